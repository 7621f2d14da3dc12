"""From finished chunks to a complete TFDS data set: names, metadata, index, statistics, reports."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cell import SHARED
from data_prep.chunks import MOST_LAYOUTS, TOO_MANY_LAYOUTS, WORK, Job, chunk_path, shard_path, sync
from data_prep.doubts import looks_wrong
from data_prep.stats import Tally
from terrafm_jax import landcover
from terrafm_jax.data import tiles

DATASET = "tiles"
SUMMARY = "summary.json"
ATTRIBUTION = (
    "Contains modified Copernicus Sentinel data. Land cover: ESA WorldCover project / Contains modified Copernicus "
    "Sentinel data processed by the ESA WorldCover consortium (CC-BY-4.0). Major-TOM Core: CC-BY-SA-4.0."
)


def finalize(job: Job, chunks: int, plan: dict[str, Any]) -> dict[str, Any]:
    """Gives the shards of all chunks their names and writes everything beside them; returns the summary.

    Can be interrupted anywhere and started again: a shard lies either under its old or under its new
    name, ``dataset_info.json`` comes after everything it speaks of, and the work folder goes last.

    Args:
      job: output and options.
      chunks: number of chunks; all must be done.
      plan: what planning counted (cells seen, duplicates, ...), for the summary.
    """
    merged = _Merged(job)
    for chunk in range(chunks):
        merged.add(chunk)
    directory = Path(job.directory)
    if not sum(merged.count.values()):  # nothing to publish but the reasons
        write_text(directory / "rejected.csv", merged.rejected_csv())
        remove_work(directory)  # whoever has mended the files must not meet the old verdicts again
        return merged.summary(plan)
    counts = {split: len(found) for split, found in merged.shards.items() if found}
    for split, total in counts.items():
        for number, chunk in enumerate(merged.shards[split]):
            shard = shard_path(job, chunk, split)
            if shard.exists():
                shard.replace(directory / f"{DATASET}-{split}.array_record-{number:05d}-of-{total:05d}")
    for split in counts:
        save_array(directory / f"index_{split}.npy", merged.index(split))
    write_text(directory / "layouts.json", json.dumps(merged.layouts))
    trained = any(merged.tally.records.values())  # without, those who read it keep the published numbers
    source = "computed over the train split" if trained else "published, as the train split holds no tile"
    statistics = merged.tally.to_json(merged.classes(), source)
    write_text(directory / "statistics.json", statistics)
    write_text(directory / "rejected.csv", merged.rejected_csv())
    summary = merged.summary(plan) | {"looks_wrong": [*merged.doubted(), *looks_wrong(json.loads(statistics))]}
    write_text(directory / SUMMARY, json.dumps(summary, indent=1))
    _write_metadata(directory, merged)
    remove_work(directory)
    return summary


def remove_work(directory: Path) -> None:
    """Removes the work folder, under another name: half of it would pass for an interrupted preparation."""
    leftover = directory / f"{WORK}-done"
    shutil.rmtree(leftover, ignore_errors=True)
    if (directory / WORK).exists():
        (directory / WORK).rename(leftover)
        shutil.rmtree(leftover, ignore_errors=True)


class _Merged:
    """The sum of all chunks."""

    def __init__(self, job: Job):
        self.job = job
        self.tally = Tally()
        self.layouts: list[dict[str, list[int]]] = []
        self.shards: dict[str, list[int]] = {split: [] for split in tiles.SPLITS}
        self.lengths: dict[str, list[int]] = {split: [] for split in tiles.SPLITS}
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.rejected: list[tuple[str, str, str]] = []
        self.notes: list[tuple[str, str]] = []
        self.shared: set[str] = set()
        self.doubts: Counter[str] = Counter()
        self.empty = 0
        self._rows: dict[str, list[np.ndarray]] = {split: [] for split in tiles.SPLITS}

    def add(self, chunk: int) -> None:
        """Adds a finished chunk."""
        with np.load(chunk_path(self.job, chunk), allow_pickle=False) as arrays:
            meta = json.loads(str(arrays["meta"]))
            number = np.array([self._layout(layout) for layout in meta["layouts"]] or [0], np.uint8)
            for split in tiles.SPLITS:
                rows = arrays[f"index_{split}"]
                if len(rows):
                    rows["layout"] = number[rows["layout"]]
                    self._rows[split].append(rows)
                    self.shards[split].append(chunk)
                    self.lengths[split].append(len(rows))
            self.tally.add_arrays(arrays)
        self.count.update(meta["count"])
        self.bytes.update(meta["bytes"])
        self.dropped.update(meta["dropped"])
        self.rejected += [tuple(row) for row in meta["rejected"]]
        self.notes += [tuple(note) for note in meta["notes"]]
        self.shared.update(meta["shared"])
        self.doubts.update(meta.get("doubts", {}))
        self.empty += meta.get("empty", 0)  # chunks of an earlier version did not count

    def _layout(self, layout: dict[str, list[int]]) -> int:
        if layout not in self.layouts:
            self.layouts.append(layout)
        if len(self.layouts) > MOST_LAYOUTS:
            raise ValueError(TOO_MANY_LAYOUTS)
        return self.layouts.index(layout)

    def index(self, split: str) -> np.ndarray:
        """INDEX_DTYPE [records] in the order of the data source."""
        return np.concatenate(self._rows[split])

    def classes(self) -> dict[str, dict[str, int]]:
        """split -> category -> records."""
        result = {}
        for split, rows in self._rows.items():
            if rows:
                counts = np.bincount(self.index(split)["landcover"], minlength=landcover.NUM_CATEGORIES)
                result[split] = dict(zip(landcover.NAMES, counts.tolist(), strict=True))
        return result

    def doubted(self) -> list[str]:
        """What looks wrong with single cells, as a sentence on all of them."""
        return [f"{n} cells: {text}" for text, n in sorted(self.doubts.items())]

    def rejected_csv(self) -> str:
        """The text of ``rejected.csv``."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([("unit", "products", "reason"), *self.rejected])
        return text.getvalue()

    def summary(self, plan: dict[str, Any]) -> dict[str, Any]:
        """What was seen, kept, left out and why."""
        of_tiles = [n for reason, n in self.dropped.items() if not of_sensor(reason)]
        tiles_seen = sum(self.count.values()) + sum(of_tiles)
        conflicts = sorted({note for _, note in self.notes})  # once per product
        straddling = self.dropped.get("straddles splits", 0) + self.dropped.get(SHARED, 0)
        return {
            **plan,
            "tiles": dict(self.count),
            "bytes": sum(self.bytes.values()),
            "left_out": dict(sorted(self.dropped.items())),
            "lost_between_splits": round(straddling / tiles_seen, 6) if tiles_seen else 0.0,
            "cells_sharing_ground": len(self.shared),
            "cells_sharing_ground_examples": sorted(self.shared)[:50],
            "cells_without_tile": self.empty,
            "rejected": len(self.rejected),
            "rejected_reasons": dict(sorted(Counter(_kind(r[2]) for r in self.rejected).items())),
            "rejected_examples": {_kind(reason): f"{unit}: {reason}" for unit, _, reason in reversed(self.rejected)},
            "offset_conflicts": len(conflicts),
            "offset_conflict_examples": conflicts[:20],
            "classes": self.classes(),
        }


