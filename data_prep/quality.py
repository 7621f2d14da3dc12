"""How much of a tile was measured, and how much of it is cloud."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import numpy as np

from data_prep.harmonize import select

CLOUD_CODES = (1, 2)  # thick and thin in the 4-class mask of Major-TOM; 3 is shadow
BLACK_SHARE = 0.999


def nodata_share(measured: Mapping[str, np.ndarray]) -> float:
    """Share of pixels without a measurement on the finest group, 0..1. ``measured``: bool [H, W] per group."""
    finest = max(measured.values(), key=lambda mask: mask.size)
    return 1.0 - np.count_nonzero(finest) / finest.size


def is_black(share: float) -> bool:
    """A black tile: nodata (nearly) everywhere, whatever the metadata claims."""
    return share >= BLACK_SHARE


def is_constant(pixels: np.ndarray, valid: np.ndarray) -> bool:
    """Whether all valid pixels (at least two) hold one value: filled, not measured."""
    few = pixels[::16, ::16][valid[::16, ::16]]
    if few.size and few.min() != few.max():
        return False
    values = select(pixels, valid)
    return values.size > 1 and bool(values.min() == values.max())


def cloud_share(mask: np.ndarray | None, percent: float | None) -> tuple[float, str]:
    """Cloud share 0..1 (NaN unknown) and its source; recorded, never a filter.

    Args:
      mask: the cell's ``cloud_mask`` [H, W]. All zero also on fully overcast cells, so a mask
        without any cloud only counts if the metadata do not contradict it.
      percent: ``cloud_cover`` of the metadata, 0..100.
    """
    stated = None if percent is None or not np.isfinite(percent) else float(percent) / 100.0
    if mask is not None and mask.size:
        share = float(reduce(np.logical_or, [mask == code for code in CLOUD_CODES]).mean())
        if share > 0 or stated is None:
            return share, "cloud mask"
        return stated, "metadata (cloud mask empty)"
    return (stated, "metadata") if stated is not None else (float("nan"), "")
