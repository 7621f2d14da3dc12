"""What is read of a scene: beyond edges and the end of the degrees, pixels without a value, masks, many files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from rasterio.warp import transform
from scenes_fake import call, optical, surface, tokens, write

from terrafm_jax.scenes import output, read
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Grid, target_grid
from terrafm_jax.scenes.inputs import Declared, resolve
from terrafm_jax.scenes.masks import read_mask
from terrafm_jax.scenes.points import to_grid
from terrafm_jax.scenes.read import SceneReader
from terrafm_jax.scenes.readback import place_of
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


def test_footprints_across_the_antimeridian_are_cut_there(tmp_path: Path) -> None:
    """As one polygon they would span the Earth the other way round."""
    rows = []
    for lon in (180.0, -177.0):
        (x,), (y,) = transform("EPSG:4326", "EPSG:32701", [lon], [-16.5])
        grid = Grid(rasterio.CRS.from_epsg(32701), x - 1120, y + 1120, 10.0, 224, 224)
        rows.append(output.window_row(grid, (0, 0, 224, 224), np.zeros(4, np.float32), "p", "", "m"))
    output.write_windows(tmp_path / "w.parquet", rows, output.Meta((), {}))
    table = pq.read_table(tmp_path / "w.parquet")
    described = json.loads(table.schema.metadata[b"geo"])["columns"]["geometry"]
    assert described["geometry_types"] == ["MultiPolygon", "Polygon"]
    cut, plain = (shapely.from_wkb(shape) for shape in table["geometry"].to_pylist())
    assert cut.bounds[0] == -180
    assert cut.bounds[2] == 180
    assert cut.area == pytest.approx(plain.area, rel=0.01)
    assert shapely.covers(cut, shapely.points([179.995, -179.995], -16.5)).all()
    assert not shapely.covers(cut, shapely.points([179.98, 0, -179.98], -16.5)).any()


def test_web_mercator_across_the_antimeridian_is_refused(tmp_path: Path) -> None:
    """The projection ends there: half of the scene was lost, or embedded in a zone at the other side of the Earth."""
    names, edge = SENSORS["s2_l2a"].band_names, 20_037_508.34
    for name, west, zone in (("west", edge - 1500, 32760), ("east", -edge - 1000, 32701), ("inside", edge - 3000, 0)):
        path = write(
            tmp_path / f"{name}.tif", surface(300, 300, 12), names=names, crs="EPSG:3857", west=west, north=-1_900_000.0
        )
        date = resolve(f"s2_l2a={path}", Declared())
        if not zone:
            assert target_grid([date]).crs.to_epsg() == 32760
            continue
        with pytest.raises(SceneError, match=f"{name}.tif: crosses the antimeridian.*EPSG:{zone} first"):
            target_grid([date])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts the open files of Linux")
def test_many_dates_do_not_need_as_many_open_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A year of dates of twelve files each is more than a process may open; the same pixels come from a few."""
    dates = []
    for i, fill in enumerate((500, 900, 700, 600, 800)):
        for band in SENSORS["s2_l2a"].band_names:
            write(tmp_path / f"{i}" / f"x_{band}.tif", np.full((1, 32, 32), fill, np.uint16))
        dates.append(resolve(f"s2_l2a={tmp_path / str(i)}", Declared()))
    monkeypatch.setattr(read, "_OPEN_FILES", 14)
    reader = SceneReader(dates, target_grid(dates), composite="median")
    for _ in range(2):
        assert (reader.read(0, 0, 32, 32)["s2_l2a"].values == 700).all()
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    assert sum(str(tmp_path) in os.readlink(link) for link in links if link.is_symlink()) <= 14


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.float32])
def test_a_mask_keeps_whatever_is_not_zero(tmp_path: Path, kind: type) -> None:
    """Shares, negative numbers and NaN used to be rounded and cut to one byte first."""
    numbers = {np.uint8: (0, 1, 2, 255), np.int16: (0, -1, 1, 0), np.uint16: (0, 256, 512, 1)}
    numbers = numbers.get(kind, (0, 0.2, 1, np.nan))
    mask = write(tmp_path / "mask.tif", np.repeat(np.array(numbers, kind), 8)[None, None].repeat(32, 1))
    date = resolve(f"s2_l2a={optical(tmp_path / 's.tif', 32, 32)}", Declared())
    found = SceneReader([date], target_grid([date]), masks=[read_mask(str(mask))]).read(0, 0, 32, 32)["s2_l2a"]
    kept = [bool(n) and n == n for n in numbers]
    np.testing.assert_array_equal(found.valid, np.repeat(kept, 8)[None].repeat(32, 0))


def test_a_mask_of_the_whole_earth_holds_the_scene(tmp_path: Path) -> None:
    """Its borders have no place in a UTM zone: it lay elsewhere for scenes west of the middle of theirs."""
    path = tmp_path / "s.tif"
    earth = rasterio.Affine(1.0, 0, -180, 0, -1.0, 90)
    mask = write(tmp_path / "earth.tif", np.ones((1, 180, 360), np.uint8), crs="EPSG:4326", transform=earth)
    for west in (300_000.0, 700_000.0):
        grid = target_grid([date := resolve(f"s2_l2a={optical(path, 32, 32, west=west)}", Declared())])
        reader = SceneReader([date], grid, masks=[read_mask(str(mask))])
        assert reader.read(0, 0, 32, 32)["s2_l2a"].valid.all()
        assert not reader.warnings


def test_places_all_over_the_earth_are_outside() -> None:
    """One that the projection of the scene cannot hold ended the command, and folded ones might lie in the scene."""
    grid = Grid(rasterio.CRS.from_epsg(32632), 600_000.0, 5_100_000.0, 10.0, 1000, 1000)
    lon, lat = (v.ravel() for v in np.meshgrid(np.linspace(-180, 180, 73), np.linspace(-90, 90, 37)))
    x, y = to_grid(np.stack([np.append(lon, 10.35), np.append(lat, 46.0)], 1), grid).T
    left, bottom, right, top = grid.bounds
    inside = (x >= left) & (x <= right) & (y >= bottom) & (y <= top)
    assert inside[-1]
    assert not inside[:-1].any()
    assert place_of(grid, 99.0, 0.0) is None
    assert place_of(grid, 10.35, 46.0) is not None
