"""GEO-Bench 1: one HDF5 file per sample, JSON partitions. Facts and traps of the files: docs/evaluation.md."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals.datasets import files, stub_pickle
from terrafm_jax.evals.datasets.base import Dataset, DatasetError, DatasetInfo, Input, Sample, Split
from terrafm_jax.sensors import SENSORS, band_name

_S2_13 = ("01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red", "05 - Vegetation Red Edge",
          "06 - Vegetation Red Edge", "07 - Vegetation Red Edge", "08 - NIR", "08A - Vegetation Red Edge",
          "09 - Water vapour", "10 - SWIR - Cirrus", "11 - SWIR", "12 - SWIR")  # fmt: skip
_S2_12 = tuple(n for n in _S2_13 if not n.startswith("10"))
_ORDER_WARNING = "bands=as_labelled keeps the wrong labels of the files, as most published numbers do"


@dataclasses.dataclass(frozen=True)
class Spec:
    """One data set of the benchmark.

    Attributes:
      names: HDF5 names of the optical bands; corrected: what those planes really are ("" = no band of the sensor).
      radar: (HDF5 name, band) of Sentinel-1 planes.
      tile: side in px that images are cut into (Galileo's protocol), 0 for whole images.
    """

    task: str
    folder: str
    level: str
    classes: int
    names: tuple[str, ...]
    corrected: tuple[str, ...] = ()
    unit: str = "DN"
    radar: tuple[tuple[str, str], ...] = ()
    tile: int = 0
    note: str = ""


DATASETS: dict[str, Spec] = {
    "m-eurosat": Spec(
        "classification", "classification_v1.0", "s2_l1c", 10, _S2_13,
        ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A"),
        note=_ORDER_WARNING,
    ),
    "m-bigearthnet": Spec("multilabel", "classification_v1.0", "s2_l2a", 43, _S2_12, note="old baseline, no offset"),
    "m-so2sat": Spec(
        "classification", "classification_v1.0", "s2_l1c", 17,
        tuple(n for n in _S2_13 if n[:2] not in ("01", "09", "10")), unit="reflectance",
        radar=(("06 - VV.LEE Filtered", "VV"), ("05 - VH.LEE Filtered", "VH")),
        note="no B01, B09; S1 is Lee-filtered power, converted to dB, sigma0 not gamma0",
    ),
    "m-brick-kiln": Spec(
        "classification", "classification_v1.0", "s2_l2a", 2, _S2_13,
        ("B01", "B02", "B03", "B04", "B05", "B07", "B8A", "B08", "B11", "B12", "", "", ""),
        note=_ORDER_WARNING + "; the last three planes are true-color bytes",
    ),
    "m-cashew-plant": Spec(
        "segmentation", "segmentation_v1.0", "s2_l2a", 7, _S2_12, tile=64, note="cut into 64 px tiles"
    ),
    "m-SA-crop-type": Spec(
        "segmentation", "segmentation_v1.0", "s2_l2a", 10, _S2_12, tile=64,
        note="cut into 64 px tiles; values look 8-bit, so normalized inputs lie far from pretraining",
    ),
}  # fmt: skip
REFUSED = {
    "m-forestnet": "Landsat 8", "m-pv4ger": "aerial RGB", "m-pv4ger-seg": "aerial RGB", "m-NeonTree": "aerial",
    "m-nz-cattle": "aerial RGB", "m-chesapeake": "aerial", "m-chesapeake-landcover": "aerial",
}  # fmt: skip


def open_geobench(
    root: str | Path, names: Sequence[str] = (), *, bands: str = "corrected", partition: str = "default"
) -> list[Dataset]:
    """Opens data sets below ``$GEO_BENCH_DIR`` (all that are there unless named).

    Args:
      bands: ``corrected`` or ``as_labelled``; decides the order where the files name their bands wrongly.
      partition: ``default`` or e.g. ``0.01x_train``.

    Raises:
      DatasetError: nothing there, an unknown name, Landsat or aerial imagery, an unknown option.
    """
    root = Path(root)
    if bands not in ("corrected", "as_labelled"):
        raise DatasetError(f"bands: {bands!r}, expected 'corrected' or 'as_labelled'")
    refused = [f"{n} ({REFUSED[n]})" for n in names if n in REFUSED]
    unknown = [n for n in names if n not in DATASETS and n not in REFUSED]
    if refused or unknown:
        raise DatasetError(f"geobench: refused {refused}, unknown {unknown}; readable are {sorted(DATASETS)}")
    there = [n for n in (names or DATASETS) if names or _folder(root, n).exists()]
    if not there:
        raise DatasetError(f"{root}: holds none of {sorted(DATASETS)} below classification_v1.0 or segmentation_v1.0")
    return [_open(files.need(_folder(root, n), f"GEO-Bench data set {n}"), n, bands, partition) for n in there]


def _folder(root: Path, name: str) -> Path:
    return root / DATASETS[name].folder / name


def _open(folder: Path, name: str, bands: str, partition: str) -> Dataset:
    spec = DATASETS[name]
    corrected = bands == "corrected" and bool(spec.corrected)
    # A plane labelled B10 in a Level-2A set is not a band of that sensor.
    named = tuple(n if band_name(n, SENSORS[spec.level]) else "" for n in spec.names)
    optical = spec.corrected if corrected else named
    level = {"s2_l1c": "L1C", "s2_l2a": "L2A"}[spec.level]
    inputs = {spec.level: Input(spec.level, optical, spec.unit, level=level)}
    if spec.radar:
        inputs["s1"] = Input("s1", tuple(b for _, b in spec.radar), "power", level="GRD sigma0, Lee-filtered")
    order = f"bands={'corrected' if corrected else 'as_labelled'}"
    part = "" if partition == "default" else f"partition {partition}"
    info = DatasetInfo(
        name, spec.task, _class_names(folder, spec.classes), inputs, share=_share(partition),
        note="; ".join(t for t in (order, part, spec.note) if t),
    )  # fmt: skip
    chosen = files.need(folder / f"{partition}_partition.json", "a GEO-Bench partition", f"found {_partitions(folder)}")
    names = (("train", "train"), ("valid", "val"), ("test", "test"))
    parts = files.read_json(chosen, lambda found: {new: [str(i) for i in found[old]] for old, new in names})
    reader = _Reader(folder, spec)
    splits = {name: reader.split(members) for name, members in parts.items()}
    return Dataset(info, splits)


def _share(partition: str) -> float:
    """Of the train labels: 0.01 for ``0.01x_train``."""
    found = re.fullmatch(r"(\d+\.\d+)x_train", partition)
    return float(found[1]) if found else 1.0


def _partitions(folder: Path) -> list[str]:
    return sorted(p.name.removesuffix("_partition.json") for p in folder.glob("*_partition.json"))


def _class_names(folder: Path, count: int) -> tuple[str, ...]:
    """From ``task_specs.pkl`` through the stub unpickler when it tells them, else numbers."""
    names: Any = None
    if (folder / "task_specs.pkl").exists():
        try:
            state = stub_pickle.loads((folder / "task_specs.pkl").read_bytes()).state or {}
            label = state.get("label_type")
            names = (getattr(label, "state", None) or {}).get("class_names") or (label.state or {}).get("_class_names")
        except (ValueError, AttributeError, TypeError):
            names = None
    good = isinstance(names, list | tuple) and len(names) == count and all(isinstance(n, str) for n in names)
    return tuple(names) if good else tuple(f"class {i}" for i in range(count))


class _Reader:
    def __init__(self, folder: Path, spec: Spec):
        self.folder, self.spec = folder, spec

    def split(self, ids: Sequence[str]) -> Split:
        tile = self.spec.tile
        if not tile or not ids:
            return Split(ids, lambda i: self.read(ids[i]))
        side = self._side(ids[0]) // tile
        cells = [(sample, r, c) for sample in ids for r in range(side) for c in range(side)]
        names = [f"{s}/r{r}c{c}" for s, r, c in cells]
        return Split(names, lambda i: self._cut(*cells[i], name=names[i]))

    def _side(self, sample: str) -> int:
        with files.open_h5(self._path(sample)) as f:
            return min(f[self._keys(f, self.spec.names[:1])[0]].shape[:2])

    def _cut(self, sample: str, row: int, column: int, name: str) -> Sample:
        whole, t = self.read(sample), self.spec.tile
        window = (slice(row * t, (row + 1) * t), slice(column * t, (column + 1) * t))
        images = {k: v[window] for k, v in whole.images.items()}
        return dataclasses.replace(whole, id=name, images=images, target=whole.target[window])

    def _path(self, sample: str) -> Path:
        return self.folder / f"{sample}.hdf5"

    def _keys(self, f: Any, names: Sequence[str]) -> list[str]:
        """HDF5 names of the wanted bands; time series carry a date behind the name, the first date is taken."""
        bare: dict[str, str] = {}
        for key in sorted(f):
            bare.setdefault(re.sub(r"_\d{4}-\d{2}-\d{2}.*$", "", key), key)
        lacking = [n for n in names if n not in bare]
        if lacking:
            raise DatasetError(f"{f.filename}: lacks bands {lacking}; it holds {sorted(bare)}")
        return [bare[n] for n in names]

    def read(self, sample: str) -> Sample:
        path, spec = self._path(sample), self.spec
        with files.open_h5(path) as f:
            images = {spec.level: np.stack([f[k][()] for k in self._keys(f, spec.names)], axis=-1)}
            if spec.radar:
                radar = self._keys(f, [n for n, _ in spec.radar])
                images["s1"] = np.stack([np.asarray(f[k][()]) for k in radar], axis=-1)
            target = self._target(f, path)
        return Sample(sample, images, target, path=str(path))

    def _target(self, f: Any, path: Path) -> Any:
        if self.spec.task == "segmentation":
            if "label" not in f:
                raise DatasetError(f"{path}: no data set 'label'")
            return f["label"][()].astype(np.int64).reshape(f["label"].shape[:2])
        if "pickle" not in f.attrs:
            raise DatasetError(f"{path}: no attribute 'pickle'")
        try:
            found = stub_pickle.loads_attribute(f.attrs["pickle"])
            label = found["label"]
        except (ValueError, KeyError, TypeError) as e:
            raise DatasetError(f"{path}: label cannot be read ({e})") from e
        if self.spec.task == "multilabel":
            array = np.asarray(label)
            if array.shape != (self.spec.classes,):
                raise DatasetError(f"{path}: label of shape {array.shape}, expected ({self.spec.classes},)")
            return array.astype(bool)
        if isinstance(label, stub_pickle.Stub) or not 0 <= int(label) < self.spec.classes:
            raise DatasetError(f"{path}: label {label!r}, expected 0..{self.spec.classes - 1}")
        return int(label)
