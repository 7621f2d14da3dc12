"""The end of a job: is OUT finished already, does the result hold anything, what was warned of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.scenes import tags
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.store import Unfinished, UnfinishedPlaces


def digest(mark: str, **how: Any) -> str:
    """SHA-256 of what tells one output from another: ``run.signature`` and how the output is written."""
    return hashlib.sha256(json.dumps([mark, how], sort_keys=True, default=str).encode()).hexdigest()


def done_already(out: Path, job: str, overwrite: bool) -> bool:
    """Whether OUT is the result of this very job.

    Raises:
      SceneError: OUT holds something else and is not to be overwritten.
    """
    if overwrite or not out.exists():
        return False
    found = _tags(out).get(tags.JOB)
    if found == job:
        return True
    what = "was made from other inputs or settings" if found else "exists and was not made by this command"
    raise SceneError(f"--out {out}: {what}; choose another name, or pass --overwrite to replace it")


def _tags(out: Path) -> Mapping[str, str]:
    """Tags of an output of any format; empty if it is none."""
    import rasterio
    from rasterio.errors import RasterioError

    try:
        if out.suffix.lower() == ".zarr":
            return json.loads((out / ".zattrs").read_text())
        if out.suffix.lower() in (".parquet", ".geoparquet"):
            import pyarrow.parquet as pq

            return {k.decode(): v.decode() for k, v in (pq.read_schema(out).metadata or {}).items()}
        with rasterio.open(out) as source:
            return source.tags()
    except (RasterioError, OSError, ValueError):
        return {}


def closing_tags(job: str, warnings: Sequence[str]) -> dict[str, str]:
    """Tags that are known only at the end of a job."""
    return {tags.JOB: job, **({tags.WARNINGS: "; ".join(warnings)} if warnings else {})}


def closing_words(warnings: Sequence[str]) -> str:
    """The warnings once more, for the last line of a job: by then they have scrolled away."""
    return f"; {len(warnings)} warning(s): {'; '.join(warnings)}" if warnings else ""


def refuse_nothing(tokens: np.ndarray, unfinished: Unfinished | UnfinishedPlaces, out: Path) -> None:
    """Raises SceneError and deletes the unfinished result if no token of [rows, ..., d] holds a value.

    Reads only as far as the first one that does.
    """
    if not any(np.isfinite(row).any() for row in tokens):
        unfinished.remove()
        raise SceneError(
            f"{out}: nothing was encoded, no part of the scene holds valid pixels; "
            "check --mask, --use-scl, --nodata and --aoi"
        )
