"""Land cover under a tile: 1 to 4 maps, the antimeridian, the poles, missing maps, ocean or lake."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from data_prep_cells import make_source, worldcover
from rasterio.warp import transform

from data_prep import majortom
from data_prep.raster import BadInput, Grid
from data_prep.tiling import cut, windows
from data_prep.worldcover import (
    MissingMaps,
    WorldCover,
    fractions,
    is_ocean,
    majority,
    map_name,
    maps_at,
    maps_of,
    ocean,
    oceans,
)  # fmt: skip
from terrafm_jax import landcover


def grid_at(lon: float, lat: float, crs: str, size: int = 60) -> Grid:
    """A 10 m grid centered on a place."""
    (x,), (y,) = transform("EPSG:4326", crs, [lon], [lat])
    left, top = round((x - 5 * size) / 10) * 10.0, round((y + 5 * size) / 10) * 10.0
    return Grid(crs, (10.0, 0.0, left, 0.0, -10.0, top), size, size)


def centers(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    a, _, c, _, e, f = grid.transform
    x, y = np.meshgrid(c + (np.arange(grid.width) + 0.5) * a, f + (np.arange(grid.height) + 0.5) * e)
    lon, lat = transform(grid.crs, "EPSG:4326", x.ravel(), y.ravel())
    return np.array(lon).reshape(grid.shape), np.array(lat).reshape(grid.shape)


def test_names_of_maps():
    assert map_name(-75, 39) == "N39W075"
    assert map_name(177, -18) == "S18E177"
    assert maps_of(np.array([8.9, 9.1]), np.array([47.9, 48.1])) == ["N45E006", "N45E009", "N48E006", "N48E009"]
    assert maps_of(np.array([179.9, 180.1]), np.array([-17.0])) == ["S18E177", "S18W180"]
    assert maps_of(np.array([10.0]), np.array([85.0])) == []
    assert maps_of(np.array([10.0]), np.array([-61.0])) == []
    assert maps_of(np.array([10.0]), np.array([83.9, 84.1])) == ["N81E009"]
    points = np.array([[8.9, 47.9], [8.8, 47.8], [9.1, 48.1], [180.1, -17.0], [10.0, 85.0], [10.0, -61.0]])
    assert maps_at(*points.T) == {"N45E006", "N48E009", "S18W180"}


def test_four_maps_meet_under_a_tile(tmp_path: Path):
    for west, south, code in ((6, 45, 10), (9, 45, 30), (6, 48, 40), (9, 48, 50)):
        worldcover(tmp_path, west, south, np.full((30, 30), code))
    grid = grid_at(9.0, 48.0, "EPSG:32632")
    found = WorldCover.open(tmp_path).overlay(grid)
    lon, lat = centers(grid)
    names = np.array([["tree", "grass"], ["crop", "built"]])[(lat > 48).astype(int), (lon > 9).astype(int)]
    expected = np.vectorize(landcover.category)(names)
    assert (found == expected).mean() > 0.995, "nearest neighbor, but for rounding on the very border"
    assert set(np.unique(found)) == {landcover.category(n) for n in ("tree", "grass", "crop", "built")}


@pytest.mark.parametrize("crs", ["EPSG:32760", "EPSG:32701"])
def test_tile_across_the_antimeridian(tmp_path: Path, crs: str):
    worldcover(tmp_path, 177, -18, np.full((30, 30), 95))
    worldcover(tmp_path, -180, -18, np.full((30, 30), 20))
    grid = grid_at(180.0, -17.0, crs)
    found = WorldCover.open(tmp_path).overlay(grid)
    lon, _ = centers(grid)
    expected = np.where(lon % 360 < 180, landcover.category("mangrove"), landcover.category("shrub"))
    assert (found == expected).mean() > 0.995
    degrees = Grid("EPSG:4326", (1e-4, 0.0, 179.997, 0.0, -1e-4, -17.0), 60, 60)
    found = WorldCover.open(tmp_path).overlay(degrees)
    assert (found[:, :29] == landcover.category("mangrove")).all()
    assert (found[:, 31:] == landcover.category("shrub")).all()


def test_polar_gap_is_unknown_and_a_missing_map_is_an_error(tmp_path: Path):
    worldcover(tmp_path, 9, 81, np.full((30, 30), 70))
    cover = WorldCover.open(tmp_path)
    assert set(np.unique(cover.overlay(grid_at(10.5, 84.3, "EPSG:32632")))) == {landcover.UNKNOWN}
    grid = grid_at(10.5, 84.0, "EPSG:32632")
    _, lat = centers(grid)
    expected = np.where(lat < 84, landcover.category("snow"), landcover.UNKNOWN)
    assert (cover.overlay(grid) == expected).mean() > 0.99
    with pytest.raises(MissingMaps, match=r"N45E009.*absent\.txt.*--worldcover-missing"):
        cover.overlay(grid_at(10.5, 46.0, "EPSG:32632"))
    with pytest.raises(BadInput):
        cover.overlay(grid_at(10.5, 46.0, "EPSG:32632"))


def test_absent_maps_are_sea_where_declared(tmp_path: Path):
    worldcover(tmp_path, 6, 45, np.full((30, 30), 10))
    grid = grid_at(9.0, 46.5, "EPSG:32632")
    lon, _ = centers(grid)
    expected = np.where(lon < 9, landcover.category("tree"), landcover.SEA)
    assert (WorldCover.open(tmp_path, "sea").overlay(grid) == expected).mean() > 0.995
    (tmp_path / "absent.txt").write_text("N45E009\n")
    assert (WorldCover.open(tmp_path).overlay(grid) == expected).mean() > 0.995


def test_no_maps_at_all(tmp_path: Path):
    with pytest.raises(ValueError, match="ESA_WorldCover"):
        WorldCover.open(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        WorldCover.open(tmp_path / "nowhere")
    grid = grid_at(9.0, 46.5, "EPSG:32632")
    assert (WorldCover.open("none").overlay(grid) == landcover.UNKNOWN).all()


def test_a_job_does_not_go_on_with_other_land_cover(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Half of the tiles would know their land cover, and nothing would say so."""
    source = make_source(tmp_path, 1)

    def run(out: str, cover: str, *flags: str) -> int:
        places = ["--source", str(source), "--worldcover", cover, "--out", str(tmp_path / out)]
        return majortom.main([*places, "--tile-size", "48", "--split-shares", "1,0,0", *flags])

    maps = str(source / "worldcover")
    assert run("known", maps) == 0
    assert run("known", "none") == 1
    assert "--worldcover a folder of maps there, none now" in capsys.readouterr().err
    assert run("known", maps, "--worldcover-missing", "sea") == 1
    assert "--worldcover-missing error there, sea now" in capsys.readouterr().err
    moved = shutil.move(maps, tmp_path / "moved")
    assert run("known", str(moved)) == 0, "the same maps in another folder"
    assert run("unknown", "none") == 0
    assert run("unknown", "none") == 0
    assert run("unknown", str(moved)) == 1
    assert "--worldcover none there, a folder of maps now" in capsys.readouterr().err


