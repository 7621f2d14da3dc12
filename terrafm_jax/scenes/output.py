"""Embeddings on disk: Cloud Optimized GeoTIFF, Zarr, GeoParquet. Each is written whole or not at all."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import os
import shutil
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import shapely
from affine import Affine
from rasterio.errors import RasterioError
from rasterio.shutil import copy as raster_copy
from rasterio.warp import transform as transform_points
from rasterio.windows import Window

from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.scenes.grid import Grid

FORMATS = {".tif": "cog", ".tiff": "cog", ".zarr": "zarr", ".parquet": "parquet", ".geoparquet": "parquet"}
INT8_NODATA = -128
_OVERVIEW_EDGE = 512  # overviews end when the longer side fits
_BLOCK_BYTES = 64 << 20  # a pixel-interleaved block holds all bands and is decoded whole


@dataclasses.dataclass(frozen=True)
class Meta:
    """What is written beside the numbers: band names and provenance tags."""

    bands: tuple[str, ...]
    tags: Mapping[str, str]


def format_of(out: Path) -> str:
    """``cog``, ``zarr`` or ``parquet`` by suffix. Raises SceneError."""
    if out.suffix.lower() not in FORMATS:
        raise SceneError(f"--out {out}: unknown suffix {out.suffix!r}; expected one of {sorted(FORMATS)}")
    return FORMATS[out.suffix.lower()]


def block_size(bands: int, itemsize: int) -> int:
    """Pixels per side of a block: a power of two up to 512 with all bands below 64 MB."""
    size = 512
    while size > 16 and size * size * bands * itemsize >= _BLOCK_BYTES:
        size //= 2
    return size


def scales(tokens: np.ndarray, rows: int = 64) -> np.ndarray:
    """float32 [d]: step of int8 per band, so that the largest absolute value becomes 127."""
    peak = np.zeros(tokens.shape[-1], np.float32)
    for at in range(0, len(tokens), rows):
        part = np.abs(np.asarray(tokens[at : at + rows]))
        peak = np.fmax(peak, np.nan_to_num(part, nan=0.0).max((0, 1)))
        _release(tokens)
    return np.where(peak > 0, peak / 127.0, 1.0).astype(np.float32)


def _release(tokens: np.ndarray) -> None:
    """Gives the pages of a mapped file back now: they would count as used memory until the system wants them."""
    mapped = getattr(tokens, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def encode_values(values: np.ndarray, dtype: str, step: np.ndarray | None) -> np.ndarray:
    """Stored form of float32 [..., d]: itself, half precision, or int8 with -128 for nodata."""
    if dtype != "int8":
        return values.astype(dtype)
    whole = np.round(values / step)
    return np.where(np.isnan(values), INT8_NODATA, np.clip(np.nan_to_num(whole), -127, 127)).astype(np.int8)


# --- Cloud Optimized GeoTIFF ---------------------------------------------------------------------


def write_cog(out: Path, tokens: np.ndarray, grid: Grid, meta: Meta, dtype: str = "float32") -> None:
    """Tokens [rows, columns, d] as a COG with one band per feature and averaged overviews.

    float16 is stored as TIFF samples of 16 bits (NBITS = 16), which GDAL below 3.11 reads as float32; int8 carries its
    scale per band.
    Memory stays at a few blocks (GDAL's cache is limited), whatever the size. The overviews are ours: GDAL's
    own go band by band and would decode every pixel-interleaved block once per band.
    """
    rows, columns, bands = tokens.shape
    size = block_size(bands, {"float32": 4, "float16": 2, "int8": 1}[dtype])
    step = scales(tokens) if dtype == "int8" else None
    stored = "int8" if dtype == "int8" else "float32"
    options = {
        "driver": "GTiff", "count": bands, "dtype": stored, "crs": grid.crs, "interleave": "pixel", "tiled": True,
        "blockxsize": size, "blockysize": size, "nodata": INT8_NODATA if step is not None else np.nan,
        "bigtiff": "IF_SAFER", **({"nbits": 16} if dtype == "float16" else {}),
    }  # fmt: skip
    plain, temporary = out.with_name(out.name + ".partial.tif"), out.with_name(out.name + ".tmp")
    files = [plain]
    try:
        with rasterio.Env(GDAL_CACHEMAX=max(64, 2 * size * size * bands * np.dtype(stored).itemsize >> 20)):
            with rasterio.open(plain, "w", height=rows, width=columns, transform=grid.transform, **options) as file:
                for window in _blocks(rows, columns, size):
                    part = np.asarray(tokens[window.toslices()])
                    # To the nearest half: GDAL itself would cut the last bits off.
                    part = encode_values(part, dtype, step).astype(stored)
                    file.write(np.ascontiguousarray(np.moveaxis(part, -1, 0)), window=window)
                    _release(tokens)
                file.descriptions = meta.bands
                file.update_tags(**meta.tags)
                if step is not None:
                    file.scales = tuple(float(s) for s in step)
            while max(_shape(files[-1])) > _OVERVIEW_EDGE:
                files.append(_overview(files[-1], size, options))
            copied = {"blocksize": size, "compress": "deflate", "level": 1, "bigtiff": "IF_SAFER", "predictor": "yes"}
            if dtype == "float16":  # of halves GDAL 3.12 takes differences of whole numbers only
                copied |= {"predictor": "standard"} | ({"nbits": 16} if _dtype(plain) == "float32" else {})
            raster_copy(plain, temporary, driver="COG", overviews="auto", num_threads=2, **copied)
        os.replace(temporary, out)
    except (RasterioError, OSError) as error:
        raise SceneError(f"{out}: cannot be written ({first_line(error)}); free space and start again") from None
    finally:
        for path in (*files, temporary):
            path.unlink(missing_ok=True)


def _blocks(rows: int, columns: int, size: int) -> Iterator[Window]:
    for row in range(0, rows, size):
        for column in range(0, columns, size):
            yield Window(column, row, min(size, columns - column), min(size, rows - row))


def _shape(path: Path) -> tuple[int, int]:
    with rasterio.open(path) as file:
        return file.shape


def _dtype(path: Path) -> str:
    with rasterio.open(path) as file:
        return file.dtypes[0]


def _overview(below: Path, size: int, options: Mapping[str, Any]) -> Path:
    """Half the resolution of a file, mean of the valid pixels, beside it as ``.ovr`` (GDAL chains them)."""
    path = below.with_name(below.name + ".ovr")
    with rasterio.open(below) as source:
        rows, columns = (-(-n // 2) for n in source.shape)
        transform = Affine(2 * source.transform.a, 0, source.transform.c, 0, 2 * source.transform.e, source.transform.f)
        with rasterio.open(path, "w", height=rows, width=columns, transform=transform, **options) as target:
            for window in _blocks(*source.shape, size):  # one block of the source is a quarter of one of the target
                values = source.read(window=window)
                place = Window(window.col_off // 2, window.row_off // 2, -(-window.width // 2), -(-window.height // 2))
                target.write(_halved(values), window=place)
    return path


def _halved(values: np.ndarray) -> np.ndarray:
    """Mean over 2 x 2 valid pixels of [bands, H, W]; int8 keeps its scale, -128 is nodata."""
    whole = values.astype(np.float32)
    if values.dtype == np.int8:
        whole[values == INT8_NODATA] = np.nan
    whole = np.pad(whole, ((0, 0), (0, whole.shape[1] % 2), (0, whole.shape[2] % 2)), constant_values=np.nan)
    quads = np.stack([whole[:, i::2, j::2] for i in (0, 1) for j in (0, 1)])
    valid = np.isfinite(quads)
    with np.errstate(invalid="ignore"):
        mean = np.where(valid, quads, 0).sum(0) / valid.sum(0)  # 0 / 0: NaN, nodata
    return encode_values(mean, "int8", np.float32(1)) if values.dtype == np.int8 else mean.astype(np.float32)


# --- Zarr ----------------------------------------------------------------------------------------


def write_zarr(out: Path, tokens: np.ndarray, grid: Grid, meta: Meta, dtype: str = "float32") -> None:
    """Tokens as a Zarr version 2 group: ``embedding`` [y, x, feature] in chunks below 8 MB, x, y, spatial_ref.

    Written by hand (the format is JSON and compressed raw chunks), so that no further package is needed;
    xarray opens it with dimension names and coordinates.
    """
    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    rows, columns, bands = tokens.shape
    step = scales(tokens) if dtype == "int8" else None
    edge = max(1, min(256, int((8 << 20) / (bands * 4)) ** 0.5 // 1))
    try:
        temporary.mkdir(parents=True)
        attributes: dict[str, Any] = {**meta.tags, "Conventions": "CF-1.8"}
        (temporary / ".zgroup").write_text('{"zarr_format": 2}')
        (temporary / ".zattrs").write_text(json.dumps(attributes, indent=1))
        y = grid.y - (np.arange(rows) + 0.5) * grid.gsd
        x = grid.x + (np.arange(columns) + 0.5) * grid.gsd
        _zarr_array(temporary / "y", y, (rows,), {"_ARRAY_DIMENSIONS": ["y"], "units": "m"})
        _zarr_array(temporary / "x", x, (columns,), {"_ARRAY_DIMENSIONS": ["x"], "units": "m"})
        transform = grid.transform
        geo = " ".join(map(str, (transform.c, transform.a, transform.b, transform.f, transform.d, transform.e)))
        crs = {"crs_wkt": grid.crs.to_wkt(), "spatial_ref": grid.crs.to_wkt(), "GeoTransform": geo}
        _zarr_array(temporary / "spatial_ref", np.zeros((), np.int32), (), {"_ARRAY_DIMENSIONS": [], **crs})
        extra: dict[str, Any] = {"_ARRAY_DIMENSIONS": ["y", "x", "feature"], "grid_mapping": "spatial_ref"}
        if step is not None:
            _zarr_array(temporary / "scale", step, step.shape, {"_ARRAY_DIMENSIONS": ["feature"]})
            extra["description"] = "value = stored * scale[feature]; -128 is nodata"
        _zarr_array(temporary / "embedding", tokens, (int(edge), int(edge), bands), extra, dtype, step)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(temporary, out)
    except OSError as error:
        raise SceneError(f"{out}: cannot be written ({first_line(error)}); free space and start again") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _zarr_array(
    folder: Path,
    data: np.ndarray,
    chunks: Sequence[int],
    attributes: Mapping[str, Any],
    dtype: str = "",
    step: np.ndarray | None = None,
) -> None:
    stored = np.dtype(dtype or data.dtype)
    fill: Any = "NaN" if stored.kind == "f" else INT8_NODATA if stored == np.int8 else 0
    if stored == np.float16:
        fill = None  # GDAL 3.12 opens no array of halves with one; every chunk is written, so none is needed
    folder.mkdir()
    header = {
        "zarr_format": 2,
        "shape": list(data.shape),
        "chunks": list(chunks),
        "dtype": stored.str,
        "compressor": {"id": "zlib", "level": 1},
        "fill_value": fill,
        "order": "C",
        "filters": None,
    }
    (folder / ".zarray").write_text(json.dumps(header, indent=1))
    (folder / ".zattrs").write_text(json.dumps(dict(attributes), indent=1))
    for index in np.ndindex(*(-(-n // c) for n, c in zip(data.shape, chunks, strict=True))):
        part = np.asarray(data[tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunks, strict=True))])
        full = np.full(tuple(chunks), np.nan if stored.kind == "f" else fill, stored)
        full[tuple(slice(0, n) for n in part.shape)] = encode_values(part, dtype, step) if dtype else part
        (folder / (".".join(map(str, index)) or "0")).write_bytes(zlib.compress(full.tobytes(), 1))
        _release(data)


# --- GeoParquet ----------------------------------------------------------------------------------


def write_windows(out: Path, rows: Sequence[Mapping[str, Any]], meta: Meta) -> None:
    """One row per window with the columns of Major-TOM's embedding sets, as GeoParquet 1.1 in EPSG:4326."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: [r[name] for r in rows] for name in rows[0]}
    columns["embedding"] = _vectors(np.stack([r["embedding"] for r in rows]))
    columns["pixel_bbox"] = pa.array(columns["pixel_bbox"], pa.list_(pa.int32(), 4))
    columns["geometry"] = pa.array(columns["geometry"], pa.binary())
    write_parquet(out, columns, meta.tags, "geometry")


def _vectors(array: np.ndarray) -> Any:
    import pyarrow as pa

    flat = pa.array(np.ascontiguousarray(array, np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def write_parquet(out: Path, columns: Mapping[str, Any], tags: Mapping[str, str], geometry: str = "") -> None:
    """A Parquet file with provenance in its metadata; ``geometry`` names a WKB column (GeoParquet)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({k: _vectors(v) if isinstance(v, np.ndarray) and v.ndim == 2 else v for k, v in columns.items()})
    metadata = {k: str(v) for k, v in tags.items()}
    if geometry:
        names = {1: "Point", 3: "Polygon", 6: "MultiPolygon"}
        kinds = sorted({names[struct.unpack_from("<I", shape, 1)[0]] for shape in table[geometry].to_pylist()})
        described = {geometry: {"encoding": "WKB", "geometry_types": kinds}}
        geo = {"version": "1.1.0", "primary_column": geometry, "columns": described}
        metadata["geo"] = json.dumps(geo)
    temporary = out.with_name(out.name + ".tmp")
    try:
        pq.write_table(table.replace_schema_metadata(metadata), temporary, compression="zstd")
        os.replace(temporary, out)
    except (OSError, pa.ArrowException) as error:
        raise SceneError(f"{out}: cannot be written ({first_line(error)}); free space and start again") from None
    finally:
        temporary.unlink(missing_ok=True)


def window_row(
    grid: Grid, box: tuple[int, int, int, int], cls: np.ndarray, product: str, time: str, model: str
) -> dict:
    """The row of one window; ``box`` is (left, top, right, bottom) in pixels of the scene's grid."""
    left, top, right, bottom = box
    part = grid.window(top, left, bottom - top, right - left)
    corners = [(part.bounds[i], part.bounds[j]) for i, j in ((0, 1), (2, 1), (2, 3), (0, 3), (0, 1))]
    lons, lats = transform_points(grid.crs, "EPSG:4326", *zip(*corners, strict=True))
    middle = ((part.bounds[0] + part.bounds[2]) / 2, (part.bounds[1] + part.bounds[3]) / 2)
    (lon,), (lat,) = transform_points(grid.crs, "EPSG:4326", [middle[0]], [middle[1]])
    row, column = majortom_cell(lat, lon)
    footprint = "POLYGON ((" + ", ".join(f"{x:.3f} {y:.3f}" for x, y in corners) + "))"
    ring = list(zip(lons, lats, strict=True))
    name = hashlib.sha256(f"{footprint}{grid.crs.to_string()}{product}{time}{model}".encode()).hexdigest()
    return {
        "unique_id": name,
        "embedding": cls,
        "timestamp": time,
        "product_id": product,
        "grid_cell": f"{row}_{column}",
        "grid_row_u": _signed(row, "U"),
        "grid_col_r": _signed(column, "R"),
        "geometry": wkb_polygon(ring),
        "centre_lat": lat,
        "centre_lon": lon,
        "utm_footprint": footprint,
        "utm_crs": grid.crs.to_string(),
        "pixel_bbox": list(box),
    }


def wkb_polygon(ring: Sequence[tuple[float, float]]) -> bytes:
    """Little-endian well-known binary of a polygon in degrees; across the antimeridian it is cut into two there."""
    lon, lat = np.array(ring).T
    if np.ptp(lon) <= 180:
        return struct.pack("<BIII", 1, 3, 1, len(ring)) + b"".join(struct.pack("<dd", x, y) for x, y in ring)
    turned = shapely.make_valid(shapely.Polygon(np.stack([lon % 360, lat], 1)))
    halves = [shapely.intersection(turned, shapely.box(west, -90, west + 180, 90)) for west in (0, 180)]
    halves[1] = shapely.transform(halves[1], lambda places: places - (360, 0))
    return shapely.to_wkb(shapely.union_all(halves), byte_order=1)


def majortom_cell(lat: float, lon: float) -> tuple[str, str]:
    """Row and column names ("199U", "1099R") of the Major-TOM grid with 10 km cells (arXiv 2402.12095)."""
    around = 2 * np.pi * 6378.137
    rows = int(np.ceil(around / 2 / 10))
    spacing = 180.0 / rows
    row = int(np.floor((lat + 90) / spacing))
    bottom = -90 + row * spacing
    columns = max(1, int(np.ceil(around * np.cos(np.radians(bottom)) / 10)))
    column = int(np.floor((lon + 180) / (360.0 / columns)))
    # Names count from the first row and column at or beyond zero.
    zero_row = np.ceil(90 / spacing - 1e-9)
    zero_column = np.ceil(180 / (360.0 / columns) - 1e-9)
    return _name(row - int(zero_row), "U", "D"), _name(column - int(zero_column), "R", "L")


def _name(number: int, up: str, down: str) -> str:
    return f"{number}{up}" if number >= 0 else f"{-number}{down}"


def _signed(name: str, up: str) -> int:
    return int(name[:-1]) if name.endswith(up) else -int(name[:-1])
