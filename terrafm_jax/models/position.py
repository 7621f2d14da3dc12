"""Bicubic interpolation of learned position embeddings, exactly as the released code does it in PyTorch.

``torch.nn.functional.interpolate(mode="bicubic", scale_factor=((h + 0.1) / 14, (w + 0.1) / 14))``: kernel
a = -0.75, no antialiasing, align_corners False, and coordinates scaled by the *given* factors instead of
the ratio of sizes. ``jax.image.resize`` differs in the kernel (a = -0.5) and in the scale.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

_A = -0.75
_NUDGE = 0.1  # upstream adds it to the grid size before it computes the scale factor


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel, support 2."""
    x = np.abs(distance)
    near = (_A + 2.0) * x**3 - (_A + 3.0) * x**2 + 1.0
    far = _A * (x**3 - 5.0 * x**2 + 8.0 * x - 4.0)
    return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


@functools.lru_cache(maxsize=256)
def interpolation_matrix(size: int, grid: int) -> np.ndarray:
    """float64 [size, grid]: weights that resample ``grid`` learned rows to ``size``; edges repeat."""
    source = (np.arange(size) + 0.5) * grid / (size + _NUDGE) - 0.5
    first = np.floor(source).astype(int) - 1
    matrix = np.zeros((size, grid))
    for tap in range(4):
        index = first + tap
        np.add.at(matrix, (np.arange(size), np.clip(index, 0, grid - 1)), _cubic(source - index))
    return matrix


def interpolate(embedding: Array, rows: int, columns: int, grid: int) -> Array:
    """Resamples ``embedding [grid * grid, d]`` to ``[rows, columns, d]``; the learned grid itself is returned as is."""
    table = embedding.reshape(grid, grid, -1)
    if (rows, columns) == (grid, grid):
        return table
    vertical = jnp.asarray(interpolation_matrix(rows, grid), table.dtype)
    horizontal = jnp.asarray(interpolation_matrix(columns, grid), table.dtype)
    return jnp.einsum("hi,wj,ijd->hwd", vertical, horizontal, table, precision=lax.Precision.HIGHEST)
