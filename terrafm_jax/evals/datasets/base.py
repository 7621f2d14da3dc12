"""What a labelled data set is, and how its channels become the model's bands.

A reader declares each input once (sensor, bands in delivered order, unit, baseline offset); everything else,
from band order to refusing Landsat, follows from ``sensors.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from terrafm_jax.evals.features import ImageBatch, resized
from terrafm_jax.sensors import SENSORS, band_name, sensor
from terrafm_jax.units import DN_PER_REFLECTANCE, UNITS, unit_word

TASKS = ("classification", "multilabel", "segmentation", "regression", "change")
SPLITS = ("train", "val", "test")
MOST_CLASSES = 255  # of pixels: predicted masks and maps hold a byte for each, and 255 is no data there


class DatasetError(ValueError):
    """A data set cannot be read or does not fit the model; the message names file or field and the remedy."""


@dataclasses.dataclass(frozen=True)
class Input:
    """One sensor as a data set delivers it.

    Attributes:
      sensor: key or alias in ``sensors.py``. Raises DatasetError for any other (Landsat has no stem).
      bands: delivered channels in order, in any known spelling; "" marks one that the model has no use for.
      unit: ``DN`` (reflectance x 10000), ``reflectance``, ``dB`` or ``power``, as ``units.unit_word`` reads them.
      offset: DN of the processing baseline still in all images (1000 from N0400 on, unless removed).
      level: for people, e.g. ``L1C``, ``GRD sigma0, Lee-filtered``.
    """

    sensor: str
    bands: tuple[str, ...]
    unit: str = ""
    offset: float = 0.0
    level: str = ""

    def __post_init__(self) -> None:
        try:
            found = sensor(self.sensor)
        except ValueError as e:
            raise DatasetError(
                f"sensor {self.sensor!r} cannot be evaluated: the model has stems for {list(SENSORS)} only "
                f"(Landsat, aerial and other sensors are refused, not squeezed into a Sentinel stem)"
            ) from e
        object.__setattr__(self, "sensor", found.key)
        allowed = UNITS[found.unit]
        object.__setattr__(self, "unit", unit_word(self.unit) or allowed[0])
        if self.unit not in allowed:
            raise DatasetError(f"{found.key}: unit {self.unit!r}, expected one of {list(allowed)}")
        names = [band_name(b, found) for b in self.bands]
        unknown = [b for b, n in zip(self.bands, names, strict=True) if b and n is None]
        known = [n for n in names if n]
        twice = sorted({n for n in known if known.count(n) > 1})
        faults = [f"unknown bands {unknown}"] if unknown else []
        if found.key == "s2_l2a" and any(band_name(b) == "B10" for b in unknown):
            faults.append("B10 means Level-1C: declare sensor s2_l1c")
        faults += [f"repeated bands {twice}"] if twice else []
        if faults:
            raise DatasetError(f"{found.key}: {', '.join(faults)} in {list(self.bands)}")
        if not any(n in found.band_names for n in known):
            raise DatasetError(f"{found.key}: none of {list(self.bands)} is a band of the sensor")

    @property
    def channels(self) -> tuple[tuple[int, int], ...]:
        """(delivered channel, canonical position) of every band that the model sees."""
        s = SENSORS[self.sensor]
        names = [band_name(b, s) for b in self.bands]
        return tuple((i, s.band_names.index(n)) for i, n in enumerate(names) if n in s.band_names)

    @property
    def mask(self) -> np.ndarray:
        """bool [C]: canonical bands that the data set delivers."""
        mask = np.zeros(len(SENSORS[self.sensor].bands), bool)
        mask[[c for _, c in self.channels]] = True
        return mask

    @property
    def missing(self) -> tuple[str, ...]:
        """Bands the model knows and the data set lacks."""
        return tuple(n for n, there in zip(SENSORS[self.sensor].band_names, self.mask, strict=True) if not there)


def canonical(source: Input, image: np.ndarray, name: str = "image") -> np.ndarray:
    """[H, W, delivered channels] -> float32 [H, W, C] in the sensor's unit; NaN: not measured; absent bands are 0.

    Sentinel-2 is nodata where all delivered bands are 0; power at or below 0 and -inf dB are nodata. A pixel that
    lacks one band is not measured at all, as in preparation: a speckle hole in VH must not leave VV with a mean of VH.
    Raises DatasetError on a wrong channel count or shape.
    """
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != len(source.bands):
        raise DatasetError(f"{name}: shape {image.shape}, expected [H, W, {len(source.bands)}] for {source.bands}")
    taken = image[..., [i for i, _ in source.channels]].astype(np.float32)
    if source.sensor == "s1":
        if source.unit == "power":
            with np.errstate(divide="ignore", invalid="ignore"):
                taken = np.where(taken > 0, 10.0 * np.log10(taken), np.nan)
        nothing = np.zeros(taken.shape[:2], bool)
    else:
        if source.unit == "reflectance":
            taken = taken * DN_PER_REFLECTANCE
        nothing = (taken == 0).all(-1)
    taken[nothing | ~np.isfinite(taken).all(-1)] = np.nan
    out = np.zeros((*image.shape[:2], len(SENSORS[source.sensor].bands)), np.float32)
    out[..., [c for _, c in source.channels]] = taken
    return out


@dataclasses.dataclass
class Sample:
    """One labelled example.

    Attributes:
      id: unique within the data set.
      images: per input key [H, W, delivered channels].
      target: class int, bool [C], mask [H, W] int, or float.
      offset: per input key, overrides ``Input.offset``.
      after: second date of a change pair, like ``images``.
      path: where it came from (error sheets, georeferenced predictions).
      window: row and column in the image that this was cut from, and that image's shape; None: a whole image.
    """

    id: str
    images: Mapping[str, np.ndarray]
    target: Any
    offset: Mapping[str, float] = dataclasses.field(default_factory=dict)
    after: Mapping[str, np.ndarray] | None = None
    path: str = ""
    window: tuple[int, int, tuple[int, int]] | None = None


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """What stands in the tables.

    Attributes:
      name: unique, the same as in the published tables where there is one.
      inputs: by key ("s2_l2a", "s1"); several are fused when the model can.
      ignore: label that does not count in segmentation.
      note: printed with the results: band order used, what was cut, traps.
      share: of the published train split that this opening holds (1 % partitions of GEO-Bench).
      unit: of a regression target, for people ("t/ha").
      license: of the data, printed with the results.
    """

    name: str
    task: str
    classes: tuple[str, ...]
    inputs: Mapping[str, Input]
    ignore: int = -1
    note: str = ""
    share: float = 1.0
    unit: str = ""
    license: str = ""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise DatasetError(f"{self.name}: task {self.task!r}, expected one of {list(TASKS)}")
        if not self.inputs:
            raise DatasetError(f"{self.name}: declares no input")
        if self.task == "segmentation" and len(self.classes) > MOST_CLASSES:
            raise DatasetError(
                f"{self.name}: {len(self.classes)} classes of pixels, at most {MOST_CLASSES}: a byte each"
            )

    @property
    def printed(self) -> dict[str, str]:
        """Fields of a row of results that only people read."""
        return {k: v for k, v in (("unit", self.unit), ("license", self.license)) if v}

    def select(self, keys: Sequence[str]) -> dict[str, Input]:
        """The inputs of the given sensors. Raises DatasetError naming those the data set lacks."""
        lacking = [k for k in keys if k not in self.inputs]
        if lacking or not keys:
            raise DatasetError(f"{self.name}: has inputs {list(self.inputs)}, asked for {list(keys)}")
        return {k: self.inputs[k] for k in keys}


class Split(Sequence[Sample]):
    """A lazily read list of samples: ids are known beforehand, pixels are read by ``read(i)``.

    Attributes:
      labels: targets [N] without reading pixels where the format allows it, else None (stratified subsets need it).
      state: of the files of sample i, a text that changes when they do, where the reader knows of it.
    """

    def __init__(
        self,
        ids: Sequence[str],
        read: Callable[[int], Sample],
        labels: np.ndarray | None = None,
        state: Callable[[int], str] = lambda i: "",
    ):
        self.ids, self._read, self.labels, self.state = list(ids), read, labels, state

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Sample:
        if not 0 <= i < len(self.ids):
            raise IndexError(i)
        return self._read(int(i))

    def subset(self, indices: Sequence[int]) -> Split:
        indices = [int(i) for i in indices]
        labels = None if self.labels is None else self.labels[indices]
        ids = [self.ids[i] for i in indices]
        return Split(ids, lambda i: self._read(indices[i]), labels, lambda i: self.state(indices[i]))

    def map(self, change: Callable[[Sample], Sample]) -> Split:
        return Split(self.ids, lambda i: change(self._read(i)), self.labels, self.state)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Declaration and splits ("train", "val", "test"; a data set may lack some).

    ``tile``: side in px of the windows that images were cut into (``store.tiled``), 0 for whole images.
    """

    info: DatasetInfo
    splits: Mapping[str, Split]
    tile: int = 0

    def split(self, name: str) -> Split:
        if name not in self.splits:
            raise DatasetError(f"{self.info.name}: no split {name!r}; it has {list(self.splits)}")
        return self.splits[name]

    def fingerprint(self, split: str, keys: Sequence[str]) -> str:
        """Changes with what stands for a split in a cache: samples and their order, what is known of their labels
        without reading images, the state of their files, the declaration of classes and inputs, windows.
        """
        info, samples = self.info, self.splits[split]
        declared = {k: dataclasses.asdict(info.inputs[k]) for k in keys}
        labels = None if samples.labels is None else np.asarray(samples.labels).tolist()
        kind = [info.task, info.classes, info.ignore, self.tile]
        states = "".join(samples.state(i) for i in range(len(samples)))
        text = json.dumps([info.name, samples.ids, declared, labels, kind, states], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def collate(
    info: DatasetInfo,
    samples: Sequence[Sample],
    keys: Sequence[str],
    after: bool = False,
    side: int = 0,
    remedy: str = "",
) -> ImageBatch:
    """Batch of samples for the encoder, through ``canonical``.

    Images of a sensor that differ in size are resized to ``side`` px, to which the network would resize them; 0: raises
    DatasetError, which ends in ``remedy``.
    """
    inputs = info.select(keys)
    images = {}
    for key, source in inputs.items():
        parts = [canonical(source, (s.after if after else s.images)[key], f"{info.name}/{s.id}/{key}") for s in samples]
        shapes = {p.shape: s.id for p, s in zip(parts, samples, strict=True)}
        if len(shapes) > 1 and not side:
            shown = ", ".join(f"{name} {h}x{w} px" for (h, w, _), name in shapes.items())
            raise DatasetError(f"{info.name}: {key} images differ in size: {shown}{remedy and '; '}{remedy}")
        if len(shapes) > 1:
            parts = [resized(p, side) for p in parts]
        images[key] = np.stack(parts)
    offset = {k: np.array([s.offset.get(k, inputs[k].offset) for s in samples], np.float32) for k in keys}
    return ImageBatch(images, {k: i.mask for k, i in inputs.items()}, offset)


def batches(split: Sequence[Sample], size: int) -> Iterator[list[Sample]]:
    """Consecutive samples of equal image shapes, at most ``size`` together."""
    group: list[Sample] = []
    shapes: Any = None
    for i in range(len(split)):
        sample = split[i]
        found = {k: np.shape(v) for k, v in sample.images.items()}
        if group and (found != shapes or len(group) == size):
            yield group
            group = []
        shapes = found
        group.append(sample)
    if group:
        yield group


def spread(count: int, most: int) -> np.ndarray:
    """Sorted indices of at most ``most`` of ``count`` samples, evenly spread; all where there are no more."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))


def label_fraction(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Sorted indices of a random subset that holds ``fraction`` of every class, at least one sample of each.

    Multilabel targets bool [N, C] and targets that are not classes are drawn without stratification.
    """
    labels = np.asarray(labels)
    rng = np.random.default_rng([seed, int(fraction * 1e6)])
    if not 0 < fraction <= 1:
        raise DatasetError(f"label fraction {fraction}, expected above 0 and at most 1")
    if fraction == 1:
        return np.arange(len(labels))
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        count = max(1, round(fraction * len(labels)))
        return np.sort(rng.permutation(len(labels))[:count])
    picked = []
    for c in np.unique(labels):
        members = rng.permutation(np.nonzero(labels == c)[0])
        picked.append(members[: max(1, round(fraction * len(members)))])
    return np.sort(np.concatenate(picked))


def held_out(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (rest, held): a stratified fifth to choose by, where there is no validation split.

    The only sample of a class stays in the rest, else the class would never be learned. Where that leaves nothing to
    one of the two, both are all samples.
    """
    labels = np.asarray(labels)
    held = label_fraction(labels, 0.2, seed)
    if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        values, counts = np.unique(labels, return_counts=True)
        held = held[~np.isin(labels[held], values[counts == 1])]
    everything = np.arange(len(labels))
    rest = np.setdiff1d(everything, held)
    return (rest, held) if rest.size and held.size else (everything, everything)


def by_image(ids: Sequence[str]) -> list[np.ndarray]:
    """Rows that belong together: windows cut from one image, told by their ids, else each sample by itself.

    Neighboring windows look alike, so choosing by some of an image's while training on others would flatter. Windows
    of a single image have to be parted.
    """
    rows: dict[str, list[int]] = {}
    for i, sample in enumerate(ids):
        rows.setdefault(re.sub(r"/r\d+_?c\d+$", "", sample), []).append(i)
    return [np.array(found) for found in rows.values()] if len(rows) > 1 else list(np.arange(len(ids))[:, None])


def few_shot(labels: np.ndarray, shots: int, seed: int) -> np.ndarray:
    """Sorted indices of ``shots`` samples per class (fewer where a class has fewer)."""
    rng = np.random.default_rng([seed, shots])
    picked = [rng.permutation(np.nonzero(labels == c)[0])[:shots] for c in np.unique(labels)]
    return np.sort(np.concatenate(picked))
