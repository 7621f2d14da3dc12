"""The table of land cover against the product user manual of ESA WorldCover 10 m v200."""

from __future__ import annotations

import numpy as np
import pytest

from terrafm_jax import landcover

# code, color in red, green, blue, title of the class
OFFICIAL = (
    (10, (0, 100, 0), "Tree cover"),
    (20, (255, 187, 34), "Shrubland"),
    (30, (255, 255, 76), "Grassland"),
    (40, (240, 150, 255), "Cropland"),
    (50, (250, 0, 0), "Built-up"),
    (60, (180, 180, 180), "Bare / sparse vegetation"),
    (70, (240, 240, 240), "Snow and ice"),
    (80, (0, 100, 200), "Permanent water bodies"),
    (90, (0, 150, 160), "Herbaceous wetland"),
    (95, (0, 207, 117), "Mangroves"),
    (100, (250, 230, 160), "Moss and lichen"),
)
OURS = ("tree", "shrub", "grass", "crop", "built", "bare", "snow", "water", "wetland", "mangrove", "moss")


def test_codes_titles_and_colors_are_the_official_ones() -> None:
    found = [(c.code, tuple(bytes.fromhex(c.color[1:])), c.title) for c in landcover.CATEGORIES[: len(OFFICIAL)]]
    assert found == list(OFFICIAL)
    assert landcover.NUM_CLASSES == len(OFFICIAL) == 11


def test_names_stand_in_the_order_of_the_codes_and_ours_follow() -> None:
    """Prepared data sets hold these indices: the order is part of their format."""
    assert (*OURS, "sea", "unknown") == landcover.NAMES
    assert [c.code for c in landcover.CATEGORIES[len(OFFICIAL) :]] == [None, None]
    assert (landcover.SEA, landcover.UNKNOWN, landcover.NUM_CATEGORIES) == (11, 12, 13)


def test_every_code_has_its_category_and_all_others_are_unknown() -> None:
    table = landcover.code_to_index()
    expected = np.full(256, landcover.UNKNOWN)
    expected[0] = landcover.SEA  # nodata of the maps: open sea away from the coast
    for index, (code, _, _) in enumerate(OFFICIAL):
        expected[code] = index
    np.testing.assert_array_equal(table, expected)


def test_frequent_is_above_the_mean_share_of_the_known_classes_that_occur() -> None:
    shares = np.zeros(landcover.NUM_CATEGORIES)
    shares[[0, 1, landcover.SEA, landcover.UNKNOWN]] = 0.3, 0.1, 0.3, 0.3
    assert [landcover.NAMES[i] for i in np.flatnonzero(landcover.frequent(shares))] == ["tree", "sea"]
    assert [landcover.NAMES[i] for i in np.flatnonzero(landcover.frequent(shares, ["shrub"]))] == ["shrub"]
    assert not landcover.frequent(np.zeros(landcover.NUM_CATEGORIES)).any()


@pytest.mark.parametrize("classes", range(2, 13))
def test_no_class_is_frequent_by_rounding_alone(classes: int) -> None:
    """``data.power=1`` makes all classes equal, up to the last bit of sums, whose order machines choose."""
    shares = np.zeros(landcover.NUM_CATEGORIES)
    shares[:classes] = 1.0 / classes + np.resize([1e-16, -1e-16, 0], classes)
    assert not landcover.frequent(shares).any()
