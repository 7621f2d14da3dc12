"""Readers of data sets in the layouts their authors publish: floods, landslides, crops, change, clouds, BigEarthNet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals.datasets import files, labels
from terrafm_jax.evals.datasets.base import SPLITS, Dataset, DatasetError, DatasetInfo, Input, Sample, Split
from terrafm_jax.sensors import band_name

_S1 = Input("s1", ("VV", "VH"), "dB", level="GRD sigma0")

# Landslide4Sense publishes DN divided by these; multiplying restores them. The last two planes are slope and DEM.
L4S_DIVISORS = (1111.81, 824.63, 663.42, 445.17, 645.86, 1547.74, 1960.44, 1941.32, 674.07, 9.05, 1113.98, 519.90,
                20.29, 772.83)  # fmt: skip
# Inferred from the published planes: they include B10 and lack B8A.
_L4S_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "", "")


def _landslide4sense(root: Path) -> Dataset:
    """``{Train,Valid,Test}Data/{img,mask}/{image,mask}_<n>.h5`` with data sets img [128, 128, 14] and mask."""
    info = DatasetInfo(
        "Landslide4Sense",
        "segmentation",
        ("other", "landslide"),
        {"s2_l1c": Input("s2_l1c", _L4S_BANDS, "DN", level="L1C")},
        note="DN restored with the published divisors; no B8A; level and order inferred",
    )
    splits = {}
    for split, folder in zip(SPLITS, ("TrainData", "ValidData", "TestData"), strict=True):
        images = sorted((root / folder / "img").glob("image_*.h5"), key=lambda p: int(p.stem.split("_")[-1]))
        if images:
            splits[split] = Split([f"{folder}/{p.stem}" for p in images], _l4s_reader(root / folder, images))
    return Dataset(info, splits)


def _l4s_reader(folder: Path, images: list[Path]) -> Callable[[int], Sample]:
    def read(i: int) -> Sample:
        with files.open_h5(images[i]) as f:
            image = f["img"][()].astype(np.float32) * np.array(L4S_DIVISORS, np.float32)
        with files.open_h5(folder / "mask" / images[i].name.replace("image_", "mask_")) as f:
            mask = f["mask"][()].astype(np.int64)
        return Sample(f"{folder.name}/{images[i].stem}", {"s2_l1c": image}, mask, path=str(images[i]))

    return read


def _sen1floods11(root: Path) -> Dataset:
    """``v1.1/data/flood_events/HandLabeled/{S1Hand,S2Hand,LabelHand}`` and ``v1.1/splits/flood_handlabeled/*.csv``."""
    base = root / "v1.1" if (root / "v1.1").is_dir() else root
    data, lists = base / "data/flood_events/HandLabeled", base / "splits/flood_handlabeled"
    info = DatasetInfo(
        "Sen1Floods11",
        "segmentation",
        ("dry", "water"),
        {"s1": _S1, "s2_l1c": Input("s2_l1c", labels.S2_13, "DN", level="L1C")},
        note="label -1 and NaN radar pixels do not count; EPSG:4326",
    )
    splits = {}
    for split, name in zip(SPLITS, ("train", "valid", "test"), strict=True):
        rows = [line.split(",")[0] for line in files.read_lines(lists / f"flood_{name}_data.csv")]
        names = [r.removesuffix("_S1Hand.tif") for r in rows]
        splits[split] = Split(names, _floods_reader(data, names, info.inputs))
    return Dataset(info, splits)


def _floods_reader(data: Path, names: list[str], inputs: Mapping[str, Input]) -> Callable[[int], Sample]:
    def read(i: int) -> Sample:
        paths = {"s1": data / "S1Hand" / f"{names[i]}_S1Hand.tif", "s2_l1c": data / "S2Hand" / f"{names[i]}_S2Hand.tif"}
        images = files.read_images(paths, inputs)
        mask = files.read_tiff(files.need(data / "LabelHand" / f"{names[i]}_LabelHand.tif", "the label"))[..., 0]
        return Sample(names[i], images, mask.astype(np.int64), path=str(paths["s1"]))

    return read


def _bigearthnet(root: Path) -> Dataset:
    """BigEarthNet v2: ``BigEarthNet-S{1,2}/<scene>/<patch>/<patch>_<band>.tif`` and ``metadata.parquet``."""
    import pyarrow.parquet as pq

    wanted = ["patch_id", "labels", "split", "s1_name"]
    path = files.need(root / "metadata.parquet", "BigEarthNet v2 metadata")
    lacking = [c for c in wanted if c not in pq.read_schema(path).names]
    if lacking:
        raise DatasetError(f"{path}: lacks columns {lacking}")
    rows = pq.read_table(path, columns=wanted).to_pylist()
    inputs = {"s1": _S1, "s2_l2a": Input("s2_l2a", labels.S2_12, "DN", level="L2A")}
    present = {"s1": (root / "BigEarthNet-S1").is_dir(), "s2_l2a": (root / "BigEarthNet-S2").is_dir()}
    inputs = {k: v for k, v in inputs.items() if present[k]}
    info = DatasetInfo("BigEarthNet-v2", "multilabel", labels.BIGEARTHNET_19, inputs)
    splits = {}
    for split, name in zip(SPLITS, ("train", "validation", "test"), strict=True):
        chosen = [r for r in rows if r["split"] == name]
        targets = np.array([[c in r["labels"] for c in labels.BIGEARTHNET_19] for r in chosen], bool)
        splits[split] = Split([r["patch_id"] for r in chosen], _ben_reader(root, chosen, targets, inputs), targets)
    return Dataset(info, splits)


def _ben_reader(
    root: Path, rows: list[dict[str, Any]], targets: np.ndarray, inputs: Mapping[str, Input]
) -> Callable[[int], Sample]:
    def read(i: int) -> Sample:
        patch, radar = rows[i]["patch_id"], rows[i]["s1_name"]
        images = {}
        if "s1" in inputs:
            folder = root / "BigEarthNet-S1" / radar.rsplit("_", 3)[0] / radar
            images["s1"] = files.read_band_files(folder, inputs["s1"], radar + "_{band}.tif")
        folder = root / "BigEarthNet-S2" / patch.rsplit("_", 2)[0] / patch
        if "s2_l2a" in inputs:
            images["s2_l2a"] = files.read_band_files(folder, inputs["s2_l2a"], patch + "_{band}.tif")
        return Sample(patch, images, targets[i], path=str(folder))

    return read


def _pastis(root: Path) -> Dataset:
    """PASTIS-R: ``DATA_S2/S2_<id>.npy`` [T, 10, 128, 128], ``DATA_S1A/...``, ``ANNOTATIONS/TARGET_<id>.npy``.

    The model sees one image: the median of the dates of each sensor (radar: of power). Folds 1-3, 4, 5.
    """
    patches = files.read_json(
        files.need(root / "metadata.geojson", "PASTIS metadata"),
        lambda meta: [(int(f["properties"]["ID_PATCH"]), int(f["properties"]["Fold"])) for f in meta["features"]],
    )
    inputs = {"s2_l2a": Input("s2_l2a", labels.S2_10, "DN", level="L2A")}
    if (root / "DATA_S1A").is_dir():
        inputs["s1"] = Input("s1", ("VV", "VH", ""), "dB", level="GRD sigma0, ascending")
    info = DatasetInfo(
        "PASTIS", "segmentation", labels.PASTIS, inputs, note="median over the year: a single-date model; void ignored"
    )
    folds = {"train": (1, 2, 3), "val": (4,), "test": (5,)}
    splits = {}
    for split, wanted in folds.items():
        ids = sorted(p for p, fold in patches if fold in wanted)
        splits[split] = Split([str(p) for p in ids], _pastis_reader(root, ids, tuple(inputs)))
    return Dataset(info, splits)


def _pastis_reader(root: Path, ids: list[int], sensors: Sequence[str]) -> Callable[[int], Sample]:
    def load(path: Path) -> np.ndarray:
        try:
            return np.load(files.need(path, "a PASTIS array"), allow_pickle=False)
        except (ValueError, EOFError) as e:
            raise DatasetError(f"{path}: cannot be read as a NumPy array ({e})") from e

    def read(i: int) -> Sample:
        series = load(root / "DATA_S2" / f"S2_{ids[i]}.npy").astype(np.float32)
        images = {"s2_l2a": np.median(series, axis=0).transpose(1, 2, 0)}
        if "s1" in sensors:
            radar = load(root / "DATA_S1A" / f"S1A_{ids[i]}.npy").astype(np.float32)
            # Of dB: the median commutes with the logarithm (for an odd number of dates).
            images["s1"] = np.median(radar, axis=0).transpose(1, 2, 0)
        mask = load(root / "ANNOTATIONS" / f"TARGET_{ids[i]}.npy")[0].astype(np.int64)
        return Sample(str(ids[i]), images, np.where(mask >= len(labels.PASTIS), -1, mask))

    return read


def _oscd(root: Path) -> Dataset:
    """OSCD: ``*Images/<city>/imgs_{1,2}_rect/B01.tif ...`` and ``*{Train,Test} Labels/<city>/cm/cm.png``."""
    images = next((p for p in sorted(root.glob("*Images")) if p.is_dir()), None)
    if images is None:
        raise DatasetError(f"{root}: no '*Images' folder of OSCD")
    info = DatasetInfo(
        "OSCD",
        "change",
        ("no change", "change"),
        {"s2_l1c": Input("s2_l1c", labels.S2_13, "DN", level="L1C")},
        note="feature difference of two dates",
    )
    splits = {}
    for split, word in (("train", "Train"), ("test", "Test")):
        found = sorted(root.glob(f"*{word} Labels/*/cm/cm.png"))
        if found:
            cities = [p.parts[-3] for p in found]
            splits[split] = Split(cities, _oscd_reader(images, cities, found, info.inputs["s2_l1c"]))
    return Dataset(info, splits)


