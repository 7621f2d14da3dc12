"""Writers of small labelled data sets in exactly the published formats (a helper of the evaluation tests)."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals.datasets.base import collate
from terrafm_jax.sensors import S2_L2A


def tiff(path: Path, array: np.ndarray, names=(), tags=None, crs="EPSG:32632") -> Path:
    """Writes [H, W, C] or [H, W] as GeoTIFF."""
    import rasterio

    array = array[..., None] if array.ndim == 2 else array
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {
        "driver": "GTiff", "height": array.shape[0], "width": array.shape[1], "count": array.shape[2],
        "dtype": array.dtype, "crs": crs, "transform": rasterio.Affine(10, 0, 4e5, 0, -10, 5e6),
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as dst:
        dst.write(array.transpose(2, 0, 1))
        for i, name in enumerate(names, 1):
            dst.set_band_description(i, name)
        dst.update_tags(**(tags or {}))
    return path


def planes(rng: np.random.Generator, size: int, count: int, level: float = 0.0) -> np.ndarray:
    """uint16 [size, size, count]: plane i holds values near 1000 * (i + 1) + level, so that order can be checked."""
    base = 1000.0 * np.arange(1, count + 1) + level
    return (base + rng.integers(0, 50, (size, size, count))).astype(np.uint16)


class Evil:
    """Unpickling this would create a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def hdf5(path: Path, bands: dict[str, np.ndarray], label, extra=None) -> None:
    """One GEO-Bench 1 sample: a data set per band, the label pickled into the text attribute ``pickle``."""
    import h5py

    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as f:
        for name, plane in bands.items():
            f.create_dataset(name, data=plane)
        attributes = {"label": label, "bands_order": list(bands), **(extra or {})}
        f.attrs["pickle"] = str(pickle.dumps(attributes))


def geobench(root: Path, name: str, folder: str, names, labels, size: int = 16, masks=None, dtype=np.float64) -> Path:
    """A GEO-Bench 1 data set of len(labels) samples; plane i of a sample is near 1000 * (i + 1)."""
    rng = np.random.default_rng(0)
    out = root / folder / name
    ids = [f"sample_{i}" for i in range(len(labels))]
    for i, sample in enumerate(ids):
        values = planes(rng, size, len(names), 10.0 * i).astype(dtype)
        bands = {n: values[..., k] for k, n in enumerate(names)}
        if masks is not None:
            bands["label"] = masks[i]
        hdf5(out / f"{sample}.hdf5", bands, labels[i])
    third = max(1, len(ids) // 3)
    parts = {"train": ids[: len(ids) - 2 * third], "valid": ids[-2 * third : -third], "test": ids[-third:]}
    (out / "default_partition.json").write_text(json.dumps(parts))
    (out / "0.01x_train_partition.json").write_text(json.dumps({**parts, "train": ids[:1]}))
    return out


def hole(files: Iterable[Path], band: int = -1, at: tuple[int, int] = (0, 0)) -> None:
    """Writes a declared nodata value into a pixel of one band (the last) of rasters."""
    import rasterio

    for path in files:
        with rasterio.open(path, "r+") as dst:
            number = dst.count if band < 0 else band
            value = -9999.0 if dst.dtypes[0].startswith("float") else 65535
            plane = dst.read(number)
            plane[at] = value
            dst.write(plane, number)
            dst.nodata = value


def measured(dataset: Any, split: str, key: str, **which: bool) -> np.ndarray:
    """bool [H, W]: what of the first image the encoder sees as measured, in every band."""
    found = collate(dataset.info, [dataset.split(split)[0]], [key], **which).images[key][0]
    gone = np.isnan(found[..., dataset.info.inputs[key].mask])
    np.testing.assert_array_equal(gone.any(-1), gone.all(-1))
    return ~gone.any(-1)


def tortilla(samples: list[tuple[dict, bytes]]) -> bytes:
    """Packs (metadata, payload) pairs; offsets count from the archive's first byte."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    content, rows = bytearray(18), []
    for metadata, payload in samples:
        rows.append({**metadata, "tortilla:offset": len(content), "tortilla:length": len(payload)})
        content += payload
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    footer = sink.getvalue()
    content[:18] = struct.pack("<2sQQ", b"#y", len(content), len(footer))
    return bytes(content) + footer


def tortilla_sample(tmp: Path, arrays: list[np.ndarray]) -> bytes:
    """A nested archive of GeoTIFFs."""
    items = []
    for i, array in enumerate(arrays):
        path = tiff(tmp / f"item{i}.tif", array)
        items.append(({"tortilla:id": f"item{i}", "tortilla:file_format": "GTiff"}, path.read_bytes()))
    return tortilla(items)


def eurosat_like(root: Path, classes: int = 3, per_class: int = 6, size: int = 32, bands=None, yaml: str = "") -> Path:
    """A folder ``class_name/*.tif`` of separable classes with ``dataset.yaml``: Sentinel-2 L2A, 12 bands."""
    rng = np.random.default_rng(0)
    bands = bands or ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"]
    for c in range(classes):
        for i in range(per_class):
            base = 600 + 900 * c + 60.0 * np.arange(len(bands))
            image = base + rng.normal(0, 150, (size, size, len(bands)))
            tiff(root / f"class_{c}" / f"class_{c}_{i}.tif", image.clip(1).astype(np.uint16))
    text = f"name: tiny\ninputs:\n  s2_l2a: {{bands: [{', '.join(bands)}], unit: DN}}\n"
    (root / "dataset.yaml").write_text(text + (yaml or "splits: {train: 0.5, val: 0.17, test: 0.33}\n"))
    return root


def band_levels(dataset: Any, split: str = "train", key: str = "s2_l2a") -> dict[str, int]:
    """Which delivered plane (counted from 1) stands at each canonical band of the first sample; 0: absent."""
    batch = collate(dataset.info, [dataset.split(split)[0]], [key])
    means = np.nan_to_num(batch.images[key][0].mean((0, 1)))
    return dict(zip(S2_L2A.band_names, (means // 1000).astype(int).tolist(), strict=True))
