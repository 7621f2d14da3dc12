"""Offsets, snapping, nodata: on constructed arrays, and against the truth of the real tiles."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import rasterio
from data_prep_cells import manifest_bands, scene
from scipy import ndimage

from data_prep.delivered import SensorInput
from data_prep.harmonize import (
    connected,
    darker,
    decide_offset,
    measured,
    misplaced,
    pixel_offset,
    snap_origin,
)
from data_prep.optical import optical
from data_prep.raster import Grid, Raster
from terrafm_jax.sensors import baseline, baseline_offset


@pytest.mark.parametrize(
    ("product", "number", "proposed"),
    [
        ("S2B_MSIL2A_20200223T032739_N9999_R018_T48QUE_20230924T183543", 9999, None),
        ("S2A_MSIL1C_20220612T103021_N0400_R108_T32UPU_20220612T120000.SAFE", 400, 1000.0),
        ("S2A_MSIL2A_20190612T103021_N0500_R108_T32UPU_20230612T120000", 500, 1000.0),
        ("S2A_MSIL2A_20220101T103021_N0399_R108_T32UPU_20220612T120000", 399, 0.0),
        ("S2A_MSIL2A_20170613T101031_87_48", None, None),
        ("patch_10", None, None),
        ("S2A_NOTAN0500", None, None),
        ("field_N4512_E0712", None, None),
        ("site_N0087_E0712", None, None),
        ("cell_N4512_S2A_MSIL2A_20190612T103021_N0213_R108_T32UPU_20190612T120000", 213, 0.0),
        ("S2C_MSIL2A_20270612T103021_N0600_R108_T32UPU_20270612T120000", 600, 1000.0),
    ],
)
def test_offset_proposed_by_product_id(product, number, proposed):
    assert baseline(product) == number
    assert baseline_offset(product) == proposed


def test_darker_is_the_first_percentile_by_nearest_rank():
    values = np.arange(1, 1001, dtype=np.uint16)
    for given in (values, values.reshape(10, 100)):
        assert darker(given, 10)
        assert not darker(given, 9)
    assert not darker(values[:0], 65535)
    assert (darker(values[6:7], 6), darker(values[6:7], 7)) == (False, True)
    noise = np.random.default_rng(0).integers(0, 4000, (20, 777))
    for row in noise:
        lowest = np.percentile(row, 1, method="inverted_cdf")
        assert (darker(row, lowest - 1), darker(row, lowest)) == (False, True)


def test_pixels_abstain_where_nothing_is_dark():
    dark, bright = np.full((9, 9), 200, np.uint16), np.full((9, 9), 5000, np.uint16)
    valid = {"B02": np.ones((9, 9), bool), "B10": np.ones((9, 9), bool)}
    assert pixel_offset("s2_l2a", {"B02": dark}, valid) == 0
    assert pixel_offset("s2_l2a", {"B02": dark + 800}, valid) == 1000
    assert pixel_offset("s2_l2a", {"B02": bright}, valid) is None
    assert pixel_offset("s2_l1c", {"B02": dark}, valid) is None, "L1C without B10 cannot be told apart"
    assert pixel_offset("s2_l1c", {"B10": dark // 10}, valid) == 0
    assert pixel_offset("s2_l1c", {"B10": dark + 900}, valid) == 1000
    assert pixel_offset("s2_l2a", {"B02": dark}, {"B02": np.zeros((9, 9), bool)}) is None


def test_product_id_and_pixels_are_joined():
    new, old, odd = "A_N0500_B", "A_N0300_B", "A_N9999_B"
    assert (decide_offset(new, 1000.0).value, decide_offset(new, None).value) == (1000, 1000)
    assert (decide_offset(odd, None).value, decide_offset(odd, 1000.0).value) == (0, 1000)
    assert (decide_offset("x", None).value, decide_offset("x", 1000.0).value) == (0, 1000)
    harmonized = decide_offset(new, 0.0)
    assert harmonized.value == 0
    assert harmonized.conflict
    bright = decide_offset(old, 1000.0)
    assert bright.value == 0
    assert bright.conflict
    assert "pixels" in bright.source


def test_offsets_of_the_real_tiles(real_data: Path):
    """Truth: tile_index.csv. The pixel rule must be right wherever it does not abstain."""
    checked = {"s2_l1c": 0, "s2_l2a": 0}
    abstained = []
    orders = manifest_bands(real_data)
    for row in csv.DictReader((real_data / "tile_index.csv").read_text().splitlines()):
        for key, column in (("s2_l1c", "S2L1C"), ("s2_l2a", "S2L2A")):
            truth = row[column.replace("S2", "") + "_offset"]
            if not row[column] or truth in ("", "?"):
                continue
            with rasterio.open(real_data / row[column]) as source:
                bands = dict(zip(orders[row[column]], source.read().astype(np.int64), strict=True))
            valid = np.any([b != 0 for b in bands.values()], axis=0)
            found = pixel_offset(key, bands, dict.fromkeys(bands, valid))
            if found is None:
                abstained.append(row["location"])
                continue
            checked[key] += 1
            assert found == float(truth), f"{row['location']} {key}: {found}, truth {truth}"
    assert checked["s2_l1c"] >= 15
    assert checked["s2_l2a"] >= 58
    assert len(abstained) <= 3, abstained


def _grid(left: float, top: float, step: float, size: int, crs: str = "EPSG:32648") -> Grid:
    return Grid(crs, (step, 0.0, left, 0.0, -step, top), size, size)


def test_snap_origin_to_the_nearest_multiple():
    for step, left, top in ((10.0, 362610.0, 1987090.0), (20.0, 362620.0, 1987080.0), (60.0, 362640.0, 1987080.0)):
        snapped = snap_origin(_grid(362612.19685932994, 1987088.206431803, step, 8))
        assert snapped.transform == (step, 0.0, left, 0.0, -step, top)
        assert snap_origin(snapped) == snapped
    odd = _grid(624602.2348, 4877286.03, 10.0057, 8)
    assert snap_origin(odd) == odd
    assert not misplaced({"10m": _grid(600_000, 0, 10.0, 6), "60m": _grid(600_000, 0, 60.0, 1)})
    assert misplaced({"10m": _grid(600_010, 0, 10.0, 6), "60m": _grid(600_010, 0, 60.0, 1)})
    assert not misplaced({"10m": odd, "20m": odd}), "stacked on one grid: nothing tells that it is misplaced"


def test_correlation_peak_of_the_real_cell_moves_to_zero(real_data: Path):
    """As labelled, B8A and B09 of 199U_1099R peak at (1, 1) and (1, 3) ten-metre pixels against B08."""
    (folder,) = (real_data / "train_tiles/majortom_core_native").glob("S2L2A/*/*/*")
    bands = {}
    for name in ("B08", "B8A", "B09"):
        with rasterio.open(folder / f"{name}.tif") as source:
            grid = Grid(source.crs.to_string(), tuple(source.transform)[:6], source.height, source.width)
            bands[name] = (source.read(1).astype(np.float64), grid)
    for name, labelled in (("B8A", (1, 1)), ("B09", (1, 3))):
        assert _peak(bands["B08"], bands[name]) == labelled
        snapped = [(pixels, snap_origin(grid)) for pixels, grid in (bands["B08"], bands[name])]
        assert _peak(*snapped) == (0, 0)


def _peak(fine: tuple[np.ndarray, Grid], coarse: tuple[np.ndarray, Grid]) -> tuple[int, int]:
    """Shift (rows, columns) in fine pixels that aligns the fine band, averaged to the coarse grid, best."""
    (pixels, grid), (target, coarse_grid) = fine, coarse
    k = round(coarse_grid.transform[0] / grid.transform[0])
    row0 = round((coarse_grid.transform[5] - grid.transform[5]) / grid.transform[4])
    col0 = round((coarse_grid.transform[2] - grid.transform[2]) / grid.transform[0])
    margin, n = 4, target.shape[0] - 8
    best, where = -2.0, (0, 0)
    for dy in range(-5, 6):
        for dx in range(-5, 6):
            top, left = row0 + margin * k + dy, col0 + margin * k + dx
            part = pixels[top : top + n * k, left : left + n * k].reshape(n, k, n, k).mean(axis=(1, 3))
            found = np.corrcoef(part.ravel(), target[margin : margin + n, margin : margin + n].ravel())[0, 1]
            if found > best:
                best, where = found, (dy, dx)
    return where


def test_nodata_only_where_all_bands_are_zero():
    grid = _grid(0, 0, 10.0, 12)
    dark = np.zeros((12, 12), bool)
    dark[:, :6] = True  # this group is zero here, the other is not: clipped dark reflectance
    other = np.zeros((12, 12), bool)
    other[:3] = True
    valid = measured({"10m": dark, "20m": other}, {"10m": grid, "20m": grid})
    expected = ~(dark & other)
    assert (valid["10m"] == expected).all()
    assert (valid["20m"] == expected).all()


def test_nodata_across_samplings_at_the_edge_of_a_swath():
    empty = {"10m": np.zeros((12, 12), bool), "60m": np.zeros((2, 2), bool)}
    grids = {"10m": _grid(0, 0, 10.0, 12), "60m": _grid(0, 0, 60.0, 2)}
    empty["10m"][:, :3] = True  # the swath ends within the first column of 60 m pixels
    empty["60m"][:, 0] = True  # and the provider left those empty
    valid = measured(empty, grids)
    assert (valid["10m"] == ~empty["10m"]).all()
    assert (valid["60m"] == ~empty["60m"]).all()
    empty["10m"][5:7, 3] = True  # a coarse pixel may reach further than the fine ones: what touches nodata is nodata
    valid = measured(empty, grids)
    assert (valid["10m"] == ~empty["10m"]).all()
    empty["10m"][9:11, 8:10] = True  # dark reflectance elsewhere is not
    assert measured(empty, grids)["10m"][9:11, 8:10].all()
    empty["10m"][:] = False  # nothing is missing at 10 m: zero at 60 m is dark reflectance
    assert measured(empty, grids)["60m"].all()


def test_connected_is_the_propagation_of_its_seeds():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.05, 0.4, 1.0):
        mask = np.pad(rng.random((20, 30)) < share, ((7, 3), (0, 5)))
        for seeds in (mask & (rng.random(mask.shape) < 0.1), rng.random(mask.shape) < 0.05, np.zeros_like(mask)):
            expected = ndimage.binary_propagation(seeds & mask, np.ones((3, 3), bool), mask)
            assert (connected(mask, seeds) == expected).all()


@pytest.mark.parametrize(("dtype", "nodata"), [("float32", np.nan), ("int16", -9999), ("uint16", 65535)])
def test_declared_nodata_of_one_band_is_no_dark_ground(dtype: str, nodata: float):
    """And no reason to think that a provider has subtracted the offset."""
    bands = {}
    for name, pixels in scene(3, offset=1000)["s2_l2a"].items():
        pixels, step = pixels.astype(dtype), 480.0 / len(pixels)
        if name in ("B03", "B01"):
            pixels[:2] = nodata
        bands[name] = Raster(pixels, _grid(0, 0, step, len(pixels)), nodata)
    layer = optical("s2_l2a", SensorInput(bands, "S2A_MSIL2A_20220612T103021_N0500_R108_T32UPU_20220612T120000"), "off")
    assert (layer.offset.value, layer.offset.conflict) == (1000, False)
    for name, rows in (("10m", 2), ("20m", 0), ("60m", 2)):
        assert not layer.groups[name].valid[:rows].any()
        assert layer.groups[name].valid[rows:].all()


def test_zeros_in_some_bands_of_real_ships_stay_valid(real_data: Path):
    """18 of 22 ship tiles hold zeros in some band over 5 % of the pixels, at most 0.07 % in all bands."""
    with_zeros = 0
    for path in sorted((real_data / "train_tiles/s2l2a_ships_128").glob("*.tif")):
        with rasterio.open(path) as source:
            pixels = source.read()
        grid = _grid(0, 0, 10.0, pixels.shape[1])
        groups = {"10m": (pixels[[1, 2, 3, 7]] == 0).all(0), "20m": (pixels[[4, 5, 6, 8, 10, 11]] == 0).all(0)}
        groups["60m"] = (pixels[[0, 9]] == 0).all(0)
        valid = measured(groups, dict.fromkeys(groups, grid))
        assert valid["10m"].mean() >= 0.9992
        with_zeros += (pixels == 0).any(0).mean() > 0.05
    assert with_zeros == 18


def test_fixture_scene_carries_its_offset():
    for offset in (0, 1000):
        bands = scene(3, offset=offset)
        for key in ("s2_l1c", "s2_l2a"):
            valid = {name: pixels > 0 for name, pixels in bands[key].items()}
            assert pixel_offset(key, bands[key], valid) == offset