def _oscd_reader(images: Path, cities: list[str], masks: list[Path], source: Input) -> Callable[[int], Sample]:
    from PIL import Image

    def read(i: int) -> Sample:
        dates = [files.read_band_files(images / cities[i] / f"imgs_{n}_rect", source, "{band}.tif") for n in (1, 2)]
        with Image.open(masks[i]) as picture:
            mask = (np.asarray(picture.convert("L")) > 0).astype(np.int64)
        rows, cols = (min(a.shape[k] for a in (*dates, mask)) for k in (0, 1))
        first, second = ({"s2_l1c": d[:rows, :cols]} for d in dates)
        return Sample(cities[i], first, mask[:rows, :cols], after=second, path=str(masks[i]))

    return read


def _cloudsen12(root: Path) -> Dataset:
    """CloudSEN12 "high": memory maps ``{train,val,test}/{L1C,L2A}_B01.dat ...`` and ``LABEL_manual_hq.dat``."""
    splits, keys = {}, None
    for split in SPLITS:
        mask = root / split / "LABEL_manual_hq.dat"
        if not mask.exists():
            continue
        count, rest = divmod(mask.stat().st_size, 512 * 512)
        if rest or not count:
            raise DatasetError(f"{mask}: {mask.stat().st_size} bytes is no whole number of 512x512 masks")
        planes = {k: _cloud_planes(root / split, k, count) for k in ("s2_l1c", "s2_l2a")}
        planes = {k: v for k, v in planes.items() if v}
        keys = tuple(planes)
        splits[split] = Split([f"{split}/{i}" for i in range(count)], _cloud_reader(split, planes, mask, count))
    if not splits or not keys:
        raise DatasetError(f"{root}: no {{train,val,test}}/LABEL_manual_hq.dat with L1C_*.dat or L2A_*.dat beside it")
    bands = {"s2_l1c": labels.S2_13, "s2_l2a": labels.S2_12}
    inputs = {k: Input(k, bands[k], "DN", level=k[3:].upper()) for k in keys}
    return Dataset(DatasetInfo("CloudSEN12", "segmentation", labels.CLOUDS, inputs), splits)


