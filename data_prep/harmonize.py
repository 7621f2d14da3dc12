"""Sentinel-2 processing-baseline offset, snapped band origins, and which pixels were measured at all.

The rules were measured on real tiles. The delivered DN stays untouched: the offset is recorded
beside it and subtracted by ``sensors.normalize``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from scipy import ndimage

from data_prep.raster import Affine6, Grid
from terrafm_jax.sensors import (
    BASELINE_OFFSET,
    L1C_CIRRUS_THRESHOLD,
    L2A_ABSTAIN,
    L2A_THRESHOLD,
    baseline,
    baseline_offset,
)

WITHOUT_ID = ("pixels", "prior")  # sources of an offset that no product id has proposed


@dataclasses.dataclass(frozen=True)
class Offset:
    """DN still inside the stored values, where that is known from, and whether id and pixels contradict."""

    value: float
    source: str
    conflict: bool = False


def select(pixels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The valid pixels; without a copy where all are."""
    return pixels if valid.all() else pixels[valid]


def _thin(pixels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The valid pixels, of a large band every second row and column: plenty for a percentile."""
    step = 2 if pixels.size > 400_000 else 1
    return select(pixels[::step, ::step], valid[::step, ::step])


def darker(values: np.ndarray, limit: int) -> bool:
    """Whether the 1st percentile (nearest rank) of values of any shape is at most ``limit``; False if there are none.

    Counting what lies below takes a tenth of the time that finding the percentile itself does.
    """
    return values.size > 0 and np.count_nonzero(values <= limit) >= max(1, values.size * 0.01)


def pixel_offset(key: str, bands: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]) -> float | None:
    """What the pixels say: 0, 1000, or None where they cannot tell.

    Args:
      key: ``s2_l1c`` or ``s2_l2a``.
      bands: delivered DN per band, each [H, W] at its own sampling; L1C needs B10 to be decided.
      valid: bool [H, W] per band.
    """
    if key == "s2_l1c":
        cirrus = select(bands["B10"], valid["B10"]) if "B10" in bands else np.empty(0)
        if cirrus.size == 0:
            return None
        return 0.0 if darker(cirrus, L1C_CIRRUS_THRESHOLD) else BASELINE_OFFSET
    thin = [_thin(bands[name], valid[name]) for name in bands]
    if any(darker(values, L2A_THRESHOLD) for values in thin):
        return 0.0
    return BASELINE_OFFSET if any(darker(values, L2A_ABSTAIN) for values in thin) else None


def decide_offset(product: str, pixels: float | None) -> Offset:
    """Joins the proposal of the product id with the verdict of the pixels.

    Dark pixels rule the offset out whatever the id says (a provider has subtracted it), while the
    lack of dark pixels does not overrule a documented baseline: a bright scene looks the same. The
    prior for N9999 and for products without a baseline is 0.
    """
    proposed = baseline_offset(product)
    if proposed is None:
        if pixels is not None:
            return Offset(pixels, WITHOUT_ID[0])
        return Offset(0.0, "prior: N9999" if baseline(product) is not None else WITHOUT_ID[1])
    if pixels is None:
        return Offset(proposed, "product id")
    if pixels == proposed:
        return Offset(proposed, "product id, pixels agree")
    if pixels == 0.0:
        return Offset(0.0, f"pixels against product id ({proposed:.0f})", conflict=True)
    return Offset(proposed, f"product id against pixels ({pixels:.0f})", conflict=True)


def snap_origin(grid: Grid) -> Grid:
    """Moves a misplaced origin to the nearest multiple of the pixel size.

    Major-TOM labels all bands of a cell with the bounds of the cell, while the pixels lie on the
    Sentinel-2 grid, whose lines are multiples of 10, 20 and 60 m. Grids of other pixel sizes or in
    degrees are returned as they are.
    """
    a, b, c, d, e, f = grid.transform
    if a not in (10.0, 20.0, 60.0) or e != -a:
        return grid
    snapped: Affine6 = (a, b, _nearest(c, a), d, e, _nearest(f, a))
    return dataclasses.replace(grid, transform=snapped)


def _nearest(value: float, step: float) -> float:
    return float(np.floor(value / step + 0.5) * step)


def misplaced(grids: Mapping[str, Grid]) -> bool:
    """The signature of the Major-TOM defect: several pixel sizes, one origin, and that off the coarsest grid."""
    sizes = {grid.transform[0] for grid in grids.values()}
    origins = {(grid.transform[2], grid.transform[5]) for grid in grids.values()}
    if len(sizes) < 2 or len(origins) != 1 or not sizes <= {10.0, 20.0, 60.0}:
        return False
    return any(coordinate % max(sizes) for coordinate in origins.pop())


def measured(empty: Mapping[str, np.ndarray], grids: Mapping[str, Grid]) -> dict[str, np.ndarray]:
    """Which pixels hold a measurement, per resolution group.

    A pixel is nodata only where *all* bands of the sensor are: zero in some bands is clipped dark
    reflectance. Across samplings, a coarse pixel without values needs an empty finer pixel under it, a
    fine one an empty coarser pixel over it; and pixels without values that touch nodata belong to it,
    because the edge of a swath runs through coarse pixels that still hold values.

    Args:
      empty: bool [H, W] per group, True where all bands of that group are nodata.
      grids: the (snapped) grid per group.

    Returns:
      bool [H, W] per group, True = measured.
    """
    result = {}
    for group, own in empty.items():
        nothing = own.copy()
        mixed = False
        for other, theirs in empty.items():
            if other == group or not nothing.any():
                continue
            same = grids[group] == grids[other]
            mixed |= not same
            nothing &= theirs if same else _empty_on(theirs, grids[other], grids[group])
        if mixed and nothing.any():
            nothing = connected(own, nothing)
        result[group] = ~nothing
    return result


def connected(mask: np.ndarray, seeds: np.ndarray) -> np.ndarray:
    """bool [H, W]: the parts of ``mask`` (8 neighbors) in which there is a pixel of ``seeds``."""
    rows, cols = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    result = np.zeros_like(mask)
    if len(rows):  # labels take much longer than all else here, and masks are often a corner of the array
        box = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
        labels, count = ndimage.label(mask[box], structure=np.ones((3, 3), bool))
        chosen = np.zeros(count + 1, bool)
        chosen[labels[seeds[box] & mask[box]]] = True
        result[box] = chosen[labels]
    return result


def _empty_on(empty: np.ndarray, grid: Grid, target: Grid) -> np.ndarray:
    """Pixels of ``target`` with any empty pixel of ``grid`` under them, bool [H, W]."""
    fine = max(1, round(target.transform[0] / grid.transform[0]))
    centers = (np.arange(fine) + 0.5) / fine
    (a, _, c, _, e, f), (ga, _, gc, _, ge, gf) = target.transform, grid.transform
    result = np.zeros(target.shape, bool)
    for dy in centers:
        rows = np.clip(_index(f, e, gf, ge, dy, target.height), 0, grid.height - 1)
        for dx in centers:
            cols = np.clip(_index(c, a, gc, ga, dx, target.width), 0, grid.width - 1)
            result |= empty.take(rows, axis=0).take(cols, axis=1)
    return result


def _index(origin: float, step: float, other_origin: float, other_step: float, shift: float, count: int) -> np.ndarray:
    """Pixel numbers on another axis of the points ``shift`` into each of ``count`` pixels."""
    points = origin + (np.arange(count) + shift) * step
    return np.floor((points - other_origin) / other_step).astype(np.int64)
