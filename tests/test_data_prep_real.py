"""The real Major-TOM cell 199U_1099R as its parquet delivers it, and the measures of quality on all real tiles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio

from data_prep import inspect, majortom
from data_prep.dataset import DataSet
from data_prep.harmonize import snap_origin
from data_prep.quality import cloud_share, is_black, is_constant, nodata_share
from data_prep.radar import power_from
from data_prep.raster import Grid, grid_of
from data_prep.tiling import cut, windows
from data_prep.worldcover import WorldCover, fractions, is_ocean, lonlat_outline, ocean
from terrafm_jax import landcover
from terrafm_jax.sensors import S2_L2A

pytestmark = pytest.mark.real
CELL = "199U_1099R"


@pytest.fixture(scope="module")
def delivered(real_data: Path) -> Path:
    """Folder of the cell's GeoTIFFs."""
    (folder,) = (real_data / "train_tiles/majortom_core_native/S2L2A").glob(f"*/{CELL}/*")
    return folder


@pytest.fixture(scope="module")
def prepared(delivered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files' very bytes in a parquet row, prepared into four tiles."""
    root = tmp_path_factory.mktemp("real_cell")
    images = root / "Core-S2L2A" / "images"
    images.mkdir(parents=True)
    row = {"product_id": delivered.name, "grid_cell": CELL, "timestamp": "2020-02-23T03:27:39"}
    bands = {path.stem: path.read_bytes() for path in delivered.glob("*.tif")}
    with rasterio.open(delivered / "B02.tif") as source:
        grid = grid_of(source, "B02")
    lon, lat = lonlat_outline(grid)
    place = {"centre_lat": float(lat.mean()), "centre_lon": float(lon.mean()), "crs": f"EPSG:{grid.crs}"}
    meta = row | place | {"cloud_cover": 3.5, "nodata": 0.0, "parquet_url": "part_00000.parquet", "parquet_row": 0}
    pq.write_table(pa.Table.from_pylist([row | bands]), images / "part_00000.parquet")
    pq.write_table(pa.Table.from_pylist([meta]), images.parent / "metadata.parquet")
    out = root / "out"
    flags = ["--source", str(root), "--worldcover", "none", "--out", str(out), "--split-shares", "1,0,0"]
    assert majortom.main(flags) == 0
    return out


def test_export_of_the_real_cell_lies_on_its_source(prepared: Path, delivered: Path, tmp_path: Path):
    """Every band of every tile: the delivered DN, at the place that snapping gives them."""
    data = DataSet.open(prepared)
    assert len(data.splits["train"]) == 4
    for number in range(4):
        out = tmp_path / str(number)
        assert inspect.main([str(prepared), "--export", f"train:{number}", str(out)]) == 0
        for group, bands in S2_L2A.groups.items():
            (path,) = out.glob(f"*_s2_l2a_{group}.tif")
            with rasterio.open(path) as exported:
                found, pixels = grid_of(exported, path.name), exported.read()
            for name, stored in zip(bands, pixels, strict=True):
                with rasterio.open(delivered / f"{name}.tif") as source:
                    grid, truth = snap_origin(grid_of(source, name)), source.read(1)
                row = round((found.transform[5] - grid.transform[5]) / grid.transform[4])
                col = round((found.transform[2] - grid.transform[2]) / grid.transform[0])
                assert found == grid.window(row, col, *stored.shape)
                assert (stored == truth[row : row + stored.shape[0], col : col + stored.shape[1]]).all()


def test_record_of_the_real_cell(prepared: Path):
    data = DataSet.open(prepared)
    record = inspect.find(data, f"{CELL}/r534_c534")
    entry = record["s2_l2a"]
    assert entry["10m"]["dn"].shape == (534, 534, 4)
    assert [bool(record[key]["present"]) for key in ("s1", "s2_l1c", "s2_l2a")] == [False, False, True]
    assert (entry["product"][:10], entry["kind"], entry["time"]) == ("S2B_MSIL2A", "L2A", "2020-02-23T03:27:39Z")
    assert (entry["offset"], entry["offset_source"]) == (0, "pixels"), "N9999 says nothing, dark pixels do"
    assert entry["cloud"] == pytest.approx(0.035)
    assert "empty" in entry["cloud_source"], "its mask is all zero, the metadata know better"
    assert record["landcover"] == landcover.UNKNOWN


def test_cloud_share_of_the_real_mask(delivered: Path):
    with rasterio.open(delivered / "cloud_mask.tif") as source:
        mask = source.read(1)
    assert mask.max() == 0
    assert cloud_share(mask, None) == (0.0, "cloud mask")
    assert cloud_share(mask, 100.0) == (1.0, "metadata (cloud mask empty)"), "empty on overcast cells, too"


def test_measures_of_quality_on_the_real_tiles(real_data: Path):
    """No real optical tile is black or constant; one chip of Sentinel-1 is black, one lacks 0.2 %."""
    checked = 0
    for folder in ("terramesh_224/S2L2A", "s2l2a_ships_128", "s2l2a_hydro_256", "s2l2a_boadella"):
        for path in sorted((real_data / "train_tiles" / folder).glob("*.tif")):
            with rasterio.open(path) as source:
                pixels = source.read()
            valid = (pixels != 0).any(axis=0)
            share = nodata_share({"10m": valid})
            assert share == pytest.approx(1 - valid.mean())
            assert share < 0.001
            assert not all(is_constant(band, valid) for band in pixels[[1, 2, 3, 7]]), path.name
            checked += 1
    assert checked >= 35
    for name, low, high in (("Nigeria_812045", 0.001, 0.004), ("Paraguay_34417", 1.0, 1.0)):
        with rasterio.open(real_data / f"train_tiles/sen1floods11_512/S1GRD/{name}_S1Hand.tif") as source:
            power = power_from(source.read(1), "dB", source.nodata)
        share = nodata_share({"10m": ~np.isnan(power)})
        assert low <= share <= high
        assert is_black(share) == (name == "Paraguay_34417")


def test_ocean_filter_spares_the_real_coasts(real_data: Path):
    """Principe and the sea around it, cut into tiles: what holds over 1 % of land is never ocean, the far sea is."""
    cover = WorldCover.open(real_data / "data_prep/esa_worldcover")
    side = 16 * 267  # tiles of 5.34 km at 20 m
    grid = Grid("EPSG:32632", (20.0, 0.0, 280_000.0, 0.0, -20.0, 220_000.0), side, side)
    categories = cover.overlay(grid)
    sea = ocean(categories)
    water = (landcover.SEA, landcover.WATER)
    land, thinned = 0, 0
    for window in windows(side, side, 267, 267):
        shares = fractions(cut(categories, window, landcover.UNKNOWN))
        dry = 1.0 - sum(shares[i] for i in water)
        if is_ocean(cut(sea, window, False)):
            assert dry <= 0.01
            thinned += 1
        land += dry > 0.01
    assert land >= 10
    assert thinned >= 200
    assert land + thinned == 256, "no tile around the island is neither"