def _cloud_planes(folder: Path, key: str, count: int) -> list[np.ndarray]:
    """Memory maps [N, 512, 512] in band order, or [] when the level is not there. Raises on gaps and odd sizes."""
    prefix = key[3:].upper() + "_"
    found = {band_name(p.stem.removeprefix(prefix)): p for p in folder.glob(f"{prefix}*.dat")}
    if not found:
        return []
    wanted = labels.S2_13 if key == "s2_l1c" else labels.S2_12
    lacking = [b for b in wanted if b not in found]
    wrong = [found[b].name for b in wanted if b in found and found[b].stat().st_size != count * 512 * 512 * 2]
    if lacking or wrong:
        raise DatasetError(f"{folder}: {prefix}*.dat lack {lacking}, of another length than the labels: {wrong}")
    return [np.memmap(found[b], np.int16, "r", shape=(count, 512, 512)) for b in wanted]


def _cloud_reader(split: str, planes: dict[str, list[np.ndarray]], mask: Path, count: int) -> Callable[[int], Sample]:
    target = np.memmap(mask, np.int8, "r", shape=(count, 512, 512))

    def read(i: int) -> Sample:
        images = {k: np.stack([p[i] for p in v], axis=-1) for k, v in planes.items()}
        return Sample(f"{split}/{i}", images, np.asarray(target[i], np.int64))

    return read


DATASETS: dict[str, Callable[[Path], Dataset]] = {
    "landslide4sense": _landslide4sense,
    "sen1floods11": _sen1floods11,
    "bigearthnet": _bigearthnet,
    "pastis": _pastis,
    "oscd": _oscd,
    "cloudsen12": _cloudsen12,
}


def open_layout(name: str, root: str | Path) -> list[Dataset]:
    """Opens one data set in its authors' layout. Raises DatasetError when nothing of it is below ``root``."""
    root = files.need(Path(root), f"the folder of {name}")
    dataset = DATASETS[name](root)
    if not any(len(s) for s in dataset.splits.values()):
        raise DatasetError(f"{root}: nothing of {name} found; expected {DATASETS[name].__doc__.splitlines()[0]}")
    return [dataset]
