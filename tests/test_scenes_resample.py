"""Resampling on parallel grids: what GDAL's bilinear warp does, without GDAL."""

from __future__ import annotations

import numpy as np
import pytest
from affine import Affine
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.warp import reproject

from terrafm_jax.scenes.grid import Grid
from terrafm_jax.scenes.resample import resample

UTM = CRS.from_epsg(32632)


def warped(data: np.ndarray, transform: Affine, grid: Grid) -> np.ndarray:
    out = np.full((len(data), grid.height, grid.width), np.nan, np.float32)
    reproject(
        data, out, src_transform=transform, src_crs=UTM, dst_transform=grid.transform, dst_crs=UTM, src_nodata=np.nan,
        dst_nodata=np.nan, resampling=Resampling.bilinear, tolerance=0.0,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("holes", [0.0, 0.1, 0.7])
@pytest.mark.parametrize(
    ("source", "target", "shift"),
    [
        (20, 10, (0, 0)),
        (60, 10, (0, 0)),
        (20, 10, (-33, 17)),
        (10, 20, (-40, 40)),
        (10, 25, (-43, 47)),
        (10, 60, (-5, 0)),
    ],
)
def test_equals_gdal(source: int, target: int, shift: tuple[int, int], holes: float) -> None:
    rng = np.random.default_rng(0)
    grid = Grid(UTM, 6e5, 5.1e6, target, 30, 50)
    # What the reader cuts out: the kernel's reach beyond the grid.
    more = 100 + 2 * target
    transform = Affine(source, 0, 6e5 - more + shift[0], 0, -source, 5.1e6 + more + shift[1])
    data = rng.normal(1500, 300, (3, *((n * target + 2 * more) // source for n in (30, 50)))).astype(np.float32)
    data[:, rng.random(data.shape[1:]) < holes] = np.nan
    expected, found = warped(data, transform, grid), resample(data, transform, grid)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    assert np.isnan(found).any() == (holes > 0)
    assert np.nanmax(np.abs(found - expected)) < 2e-3


def test_a_raster_that_ends_within_the_grid() -> None:
    # GDAL stretches a kernel that it cuts off at the border; this one keeps the weights of the pixels that exist.
    grid = Grid(UTM, 0.0, 300.0, 20.0, 15, 10)
    data = np.arange(8, dtype=np.float32)[None, None].repeat(20, 1)
    found = resample(data, Affine(10, 0, 40, 0, -10, 250), grid)[0]
    assert np.isnan(found[:, :2]).all(), "left of the raster"
    assert np.isnan(found[:, 6:]).all(), "right of it"
    assert np.isnan(found[:2]).all(), "above"
    assert np.isnan(found[13:]).all(), "below"
    assert np.isfinite(found[3:12, 2:6]).all()
    assert found[5, 2] == pytest.approx((0.75 * 0 + 0.75 * 1 + 0.25 * 2) / 1.75)
    assert found[5, 3] == pytest.approx(2.5)
