"""Which synthetic cells there are: names, places, classes, planted defects, radar of other zones."""

from __future__ import annotations

from collections import Counter

import pytest
from affine import Affine

from data_prep.synthetic import geography
from data_prep.synthetic.cell import render
from data_prep.synthetic.landscape import CLASSES
from data_prep.synthetic.plan import DEFECTS, plan_cells

SIZE = 48


def test_grid_names_agree_with_a_real_cell() -> None:
    """Cell 199U_1099R lies around 103.75 E, 17.92 N in tile T48QUE."""
    row, col = geography.cell_at(17.92, 103.75)
    assert geography.cell_name(row, col) == "199U_1099R"
    assert geography.cell_center(row, col) == pytest.approx((17.92, 103.75), abs=0.05)
    epsg = geography.utm_epsg(17.92, 103.75)
    assert epsg == 32648
    assert geography.mgrs_tile(epsg, 17.92, 367952, 1981748) == "T48QUE"
    assert geography.cell_name(-3, -120) == "3D_120L"


def test_cells_stay_on_this_side_of_the_antimeridian() -> None:
    """Seed 1 draws a point in the last column of a row, whose center lies beyond 180 degrees west."""
    plans = plan_cells(seed=1, size=SIZE, cells=300, validation=300, heldout=300)
    assert all(-180 <= p.lon < 180 for p in plans)


def test_long_tail() -> None:
    counts = Counter(p.landcover for p in plan_cells(seed=0, size=SIZE, cells=600))
    assert set(counts) == set(CLASSES)
    assert counts["tree"] > 20 * counts["mangrove"]


def test_planned_defects_occur_in_training_cells_only() -> None:
    plans = plan_cells(seed=1, size=SIZE, cells=200, heldout=24, defects=0.5)
    assert set(DEFECTS) == {p.defect for p in plans} - {""}
    assert {p.defect for p in plans if p.split == "holdout"} == {""}
    conflicts = [p.acquisitions["s2_l2a"] for p in plans if p.defect == "offset conflict"]
    assert all("_N0500_" in a.product and a.offset == 0 for a in conflicts)


def test_radar_of_another_zone_covers_the_cell() -> None:
    """Some radar products come on the grid of the next UTM zone or in another size; they see the same ground."""
    odd = Counter()
    for plan in plan_cells(seed=2, size=24, cells=160, missing=0):
        product = render(plan).products["s1"]
        odd["zone"] += product.epsg != plan.epsg
        odd["size"] += product.epsg == plan.epsg and product.bands["vv"].shape != (24, 24)
        affine: Affine = product.true["vv"]
        assert (affine.a, affine.e) == pytest.approx((10, -10))
    assert odd["zone"] >= 1
    assert odd["size"] >= 5
