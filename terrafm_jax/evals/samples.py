"""Small labelled sets and scenes cut from Major-TOM cells: for notebooks and trials where no labelled data is at hand.

Works on the output of ``python -m data_prep.synthetic`` as on real Major-TOM Core folders with WorldCover maps.
Labels are the WorldCover majority of each crop: numbers on them say that things work, not how good a model is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax import landcover
from terrafm_jax.sensors import S2_L2A, baseline_offset

_FOLDERS = {"s2_l2a": "Core-S2L2A", "s1": "Core-S1RTC"}
NAMES = {"s2_l2a": S2_L2A.band_names, "s1": ("VV", "VH")}


def cells(root: Path, limit: int = 0) -> Iterator[tuple[str, dict[str, np.ndarray], dict[str, Any]]]:
    """(cell, pixels per sensor [H, W, C] at 10 m, rasterio profile) of the cells that have both sensors.

    Sentinel-2 as harmonized DN, Sentinel-1 in dB; coarser bands are repeated to 10 m.
    """
    import pyarrow.parquet as pq

    radar = {}
    for file in sorted((root / _FOLDERS["s1"] / "images").glob("*.parquet")):
        for row in pq.read_table(file, columns=["grid_cell", "vv", "vh"]).to_pylist():
            radar[row["grid_cell"]] = row
    found = 0
    for file in sorted((root / _FOLDERS["s2_l2a"] / "images").glob("*.parquet")):
        parts = pq.ParquetFile(file)
        for group in range(parts.num_row_groups):
            for row in parts.read_row_group(group).to_pylist():
                if row["grid_cell"] not in radar:
                    continue
                optical, profile = _stack([row[b] for b in NAMES["s2_l2a"]])
                offset = baseline_offset(row["product_id"]) or 0.0
                optical = np.where(optical == 0, 0, np.maximum(optical.astype(np.int32) - int(offset), 1))
                power, _ = _stack([radar[row["grid_cell"]][b] for b in ("vv", "vh")], optical.shape[:2])
                with np.errstate(divide="ignore", invalid="ignore"):
                    decibels = np.where(power > 0, 10 * np.log10(power), np.nan)
                images = {"s2_l2a": optical.astype(np.uint16), "s1": decibels.astype(np.float32)}
                yield row["grid_cell"], images, profile
                found += 1
                if limit and found >= limit:
                    return


def _stack(blobs: Sequence[bytes], shape: tuple[int, int] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    from rasterio.io import MemoryFile

    planes, profile = [], {}
    for blob in blobs:
        with MemoryFile(blob) as memory, memory.open() as src:
            planes.append(src.read(1))
            if planes[-1].shape[0] == max(p.shape[0] for p in planes):
                profile = {"crs": src.crs, "transform": src.transform}
    rows, columns = shape or max(p.shape for p in planes)
    whole = [_fit(p, rows, columns) for p in planes]
    return np.stack(whole, axis=-1), profile


def _fit(plane: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Repeats a plane to at least the wanted size, cuts or continues the rest."""
    factor = max(1, round(rows / plane.shape[0]))
    big = plane.repeat(factor, 0).repeat(factor, 1)[:rows, :columns]
    return np.pad(big, ((0, rows - big.shape[0]), (0, columns - big.shape[1])), mode="edge")


def land_cover(worldcover: Path, profile: dict[str, Any], shape: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W] category indices of ``landcover.CATEGORIES`` on a raster's grid; unknown where no map is."""
    import rasterio
    from rasterio.vrt import WarpedVRT

    found = np.full(shape, landcover.UNKNOWN, np.uint8)
    table = landcover.code_to_index()
    for file in sorted(worldcover.glob("*.tif")):
        with rasterio.open(file) as src, WarpedVRT(
            src, crs=profile["crs"], transform=profile["transform"], height=shape[0], width=shape[1],
            add_alpha=True,
        ) as warped:  # fmt: skip
            inside = warped.dataset_mask() > 0
            found[inside] = table[warped.read(1)][inside]
    return found


def write_raster(path: Path, image: np.ndarray, profile: dict[str, Any], names: Sequence[str] = ()) -> Path:
    """[H, W, C] or [H, W] as GeoTIFF with named bands."""
    import rasterio

    image = image[..., None] if image.ndim == 2 else image
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = {"height": image.shape[0], "width": image.shape[1], "count": image.shape[2], "dtype": image.dtype}
    with rasterio.open(path, "w", driver="GTiff", compress="deflate", **shape, **profile) as dst:
        dst.write(image.transpose(2, 0, 1))
        for i, name in enumerate(names, 1):
            dst.set_band_description(i, name)
    return path


def labelled_folder(root: Path, out: Path, *, size: int = 80, limit: int = 0, least: int = 6) -> dict[str, int]:
    """Writes ``out/s2_l2a/CLASS/*.tif``, ``out/s1/CLASS/*.tif`` and ``dataset.yaml``; returns samples per class.

    Classes with fewer than ``least`` crops are left out.
    """
    from rasterio.transform import Affine

    crops: dict[str, list[tuple[str, dict[str, np.ndarray], dict[str, Any]]]] = {}
    for cell, images, profile in cells(root, limit):
        shape = images["s2_l2a"].shape[:2]
        cover = land_cover(root / "worldcover", profile, shape)
        for r in range(0, shape[0] - size + 1, size):
            for c in range(0, shape[1] - size + 1, size):
                name = landcover.NAMES[np.bincount(cover[r : r + size, c : c + size].ravel()).argmax()]
                moved = {**profile, "transform": profile["transform"] * Affine.translation(c, r)}
                cut = {k: v[r : r + size, c : c + size] for k, v in images.items()}
                crops.setdefault(name, []).append((f"{cell}_r{r}_c{c}.tif", cut, moved))
    kept = {k: v for k, v in crops.items() if len(v) >= least and k != "unknown"}
    for name, members in kept.items():
        for file, cut, profile in members:
            for key, image in cut.items():
                write_raster(out / key / name / file, image, profile, NAMES[key])
    inputs = [f"  {k}: {{folder: {k}, bands: [{', '.join(NAMES[k])}]}}" for k in ("s2_l2a", "s1")]
    text = ["name: land cover of cells", "inputs:", *inputs, "splits: {train: 0.6, val: 0.15, test: 0.25}"]
    (out / "dataset.yaml").write_text("\n".join(text) + "\n")
    return {k: len(v) for k, v in sorted(kept.items())}


def scene(root: Path, out: Path, number: int = 0) -> dict[str, Path]:
    """Writes one cell as ``s2_l2a.tif``, ``s1.tif`` and ``landcover.tif`` (category indices) and returns the paths."""
    *_, (_, images, profile) = cells(root, number + 1)
    paths = {k: write_raster(out / f"{k}.tif", v, profile, NAMES[k]) for k, v in images.items()}
    cover = land_cover(root / "worldcover", profile, images["s2_l2a"].shape[:2])
    return {**paths, "landcover": write_raster(out / "landcover.tif", cover, profile)}
