"""STAC items through odc-stac, from a static catalog that the test writes."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from data_prep_cells import geotiff, scene
from rasterio.transform import from_origin
from rasterio.warp import transform_bounds

from data_prep import stac
from data_prep.cell import Options
from data_prep.raster import Grid
from data_prep.scenes import kind_of
from data_prep.stac import _radar_of, assets_of, blocks_of, collections_of, grid_of_item
from terrafm_jax.sensors import S2_L1C, SENSORS

pytest.importorskip("odc.stac", reason="extra [stac] is not installed")
pystac = pytest.importorskip("pystac")

LEFT, TOP, SIZE = 600_000.0, 5_400_000.0, 96
COMMON = {"B02": "blue", "B03": "green", "B04": "red", "B08": "nir", "B8A": "nir08", "B11": "swir16", "B12": "swir22"}


def add_item(catalog: Any, root: Path, key: str, name: str, bands: dict[str, np.ndarray], **properties: Any) -> None:
    """One item with a GeoTIFF per band; assets are called by common names where there are some."""
    import datetime as dt

    box = [LEFT, TOP - 10 * SIZE, LEFT + 10 * SIZE, TOP]
    lonlat = list(transform_bounds("EPSG:32632", "EPSG:4326", *box))
    west, south, east, north = lonlat
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    item = pystac.Item(
        name, {"type": "Polygon", "coordinates": [ring]}, lonlat, dt.datetime(2021, 6, 11, 10, 30, 21),
        {"proj:code": "EPSG:32632", **({"proj:bbox": box} if key != "s1" else {}), **properties},
        collection=catalog.get_child(key),
    )  # fmt: skip
    folder = root / key / name
    folder.mkdir(parents=True)
    for band, pixels in bands.items():
        step = 10 * SIZE / pixels.shape[0]
        path = folder / f"{band}.tif"
        path.write_bytes(geotiff(pixels, from_origin(LEFT, TOP, step, step), nodata=-32768 if key == "s1" else 0))
        asset = pystac.Asset(str(path), media_type="image/tiff; application=geotiff", roles=["data"])
        item.add_asset(COMMON.get(band, band.lower()), asset)
    item.add_asset("overview", pystac.Asset(str(folder / "B02.tif"), roles=["overview"]))
    catalog.get_child(key).add_item(item)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    root = tmp_path_factory.mktemp("stac")
    catalog = pystac.Catalog("test", "co-registered scenes")
    everywhere = pystac.Extent(pystac.SpatialExtent([[-180, -90, 180, 90]]), pystac.TemporalExtent([[None, None]]))
    for key in SENSORS:
        catalog.add_child(pystac.Collection(key, key, everywhere))
    bands = scene(11, SIZE, 1000)
    without_cirrus = scene(11, SIZE)["s2_l1c"]
    # Ids are unique within a collection only: both levels share theirs.
    add_item(
        catalog, root, "s2_l2a", "S2A_T32UPU_20210611T103021", bands["s2_l2a"],
        **{"s2:processing_baseline": "05.00", "s2:mgrs_tile": "32UPU", "eo:cloud_cover": 7.0},
    )  # fmt: skip
    add_item(
        catalog, root, "s2_l1c", "S2A_T32UPU_20210611T103021", without_cirrus,
        **{"s2:processing_baseline": "03.00", "s2:mgrs_tile": "32UPU"},
    )  # fmt: skip
    add_item(catalog, root, "s1", "S1A_IW_GRDH_20210612_rtc", bands["s1"], **{"sat:orbit_state": "ascending"})
    catalog.normalize_hrefs(str(root / "catalog"))
    catalog.save(catalog_type=pystac.CatalogType.SELF_CONTAINED)
    return root / "catalog" / "catalog.json", {**bands, "s2_l1c": without_cirrus}


def prepare(path: Path, out: Path, *flags: str) -> int:
    places = ["--catalog", str(path), "--worldcover", "none", "--out", str(out), "--tile-size", "48"]
    collections = ["--collection", "s1", "--collection", "s2_l1c=s2_l1c", "--collection", "s2_l2a=s2_l2a"]
    return stac.main([*places, *collections, "--split-shares", "1,0,0", *flags])


def records(out: Path) -> list[dict[str, Any]]:
    import tensorflow_datasets as tfds

    return list(tfds.builder_from_directory(out).as_data_source("train"))


def test_items_of_three_sensors_become_tiles_pixel_by_pixel(catalog: tuple[Path, dict], tmp_path: Path):
    path, delivered = catalog
    assert prepare(path, tmp_path / "out") == 0
    found = records(tmp_path / "out")
    assert len(found) == 4
    for record in found:
        left, top = record["s2_l2a"]["10m"]["transform"][[2, 5]]
        row, col = round((TOP - top) / 10), round((left - LEFT) / 10)
        for key, sensor in SENSORS.items():
            assert record[key]["present"]
            for group, bands in sensor.groups.items():
                k = int(group[:-1]) // 10
                for i, band in enumerate(bands):
                    part = delivered[key][band][row // k : (row + 48) // k, col // k : (col + 48) // k]
                    stored = record[key][group]["dn"][..., i]
                    if key == "s1":
                        assert np.abs(stored / 100 - 10 * np.log10(part)).max() <= 0.0051
                    else:
                        assert (stored == part).all()
    record = found[0]
    assert (record["s2_l2a"]["offset"], record["s2_l1c"]["offset"]) == (1000, 0)
    assert record["s2_l2a"]["product"].endswith(b"_N0500")
    assert record["s1"]["orbit"] == b"ascending"
    assert record["s1"]["kind"] == b"RTC gamma0"
    assert record["s2_l2a"]["cloud"] == pytest.approx(0.07)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda dn: dn.astype(np.int16) - np.int16(200), "are no DN"),  # below zero: it became nodata
        (lambda dn: (dn / 10_000).astype(np.float32), "for 0..1 state the unit reflectance"),  # it became black
    ],
)
def test_what_is_no_dn_is_refused_and_not_cut_off(change: Any, reason: str, tmp_path: Path):
    catalog = pystac.Catalog("test", "one scene")
    everywhere = pystac.Extent(pystac.SpatialExtent([[-180, -90, 180, 90]]), pystac.TemporalExtent([[None, None]]))
    for key in SENSORS:
        catalog.add_child(pystac.Collection(key, key, everywhere))
    bands = {name: change(pixels) for name, pixels in scene(11, SIZE)["s2_l2a"].items()}
    add_item(catalog, tmp_path, "s2_l2a", "S2A_T32UPU_20210611T103021", bands)
    catalog.normalize_hrefs(str(tmp_path / "catalog"))
    catalog.save(catalog_type=pystac.CatalogType.SELF_CONTAINED)
    assert prepare(tmp_path / "catalog" / "catalog.json", tmp_path / "out") == 1
    assert reason in (tmp_path / "out" / "rejected.csv").read_text()


def test_search_by_place_and_day(catalog: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path, _ = catalog
    assert prepare(path, tmp_path / "a", "--datetime", "2020-01-01/2020-12-31") == 1
    assert "no cell to prepare" in capsys.readouterr().err
    assert prepare(path, tmp_path / "b", "--bbox", "0", "0", "1", "1") == 1
    assert prepare(path, tmp_path / "c", "--datetime", "2021-06-11") == 0
    assert "Warning" not in capsys.readouterr().err, "a static catalog is nothing to warn of"
    assert prepare(path, tmp_path / "d", "--datetime", "2021-06-11/..", "--limit", "1") == 0


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--datetime", "2021-13-01", r"'2021-13-01' is no day; expected 2021-06-01 or 2021-06-01/2021-06-30"),
        ("--datetime", "2021-06-01/June", r"'June' is no day"),
        ("--sign", "no_such_module:sign", r"--sign no_such_module:sign: expected MODULE:FUNCTION .*no_such_module"),
        ("--sign", "math", r"--sign math: expected MODULE:FUNCTION"),
    ],
)
def test_wrong_flags_are_said_before_the_catalog_is_asked(tmp_path: Path, capsys: Any, flag, value, message):
    assert prepare(tmp_path / "nowhere.json", tmp_path / "out", flag, value) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_items_that_state_when_they_begin_are_found_by_that_day():
    """A mosaic has no datetime of its own; without --datetime none is left out for that."""
    start = "2021-06-11T10:30:21Z"
    given = {"start_datetime": start, "end_datetime": start}
    for properties, days in ((given, ["", "2021-06-11", "2021-06-01/..", "../2021-06-11"]), ({}, [""])):
        item = SimpleNamespace(datetime=None, bbox=[11, 48, 12, 49], properties=properties)
        asked = ["", "2021-06-11", "2021-06-01/..", "../2021-06-11", "2021-06-12", "2021-06-12/.."]
        assert [when for when in asked if stac._wanted(item, None, when)] == days


def test_names_of_collections(catalog: tuple[Path, dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Those of Planetary Computer, Earth Search and Copernicus Data Space say the sensor themselves."""
    known = ["sentinel-1-rtc", "sentinel-2-l1c", "sentinel-2-c1-l2a"]
    assert collections_of(known) == dict(zip(SENSORS, known, strict=True))
    assert collections_of(["s1=mine", "S2L2A=other"]) == {"s1": "mine", "s2_l2a": "other"}
    assert kind_of("s1", "sentinel-1-rtc S1A_IW_GRDH_1SDV_20210611T053500_rtc") == "RTC gamma0"
    assert kind_of("s1", "sentinel-1-grd S1A_IW_GRDH_1SDV_20210611T053500") == "GRD sigma0"
    for wrong, message in (
        (["landsat-c2-l2"], "expected SENSOR=NAME; unknown sensor 'landsat-c2-l2'"),
        (["sentinel-1-rtc", "s1=sentinel-1-grd"], "s1 has sentinel-1-rtc already"),
    ):
        with pytest.raises(ValueError, match=message):
            collections_of(wrong)
    flags = ["--catalog", str(catalog[0]), "--worldcover", "none", "--out", str(tmp_path / "out")]
    assert stac.main([*flags, "--collection", "mine"]) == 1
    assert "--collection mine" in capsys.readouterr().err


