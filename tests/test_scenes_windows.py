"""Where a raster is looked for: windows beyond its edges, beyond the end of the degrees, and pixels of no value."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from scenes_fake import call, surface, tokens, write

from terrafm_jax.scenes.grid import target_grid
from terrafm_jax.scenes.inputs import Declared, resolve
from terrafm_jax.scenes.read import SceneReader
from terrafm_jax.sensors import SENSORS

pytestmark = pytest.mark.usefixtures("loaded")


@pytest.mark.parametrize("west", [179.992, -180.008])
def test_geographic_rasters_across_the_antimeridian(tmp_path: Path, west: float) -> None:
    # Seen from its UTM zone, the border of degrees at 180 is as any other between two zones.
    outs = []
    for name, left, code in (("greenwich", -0.008, 32631), ("antimeridian", west, 32601)):
        source = write(
            tmp_path / f"{name}.tif", surface(160, 192, 12), crs="EPSG:4326", names=SENSORS["s2_l2a"].band_names,
            transform=rasterio.Affine(8.983e-5, 0, left, 0, -8.983e-5, 10.0),
        )  # fmt: skip
        outs.append(tmp_path / f"{name}_e.tif")
        assert call(f"--crs=EPSG:{code}", "--batch=1", "--window=64", out=outs[-1], sensors={"s2_l2a": source}) == 0
    first, second = (tokens(out) for out in outs)
    assert np.array_equal(np.isnan(first), np.isnan(second))
    assert np.allclose(first, second, atol=1e-2, equal_nan=True)


def test_dates_far_apart_make_a_mosaic(tmp_path: Path) -> None:
    names = SENSORS["s2_l2a"].band_names
    north = write(tmp_path / "n.tif", surface(160, 160, 12), names=names)
    south = write(tmp_path / "s.tif", surface(160, 160, 12), names=names, north=5_100_000.0 - 4800)
    out = tmp_path / "e.tif"
    more = f"--sensor=s2_l2a={south}"
    assert call(more, "--window=64", "--overlap=0", out=out, sensors={"s2_l2a": north}) == 0
    valid = ~np.isnan(tokens(out)).all(-1)
    assert valid.shape == (40, 10)
    assert np.array_equal(valid.all(1), np.repeat([True, False, True], (10, 20, 10)))
    assert not valid[10:30].any()


@pytest.mark.parametrize("gsd", [10, 20])
def test_water_without_values_at_one_resolution_is_ground_beyond_a_swath_is_none(tmp_path: Path, gsd: int) -> None:
    rng = np.random.default_rng(0)
    seen = np.add.outer(np.arange(240), np.arange(240)) > 100  # fine pixels beyond the edge of the swath
    for band in SENSORS["s2_l2a"].bands:
        k = band.gsd // 10
        inside = seen.reshape(240 // k, k, 240 // k, k).any((1, 3))  # coarse pixels on the edge hold values
        pixels = rng.integers(100, 3000, inside.shape) * inside
        if k > 1:  # water: black in the infrared, and here in the bands of 60 m, too
            pixels[120 // k : 180 // k, 120 // k : 180 // k] = 0
        write(tmp_path / "scene" / f"x_{band.name}.tif", pixels[None].astype(np.uint16), gsd=band.gsd)
    date = resolve(f"s2_l2a={tmp_path / 'scene'}", Declared())
    grid = target_grid([date], gsd)
    found = SceneReader([date], grid).read(0, 0, grid.height, grid.width)["s2_l2a"]
    center = slice(gsd // 20, None, gsd // 10)
    np.testing.assert_array_equal(found.valid, seen[center, center])
    window = SceneReader([date], grid).read(60, 60, 20, 20)["s2_l2a"]
    np.testing.assert_array_equal(window.values, found.values[60:80, 60:80])
