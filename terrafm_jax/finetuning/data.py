"""Batches of labelled images as a function of the step: seeded order, read ahead by threads."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from terrafm_jax.config import ConfigError
from terrafm_jax.evals.datasets import files
from terrafm_jax.evals.datasets.base import DatasetError, DatasetInfo, Sample, Split, collate, spread

AHEAD = 3  # batches read before they are needed


@dataclasses.dataclass
class Source:
    """A split that is read in batches.

    Attributes:
      inputs: sensors to read. task: decides the type of targets. threads: of reading.
      cache: keep decoded samples in memory.
      side: of the network's input in px; 0: the images' own size, which must then be one.
    """

    info: DatasetInfo
    split: Split
    inputs: tuple[str, ...]
    threads: int = 4
    cache: bool = False
    side: int = 0

    def __post_init__(self) -> None:
        self._kept: dict[int, Sample] = {}
        self._pool = ThreadPoolExecutor(max(1, self.threads))

    def __len__(self) -> int:
        return len(self.split)

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def read(self, row: int) -> Sample:
        if row in self._kept:
            return self._kept[row]
        sample = self.split[row]
        if self.cache:
            self._kept[row] = sample
        return sample

    def image_px(self) -> int:
        """Side in px that images of this split have as they are delivered: the median over some of them."""
        shapes = [np.shape(self.read(i).images[self.inputs[0]])[:2] for i in spread(len(self), 8)]
        return round(float(np.median([np.sqrt(h * w) for h, w in shapes]))) if shapes else 0

    def gsd(self) -> float:
        """Meters per pixel of the images of this split, in pixels of the first sensor: the median over some of them.

        0.0 where their files do not say where they lie.
        """
        found = []
        for sample in map(self.read, spread(len(self), 8)):
            pixels = np.shape(sample.images[self.inputs[0]])[0]
            if sample.window is not None:  # a part of the file
                pixels *= sample.window[2][0] / np.shape(sample.target)[0]
            found.append(files.ground_height(sample.path) / pixels)
        found = [value for value in found if value]
        return round(float(np.median(found)), 2) if found else 0.0

    def batch(self, rows: Sequence[int]) -> dict[str, Any]:
        """images, bands, offset per sensor and targets of the given rows."""
        samples = list(self._pool.map(self.read, rows))
        dense = self.info.task == "segmentation"  # masks lie on their images, so both are cut alike
        remedy = "cut them alike with config.data.tile" if dense else "give config.image_size, e.g. 224"
        found = collate(self.info, samples, self.inputs, side=0 if dense else self.side, remedy=remedy)
        kind = {"multilabel": np.float32, "regression": np.float32}.get(self.info.task, np.int32)
        sizes = {np.shape(s.target): s.id for s in samples}
        if len(sizes) > 1:
            shown = ", ".join(f"{name} {size}" for size, name in sizes.items())
            raise DatasetError(
                f"{self.info.name}: masks differ in size ({shown}); cut them alike with config.data.tile"
            )
        targets = np.stack([np.asarray(s.target) for s in samples]).astype(kind)
        return {"images": found.images, "bands": found.bands, "offset": found.offset, "targets": targets}

    def order(self, epoch: int, seed: int) -> np.ndarray:
        return np.random.default_rng([seed, epoch]).permutation(len(self.split))

    def rows(self, step: int, batch_size: int, seed: int) -> np.ndarray:
        """Rows of the global batch of ``step``; the last batch of an epoch is filled from its front."""
        per_epoch = steps_per_epoch(len(self.split), batch_size)
        epoch, at = divmod(step, per_epoch)
        return np.resize(np.roll(self.order(epoch, seed), -at * batch_size), batch_size)

    def train(self, start: int, stop: int, batch_size: int, seed: int) -> Iterator[dict[str, Any]]:
        """The batches of steps start..stop-1, read ahead of the device."""
        with ThreadPoolExecutor(1) as ahead:
            waiting = []
            step = start
            while step < stop or waiting:
                while step < stop and len(waiting) < AHEAD:
                    waiting.append(ahead.submit(self.batch, self.rows(step, batch_size, seed)))
                    step += 1
                yield waiting.pop(0).result()

    def evaluate(self, batch_size: int) -> Iterator[tuple[dict[str, Any], int]]:
        """Batches in order, the last one filled up by repetition, with the number of samples that count."""
        for lo in range(0, len(self.split), batch_size):
            rows = list(range(lo, min(lo + batch_size, len(self.split))))
            yield self.batch(np.resize(rows, batch_size)), len(rows)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    return -(-samples // batch_size)


def digest(sources: Mapping[str, Source]) -> str:
    """Of what is trained on and chosen by: samples, their labels (not masks, which would have to be read), classes.

    Not of the test split, which may be added later, nor of the files' dates: a data set may be copied elsewhere.
    """
    info = next(iter(sources.values())).info
    said = [info.task, info.classes, info.ignore, {k: dataclasses.asdict(i) for k, i in info.inputs.items()}]
    for name in ("train", "val"):
        split = sources[name].split
        said += [name, split.ids, None if split.labels is None else np.asarray(split.labels).tolist()]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()


def check_origin(folder: Any, theirs: Mapping[str, str], mine: Mapping[str, str]) -> None:
    """Raises ConfigError where a run began with other weights or labels, whose scores its result would pass on."""
    other = [key for key in mine if theirs.get(key, mine[key]) != mine[key]]
    if other:
        raise ConfigError(
            f"{folder}: was tuned with another content of {' and '.join(other)} (weights, or samples, labels and "
            "classes); give it again (it may have moved), another --workdir, or --config.allow_config_change=True to "
            "continue with this one"
        )


def class_weights(source: Source, classes: int, ignore: int) -> np.ndarray:
    """float32 [C] inverse frequencies with mean 1 over the labels; reads all masks for segmentation."""
    counts = np.zeros(classes)
    for i in range(len(source)):
        labels = source.split.labels[i] if source.split.labels is not None else source.read(i).target
        labels = np.asarray(labels).reshape(-1)
        counts += np.bincount(labels[labels != ignore].astype(int), minlength=classes)[:classes]
    weights = counts.sum() / np.maximum(counts, 1) / max((counts > 0).sum(), 1)
    return np.where(counts > 0, weights, 0.0).astype(np.float32)
