"""A prepared data set, opened for looking at."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.data.decode import decode_record
from terrafm_jax.data.sampling import MODES, Order, SamplingSpec
from terrafm_jax.data.source import DataError, Records, Split, open_split, read_json
from terrafm_jax.data.tiles import SPLITS


@dataclasses.dataclass
class DataSet:
    """A prepared data set: splits that exist, their index rows, ``statistics.json``, ``summary.json``, layouts."""

    directory: Path
    splits: dict[str, Split]
    index: dict[str, np.ndarray]
    statistics: dict[str, Any]
    summary: dict[str, Any]
    layouts: list[dict[str, tuple[int, int]]]

    @classmethod
    def open(cls, directory: Path) -> DataSet:
        """Raises DataError where the folder holds no complete data set."""
        info_path = directory / "dataset_info.json"
        if not info_path.exists():
            unfinished = "; expected the --out of a finished preparation"
            if (directory / ".work").exists():
                unfinished = " (an unfinished preparation: start it again)"
            raise DataError(f"{directory}: no dataset_info.json{unfinished}")
        names = read_json(info_path, lambda info: {s["name"] for s in info["splits"]})
        splits = {name: open_split(directory, name) for name in SPLITS if name in names}
        first = next(iter(splits.values()))
        files = {name: directory / f"{name}.json" for name in ("statistics", "summary")}
        loaded = {name: read_json(path, dict) if path.exists() else {} for name, path in files.items()}
        index = {name: np.asarray(split.index()) for name, split in splits.items()}
        return cls(directory, splits, index, loaded["statistics"], loaded["summary"], first.layouts())

    def record(self, split: str, number: int) -> dict[str, Any]:
        """One decoded record."""
        return decode_record(Records(self.splits[split]).read(number))

    def sampling(self) -> dict[str, Order]:
        """Sampling mode -> the order it makes of the training split, or of the first split there is."""
        split, index = next(iter(self.index.items()))
        sea = self.splits[split].sea_left_out()
        keep = 1.0 if sea else SamplingSpec().sea_keep  # never thin twice, as training does not
        specs = {mode: SamplingSpec(mode=mode, sea_keep=keep) for mode in MODES}
        buckets = np.zeros(256, np.int64)
        return {mode: Order(index, spec, 64, 0, buckets=buckets, sea_left_out=sea) for mode, spec in specs.items()}