def test_landmark_of_the_real_map(real_data: Path):
    """N00E006 is 87.3 % open sea, 11.8 % water and 0.9 % land; Principe is forest."""
    cover = WorldCover.open(real_data / "data_prep/esa_worldcover")
    whole = Grid("EPSG:4326", (3.0 / 1200, 0.0, 6.0, 0.0, -3.0 / 1200, 3.0), 1200, 1200)
    share = fractions(cover.overlay(whole))
    assert share[landcover.SEA] == pytest.approx(0.873, abs=0.002)
    assert share[landcover.WATER] == pytest.approx(0.118, abs=0.002)
    assert 1 - share[landcover.SEA] - share[landcover.WATER] == pytest.approx(0.009, abs=0.001)
    island = fractions(cover.overlay(grid_at(7.4, 1.6, "EPSG:32632", 480)))
    assert majority(island) == landcover.category("tree")
    out = cover.overlay(grid_at(8.5, 0.7, "EPSG:32632", 240))
    assert is_ocean(ocean(out))


def test_a_real_map_up_to_the_antimeridian(real_data: Path):
    """N66E177 ends at 180 E: a tile across it needs N66W180, too, and where that is sea, land ends at the line."""
    folder = real_data / "data_prep/esa_worldcover"
    grid = grid_at(180.0, 68.0, "EPSG:32601", 480)
    with pytest.raises(MissingMaps, match="maps N66W180 are not in"):
        WorldCover.open(folder).overlay(grid)
    found = WorldCover.open(folder, "sea").overlay(grid)
    lon, _ = centers(grid)
    west, east = lon % 360 < 180, lon % 360 > 180.001
    assert (found[east] == landcover.SEA).all()
    assert (found[west] == landcover.SEA).mean() < 0.02
    assert majority(fractions(found[west])) == landcover.category("moss")