def of_sensor(reason: str) -> bool:
    """Whether what was left out is one sensor of a cell, whose tiles are counted for themselves, and not a tile."""
    return reason.endswith(" a cell")


_KINDS = (  # the first that fits
    "bands without names", "wrong band order", "implausible backscatter", "taken as power", "taken as dB",
    "nodata not declared", "radar geometry", "8-bit values", "reflectance is no multiple", "are no reflectance",
    "cannot be read as an image", "truncated", "missing band", "sensors missing", "wrong size", "wrong CRS",
    "different CRS", "no georeference", "black", "NaN", "are no DN", "fractional values", "one value in all pixels",
    "no such file", "ends the worker", "WorldCover maps", "projection is no UTM",
)  # fmt: skip


def _kind(reason: str) -> str:
    """What many cells have in common in their reasons."""
    known = next((kind for kind in _KINDS if kind in reason), "")
    without_path = re.sub(r"(?i)^.*\.(tiff?|jp2|parquet): ", "", reason)
    return known or without_path.split("(")[0][:80].strip()


def write_text(path: Path, text: str) -> None:
    """Writes a small file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    sync(temporary)
    temporary.replace(path)


def save_array(path: Path, array: np.ndarray) -> None:
    """``numpy.save`` that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        np.save(file, array)
    sync(temporary)
    temporary.replace(path)


def _write_metadata(directory: Path, merged: _Merged) -> None:
    """``features.json`` and ``dataset_info.json``, the latter last."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import naming

    template = naming.ShardedFileTemplate(
        data_dir=directory, dataset_name=DATASET, filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )  # fmt: skip
    splits = [
        tfds.core.SplitInfo(
            name=split,
            shard_lengths=lengths,
            num_bytes=merged.bytes[split],
            filename_template=template.replace(split=split),
        )
        for split, lengths in merged.lengths.items()
        if lengths
    ]
    staging = directory / WORK / "metadata"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for split, lengths in merged.lengths.items():  # TFDS reads the file names of the folder it writes to
        if lengths:
            (staging / f"{DATASET}-{split}.array_record-00000-of-{len(lengths):05d}").touch()
    tfds.folder_dataset.write_metadata(
        data_dir=staging,
        features=tiles.features(),
        split_infos=splits,
        filename_template=template.replace(data_dir=staging),
        description="Co-registered Sentinel-1 and Sentinel-2 tiles with land-cover shares, written by data_prep.",
        citation=ATTRIBUTION,
        check_data=False,
    )
    for name in ("features.json", "dataset_info.json"):
        write_text(directory / name, (staging / name).read_text(encoding="utf-8"))
