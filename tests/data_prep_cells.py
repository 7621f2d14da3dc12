"""Tiny cells in Major-TOM's layout for the tests of data_prep: a few kilobytes each, and easy to break."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from rasterio.io import MemoryFile
from rasterio.transform import from_origin
from rasterio.warp import transform

from data_prep.scenes import band_list
from terrafm_jax.sensors import S2_L1C, SENSORS

SIZE = 48  # pixels at 10 m
FOLDERS = {"s1": "Core-S1RTC", "s2_l1c": "Core-S2L1C", "s2_l2a": "Core-S2L2A"}


def geotiff(pixels: np.ndarray, affine: rasterio.Affine, crs: str | None = "EPSG:32632", nodata: Any = None) -> bytes:
    """Bytes of a GeoTIFF of [H, W] or [bands, H, W]."""
    layers = pixels[None] if pixels.ndim == 2 else pixels
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=len(layers), height=layers.shape[1], width=layers.shape[2], dtype=layers.dtype,
            crs=crs, transform=affine, nodata=nodata, compress="lzw",
        ) as out:  # fmt: skip
            out.write(layers)
        return memory.read()


def manifest_bands(real_data: Path) -> dict[str, tuple[str, ...]]:
    """File of the real tiles -> its bands in order, as their manifest states them."""
    rows = csv.DictReader((real_data / "MANIFEST.csv").read_text().splitlines())
    keys = {"Sentinel-2 L1C": "s2_l1c", "S2L1C": "s2_l1c", "Sentinel-2 L2A": "s2_l2a", "S2L2A": "s2_l2a"}
    keys["Sentinel-1 RTC"] = "s1"
    stacked = [r for r in rows if r["sensor"] in keys and "," in r["bands"] and r["file"].endswith(".tif")]
    return {row["file"]: band_list(keys[row["sensor"]], row["bands"], row["file"]) for row in stacked}


def scene(seed: int, size: int = SIZE, offset: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """Smooth random bands of the three sensors: sensor -> ESA band -> [h, w] as delivered."""
    rng = np.random.default_rng(seed)
    ground = rng.gamma(2.0, 300.0, (size // 6, size // 6)).repeat(6, 0).repeat(6, 1)
    result: dict[str, dict[str, np.ndarray]] = {}
    for key in ("s2_l1c", "s2_l2a"):
        bands = {}
        for band in (*SENSORS[key].bands, *SENSORS[key].dropped):
            step = band.gsd // 10
            base = ground[::step, ::step] * rng.uniform(0.8, 1.2) + rng.uniform(0, 60, (size // step, size // step))
            low = 15 if band.name == "B10" else 1
            bands[band.name] = (base * (0.01 if band.name == "B10" else 1) + low + offset).astype(np.uint16)
        result[key] = bands
    result["s1"] = {n: rng.gamma(4.0, 0.02, (size, size)).astype(np.float32) for n in ("VV", "VH")}
    return result


def columns(key: str, bands: Mapping[str, np.ndarray], left: float, top: float, crs: str) -> dict[str, bytes]:
    """Band columns of a parquet row; all bands claim the same (wrong) origin, as Major-TOM's do."""
    row = {}
    for name, pixels in bands.items():
        step = 480.0 * (SIZE / 48) / pixels.shape[1] if key == "s1" else next(
            b.gsd for b in (*S2_L1C.bands, *S2_L1C.dropped) if b.name == name
        )  # fmt: skip
        column = name.lower() if key == "s1" else name
        row[column] = geotiff(pixels, from_origin(left, top, step, step), crs, -32768 if key == "s1" else 0)
    if key == "s2_l2a":
        row["cloud_mask"] = geotiff(np.zeros((8, 8), np.uint8), from_origin(left, top, 60, 60), crs)
    return row


def product_id(key: str, cell: int, baseline: str = "N0300") -> str:
    """A product id in the style of each sensor."""
    if key == "s1":
        return f"S1A_IW_GRDH_1SDV_202105{10 + cell % 20:02d}T055000_rtc"
    return f"S2A_MSI{key[3:].upper()}_202106{10 + cell % 20:02d}T103021_{baseline}_R108_T32UPU_20210612T120000"


