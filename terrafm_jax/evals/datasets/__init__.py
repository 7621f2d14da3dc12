"""Readers of labelled data sets in their published formats, behind one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from terrafm_jax.evals.datasets import layouts
from terrafm_jax.evals.datasets.base import Dataset, DatasetError
from terrafm_jax.evals.datasets.copernicus import open_copernicus
from terrafm_jax.evals.datasets.folder import open_folder
from terrafm_jax.evals.datasets.geobench import open_geobench
from terrafm_jax.evals.datasets.geobench2 import open_geobench2
from terrafm_jax.evals.datasets.tfds_sets import open_tfds

SUITES: dict[str, Callable[..., list[Dataset]]] = {
    "geobench": open_geobench,
    "geobench2": open_geobench2,
    "copernicus": open_copernicus,
    "tfds": open_tfds,
    "folder": open_folder,
    **{name: partial(layouts.open_layout, name) for name in layouts.DATASETS},
}
_ALONE = ("folder", *layouts.DATASETS)  # hold one data set, so there is no name to choose by
_OPTIONS = {"geobench": {"bands", "partition"}, "tfds": {"seed"}}


def open_suite(suite: str, data: str | Path, names: Sequence[str] = (), **options: Any) -> list[Dataset]:
    """Opens data sets of a suite below a folder.

    Args:
      names: data sets of the suite; all that are there when empty.
      options: geobench takes ``bands`` (corrected, as_labelled) and ``partition``; tfds takes ``seed``.

    Raises:
      DatasetError: unknown suite, name or option; files that are missing or damaged.
    """
    if suite not in SUITES:
        raise DatasetError(f"suite {suite!r}, expected one of {list(SUITES)}")
    strange = sorted(set(options) - _OPTIONS.get(suite, set()))
    if strange:
        raise DatasetError(f"suite {suite}: options {strange}, expected some of {sorted(_OPTIONS.get(suite, ()))}")
    which = [] if suite in _ALONE else [list(names)]
    return SUITES[suite](Path(data), *which, **options)
