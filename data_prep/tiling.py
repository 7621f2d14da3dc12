"""Cutting tiles out of cells, at sizes that every native sampling divides."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from data_prep.raster import BadInput, Grid

UNIT = 6  # ten-metre pixels a 60 m pixel
LEAST = 2 * UNIT  # a tile's side: TFDS does not read a tensor of one pixel back, see tiles.features
BLOCK_TILES = 2  # tiles a side of the blocks that large scenes are read in


@dataclasses.dataclass(frozen=True)
class Window:
    """A rectangle in pixels of the finest grid of a cell."""

    row: int
    col: int
    height: int
    width: int

    @property
    def name(self) -> str:
        return f"r{self.row}_c{self.col}"


def check_multiple(pixels: int, what: str) -> None:
    """Raises ValueError naming the nearest legal values unless ``pixels`` (10 m) are whole 60 m pixels."""
    if pixels > 0 and pixels % UNIT == 0:
        return
    below, above = pixels // UNIT * UNIT, -(-max(pixels, 1) // UNIT) * UNIT
    nearest = [str(v) for v in dict.fromkeys((below, above)) if v > 0]
    raise ValueError(
        f"{what} {pixels}: must be a multiple of {UNIT} pixels (60 m), or bands at 20 and 60 m cannot be cut; "
        f"nearest legal: {' or '.join(nearest)}"
    )


def windows(height: int, width: int, size: int, stride: int) -> list[Window]:
    """Full tiles of ``size`` every ``stride`` pixels, row by row; a smaller cell is one tile of its own size."""
    return [
        Window(row, col, h, w) for row, h in _origins(height, size, stride) for col, w in _origins(width, size, stride)
    ]


def _origins(length: int, size: int, stride: int) -> list[tuple[int, int]]:
    if length <= size:
        return [(0, length)]
    return [(start, size) for start in range(0, length - size + 1, stride)]


def block_side(size: int, stride: int) -> int:
    """Pixels a side of a block: of ``BLOCK_TILES`` tiles, whether they overlap or lie apart."""
    return stride * (BLOCK_TILES - 1) + size


def blocks(height: int, width: int, size: int, stride: int) -> list[Window]:
    """Parts of a scene, row by row, whose :func:`windows` together are those of the scene."""
    side, step = block_side(size, stride), stride * BLOCK_TILES
    return [
        Window(row, col, min(side, height - row), min(side, width - col))
        for row in range(0, max(1, height - size + 1), step)
        for col in range(0, max(1, width - size + 1), step)
    ]


def whole(length: int, native: bool) -> int:
    """Pixels of a side that can be cut: with bands at 20 and 60 m only whole 60 m pixels. Raises BadInput."""
    usable, least = (length // UNIT * UNIT, LEAST) if native else (length, 2)
    if usable < least:
        bands = "with bands at 20 and 60 m " if native else ""
        raise BadInput(f"side of {length} pixels: {bands}at least {least} are needed")
    return usable


def on_grid(window: Window, finest: Grid, grid: Grid) -> Window:
    """The pixels of ``grid`` that cover a window of the ``finest`` grid.

    Origins that differ by less than half a pixel (the snapped 20 and 60 m grids) map index to index;
    others map to the nearest pixel edge, and may reach over the edge of ``grid``.
    """
    fa, _, fc, _, fe, ff = finest.transform
    a, _, c, _, e, f = grid.transform
    top, left = ff + window.row * fe, fc + window.col * fa
    row, col = _round((top - f) / e), _round((left - c) / a)
    return Window(row, col, max(1, _round(window.height * fe / e)), max(1, _round(window.width * fa / a)))


def _round(value: float) -> int:
    return math.floor(value + 0.5)


def cut(pixels: np.ndarray, window: Window, fill: float) -> np.ndarray:
    """The window of an array [H, W, ...], padded with ``fill`` where it reaches over the edge."""
    height, width = pixels.shape[:2]
    top, left = max(0, window.row), max(0, window.col)
    bottom, right = min(height, window.row + window.height), min(width, window.col + window.width)
    if (bottom - top, right - left) == (window.height, window.width):
        return pixels[top:bottom, left:right]
    result = np.full((window.height, window.width, *pixels.shape[2:]), fill, pixels.dtype)
    if bottom > top and right > left:
        result[top - window.row : bottom - window.row, left - window.col : right - window.col] = pixels[
            top:bottom, left:right
        ]
    return result
