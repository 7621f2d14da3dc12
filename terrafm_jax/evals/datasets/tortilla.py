"""Tortilla archives (``.tortilla``, ``.taco``): many files in one, listed by a Parquet footer.

Layout: two magic bytes, two little-endian 64-bit numbers (offset and length of the footer), data, footer. A row of
the footer is one item: ``tortilla:id``, ``tortilla:file_format`` (GDAL name, or TORTILLA for a nested archive whose
offsets count from its own first byte), ``tortilla:offset``, ``tortilla:length``, ``tortilla:data_split``, metadata.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from terrafm_jax.evals.datasets import files
from terrafm_jax.evals.datasets.base import DatasetError

MAGIC = (b"#y", b"WX")
_HEADER = struct.Struct("<2sQQ")


def footer(path: Path, start: int = 0) -> list[dict[str, Any]]:
    """Rows of the archive that begins at byte ``start`` of a file. Raises DatasetError when it is none or truncated."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with files.need(path, "a tortilla archive").open("rb") as f:
        f.seek(start)
        head = f.read(_HEADER.size)
        magic, offset, length = _HEADER.unpack(head) if len(head) == _HEADER.size else (head[:2], 0, 0)
        if magic not in MAGIC:
            raise DatasetError(f"{path}: no tortilla archive at byte {start} (starts with {magic!r})")
        f.seek(start + offset)
        blob = f.read(length)
    if len(blob) != length:
        raise DatasetError(f"{path}: truncated, the footer of {length} bytes is not all there")
    try:
        return pq.read_table(pa.BufferReader(blob)).to_pylist()
    except (pa.ArrowInvalid, OSError) as e:
        raise DatasetError(f"{path}: footer is not Parquet ({str(e).splitlines()[0]})") from e


class Archive:
    """One or several parts of an archive as a flat list of samples, each a nested archive."""

    def __init__(self, paths: Sequence[Path]):
        self.rows = [{**row, "_path": path} for path in paths for row in footer(path)]

    def split(self, name: str) -> list[dict[str, Any]]:
        """Rows of a split; val and validation are the same."""
        wanted = ("val", "validation") if name == "val" else (name,)
        return [r for r in self.rows if r.get("tortilla:data_split") in wanted]

    @staticmethod
    def items(row: dict[str, Any]) -> list[tuple[Path, int, int]]:
        """(file, first byte, length) of the items of a sample, in order."""
        start = int(row["tortilla:offset"])
        if row.get("tortilla:file_format") != "TORTILLA":
            return [(row["_path"], start, int(row["tortilla:length"]))]
        nested = footer(row["_path"], start)
        return [(row["_path"], start + int(r["tortilla:offset"]), int(r["tortilla:length"])) for r in nested]