def test_names_of_assets():
    item = {
        "id": "x", "properties": {}, "assets": {
            "blue": {}, "B03_10m": {}, "B03_20m": {}, "visual": {"bands": [{"name": "B04"}, {"name": "B03"}]},
            "red-jp2": {"eo:bands": [{"name": "red", "common_name": "red"}]}, "red": {}, "B8A": {}, "rededge1": {},
            "asset7": {"bands": [{"eo:common_name": "swir16"}]}, "SCL": {},
        },
    }  # fmt: skip
    found = assets_of("s2_l2a", item)
    assert found["B02"] == "blue"
    assert found["B03"] == "B03_10m", "the copy at 20 m is left alone"
    assert found["B11"] == "asset7"
    assert found["B05"] == "rededge1"
    assert set(found) == {"B02", "B03", "B04", "B05", "B8A", "B11"}


def test_blocks_lie_on_the_lines_of_60_metres():
    item = {"id": "x", "bbox": [0, 0, 1, 1], "assets": {}, "properties": {"proj:epsg": 32632}}
    item["properties"]["proj:bbox"] = [600_030.0, 5_290_200.0, 709_800.0, 5_400_010.0]
    grid = grid_of_item(item)
    assert grid.transform[2] == 600_060
    assert grid.transform[5] == 5_400_000
    assert grid.height % 6 == 0
    for row, col, block in blocks_of(grid, Options(), None):
        assert (row % 6, col % 6) == (0, 0)
        assert block.transform[2] % 60 == 0
        assert block.bounds()[2] <= 709_800
    assert all(b.gsd in (10, 20, 60) for b in S2_L1C.bands)


