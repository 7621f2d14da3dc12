"""Embeddings on disk, read back block by block: GeoTIFF and Zarr look the same from here on."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform as transform_points
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from terrafm_jax.scenes import output, tags
from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.scenes.grid import Grid
from terrafm_jax.scenes.layers import broken, open_raster
from terrafm_jax.scenes.points import to_grid

Block = tuple[slice, slice]  # rows and columns


class Embedding(Protocol):
    """Tokens on a grid.

    Attributes:
      path: where they lie. grid: one pixel per token. width: features. tags: provenance.
    """

    path: Path
    grid: Grid
    width: int
    tags: Mapping[str, str]

    def blocks(self) -> Iterator[Block]:
        """Every part that is stored together, in file order."""

    def read(self, block: Block) -> np.ndarray:
        """float32 [rows, columns, d] with int8 scaled back and NaN for nodata. Raises SceneError."""

    def __enter__(self) -> Embedding: ...

    def __exit__(self, *error: Any) -> None: ...


def open_embedding(path: Any) -> Embedding:
    """Opens an embedding written as GeoTIFF or Zarr. Raises SceneError for any other file."""
    path = Path(path)
    kind = output.FORMATS.get(path.suffix.lower(), "")
    if kind == "parquet":
        raise SceneError(
            f"{path}: holds windows or places, not tokens on a grid: it can be searched, but takes no change, picture "
            "or --query; embed with --out OUT.tif or OUT.zarr"
        )
    found = StoredZarr(path) if kind == "zarr" else StoredTiff(path)
    if tags.WEIGHTS not in found.tags:
        found.__exit__()
        raise SceneError(f"{path}: is no embedding of this program (tag {tags.WEIGHTS} is missing); run embed first")
    return found


def whole(found: Embedding) -> np.ndarray:
    """All tokens at once, float32 [rows, columns, d]."""
    return found.read((slice(0, found.grid.height), slice(0, found.grid.width)))


def place_of(grid: Grid, lon: float, lat: float) -> tuple[int, int] | None:
    """Row and column of the pixel at a place, None outside."""
    x, y = to_grid(np.array([[lon, lat]]), grid)[0]
    if not np.isfinite([x, y]).all():
        return None
    row, column = int((grid.y - y) // grid.gsd), int((x - grid.x) // grid.gsd)
    return (row, column) if 0 <= row < grid.height and 0 <= column < grid.width else None


def lonlat(grid: Grid, row: int, column: int) -> tuple[float, float]:
    """Longitude and latitude of the center of a pixel."""
    x, y = grid.x + (column + 0.5) * grid.gsd, grid.y - (row + 0.5) * grid.gsd
    (lon,), (lat,) = transform_points(grid.crs, "EPSG:4326", [x], [y])
    return lon, lat


def lonlat_bounds(grid: Grid) -> tuple[float, float, float, float]:
    """West, south, east, north of a grid in degrees."""
    return transform_bounds(grid.crs, "EPSG:4326", *grid.bounds)


def _unscaled(stored: np.ndarray, step: np.ndarray | None) -> np.ndarray:
    values = stored.astype(np.float32)
    if stored.dtype == np.int8:
        values = np.where(stored == output.INT8_NODATA, np.float32(np.nan), values * step)
    return values


class StoredTiff:
    """See :class:`Embedding`. Raises SceneError if the file is not a raster."""

    def __init__(self, path: Path):
        self.path, self._source = path, open_raster(path)
        t = self._source.transform
        self.grid = Grid(self._source.crs, t.c, t.f, t.a, self._source.height, self._source.width)
        self.width, self.tags = self._source.count, self._source.tags()

    def blocks(self) -> Iterator[Block]:
        for _, window in self._source.block_windows(1):
            yield window.toslices()

    def read(self, block: Block) -> np.ndarray:
        try:
            stored = self._source.read(window=Window.from_slices(*block))
        except (RasterioError, OSError) as error:
            raise SceneError(f"{self.path}: {broken(error)}") from None
        return _unscaled(np.moveaxis(stored, 0, -1), np.asarray(self._source.scales, np.float32))

    def __enter__(self) -> StoredTiff:
        return self

    def __exit__(self, *error: Any) -> None:
        self._source.close()


class StoredZarr:
    """See :class:`Embedding`: a group as ``output.write_zarr`` leaves it. Raises SceneError if it is another one."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.tags: dict[str, str] = _json(path / ".zattrs")
            self._header = _json(path / "embedding" / ".zarray")
            georeference = _json(path / "spatial_ref" / ".zattrs")
            x, gsd, _, y, _, _ = (float(v) for v in georeference["GeoTransform"].split())
            rows, columns, self.width = self._header["shape"]
            self.grid = Grid(CRS.from_wkt(georeference["crs_wkt"]), x, y, gsd, rows, columns)
            self._chunks, self._dtype = self._header["chunks"], np.dtype(self._header["dtype"])
            self._packed = (self._header["compressor"] or {}).get("id", "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CRSError) as error:
            raise SceneError(f"{path}: is no Zarr group that embed wrote ({first_line(error)}); run embed") from None
        if self._packed not in ("", "zlib") or self._chunks[2] != self.width or self._header.get("filters"):
            raise SceneError(
                f"{path}: was packed again by another program ({self._packed or 'other chunks'}); give what embed wrote"
            )
        self._step = self._scale() if self._dtype == np.int8 else None

    def _scale(self) -> np.ndarray:
        return np.frombuffer(self._bytes(self.path / "scale" / "0"), np.float32)[: self.width]

    def blocks(self) -> Iterator[Block]:
        high, wide = self._chunks[:2]
        for row in range(0, self.grid.height, high):
            for column in range(0, self.grid.width, wide):
                yield slice(row, min(row + high, self.grid.height)), slice(column, min(column + wide, self.grid.width))

    def read(self, block: Block) -> np.ndarray:
        rows, columns = block
        high, wide = self._chunks[:2]
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start, self.width), np.float32)
        for i in range(rows.start // high, -(-rows.stop // high)):
            for j in range(columns.start // wide, -(-columns.stop // wide)):
                top, bottom = max(rows.start, i * high), min(rows.stop, (i + 1) * high)
                left, right = max(columns.start, j * wide), min(columns.stop, (j + 1) * wide)
                part = self._chunk(i, j)[top - i * high : bottom - i * high, left - j * wide : right - j * wide]
                out[top - rows.start : bottom - rows.start, left - columns.start : right - columns.start] = part
        return out

    def _chunk(self, i: int, j: int) -> np.ndarray:
        data = self._bytes(self.path / "embedding" / f"{i}.{j}.0")
        try:
            stored = np.frombuffer(data, self._dtype).reshape(self._chunks)
        except ValueError as error:
            raise SceneError(f"{self.path}: {broken(error)}") from None
        return _unscaled(stored, self._step)

    def _bytes(self, path: Path) -> bytes:
        try:
            data = path.read_bytes()
            return zlib.decompress(data) if self._packed else data
        except (OSError, zlib.error) as error:
            raise SceneError(f"{path}: {broken(error)}") from None

    def __enter__(self) -> StoredZarr:
        return self

    def __exit__(self, *error: Any) -> None:
        """Nothing stays open."""


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
