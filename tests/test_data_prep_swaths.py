"""Sentinel-1 that reaches a part of a scene, or none of it: the rest is prepared without it, and the report says so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
import tensorflow_datasets as tfds
from data_prep_cells import geotiff as tif
from data_prep_cells import scene
from rasterio.transform import from_origin

from data_prep import geotiff
from data_prep.optical import _as_dn
from data_prep.raster import BadInput, Grid, Raster
from terrafm_jax.data.pipeline import load_statistics
from terrafm_jax.sensors import Statistics

LEFT, TOP, SIZE = 600_000, 5_400_000, 120
ORDER = "--bands=s2_l2a=B01..B08,B8A,B09,B11,B12"


def prepare(source: Path, out: Path, *flags: str) -> int:
    return geotiff.main(
        ["--source", str(source), "--worldcover", "none", "--out", str(out), "--split-shares", "1,0,0",
         "--tile-size", "24", ORDER, "--bands", "s1=VV,VH", *flags]
    )  # fmt: skip


def write(root: Path, *, size: int, width: int, left: float = LEFT) -> Path:
    """Sentinel-2 of ``size`` pixels and, from ``left`` on, Sentinel-1 of ``width`` columns."""
    bands = scene(3, size)
    for folder in ("S2L2A", "S1RTC"):
        (root / folder).mkdir(parents=True)
    optical = [a.repeat(size // len(a), 0).repeat(size // len(a), 1) for a in bands["s2_l2a"].values()]
    (root / "S2L2A/a.tif").write_bytes(tif(np.stack(optical), from_origin(LEFT, TOP, 10, 10)))
    radar = np.stack(list(bands["s1"].values()))[:, :, :width]
    (root / "S1RTC/a.tif").write_bytes(tif(radar, from_origin(left, TOP, 10, 10)))
    return root


def test_blocks_that_a_swath_does_not_reach_are_prepared_without_it(tmp_path: Path):
    source = write(tmp_path / "in", size=SIZE, width=SIZE // 2)
    assert prepare(source, tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["tiles"]["train"] == 25  # every one of them, where 15 were lost
    assert summary["left_out"] == {"s1 does not reach a cell": 3}
    assert prepare(source, tmp_path / "strict", "--require", "s1") == 3
    assert "s1 does not reach this part of the scene" in (tmp_path / "strict/rejected.csv").read_text()


@pytest.mark.parametrize("key", ["S2L2A", "S1RTC"])
def test_the_mask_inside_a_file_hides_its_pixels(tmp_path: Path, key: str):
    source = write(tmp_path / "in", size=SIZE, width=SIZE)
    mask = np.full((SIZE, SIZE), 255, np.uint8)
    mask[:6] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(source / key / "a.tif", "r+") as file:
        file.write_mask(mask)
    assert prepare(source, tmp_path / "out", "--tile-size", "120") == 0
    (record,) = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    for sensor, own in (("s2_l2a", "S2L2A"), ("s1", "S1RTC")):
        for group in (record[sensor][name] for name in ("10m", "20m", "60m") if name in record[sensor]):
            valid = np.unpackbits(group["valid"], axis=1, count=SIZE).astype(bool)
            assert (valid == ((mask > 0) if own == key else np.ones_like(valid))).all()


def test_statistics_without_a_train_split_are_not_called_computed(tmp_path: Path):
    """Training and model cards took the published numbers and said that they were computed."""
    source = write(tmp_path / "in", size=SIZE, width=SIZE // 2)
    assert prepare(source, tmp_path / "out", "--split-shares", "0,0,1") == 0
    found = load_statistics(tmp_path / "out")
    assert found.mean == Statistics.published().mean
    assert found.source == "published, as the train split holds no tile"
    assert prepare(source, tmp_path / "train") == 0
    assert load_statistics(tmp_path / "train").source == "computed over the train split"


def test_a_sensor_left_out_of_a_cell_is_no_tile_left_out(tmp_path: Path):
    """Cells without radar counted as tiles seen, so that fewer seemed to be lost between splits."""
    source = write(tmp_path / "in", size=SIZE, width=SIZE // 2)
    assert prepare(source, tmp_path / "out", "--block-degrees", "0.004", "--split-shares", "0.5,0.25,0.25") == 0
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    lost, kept = summary["left_out"]["straddles splits"], sum(summary["tiles"].values())
    assert (lost + kept, summary["left_out"]["s1 does not reach a cell"]) == (25, 3)
    assert summary["lost_between_splits"] == pytest.approx(lost / 25)


def test_radar_of_another_place_is_not_called_black(tmp_path: Path):
    source = write(tmp_path / "in", size=24, width=24, left=LEFT - 300_000)
    assert prepare(source, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out/summary.json").read_text())["left_out"] == {"s1 does not reach a cell": 1}
    assert prepare(source, tmp_path / "strict", "--require", "s1") == 1
    reason = (tmp_path / "strict/rejected.csv").read_text()
    assert "s1: wrong place, its pixels lie at EPSG:32632 (300000" in reason
    assert "those of Sentinel-2 at EPSG:32632 (600000" in reason


@pytest.mark.parametrize(
    ("pixels", "remedy"),
    [
        (np.arange(-340, 2000, dtype=np.int16), r"-340..1999 are no DN .*offset subtracted\? .*\+1000"),
        (np.array([-9999] * 9 + [500], np.int16), "if -9999 means nodata"),
        (np.array([np.nan, 500.0], np.float32), "gdal_edit.py -a_nodata nan"),
    ],
)
def test_values_below_zero_and_nan_have_a_remedy(pixels: np.ndarray, remedy: str):
    repeated = np.repeat(pixels[None], 40, 0) if len(pixels) < 20 else pixels[None]
    grid = Grid("EPSG:32632", (10.0, 0.0, LEFT, 0.0, -10.0, TOP), *repeated.shape)
    with pytest.raises(BadInput, match=remedy):
        _as_dn("s2_l2a", "B02", Raster(repeated, grid))
