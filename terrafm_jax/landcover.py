"""The table of land-cover categories: ESA WorldCover classes, plus open sea and unknown.

WorldCover never is a label or an input in pretraining; it steers sampling and the frequency-aware
center. Codes and colors: ESA WorldCover 10 m v200 product user manual.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class LandCover:
    """One category. ``code`` is the value in WorldCover maps, None for the two that we derive."""

    name: str
    title: str
    code: int | None
    color: str


CATEGORIES: tuple[LandCover, ...] = (
    LandCover("tree", "Tree cover", 10, "#006400"),
    LandCover("shrub", "Shrubland", 20, "#ffbb22"),
    LandCover("grass", "Grassland", 30, "#ffff4c"),
    LandCover("crop", "Cropland", 40, "#f096ff"),
    LandCover("built", "Built-up", 50, "#fa0000"),
    LandCover("bare", "Bare / sparse vegetation", 60, "#b4b4b4"),
    LandCover("snow", "Snow and ice", 70, "#f0f0f0"),
    LandCover("water", "Permanent water bodies", 80, "#0064c8"),
    LandCover("wetland", "Herbaceous wetland", 90, "#0096a0"),
    LandCover("mangrove", "Mangroves", 95, "#00cf75"),
    LandCover("moss", "Moss and lichen", 100, "#fae6a0"),
    LandCover("sea", "Open sea", None, "#003c78"),
    LandCover("unknown", "Unknown", None, "#000000"),
)
NAMES: tuple[str, ...] = tuple(c.name for c in CATEGORIES)
NUM_CATEGORIES = len(CATEGORIES)
NUM_CLASSES = sum(c.code is not None for c in CATEGORIES)  # the 11 classes of WorldCover itself
WATER, SEA, UNKNOWN = NAMES.index("water"), NAMES.index("sea"), NAMES.index("unknown")
WORLDCOVER_NODATA = 0  # in WorldCover maps: open sea away from the coast

# The paper names these as frequent (sea is drawn down to 2 %, but still common before sampling).
PAPER_FREQUENT: tuple[str, ...] = ("tree", "grass", "sea")


def category(name: str) -> int:
    """Index of a category by name. Raises ValueError that lists the known names."""
    if name not in NAMES:
        raise ValueError(f"unknown land-cover category {name!r}; expected one of {list(NAMES)}")
    return NAMES.index(name)


def code_to_index() -> np.ndarray:
    """uint8 [256]: WorldCover code -> category index; codes that do not exist map to ``unknown``."""
    table = np.full(256, UNKNOWN, np.uint8)
    table[WORLDCOVER_NODATA] = SEA
    for i, c in enumerate(CATEGORIES):
        if c.code is not None:
            table[c.code] = i
    return table


def frequent(shares: Sequence[float], names: Sequence[str] = ()) -> np.ndarray:
    """bool [NUM_CATEGORIES]: the categories that feed the second center.

    ``names`` overrides the rule "share among the known categories above 1 / number of categories
    that occur" (our inference: the paper only gives examples). Of classes that are equally frequent, none is.
    """
    mask = np.zeros(NUM_CATEGORIES, bool)
    if names:
        mask[[category(n) for n in names]] = True
        return mask
    known = np.asarray(shares, np.float64).copy()
    if known.shape != (NUM_CATEGORIES,):
        raise ValueError(f"expected {NUM_CATEGORIES} shares, found shape {known.shape}")
    known[UNKNOWN] = 0
    occurring = int((known > 0).sum())
    if occurring:
        mask = known / known.sum() * occurring > 1.0 + 1e-6  # shares that sampling has made equal differ by rounding
    return mask
