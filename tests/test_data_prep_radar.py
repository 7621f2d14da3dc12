"""Sentinel-1: warped in power with masked kernels, stored to 0.01 dB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio

from data_prep.doubts import check_zeros
from data_prep.radar import power_from, to_hundredths, warp_power, whole_shift
from data_prep.raster import BadInput, Grid, Raster

UTM = "EPSG:32632"


def _grid(step: float, size: int, left: float = 600_000.0, top: float = 5_400_000.0, crs: str = UTM) -> Grid:
    return Grid(crs, (step, 0.0, left, 0.0, -step, top), size, size)


def test_nodata_of_power_and_decibels():
    power = power_from(np.array([0.1, 0.0, -1.0, np.nan, -32768.0, np.inf, 7.0], np.float32), "power", 7.0)
    assert np.isnan(power).tolist() == [False, True, True, True, True, True, True]
    decibel = power_from(np.array([-10.0, 0.0, -99.0, np.nan]), "dB", -99.0)
    assert decibel[:2] == pytest.approx([0.1, 1.0])
    assert np.isnan(decibel[2:]).all()
    # No receiver tells these from nothing: fill values that nobody declared, ours of exported tiles among them.
    assert np.isnan(power_from(np.array([-300.5, -327.68, -340.0, -9999.0]), "dB", None)).all()
    assert not np.isnan(power_from(np.array([-60.0, -99.0, -150.0]), "dB", None)).any()
    with pytest.raises(ValueError, match="amplitude"):
        power_from(decibel, "amplitude", None)


def test_zero_decibels_in_both_polarizations_are_nodata_that_nobody_declared():
    vv, vh = np.random.default_rng(0).normal((-8, -15), 3, (64, 64, 2)).astype(np.float32).transpose(2, 0, 1)
    vv[:9] = 0
    for edge, nodata, unit in ((vh, None, "dB"), (np.where(vv == 0, 0, vh), 0.0, "dB"), (vv, None, "power")):
        check_zeros([Raster(p, _grid(10, 64), nodata) for p in (vv, edge)], unit)
    with pytest.raises(BadInput, match=r"14\.1 % of the pixels are exactly 0 dB.*-a_nodata 0 FILE"):
        check_zeros([Raster(p, _grid(10, 64)) for p in (vv, np.where(vv == 0, 0, vh))], "dB")


def test_delivered_power_stays_as_it_is():
    whole = np.array([[0.1, 0.2], [3.0, 4.0]], np.float32)
    holes = np.array([[0.1, 0.0], [np.nan, 4.0]], np.float32)
    before = holes.copy()
    assert np.array_equal(power_from(whole, "power", 0.0), whole)
    assert np.isnan(power_from(whole, "power", 3.0)[1, 0]), "nodata of the file, though all values are positive"
    assert np.isnan(power_from(holes, "power", None)).tolist() == [[False, True], [True, False]]
    assert np.array_equal(holes, before, equal_nan=True)


def test_equal_grids_are_not_resampled():
    power = np.random.default_rng(0).gamma(2, 0.05, (24, 24)).astype(np.float32)
    assert warp_power(power, _grid(10.0, 24), _grid(10.0, 24)) is power


def test_whole_pixel_shifts_copy_pixels():
    power = np.random.default_rng(0).gamma(2, 0.05, (2, 24, 24)).astype(np.float32)
    found = warp_power(power, _grid(10.0, 24), _grid(10.0, 20, left=600_030.0, top=5_399_950.0))
    assert (found[:, :19, :] == power[:, 5:24, 3:23]).all()
    assert np.isnan(found[:, 19]).all(), "beyond the source"
    assert whole_shift(_grid(10.0, 24), _grid(10.0, 24, left=600_004.0)) is None
    assert whole_shift(_grid(10.0, 24), _grid(10.0, 24, crs="EPSG:32633")) is None
    assert whole_shift(_grid(10.0, 1068), _grid(10.007, 1068)) is None, "0.7 % of pixel size is seven pixels at the end"


def test_shrinking_averages_power_and_leaves_nodata_out():
    """At 2x an output pixel sees a triangle of 4 x 4 input pixels; the weights over nodata are renormalized."""
    rng = np.random.default_rng(1)
    power = rng.gamma(2, 0.05, (48, 48)).astype(np.float32)
    power[20:26, 10:31] = np.nan
    found = warp_power(power, _grid(10.0, 48), _grid(20.0, 24))
    weights = np.array([0.125, 0.375, 0.375, 0.125])
    for row, col in ((5, 5), (9, 7), (12, 14), (11, 15), (18, 3)):
        part = power[2 * row - 1 : 2 * row + 3, 2 * col - 1 : 2 * col + 3]
        w = np.outer(weights, weights) * ~np.isnan(part)
        expected = (w * np.nan_to_num(part)).sum() / w.sum() if w.sum() else np.nan
        if np.isnan(power[2 * row + 1, 2 * col + 1]):
            expected = np.nan  # the center of the output pixel lies on nodata
        assert found[row, col] == pytest.approx(expected, rel=1e-4, nan_ok=True)
    assert np.isnan(found).any()
    assert not np.isnan(found).all()


def test_outside_the_source_is_nodata():
    found = warp_power(np.ones((12, 12), np.float32), _grid(10.0, 12), _grid(10.0, 12, left=600_060.0))
    assert (found[:, :5] == 1).all()
    assert np.isnan(found[:, 7:]).all()


def test_warping_between_zones_moves_content_to_its_place():
    """A bright spot at a known longitude and latitude stays there when the zone changes."""
    from rasterio.warp import transform

    source = _grid(10.0, 120)
    power = np.full((120, 120), 0.01, np.float32)
    power[58:62, 70:74] = 1.0
    x, y = source.affine @ (72.0, 60.0)
    (x33,), (y33,) = transform(UTM, "EPSG:32633", [x], [y])
    target = Grid("EPSG:32633", (10.0, 0.0, round(x33, -1) - 400, 0.0, -10.0, round(y33, -1) + 400), 80, 80)
    found = np.nan_to_num(warp_power(power, source, target))
    rows, cols = np.nonzero(found > 0.5)
    center = target.affine @ (cols.mean() + 0.5, rows.mean() + 0.5)
    assert np.hypot(center[0] - x33, center[1] - y33) < 5.0


def test_hundredths_are_lossless_to_a_hundredth(real_data: Path):
    """Every S1 pixel of the real tiles comes back within 0.01 dB."""
    checked = 0
    for path in sorted((real_data / "train_tiles/terramesh_224/S1RTC").glob("*.tif")):
        with rasterio.open(path) as source:
            decibel = source.read()
        stored = to_hundredths(power_from(decibel, "dB", None))
        assert stored.dtype == np.int16
        assert np.abs(stored / 100.0 - decibel).max() <= 0.0051
        checked += stored.size
    assert checked == 3 * 2 * 224 * 224


def test_averaging_decibels_would_be_biased(real_data: Path):
    """Why power: block means of decibels lie 0.12 to 0.17 dB (2x) and 0.26 to 0.44 dB (4x) below those of power."""
    for path in sorted((real_data / "train_tiles/terramesh_224/S1RTC").glob("*.tif")):
        with rasterio.open(path) as source:
            decibel = source.read(1)
        for k, low, high in ((2, 0.11, 0.18), (4, 0.25, 0.45)):
            blocks = decibel.reshape(224 // k, k, 224 // k, k)
            right = 10 * np.log10((10 ** (blocks / 10)).mean(axis=(1, 3)))
            assert low < float(np.mean(right - blocks.mean(axis=(1, 3)))) < high
            warped = warp_power(power_from(decibel, "dB", None), _grid(10.0, 224), _grid(10.0 * k, 224 // k))
            warped_mean = 10 * np.log10(warped.astype(np.float64).mean())
            assert warped_mean == pytest.approx(10 * np.log10((10 ** (decibel / 10)).mean()), abs=0.03)


def test_extremes_stay_in_range():
    stored = to_hundredths(np.array([np.nan, 1e-40, 1e35, 1.0], np.float32))
    assert stored.tolist() == [-32768, -32767, 32767, 0]


@pytest.mark.parametrize("name", ["Nigeria_812045", "Paraguay_34417"])
def test_nan_of_real_chips_is_nodata(real_data: Path, name: str):
    with rasterio.open(real_data / f"train_tiles/sen1floods11_512/S1GRD/{name}_S1Hand.tif") as source:
        decibel = source.read(1)
    stored = to_hundredths(power_from(decibel, "dB", None))
    assert ((stored == -32768) == np.isnan(decibel)).all()
    assert np.isnan(decibel).any()