def place(cell: int) -> tuple[float, float]:
    """Claimed upper left corner of cell number ``cell`` in EPSG:32632, off the Sentinel-2 grid."""
    return 602_412.2 + 30_000 * (cell % 8), 5_402_388.2 - 30_000 * (cell // 8)


def write_majortom(
    root: Path, rows: Mapping[str, Sequence[dict[str, Any]]], metadata: Mapping[str, Sequence[dict[str, Any]]]
) -> Path:
    """Writes the three collections, one row a row group."""
    for key, found in rows.items():
        folder = root / FOLDERS[key]
        (folder / "images").mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(list(found))
        with pq.ParquetWriter(folder / "images" / "part_00000.parquet", table.schema, write_statistics=False) as writer:
            for i in range(len(table)):
                writer.write_table(table.slice(i, 1))
        pq.write_table(pa.Table.from_pylist(list(metadata[key])), folder / "metadata.parquet")
    return root


def make_cells(count: int, size: int = SIZE) -> tuple[dict[str, list[dict[str, Any]]], dict[str, list[dict[str, Any]]]]:
    """Image and metadata rows of ``count`` cells with all three sensors."""
    rows: dict[str, list[dict[str, Any]]] = {key: [] for key in FOLDERS}
    metadata: dict[str, list[dict[str, Any]]] = {key: [] for key in FOLDERS}
    for cell in range(count):
        left, top = place(cell)
        (lon,), (lat,) = transform("EPSG:32632", "EPSG:4326", [left + 5 * size], [top - 5 * size])
        baseline, offset = ("N0400", 1000) if cell % 3 == 1 else ("N0300", 0)
        for key, bands in scene(cell, size, offset).items():
            name, product = f"{500 + cell}U_{60 + cell}R", product_id(key, cell, baseline)
            key_columns = {
                "product_id": product,
                "grid_cell": name,
                "timestamp": f"2021-06-{10 + cell % 20:02d}T10:30:21",
            }
            rows[key].append({**key_columns, **columns(key, bands, left, top, "EPSG:32632")})
            metadata[key].append(
                {
                    **key_columns, "cloud_cover": 12.5, "nodata": 0.0, "centre_lat": lat, "centre_lon": lon,
                    "crs": "EPSG:EPSG:32632" if cell % 2 else "EPSG:32632", "orbit_state": "descending",
                    "parquet_url": f"https://example.org/{FOLDERS[key]}/images/part_00000.parquet", "parquet_row": cell,
                }
            )  # fmt: skip
            if key == "s1":
                del metadata[key][-1]["cloud_cover"]
            else:
                del metadata[key][-1]["orbit_state"]
    return rows, metadata


def worldcover(root: Path, west: int, south: int, codes: np.ndarray) -> Path:
    """A WorldCover map of 3 x 3 degrees made of ``codes`` [n, n], in the official naming."""
    name = f"{'N' if south >= 0 else 'S'}{abs(south):02d}{'E' if west >= 0 else 'W'}{abs(west):03d}"
    path = root / f"ESA_WorldCover_10m_2021_v200_{name}_Map.tif"
    root.mkdir(parents=True, exist_ok=True)
    step = 3.0 / codes.shape[0]
    path.write_bytes(geotiff(codes.astype(np.uint8), from_origin(west, south + 3, step, step), "EPSG:4326", 0))
    return path


def make_source(root: Path, count: int = 4) -> Path:
    """A Major-TOM source with ``count`` cells and its land cover; returns ``root``."""
    write_majortom(root, *make_cells(count))
    rng = np.random.default_rng(7)
    codes = np.array([10, 30, 40, 50, 80], np.uint8)
    for west in (9, 12):
        for south in (45, 48):
            worldcover(root / "worldcover", west, south, codes[rng.integers(0, 5, (120, 120))])
    return root


def command(source: Path, out: Path, *flags: str) -> list[str]:
    return ["--source", str(source), "--worldcover", str(source / "worldcover"), "--out", str(out), "--tile-size", "24",
            "--split-shares", "1,0,0", "--cells-per-shard", "2", *flags]  # fmt: skip
