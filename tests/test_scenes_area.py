"""The area of interest: read in degrees, laid onto grids in meters, also where zones bend and longitudes wrap."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("rasterio")
from rasterio.crs import CRS
from rasterio.warp import transform

from terrafm_jax.scenes.area import read_aoi
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Grid
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
