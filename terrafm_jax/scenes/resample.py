"""Resampling between grids of one CRS: GDAL's antialiased bilinear kernel, one axis after the other.

On parallel grids the weights of the kernel are products of row and column weights, so two short sums do what
GDAL's general warp does pixel by pixel.
"""

from __future__ import annotations

import numpy as np
from affine import Affine

from terrafm_jax.scenes.grid import Grid

Taps = tuple[np.ndarray, np.ndarray, np.ndarray]


def resample(data: np.ndarray, transform: Affine, grid: Grid) -> np.ndarray:
    """Pixels of a north-up raster on a grid of the same CRS.

    Args:
      data: float32 [bands, rows, columns], NaN in all bands of a pixel at once where nothing was measured.
      transform: of ``data``.

    Returns:
      float32 [bands, H, W]: mean of the valid pixels under a triangle that reaches as far as the larger of the two
      pixels; NaN where the pixel under the center is not, or the center lies outside of the raster.
    """
    rows = _taps((grid.y - transform.f) / transform.e, grid.gsd / -transform.e, grid.height, data.shape[1])
    columns = _taps((grid.x - transform.c) / transform.a, grid.gsd / transform.a, grid.width, data.shape[2])
    missing = np.isnan(data[0])
    if missing.any():
        weight = _separable((~missing)[None].astype(np.float32), rows, columns)[0]
        out = _separable(np.where(missing, np.float32(0), data), rows, columns)
        out /= np.where(missing[np.ix_(np.maximum(rows[2], 0), np.maximum(columns[2], 0))], np.float32(np.nan), weight)
    else:
        out = _separable(data, rows, columns)
    out[:, rows[2] < 0] = np.nan
    out[:, :, columns[2] < 0] = np.nan
    return out


def _taps(start: float, step: float, count: int, size: int) -> Taps:
    """Where the pixels of one axis come from.

    Args:
      start: first border of the output in pixels of the input. step: pixels of the input per pixel of the output.
      count, size: pixels of output and input.

    Returns:
      Positions int [taps, count], their weights float32 [taps, count] with sum one, and int [count] the position under
      the center, -1 outside.
    """
    at = start + (np.arange(count) + 0.5) * step
    reach = max(step, 1.0)
    first = np.floor(at - reach + 0.5).astype(int)
    index = first + np.arange(int(np.ceil(2 * reach)) + 1)[:, None]
    weight = np.maximum(0.0, 1.0 - np.abs(at - index - 0.5) / reach) * ((index >= 0) & (index < size))
    used = weight.any(1)  # on aligned grids the outermost pixels weigh nothing
    weight, index = weight[used], np.clip(index[used], 0, size - 1)
    weight /= np.maximum(weight.sum(0), 1e-12)
    center = np.where((at >= 0) & (at <= size), np.clip(np.floor(at).astype(int), 0, size - 1), -1)
    return index, weight.astype(np.float32), center


def _separable(data: np.ndarray, rows: Taps, columns: Taps) -> np.ndarray:
    """Both sums over [bands, rows, columns]; the one that leaves less to do for the other comes first."""
    if data.shape[1] > rows[0].shape[1]:
        return _along_columns(_along_rows(data, rows), columns)
    return _along_rows(_along_columns(data, columns), rows)


def _along_rows(data: np.ndarray, taps: Taps) -> np.ndarray:
    index, weight, _ = taps
    out = data[:, index[0]] * weight[0][:, None]
    for i, w in zip(index[1:], weight[1:], strict=True):
        out += data[:, i] * w[:, None]
    return out


def _along_columns(data: np.ndarray, taps: Taps) -> np.ndarray:
    index, weight, _ = taps
    out = data[:, :, index[0]] * weight[0]
    for i, w in zip(index[1:], weight[1:], strict=True):
        out += data[:, :, i] * w
    return out
