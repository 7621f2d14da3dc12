"""The area of interest: read in degrees, laid onto grids in meters, also where zones bend and longitudes wrap."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("rasterio")
import rasterio
from rasterio.crs import CRS
from rasterio.transform import from_origin
from rasterio.warp import transform

from terrafm_jax.scenes.area import read_aoi
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Grid, target_grid
from terrafm_jax.scenes.read import inside


def centers(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude [H, W] of the pixels."""
    rows, columns = np.mgrid[: grid.height, : grid.width] + 0.5
    x, y = grid.x + columns * grid.gsd, grid.y - rows * grid.gsd
    lon, lat = transform(grid.crs, "EPSG:4326", x.ravel(), y.ravel())
    return np.reshape(lon, rows.shape), np.reshape(lat, rows.shape)


# Center of the zone, its edge far north, both sides of the equator, the antimeridian, the pole.
GRIDS = {
    "zone": Grid(CRS.from_epsg(32632), 450_000, 5_000_000, 1000.0, 110, 110),
    "edge": Grid(CRS.from_epsg(32633), 300_000, 7_600_000, 1000.0, 110, 110),
    "equator": Grid(CRS.from_epsg(32732), 450_000, 10_050_000, 1000.0, 110, 110),
    "antimeridian": Grid(CRS.from_epsg(32601), 330_000, 8_000_000, 1000.0, 110, 110),
    "pole": Grid(CRS.from_epsg(3413), -100_000, 100_000, 2000.0, 100, 100),
}


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_box_holds_the_pixels_between_its_degrees(name: str, wide: bool) -> None:
    """A box of the world's width is bounded by two parallels; neither it nor a small one is bent or folded."""
    grid = GRIDS[name]
    lon, lat = centers(grid)
    shifted = lon % 360 if name == "antimeridian" else lon
    south, north = np.quantile(lat, [0.3, 0.8])
    west, east = (-180.0, 180.0) if wide else np.quantile(shifted, [0.2, 0.6])
    wanted = (lat > south) & (lat < north)
    if not wide:
        wanted &= (shifted > west) & (shifted < east)
        east = east - 360 if east > 180 else east
    found = inside(read_aoi(f"{west},{south},{east},{north}"), grid)
    assert found.any()
    assert not found.all()
    assert np.mean(found != wanted) < 2e-3


def test_many_shapes_count_together_and_a_far_one_is_left_out(tmp_path: Path) -> None:
    grid = GRIDS["zone"]
    lon, lat = centers(grid)
    boxes = [(lon.min(), lat.min(), 9.0, 90.0), (9.2, -90.0, lon.max(), lat.max()), (-120.0, -30.0, -60.0, 10.0)]
    features = [
        {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[w, s], [e, s], [e, n], [w, n], [w, s]]]}}
        for w, s, e, n in boxes
    ]
    path = tmp_path / "aoi.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    wanted = (lon < 9.0) | (lon > 9.2)
    assert np.mean(inside(read_aoi(str(path)), grid) != wanted) < 5e-3
    path.write_text(json.dumps(features[2]))
    assert not inside(read_aoi(str(path)), grid).any()


# Corner, degrees or meters a pixel, rows and columns of rasters; an area in them; its zone and extent in kilometers.
WIDE = {
    "degrees": ("EPSG:4326", -10.0, 50.0, 0.05, 80, 1400, "55,47,57,49", 32640, (156, 225)),
    "world": ("EPSG:4326", -180.0, 90.0, 0.08, 2250, 4500, "55,47,57,49", 32640, (156, 225)),
    "world from 0 on": ("EPSG:4326", 0.0, 90.0, 0.08, 2250, 4500, "-100,30,-97,33", 32614, (292, 336)),
    "across the antimeridian": ("EPSG:4326", 170.0, -16.0, 0.05, 200, 400, "179.5,-19,-178,-17", 32701, (268, 225)),
    "Mercator": ("EPSG:3857", -20e6, 20e6, 10_000.0, 4000, 4000, "55,47,57,49", 32640, (156, 225)),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_small_area_of_a_wide_raster_has_its_own_zone(name: str, tmp_path: Path) -> None:
    """In the zone of the raster's center meters are none, or its ends do not exist."""
    crs, west, north, step, rows, columns, text, zone, kilometers = WIDE[name]
    with rasterio.open(
        tmp_path / "x.tif", "w", driver="GTiff", height=rows, width=columns, count=1, dtype="uint8", crs=crs,
        transform=from_origin(west, north, step, step), SPARSE_OK=True,
    ):  # fmt: skip
        pass
    grid = target_grid([SimpleNamespace(sensor="s2_l2a", paths=[str(tmp_path / "x.tif")])], 3000.0, aoi=read_aoi(text))
    assert grid.crs.to_epsg() == zone
    size = grid.width * 3.0, grid.height * 3.0
    assert size == pytest.approx(kilometers, abs=12.0)
    wanted = [float(v) for v in text.split(",")]
    lon, lat = centers(grid)
    middle = (wanted[0] + (wanted[2] + 360 * (wanted[2] < wanted[0]))) / 2, (wanted[1] + wanted[3]) / 2
    assert (np.median(lon % 360), np.median(lat)) == pytest.approx((middle[0] % 360, middle[1]), abs=0.1)


@pytest.mark.parametrize(
    "content",
    [
        '{"type": "Point", "coordinates": [1, 2]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1], [1, 1], [0, 0]]]}',
        '{"type": "Polygon", "coordinates": [[]]}',
        '{"type": "Polygon", "coordinates": []}',
        '{"type": "Polygon", "coordinates": [[[500000, 0], [600000, 0], [600000, 1], [500000, 0]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1, NaN], [1, 1], [0, 0]]]}',
        '{"type": "FeatureCollection", "features": [3]}',
        "[1, 2]",
        "{",
    ],
)
def test_what_is_no_area_is_one_error(tmp_path: Path, content: str) -> None:
    path = tmp_path / "aoi.geojson"
    path.write_text(content)
    with pytest.raises(SceneError, match=r"aoi.geojson: holds no GeoJSON polygon \(.*\); expected"):
        read_aoi(str(path))


@pytest.mark.parametrize("text", ["1,2,3,x", "1,5,2,4", "1,2,1,3", "1,2,3,95", "200,2,210,3"])
def test_boxes_that_are_none(text: str) -> None:
    with pytest.raises(SceneError, match="expected a GeoJSON file or WEST,SOUTH,EAST,NORTH"):
        read_aoi(text)