def test_overlay_agrees_with_the_map_on_its_own_grid(real_data: Path):
    """The re-coded maps exist on the tile grid and on the WorldCover lattice: a warp leads from one to the other."""
    from data_prep.worldcover import codes_on

    folder = real_data / "data_prep/worldcover_coded_DERIVED"
    import rasterio

    from data_prep.raster import grid_of

    for path in sorted((folder / "utm10m").glob("*.tif")):
        with rasterio.open(path) as source:
            direct, grid = source.read(1), grid_of(source, path.name)
        warped = codes_on(str(folder / "epsg4326_wclattice" / path.name), grid)
        assert (warped == direct).mean() > 0.9, "nearest neighbor there and back moves class borders by up to a pixel"


def test_ocean_is_sea_and_water_connected_to_it():
    water, sea, tree = landcover.WATER, landcover.SEA, landcover.category("tree")
    coast = np.full((100, 100), sea, np.uint8)
    coast[60:] = water
    assert is_ocean(ocean(coast)), "coastal sea is water"
    assert not is_ocean(ocean(np.full((100, 100), water, np.uint8))), "a lake, as far as one can see"
    mangroves = coast.copy()
    mangroves[:2] = landcover.category("mangrove")
    assert majority(fractions(mangroves)) == sea
    assert not is_ocean(ocean(mangroves)), "2 % mangroves: a coast that must not be thinned"
    lagoon = np.full((100, 100), tree, np.uint8)
    lagoon[:, :50] = sea
    lagoon[10:20, 80:90] = water
    found = ocean(lagoon)
    assert found[:, :50].all()
    assert not found[10:20, 80:90].any()


def test_windows_of_a_coast_are_judged_by_the_whole_cell():
    water, sea, tree = landcover.WATER, landcover.SEA, landcover.category("tree")
    cell = np.full((120, 120), water, np.uint8)
    cell[:, 60:] = tree
    cell[:10, :10] = sea
    lake = np.full_like(cell, tree)
    lake[60:, :60] = water
    lake[60, 59] = tree  # or the lake would touch the sea at its corner
    lake[:60, 60:] = sea
    four = windows(120, 120, 60, 60)
    for categories, expected in ((cell, [True, False, True, False]), (lake, [False, True, False, False])):
        traced = ocean(categories)
        assert oceans(categories, four) == [is_ocean(cut(traced, w, False)) for w in four] == expected
    assert oceans(np.full_like(cell, tree), four) == [False] * 4


def test_majority_prefers_what_is_known():
    share = np.zeros(landcover.NUM_CATEGORIES, np.float32)
    share[landcover.UNKNOWN] = 0.9
    share[3] = 0.1
    assert majority(share) == 3
    share[3] = 0
    assert majority(share) == landcover.UNKNOWN
