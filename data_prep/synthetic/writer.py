"""Files of a synthetic run: Major-TOM Core parquet folders, WorldCover GeoTIFFs, truth and splits."""

from __future__ import annotations

import csv
import dataclasses
import io
import struct
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
from affine import Affine
from PIL import Image
from rasterio.crs import CRS
from rasterio.io import MemoryFile
from rasterio.warp import transform as warp_points
from scipy.ndimage import map_coordinates

from data_prep.synthetic.cell import S1_NODATA, Cell, Product, fractions
from data_prep.synthetic.geography import CellPlan, block_of
from data_prep.worldcover import map_name
from terrafm_jax import landcover
from terrafm_jax.sensors import SENSORS

FOLDERS = {"s1": "Core-S1RTC", "s2_l1c": "Core-S2L1C", "s2_l2a": "Core-S2L2A"}
WC_PIXELS, WC_DEGREES, WC_BLOCK = 36000, 3, 1024  # of a WorldCover file


@lru_cache(maxsize=256)
def _crs(name: str) -> CRS:
    return CRS.from_string(name)


def geotiff(values: np.ndarray, affine: Affine, crs: str, nodata: float | None) -> bytes:
    """Bytes of a complete single-band GeoTIFF of [h, w], compressed without loss."""
    rows, cols = values.shape
    block = min(1024, max(16, -(-max(rows, cols) // 16) * 16))
    options: dict[str, Any] = dict(tiled=True, blockxsize=block, blockysize=block, compress="deflate", zlevel=1)
    options["predictor"] = 1 if values.dtype == np.float32 else 2
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", height=rows, width=cols, count=1, dtype=values.dtype, crs=_crs(crs), transform=affine,
            nodata=nodata, **options,
        ) as out:  # fmt: skip
            out.write(values, 1)
        return memory.read()


def _png(product: Product) -> bytes:
    """A small color picture: true color, or VV, VH and their ratio."""
    if product.mask is None:
        vv, vh = (10 * np.log10(np.maximum(product.bands[b], 1e-5)) for b in ("vv", "vh"))
        rgb = np.stack([(vv + 20) / 18, (vh + 27) / 18, (vv - vh) / 14], -1)
    else:
        rgb = np.stack([product.bands[b] - float(product.acquired.offset) for b in ("B04", "B03", "B02")], -1) / 3000
    buffer = io.BytesIO()
    Image.fromarray((np.clip(rgb, 0, 1) * 255).astype(np.uint8)).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


# --- one cell ---------------------------------------------------------------------------------


def image_row(cell: Cell, key: str) -> dict[str, Any]:
    """Row of a ``part_NNNNN.parquet``: key columns and the bytes of every band."""
    product, crs = cell.products[key], f"EPSG:{cell.products[key].epsg}"
    nodata = S1_NODATA if key == "s1" else 0
    row: dict[str, Any] = {
        "product_id": product.acquired.product,
        "grid_cell": cell.plan.name,
        "timestamp": product.acquired.time.isoformat(),
        "thumbnail": _png(product),
    }
    for name, values in product.bands.items():
        row[name] = geotiff(values, product.claimed[name], crs, nodata)
    if product.mask is not None:
        row["cloud_mask"] = geotiff(product.mask, product.claimed["B02"], crs, None)
    return plant(row, cell, key)


def plant(row: dict[str, Any], cell: Cell, key: str) -> dict[str, Any]:
    """Applies the planned defect of a cell to the product it hits (the Level-2A, or the radar for NaN)."""
    defect = cell.plan.defect
    if defect in ("", "duplicate", "offset conflict") or key != ("s1" if defect == "nan" else "s2_l2a"):
        return row
    name = "vv" if key == "s1" else "B03"
    product = cell.products[key]
    values, affine, crs = product.bands[name], product.claimed[name], f"EPSG:{product.epsg}"
    if defect == "truncated tif":
        row[name] = row[name][: len(row[name]) // 2]
    elif defect == "not a tif":
        row[name] = b"<html>503 Service Unavailable</html>"
    elif defect == "missing band":
        row[name] = None
    elif defect == "wrong size":
        row[name] = geotiff(values[: values.shape[0] // 2], affine, crs, 0)
    elif defect == "wrong crs":
        row[name] = geotiff(values, affine, "EPSG:3857", 0)
    elif defect == "nan":
        row[name] = geotiff(np.full_like(values, np.nan), affine, crs, S1_NODATA)
    elif defect == "all nodata":
        for band, dn in product.bands.items():
            row[band] = geotiff(np.zeros_like(dn), product.claimed[band], crs, 0)
    return row


def metadata_row(cell: Cell, key: str) -> dict[str, Any]:
    """Row of ``metadata.parquet`` without the place of the row (``parquet_url``, ``parquet_row``)."""
    plan, product = cell.plan, cell.products[key]
    # A share of the published rows repeats the authority.
    twice = plan.rng(50).random() < 0.1
    row: dict[str, Any] = {
        "grid_cell": plan.name,
        "grid_row_u": plan.row,
        "grid_col_r": plan.col,
        "product_id": product.acquired.product,
        "timestamp": product.acquired.time.isoformat(),
        "nodata": product.nodata,
        "centre_lat": plan.lat,
        "centre_lon": plan.lon,
        "crs": f"EPSG:{'EPSG:' if twice else ''}{product.epsg}",
        "geometry": _footprint(plan),
    }
    if key == "s1":
        row["orbit_state"] = product.acquired.orbit
    else:
        row["cloud_cover"] = 100 * product.cloud
    return row


def _footprint(plan: CellPlan) -> bytes:
    """The cell's outline in EPSG:4326 as well-known binary."""
    (x, y), side = plan.origin, plan.size * 10
    xs, ys = [x, x + side, x + side, x, x], [y, y, y - side, y - side, y]
    lon, lat = warp_points(f"EPSG:{plan.epsg}", "EPSG:4326", xs, ys)
    return struct.pack("<BIII10d", 1, 3, 1, 5, *(v for pair in zip(lon, lat, strict=True) for v in pair))


def truth_row(cell: Cell) -> dict[str, Any]:
    """Ground truth of a cell: planned class, shares, the map, and what was done to every product."""
    plan, categories = cell.plan, cell.truth()
    half = plan.size // 2
    quadrants = [categories[r : r + half, c : c + half] for r in (0, half) for c in (0, half)]
    row: dict[str, Any] = {
        "grid_cell": plan.name,
        "split": plan.split,
        "landcover": plan.landcover,
        "pure": plan.pure,
        "defect": plan.defect,
        "lat": plan.lat,
        "lon": plan.lon,
        "epsg": plan.epsg,
        "size": plan.size,
        "claimed_x": plan.origin[0],
        "claimed_y": plan.origin[1],
        "fractions": fractions(categories).tolist(),
        "quadrant_majority": [landcover.NAMES[int(fractions(q).argmax())] for q in quadrants],
        "quadrant_share": [float(fractions(q).max()) for q in quadrants],
        "landcover_map": geotiff(categories, _true_affine(cell), f"EPSG:{plan.epsg}", None),
    }
    for key in FOLDERS:
        product = cell.products.get(key)
        row[f"{key}_product"] = product.acquired.product if product else None
        row[f"{key}_offset"] = product.acquired.offset if product else None
        row[f"{key}_nodata"] = product.nodata if product else None
        row[f"{key}_cloud"] = product.cloud if product else None
        row[f"{key}_epsg"] = product.epsg if product else None
    return row


def _true_affine(cell: Cell) -> Affine:
    x, y = (np.floor(v / 10 + 0.5) * 10 for v in cell.plan.origin)
    return Affine(10, 0, x, 0, -10, y)


# --- WorldCover -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Patch:
    """WorldCover codes uint8 [h, w] at (row, col) of the file of a 3-degree block; 255 = not this cell's ground."""

    block: tuple[int, int]
    row: int
    col: int
    codes: np.ndarray


def worldcover_name(block: tuple[int, int]) -> str:
    """Official file name of the 3-degree block with that lower left corner (lat, lon)."""
    south, west = block
    return f"ESA_WorldCover_10m_2021_v200_{map_name(west, south)}_Map.tif"


def worldcover_patches(cell: Cell) -> list[Patch]:
    """The cell's map, nearest neighbor, on the 1/12000-degree lattice: one patch per file it touches."""
    codes = np.array([c.code or 0 for c in landcover.CATEGORIES], np.uint8)[cell.canvas]
    crs, affine, n = f"EPSG:{cell.plan.epsg}", cell.canvas_affine, codes.shape[0]
    edge = np.linspace(0, n, 9)
    rim = np.array([(c, r) for c in edge for r in edge])
    lon, lat = warp_points(crs, "EPSG:4326", *(affine @ rim.T))
    # Longitudes continue past 180 degrees, so that a cell on the antimeridian stays in one piece.
    lon = cell.plan.lon + (np.array(lon) - cell.plan.lon + 180) % 360 - 180
    per = WC_PIXELS // WC_DEGREES
    first = int(np.floor((90 - max(lat)) * per)), int(np.floor((lon.min() + 180) * per))
    last = int(np.ceil((90 - min(lat)) * per)), int(np.ceil((lon.max() + 180) * per))
    rows, cols = _canvas_positions(first, last, crs, affine, per)
    inside = (rows >= 0) & (rows < n) & (cols >= 0) & (cols < n)
    drawn = np.where(inside, codes[np.clip(rows, 0, n - 1), np.clip(cols, 0, n - 1)], 255).astype(np.uint8)
    patches = []
    for top in range(first[0] // WC_PIXELS * WC_PIXELS, last[0], WC_PIXELS):
        for left in range(first[1] // WC_PIXELS * WC_PIXELS, last[1], WC_PIXELS):
            r0, r1 = max(top, first[0]), min(top + WC_PIXELS, last[0])
            c0, c1 = max(left, first[1]), min(left + WC_PIXELS, last[1])
            block = 90 - (top // per) - WC_DEGREES, (left // per) % 360 - 180
            part = drawn[r0 - first[0] : r1 - first[0], c0 - first[1] : c1 - first[1]]
            patches.append(Patch(block, r0 - top, c0 - left, part))
    return patches


def _canvas_positions(
    first: tuple[int, int], last: tuple[int, int], crs: str, affine: Affine, per: int
) -> tuple[np.ndarray, np.ndarray]:
    """Canvas row and column [h, w] of every lattice pixel: exact on a coarse mesh, bilinear between (millimetres)."""
    h, w = last[0] - first[0], last[1] - first[1]
    at_r, at_c = np.linspace(0, h - 1, 33), np.linspace(0, w - 1, 33)
    lat = 90 - (first[0] + at_r + 0.5) / per
    lon = (first[1] + at_c + 0.5) / per - 180
    mesh = np.meshgrid(lon, lat)
    x, y = warp_points("EPSG:4326", crs, mesh[0].ravel(), mesh[1].ravel())
    cols, rows = ~affine @ np.array([x, y])
    rows_at = np.broadcast_to(np.linspace(0, 32, h)[:, None], (h, w))
    cols_at = np.broadcast_to(np.linspace(0, 32, w)[None], (h, w))
    fine = [map_coordinates(v.reshape(33, 33), [rows_at, cols_at], order=1) for v in (rows, cols)]
    return np.floor(fine[0]).astype(np.int32), np.floor(fine[1]).astype(np.int32)


def write_worldcover(folder: Path, patches: list[Patch]) -> None:
    """Writes one file of the real 36000 x 36000 lattice; untouched blocks cost nothing (they read as 0)."""
    folder.mkdir(parents=True, exist_ok=True)
    block = patches[0].block
    affine = Affine(WC_DEGREES / WC_PIXELS, 0, block[1], 0, -WC_DEGREES / WC_PIXELS, block[0] + WC_DEGREES)
    options = dict(tiled=True, blockxsize=WC_BLOCK, blockysize=WC_BLOCK, compress="deflate", zlevel=1)
    tiles: dict[tuple[int, int], np.ndarray] = {}
    for patch in patches:
        _paint(tiles, patch)
    path = folder / worldcover_name(block)
    with rasterio.open(
        path, "w", driver="GTiff", height=WC_PIXELS, width=WC_PIXELS, count=1, dtype="uint8", crs="EPSG:4326",
        transform=affine, nodata=0, SPARSE_OK=True, **options,
    ) as out:  # fmt: skip
        out.update_tags(product_tile=path.name.split("_")[5], product_version="V2.0.0", title="synthetic land cover")
        for (i, j), values in sorted(tiles.items()):
            height, width = min(WC_BLOCK, WC_PIXELS - i * WC_BLOCK), min(WC_BLOCK, WC_PIXELS - j * WC_BLOCK)
            window = rasterio.windows.Window(j * WC_BLOCK, i * WC_BLOCK, width, height)
            out.write(values[:height, :width], 1, window=window)


def _paint(tiles: dict[tuple[int, int], np.ndarray], patch: Patch) -> None:
    """Copies a patch into the internal blocks it touches."""
    h, w = patch.codes.shape
    for i in range(patch.row // WC_BLOCK, (patch.row + h - 1) // WC_BLOCK + 1):
        for j in range(patch.col // WC_BLOCK, (patch.col + w - 1) // WC_BLOCK + 1):
            tile = tiles.setdefault((i, j), np.zeros((WC_BLOCK, WC_BLOCK), np.uint8))
            r0, c0 = max(patch.row, i * WC_BLOCK), max(patch.col, j * WC_BLOCK)
            r1, c1 = min(patch.row + h, (i + 1) * WC_BLOCK), min(patch.col + w, (j + 1) * WC_BLOCK)
            part = patch.codes[r0 - patch.row : r1 - patch.row, c0 - patch.col : c1 - patch.col]
            view = tile[r0 - i * WC_BLOCK : r1 - i * WC_BLOCK, c0 - j * WC_BLOCK : c1 - j * WC_BLOCK]
            np.copyto(view, part, where=part != 255)


# --- tables -----------------------------------------------------------------------------------

_BYTES = pa.binary()
_IMAGE_KEYS = [("product_id", pa.string()), ("grid_cell", pa.string()), ("timestamp", pa.string())]
_METADATA = [
    ("grid_cell", pa.string()), ("grid_row_u", pa.int16()), ("grid_col_r", pa.int16()), ("product_id", pa.string()),
    ("timestamp", pa.string()), ("cloud_cover", pa.float64()), ("nodata", pa.float64()), ("centre_lat", pa.float64()),
    ("centre_lon", pa.float64()), ("crs", pa.string()), ("parquet_url", pa.string()), ("parquet_row", pa.int64()),
    ("orbit_state", pa.string()), ("geometry", _BYTES),
]  # fmt: skip


class Collection:
    """Writes one sensor's folder: parts of ``rows_per_part`` rows, one row per row group, then metadata.parquet."""

    def __init__(self, root: Path, key: str, rows_per_part: int = 500):
        self.folder, self.key, self.rows_per_part = root / FOLDERS[key], key, rows_per_part
        (self.folder / "images").mkdir(parents=True, exist_ok=True)
        names = ["vv", "vh"] if key == "s1" else [*SENSORS[key].delivered_names, "cloud_mask"]
        self.schema = pa.schema([*_IMAGE_KEYS, *((n, _BYTES) for n in [*names, "thumbnail"])])
        unwanted = "cloud_cover" if key == "s1" else "orbit_state"
        self.metadata_schema = pa.schema([f for f in _METADATA if f[0] != unwanted])
        self.metadata: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def add(self, image: dict[str, Any], metadata: dict[str, Any]) -> None:
        part, row = divmod(len(self.metadata), self.rows_per_part)
        path = self.folder / "images" / f"part_{part:05d}.parquet"
        if row == 0:
            self.close()
            # Bands are compressed inside their GeoTIFFs.
            self._writer = pq.ParquetWriter(path, self.schema, compression="none", write_statistics=False)
        assert self._writer is not None
        self._writer.write_table(pa.Table.from_pylist([image], self.schema), row_group_size=1)
        self.metadata.append({**metadata, "parquet_url": f"images/{path.name}", "parquet_row": row})

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def finish(self) -> None:
        """Closes the last part and writes the metadata."""
        self.close()
        pq.write_table(pa.Table.from_pylist(self.metadata, self.metadata_schema), self.folder / "metadata.parquet")


def write_truth(root: Path, rows: list[dict[str, Any]]) -> None:
    """Writes ``truth.parquet`` (one row a cell) and ``splits.csv`` (columns grid_cell, split)."""
    pq.write_table(pa.Table.from_pylist(rows), root / "truth.parquet")
    with open(root / "splits.csv", "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        out.writerow(["grid_cell", "split"])
        out.writerows([row["grid_cell"], row["split"]] for row in rows)


def blocks_of(plan: CellPlan) -> set[tuple[int, int]]:
    """The 3-degree blocks that a cell may touch."""
    reach = plan.size * 10 / 111000
    wide = reach / max(0.05, np.cos(np.radians(plan.lat)))
    corners = [(plan.lat + i * reach, plan.lon + j * wide) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return {block_of(lat, (lon + 180) % 360 - 180) for lat, lon in corners}
