"""Copernicus-Bench: its Sentinel-1 and Sentinel-2 tasks, in the layout of the published archives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from terrafm_jax.evals.datasets import files, labels
from terrafm_jax.evals.datasets.base import SPLITS, Dataset, DatasetError, DatasetInfo, Input, Sample, Split

_S1 = Input("s1", ("VV", "VH"), "dB", level="GRD sigma0")
# Delivered DFC2020 classes -> the eight that occur; background, savanna and snow are ignored.
_DFC = {2: 1, 4: 2, 5: 3, 6: 4, 7: 5, 9: 6, 10: 7, 1: 0}
_DFC_CLASSES = ("Forest", "Shrubland", "Grassland", "Wetland", "Cropland", "Urban/Built-up", "Barren", "Water")


def _eurosat(folder: Path, name: str) -> Dataset:
    """``all_imgs/<class>/<class>_<n>.tif`` with ``eurosat-{train,val,test}.txt``."""
    declared = _S1 if name.endswith("S1") else Input("s2_l1c", labels.EUROSAT_BANDS, "DN", level="L1C")
    info = DatasetInfo(
        name, "classification", labels.EUROSAT, {declared.sensor: declared}, note="B8A last in the files"
    )
    splits = {}
    for split in SPLITS:
        names = [n.replace(".jpg", ".tif") for n in files.read_lines(folder / f"eurosat-{split}.txt")]
        strange = sorted({n.split("_")[0] for n in names} - set(labels.EUROSAT))
        if strange:
            raise DatasetError(f"{folder / f'eurosat-{split}.txt'}: classes {strange}, expected {labels.EUROSAT}")
        targets = np.array([labels.EUROSAT.index(n.split("_")[0]) for n in names])
        splits[split] = Split(names, _eurosat_reader(folder, names, targets, declared), targets)
    return Dataset(info, splits)


def _eurosat_reader(folder: Path, names: list[str], targets: np.ndarray, source: Input) -> Callable[[int], Sample]:
    def read(i: int) -> Sample:
        path = folder / "all_imgs" / names[i].split("_")[0] / names[i]
        images = files.read_images({source.sensor: path}, {source.sensor: source})
        return Sample(names[i], images, int(targets[i]), path=str(path))

    return read


def _bigearthnet(folder: Path, name: str) -> Dataset:
    """``multilabel-{split}.csv`` (s1_path, s2_path, one column per class), rasters below ``BigEarthNet-S{1,2}-5%``."""
    both = {"s1": _S1, "s2_l2a": Input("s2_l2a", labels.S2_12, "DN", level="L2A")}
    wanted = {"BigEarthNet-S1": ["s1"], "BigEarthNet-S2": ["s2_l2a"], "BigEarthNet-S12": ["s1", "s2_l2a"]}[name]
    splits, classes = {}, None
    for split in SPLITS:
        rows = files.read_csv(folder / f"multilabel-{split}.csv", ("s1_path", "s2_path"))
        classes = tuple(c for c in (rows[0] if rows else {}) if c not in ("s1_path", "s2_path"))
        targets = np.array([[float(r[c]) > 0.5 for c in classes] for r in rows])
        splits[split] = Split(
            [r["s2_path"] for r in rows],
            _bigearthnet_reader(folder, rows, targets, {k: both[k] for k in wanted}),
            targets,
        )
    info = DatasetInfo(
        name, "multilabel", classes or (), {k: both[k] for k in wanted}, note="5 % subset of the benchmark"
    )
    return Dataset(info, splits)


def _bigearthnet_reader(
    folder: Path, rows: list[dict], targets: np.ndarray, wanted: Mapping[str, Input]
) -> Callable[[int], Sample]:
    place = {"s1": ("BigEarthNet-S1-5%", "s1_path"), "s2_l2a": ("BigEarthNet-S2-5%", "s2_path")}

    def read(i: int) -> Sample:
        paths = {k: folder / place[k][0] / rows[i][place[k][1]] for k in wanted}
        images = files.read_images(paths, wanted)
        return Sample(rows[i]["s2_path"], images, targets[i], path=str(next(iter(paths.values()))))

    return read


def _cloud(folder: Path, name: str) -> Dataset:
    """``{split}.csv`` lists names; ``s2_toa/<name>.tif`` and ``cloud/<name>.tif``."""
    info = DatasetInfo(
        name, "segmentation", labels.CLOUDS, {"s2_l1c": Input("s2_l1c", labels.S2_13, "DN", level="L1C")}
    )
    splits = {}
    for split in SPLITS:
        names = [n.removesuffix(".tif") for n in files.read_lines(folder / f"{split}.csv")]
        splits[split] = Split(
            names, _pairs(folder, names, {"s2_l1c": lambda n: f"s2_toa/{n}.tif"}, "cloud/{}.tif", info.inputs)
        )
    return Dataset(info, splits)


def _dfc2020(folder: Path, name: str) -> Dataset:
    """``dfc-{split}-new.csv`` lists label files ``*_dfc_*.tif``; images say s1 or s2 where labels say dfc."""
    both = {"s1": _S1, "s2_l1c": Input("s2_l1c", labels.S2_13, "DN", level="L1C")}
    wanted = {"DFC2020-S1": ["s1"], "DFC2020-S2": ["s2_l1c"], "DFC2020-S12": ["s1", "s2_l1c"]}[name]
    short = {"s1": "s1", "s2_l1c": "s2"}
    info = DatasetInfo(name, "segmentation", _DFC_CLASSES, {k: both[k] for k in wanted}, ignore=255)
    splits = {}
    for split in SPLITS:
        names = files.read_lines(folder / f"dfc-{split}-new.csv")
        paths = {k: (lambda n, s=short[k]: f"{s}/{n.replace('dfc', s)}") for k in wanted}
        splits[split] = Split(names, _pairs(folder, names, paths, "dfc/{}", both, _DFC))
    return Dataset(info, splits)


def _pairs(
    folder: Path,
    names: list[str],
    images: dict[str, Callable[[str], str]],
    mask: str,
    inputs: Mapping[str, Input],
    remap: dict[int, int] | None = None,
) -> Callable[[int], Sample]:
    def read(i: int) -> Sample:
        paths = {k: folder / place(names[i]) for k, place in images.items()}
        loaded = files.read_images(paths, inputs)
        found = files.read_tiff(files.need(folder / mask.format(names[i]), "the mask"))[..., 0].astype(np.int64)
        if remap is not None:
            table = np.full(256, 255)
            table[list(remap)] = list(remap.values())
            found = table[np.clip(found, 0, 255)]
        return Sample(names[i], loaded, found, path=str(next(iter(paths.values()))))

    return read


def _lcz(folder: Path, name: str) -> Dataset:
    """``lcz_{split}.h5`` with ``sen2`` [N, 32, 32, 10] reflectance and one-hot ``label`` [N, 17]."""
    declared = Input("s2_l1c", labels.S2_10, "reflectance", level="L1C")
    info = DatasetInfo(name, "classification", labels.LCZ, {"s2_l1c": declared}, note="no B01, B09")
    splits = {}
    for split in SPLITS:
        path = folder / f"lcz_{split}.h5"
        with files.open_h5(path) as f:
            lacking = [k for k in ("sen2", "label") if k not in f]
            if lacking:
                raise DatasetError(f"{path}: lacks {lacking}")
            targets = f["label"][()].argmax(1)
        ids = [f"{split}/{i}" for i in range(len(targets))]
        splits[split] = Split(ids, _lcz_reader(path, ids, targets), targets)
    return Dataset(info, splits)


def _lcz_reader(path: Path, ids: list[str], targets: np.ndarray) -> Callable[[int], Sample]:
    def read(i: int) -> Sample:
        with files.open_h5(path) as f:
            return Sample(ids[i], {"s2_l1c": f["sen2"][i]}, int(targets[i]), path=str(path))

    return read


# name -> (folders it may lie in below the root, reader)
DATASETS: dict[str, tuple[tuple[str, ...], Callable[[Path, str], Dataset]]] = {
    "Cloud-S2": (("cloud_s2", "l1_cloud_s2/cloud_s2"), _cloud),
    "EuroSAT-S1": (("eurosat_s1", "l2_eurosat_s1s2/eurosat_s1"), _eurosat),
    "EuroSAT-S2": (("eurosat_s2", "l2_eurosat_s1s2/eurosat_s2"), _eurosat),
    "BigEarthNet-S1": (("bigearthnetv2", "l2_bigearthnet_s1s2/bigearthnetv2"), _bigearthnet),
    "BigEarthNet-S2": (("bigearthnetv2", "l2_bigearthnet_s1s2/bigearthnetv2"), _bigearthnet),
    "BigEarthNet-S12": (("bigearthnetv2", "l2_bigearthnet_s1s2/bigearthnetv2"), _bigearthnet),
    "DFC2020-S1": (("dfc2020", "l2_dfc2020_s1s2/dfc2020"), _dfc2020),
    "DFC2020-S2": (("dfc2020", "l2_dfc2020_s1s2/dfc2020"), _dfc2020),
    "DFC2020-S12": (("dfc2020", "l2_dfc2020_s1s2/dfc2020"), _dfc2020),
    "LCZ-S2": (("lcz_s2", "l3_lcz_s2", "."), _lcz),
}


def open_copernicus(root: str | Path, names: Sequence[str] = ()) -> list[Dataset]:
    """Opens tasks below the root. Unnamed: all that are there, without the fused ones (S12), which the benchmark lacks.

    Raises DatasetError for unknown names and missing folders.
    """
    root = Path(root)
    unknown = [n for n in names if n not in DATASETS]
    if unknown:
        raise DatasetError(f"copernicus: unknown {unknown}; readable are {list(DATASETS)}")
    opened, missing = [], []
    for name in names or [n for n in DATASETS if not n.endswith("S12")]:
        places, read = DATASETS[name]
        folder = next((root / p for p in places if (root / p).is_dir() and _holds(root / p, name)), None)
        if folder is None:
            missing.append(f"{name} ({' or '.join(places)})")
        else:
            opened.append(read(folder, name))
    if (names and missing) or not opened:
        raise DatasetError(f"{root}: not found {missing}")
    return opened


def _holds(folder: Path, name: str) -> bool:
    return not name.startswith("LCZ") or (folder / "lcz_train.h5").exists()
