"""Readers of labelled data sets in their published formats, behind one function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from terrafm_jax.evals.datasets.base import Dataset, DatasetError


def _geobench(root: Path, names: Sequence[str], options: dict[str, Any]) -> list[Dataset]:
    from terrafm_jax.evals.datasets.geobench import open_geobench

    return open_geobench(root, names, **options)


def _geobench2(root: Path, names: Sequence[str], options: dict[str, Any]) -> list[Dataset]:
    from terrafm_jax.evals.datasets.geobench2 import open_geobench2

    return open_geobench2(root, names, **options)


def _copernicus(root: Path, names: Sequence[str], options: dict[str, Any]) -> list[Dataset]:
    from terrafm_jax.evals.datasets.copernicus import open_copernicus

    return open_copernicus(root, names, **options)


def _tfds(root: Path, names: Sequence[str], options: dict[str, Any]) -> list[Dataset]:
    from terrafm_jax.evals.datasets.tfds_sets import open_tfds

    return open_tfds(root, names, **options)


def _folder(root: Path, names: Sequence[str], options: dict[str, Any]) -> list[Dataset]:
    from terrafm_jax.evals.datasets.folder import open_folder

    return open_folder(root, **options)


def _published(name: str) -> Callable[[Path, Sequence[str], dict[str, Any]], list[Dataset]]:
    def read(root: Path, names: Sequence[str], options: dict[str, Any]) -> list[Dataset]:
        from terrafm_jax.evals.datasets.published import open_published

        return open_published(name, root, **options)

    return read


PUBLISHED = ("landslide4sense", "sen1floods11", "bigearthnet", "pastis", "oscd", "cloudsen12")
SUITES: dict[str, Callable[[Path, Sequence[str], dict[str, Any]], list[Dataset]]] = {
    "geobench": _geobench,
    "geobench2": _geobench2,
    "copernicus": _copernicus,
    "tfds": _tfds,
    "folder": _folder,
    **{name: _published(name) for name in PUBLISHED},
}
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
    return SUITES[suite](Path(data), list(names), options)
