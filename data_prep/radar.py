"""Sentinel-1: to the Sentinel-2 grid in linear power, then to hundredths of a decibel.

Averaging decibels biases real tiles by 0.12 to 0.44 dB, so every resampling happens in power, with
kernels that leave nodata out and are renormalized over what remains.
"""

from __future__ import annotations

import numpy as np
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.warp import reproject

from data_prep import tiling
from data_prep.raster import Grid
from terrafm_jax.sensors import S1

_ALIGNED = 1e-3  # pixels: grids that differ by less lie in the same place
NOTHING = -300.0  # dB: whatever lies below is a fill value, declared or not
_LOWEST, _HIGHEST = S1.nodata + 1, np.iinfo(S1.dtype).max  # the lowest number of all is nodata


def power_from(values: np.ndarray, unit: str, nodata: float | None) -> np.ndarray:
    """Delivered values [...] -> linear power, float32, NaN where there is no measurement.

    Args:
      values: as delivered.
      unit: ``power`` (power <= 0 is nodata) or ``dB``.
      nodata: the value that the file declares, besides NaN, infinities and impossible decibels.
    """
    power = values.astype(np.float32, copy=False)
    if unit == "power" and power.size and power.min() > 0 and power.max() < np.inf and not (nodata or 0) > 0:
        return power  # NaN fails both comparisons
    missing = ~(power < np.inf)  # NaN, too
    if nodata is not None and (unit == "dB" or nodata > 0):
        missing |= power == nodata
    if unit == "dB":
        missing |= power < NOTHING
        power = np.float32(10.0) ** (power / np.float32(10.0))
    elif unit != "power":
        raise ValueError(f"unit of Sentinel-1 must be 'power' or 'dB', found {unit!r}")
    missing |= ~(power > 0)
    return np.where(missing, np.float32(np.nan), power)


def warp_power(power: np.ndarray, grid: Grid, target: Grid) -> np.ndarray:
    """Power [..., H, W] with NaN = nodata (in all bands or none) on ``grid`` -> float32 on ``target``.

    Bilinear with masked, renormalized weights, widened when the target is coarser; a target pixel
    whose center lies on nodata is nodata. An equal grid returns the input untouched, one that is shifted
    by whole pixels is cut or padded without any arithmetic.
    """
    if same_place(grid, target):
        return power
    shift = whole_shift(grid, target)
    if shift is not None:
        window = tiling.Window(*shift, *target.shape)
        planes = power.reshape(-1, *grid.shape)
        return np.stack([tiling.cut(p, window, np.nan) for p in planes]).reshape(*power.shape[:-2], *target.shape)
    result = np.full((*power.shape[:-2], *target.shape), np.nan, np.float32)
    reproject(
        power,
        result,
        src_transform=grid.affine,
        src_crs=CRS.from_user_input(grid.crs),
        src_nodata=np.nan,
        dst_transform=target.affine,
        dst_crs=CRS.from_user_input(target.crs),
        dst_nodata=np.nan,
        resampling=Resampling.bilinear,
    )
    return result


def same_place(grid: Grid, other: Grid) -> bool:
    """Same CRS and shape, and the same corners, to a thousandth of a pixel."""
    if grid.crs != other.crs or grid.shape != other.shape:
        return False
    step = abs(grid.transform[0])
    return all(abs(a - b) <= _ALIGNED * step for a, b in zip(grid.bounds(), other.bounds(), strict=True))


def whole_shift(grid: Grid, other: Grid) -> tuple[int, int] | None:
    """(rows, columns) from the origin of ``grid`` to that of ``other``, None unless they share all pixel edges."""
    (a, _, c, _, e, f), (oa, _, oc, _, oe, of) = grid.transform, other.transform
    rows, cols = (of - f) / e, (oc - c) / a
    drift = max(abs(oa / a - 1) * other.width, abs(oe / e - 1) * other.height)
    off = max(abs(rows - round(rows)), abs(cols - round(cols)), drift)
    return (round(rows), round(cols)) if grid.crs == other.crs and off <= _ALIGNED else None


def to_hundredths(power: np.ndarray) -> np.ndarray:
    """Power with NaN -> int16 hundredths of dB, nodata -32768; exact to 0.005 dB."""
    with np.errstate(invalid="ignore", divide="ignore"):
        decibel = np.log10(power)
        decibel *= np.float32(10.0 / S1.scale)
        np.rint(decibel, out=decibel)
        np.clip(decibel, _LOWEST, _HIGHEST, out=decibel)
        stored = decibel.astype(S1.dtype)
    if power.size and np.isnan(power.min()):
        stored[np.isnan(power)] = S1.nodata
    return stored