def test_the_extent_of_an_item_comes_from_its_assets_before_its_lonlat_box():
    """A box in degrees is larger than a tile of UTM: a rim of nodata; across the antimeridian it may span the Earth."""
    asset = {"proj:shape": [10980, 10980], "proj:transform": [10, 0, 199_980, 0, -10, 8_200_020]}
    lonlat = [-180.0, -17.3, 180.0, -16.2]
    item = {"id": "x", "properties": {"proj:epsg": 32701}, "assets": {"thumbnail": {}, "B02": asset}, "bbox": lonlat}
    grid = grid_of_item(item)
    assert grid.bounds() == (199_980, 8_200_020 - 109_800, 199_980 + 109_800, 8_200_020)


def test_radar_of_a_block_is_that_of_one_overpass():
    """Of an ascending and a descending pass on one day the nearer; of that all frames, also past midnight."""
    grid = Grid("EPSG:32632", (10.0, 0.0, LEFT, 0.0, -10.0, TOP), SIZE, SIZE)
    here = list(transform_bounds("EPSG:32632", "EPSG:4326", *grid.bounds()))

    def item(when: str | None, box: list[float] = here) -> dict[str, Any]:
        return {"bbox": box, "properties": {"datetime": when}}

    anchor = item("2021-06-11T10:30:21Z")
    frames = {"b": item("2021-06-11T05:30:25Z"), "a": item("2021-06-11T05:30:00Z"), "c": item("2021-06-11T17:00:00Z")}
    assert _radar_of(frames, grid, anchor) == ["a", "b"]
    assert _radar_of(frames | {"d": item("2021-06-11T05:30:50Z", [0, 0, 1, 1])}, grid, anchor) == ["a", "b"]
    night = {"x": item("2021-06-11T23:59:50Z"), "y": item("2021-06-12T00:00:15Z"), "z": item(None)}
    assert _radar_of(night, grid, anchor) == ["x", "y"]
    assert _radar_of({"z": item(None)}, grid, anchor) == ["z"]
    assert _radar_of({}, grid, anchor) == []


def test_boxes_overlap_across_the_antimeridian():
    over = (179.0, -18.0, -179.5, -17.0)  # as items name it
    assert stac._overlap(over, (-180, -20, -170, 0))
    assert stac._overlap((-180, -20, -170, 0), over)
    assert stac._overlap(over, (179.9, -17.5, 180.2, -17.4)), "blocks run on without a jump"
    assert stac._overlap((0, 0, 10, 10), (-20, 5, 30, 6)), "no corner of either lies in the other"
    assert not stac._overlap(over, (-179, -20, -170, 0))
    assert not stac._overlap(over, (178, -16, -170, 0))
    assert not stac._overlap((0, 0, 1, 1), (1.1, 0, 2, 1))
