"""Pixels of any part of the scene's grid: warped, in canonical units, several dates composited, with a mask.

Resampling follows the views of pretraining: an antialiased triangle (GDAL's bilinear warp widens its
kernel when it shrinks), renormalized over valid pixels; Sentinel-1 in linear power.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import rasterio
import rasterio.features
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.warp import reproject
from rasterio.windows import Window

from terrafm_jax.checks import hides
from terrafm_jax.scenes import area
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Grid, bounds_in
from terrafm_jax.scenes.layers import Acquisition, Layer, broken, open_raster
from terrafm_jax.scenes.masks import SCL_INVALID, MaskFile, check_masks
from terrafm_jax.scenes.measured import Part, Stored, measured, nothing
from terrafm_jax.scenes.resample import resample
from terrafm_jax.sensors import SENSORS
from terrafm_jax.units import NOISE_FLOOR

_log = logging.getLogger(__name__)

COMPOSITES = ("first", "median", "mean")
_POWER_FLOOR = 10.0 ** (NOISE_FLOOR / 10.0)
_OPEN_FILES = 100  # a thread: a year of dates has a thousand, as many as a process may open on most machines


@dataclasses.dataclass(frozen=True)
class Pixels:
    """One sensor on a part of the grid: values float32 [H, W, bands] in DN or dB, valid bool [H, W]."""

    values: np.ndarray
    valid: np.ndarray


class SceneReader:
    """Reads parts of a scene. Every thread opens files of its own and keeps some open.

    Args:
      acquisitions: one or several dates per sensor, in order of preference.
      grid: the common grid.
      composite: ``first`` valid date, or ``median`` or ``mean`` of the valid dates, per pixel.
      masks: rasters that take pixels out.
      use_classes: take out the invalid classes of an acquisition's own scene classification.
    """

    def __init__(
        self,
        acquisitions: Sequence[Acquisition],
        grid: Grid,
        *,
        composite: str = "first",
        masks: Sequence[MaskFile] = (),
        use_classes: bool = False,
    ):
        if composite not in COMPOSITES:
            raise SceneError(f"--composite {composite}: expected one of {list(COMPOSITES)}")
        self.grid, self._composite, self._masks, self._classes = grid, composite, tuple(masks), use_classes
        self.dates: dict[str, list[Acquisition]] = defaultdict(list)
        for acquisition in acquisitions:
            self.dates[acquisition.sensor].append(acquisition)
        self.bands = {key: _common_bands(dates) for key, dates in self.dates.items()}
        self._local, self._lock = threading.local(), threading.Lock()
        self._noted: list[str] = []
        for text in check_masks(grid, self._masks, self.dates, use_classes):
            self.warn(text)

    @property
    def warnings(self) -> list[str]:
        """What looks wrong with the inputs, as far as known: reading may find more."""
        return list(
            dict.fromkeys([*(t for dates in self.dates.values() for d in dates for t in d.doubts), *self._noted])
        )

    def warn(self, text: str) -> None:
        """Warns once, in whichever thread finds it first."""
        with self._lock:
            new = text not in self._noted
            self._noted += [text] if new else []
        if new:
            _log.warning(text)

    @property
    def paths(self) -> list[str]:
        """Every file that the pixels and the mask come from."""
        dates = [date for dates in self.dates.values() for date in dates]
        classes = [date.classes for date in dates if self._classes and date.classes]
        return [p for date in dates for p in date.paths] + classes + [mask.path for mask in self._masks]

    def read(self, row: int, column: int, height: int, width: int) -> dict[str, Pixels]:
        """Every sensor on height x width pixels from (row, column) on; beyond the grid's edges pixels are mirrored.

        A mirrored pixel is as valid as the one it mirrors.
        """
        inside = self.grid.window(
            row, column, min(height, self.grid.height - row), min(width, self.grid.width - column)
        )
        pad = ((0, height - inside.height), (0, width - inside.width))
        keep = self._kept(inside)
        found = {}
        for key, dates in self.dates.items():
            pixels = self._sensor(key, dates, inside)
            values, valid = pixels.values, pixels.valid & keep
            if np.any(pad):
                values, valid = np.pad(values, (*pad, (0, 0)), "symmetric"), np.pad(valid, pad, "symmetric")
            found[key] = Pixels(values, valid)
        return found

    def _sensor(self, key: str, dates: Sequence[Acquisition], grid: Grid) -> Pixels:
        stack = [self._date(date, grid) for date in dates]
        if len(stack) == 1:
            values = stack[0]
        elif self._composite == "first":
            values = stack[0].copy()
            for other in stack[1:]:
                hole = np.isnan(values).any(0)
                values[:, hole] = other[:, hole]
        else:
            values = _middle(np.stack(stack), self._composite)
        missing = np.isnan(values.sum(0))  # the values are bounded: only NaN makes NaN
        if key == "s1":
            values = 10.0 * np.log10(np.maximum(values, _POWER_FLOOR))
        if missing.any():
            values[:, missing] = 0.0
        return Pixels(np.moveaxis(values, 0, -1), ~missing)  # a view: whoever cuts windows copies anyway

    def _date(self, date: Acquisition, grid: Grid) -> np.ndarray:
        """float32 [bands, H, W] in harmonized DN or linear power, NaN where nothing was measured."""
        groups: dict[tuple[Any, ...], list[Layer]] = defaultdict(list)
        for layer in date.layers:
            if layer.band in self.bands[date.sensor]:
                source = self._open(layer.path)
                groups[(source.crs, tuple(source.transform), source.shape)].append(layer)
        out = np.full((len(self.bands[date.sensor]), grid.height, grid.width), np.nan, np.float32)
        parts = [part for layers in groups.values() if (part := self._part(layers, grid))]
        for part, empty in zip(parts, nothing(parts), strict=True):
            rows = [self.bands[date.sensor].index(layer.band) for layer in part.layers]
            stored = [Stored.of(self._open(layer.path), layer.index) for layer in part.layers]
            out[rows] = _on_grid(part, measured(part.data, date, stored, empty, self.warn), grid)
        if self._classes and date.classes:
            scl = self._classes_on(date.classes, grid)
            out[:, np.isin(scl, SCL_INVALID)] = np.nan
        return out

    def _part(self, layers: Sequence[Layer], grid: Grid) -> Part | None:
        """The pixels of bands of one resolution that a grid needs, None if there are none."""
        source = self._open(layers[0].path)
        window = _source_window(source, grid)
        if window.width <= 0 or window.height <= 0:
            return None
        return Part(tuple(layers), self._pixels(layers, window), source.crs, source.window_transform(window))

    def _pixels(self, layers: Sequence[Layer], window: Window) -> np.ndarray:
        """float32 [layers, rows, columns] as stored; bands of one file in one call, and GDAL converts."""
        data = np.empty((len(layers), window.height, window.width), np.float32)
        start = 0
        for path, some in itertools.groupby(layers, lambda layer: layer.path):
            indexes = [layer.index for layer in some]
            part, source = data[start : start + len(indexes)], self._open(path)
            try:
                source.read(indexes, window=window, out=part)
                if hides(source):
                    part[:, source.read_masks(indexes[0], window=window) == 0] = np.nan
            except (RasterioError, OSError) as error:
                raise SceneError(f"{path}: {broken(error)}") from None
            start += len(indexes)
        return data

    def _open(self, path: str) -> rasterio.DatasetReader:
        if not hasattr(self._local, "opened"):
            self._local.opened = functools.lru_cache(_OPEN_FILES)(open_raster)
        return self._local.opened(path)

    def _classes_on(self, path: str, grid: Grid, zero_or_not: bool = False) -> np.ndarray:
        """uint8 [H, W]: classes of a raster on the grid, 0 beyond it; ``zero_or_not``: 1 for any other number."""
        source = self._open(path)
        out = np.zeros((grid.height, grid.width), np.uint8)
        window = _source_window(source, grid)
        if window.width > 0 and window.height > 0:
            try:
                data = source.read(1, window=window)
            except (RasterioError, OSError) as error:
                raise SceneError(f"{path}: {broken(error)}") from None
            reproject(
                (np.nan_to_num(data) != 0).astype(np.uint8) if zero_or_not else data,
                out,
                src_transform=source.window_transform(window),
                src_crs=source.crs,
                dst_transform=grid.transform,
                dst_crs=grid.crs,
                resampling=Resampling.nearest,
                tolerance=0.0,
            )
        return out

    def _kept(self, grid: Grid) -> np.ndarray:
        keep = np.ones((grid.height, grid.width), bool)
        for mask in self._masks:
            found = self._classes_on(mask.path, grid, zero_or_not=not mask.classes)
            keep &= ~np.isin(found, mask.classes) if mask.classes else found != 0
        return keep


def _middle(dates: np.ndarray, how: str) -> np.ndarray:
    """Median or mean of the valid dates of [dates, bands, H, W] per pixel; NaN where there is none.

    NumPy's nanmedian warns of empty pixels, and silencing warnings is not safe in threads.
    """
    measured = ~np.isnan(dates).any(1, keepdims=True)
    count = measured.sum(0)
    if how == "mean":
        found = np.where(measured, dates, 0.0).sum(0, dtype=np.float64) / np.maximum(count, 1)
    else:
        ranked = np.sort(np.where(measured, dates, np.inf), axis=0)
        ends = np.stack([np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(dates) - 1)])
        found = np.take_along_axis(ranked, ends, 0).mean(0)
    return np.where(count > 0, found, np.nan).astype(np.float32)


def _common_bands(dates: Sequence[Acquisition]) -> tuple[str, ...]:
    """Bands that every date of a sensor has, in canonical order."""
    shared = set.intersection(*(set(d.bands) for d in dates))
    bands = tuple(b for b in SENSORS[dates[0].sensor].band_names if b in shared)
    if not bands:
        raise SceneError(f"{dates[0].paths[0]} and {dates[1].paths[0]}: the dates of {dates[0].sensor} share no band")
    return bands


def _source_window(source: rasterio.DatasetReader, grid: Grid) -> Window:
    """Pixels of a raster that the kernel needs for a grid, clipped to the raster."""
    bounds = bounds_in(source, grid)
    t = source.transform  # north up: no shear
    left, right = ((x - t.c) / t.a for x in (bounds[0], bounds[2]))
    top, bottom = ((y - t.f) / t.e for y in (bounds[3], bounds[1]))
    # A triangle reaches as far as the ratio of the samplings, two pixels more absorb rounding.
    margin = int(np.ceil(max((right - left) / grid.width, (bottom - top) / grid.height, 1.0))) * 2 + 2
    left, top = max(int(np.floor(left)) - margin, 0), max(int(np.floor(top)) - margin, 0)
    right, bottom = min(int(np.ceil(right)) + margin, source.width), min(int(np.ceil(bottom)) + margin, source.height)
    return Window(left, top, max(right - left, 0), max(bottom - top, 0))  # rasterio refuses sides below zero


def _on_grid(part: Part, data: np.ndarray, grid: Grid) -> np.ndarray:
    """Measurements with NaN on the pixels of ``part`` -> float32 [layers, H, W] with NaN on a grid."""
    if part.crs == grid.crs:
        aligned = _offset(part.transform, grid)
        return _shift(data, aligned, grid) if aligned else resample(data, part.transform, grid)
    out = np.full((len(data), grid.height, grid.width), np.nan, np.float32)
    reproject(
        data,
        out,
        src_transform=part.transform,
        src_crs=part.crs,
        dst_transform=grid.transform,
        dst_crs=grid.crs,
        src_nodata=np.nan,
        dst_nodata=np.nan,
        resampling=Resampling.bilinear,
        tolerance=0.0,  # GDAL's approximate transformer would depend on where the window lies
    )
    return out


def _offset(transform: Any, grid: Grid) -> tuple[int, int] | None:
    """Whole rows and columns from the grid's origin to a raster with the same pixels, or None."""
    if abs(transform.a - grid.gsd) > 1e-9 or abs(transform.e + grid.gsd) > 1e-9:
        return None
    column, row = (transform.c - grid.x) / grid.gsd, (grid.y - transform.f) / grid.gsd
    if max(abs(column - round(column)), abs(row - round(row))) > 1e-3:
        return None
    return round(row), round(column)


def _shift(data: np.ndarray, offset: tuple[int, int], grid: Grid) -> np.ndarray:
    """Places data whose first pixel lies ``offset`` from the grid's; the rest is NaN."""
    (row, column), (_, rows, columns) = offset, data.shape
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + rows, grid.height), min(column + columns, grid.width)
    if (top, left, bottom, right) == (0, 0, grid.height, grid.width):
        return data[:, -row : grid.height - row, -column : grid.width - column]
    out = np.full((len(data), grid.height, grid.width), np.nan, np.float32)
    if bottom > top and right > left:
        out[:, top:bottom, left:right] = data[:, top - row : bottom - row, left - column : right - column]
    return out


def inside(aoi: Mapping[str, Any] | None, grid: Grid) -> np.ndarray:
    """bool [H, W]: pixels of a grid whose center lies in the area of interest."""
    size = grid.height, grid.width
    if aoi is None:
        return np.ones(size, bool)
    shape = area.project(aoi, grid.crs, grid.bounds)
    if shape is None:
        return np.zeros(size, bool)
    return rasterio.features.geometry_mask([shape], size, grid.transform, invert=True)
