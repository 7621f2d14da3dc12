"""Embedding of whole scenes, end to end through the command: places, seams, edges, masks, sensors, dates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from scenes_fake import CRS, NORTH, WEST, borders, call, jumps, optical, radar, surface, tokens, write

from terrafm_jax.inference import Model
from terrafm_jax.scenes import grid as grid_lib
from terrafm_jax.scenes import inputs, read
from terrafm_jax.scenes.grid import Plan
from terrafm_jax.sensors import SENSORS

pytestmark = pytest.mark.usefixtures("loaded")


# --- geometry ---


def test_output_lies_on_the_scene(l2a_scene: Path, tmp_path: Path, tiny_encoder: Model) -> None:
    out = tmp_path / "e.tif"
    assert call(out=out, sensors={"s2_l2a": l2a_scene}) == 0
    with rasterio.open(out) as found:
        assert (found.height, found.width, found.count) == (19, 21, 24)
        assert found.crs == rasterio.crs.CRS.from_string(CRS)
        assert tuple(found.transform)[:6] == (160.0, 0.0, WEST, 0.0, -160.0, NORTH)
        assert found.descriptions[:2] == ("feature 0", "feature 1")
        assert np.isnan(found.nodata)
        tags = found.tags()
    assert tags["TERRAFM_WEIGHTS"] == tiny_encoder.weights_hash
    assert tags["TERRAFM_GSD"] == "10"
    assert json.loads(tags["TERRAFM_SOURCES"])["s2_l2a"][0]["files"] == [l2a_scene.name]
    assert str(l2a_scene.parent) not in str(tags)  # nor any other path: these files go to other people
    assert json.loads(tags["TERRAFM_BANDS"])["s2_l2a"] == list(SENSORS["s2_l2a"].band_names)
    assert not list(tmp_path.glob("*.partial*"))


@pytest.mark.parametrize(("stride", "shape"), [(16, (19, 21)), (8, (37, 41)), (4, (72, 80))])
def test_a_mark_in_the_scene_shows_where_it_is(tmp_path: Path, tiny_encoder: Model, stride: int, shape: Any) -> None:
    # One bright block of 16 px: the token that differs most must lie on it, by the output's own georeference.
    base = np.full((12, 300, 330), 1200, np.uint16)
    marked = base.copy()
    marked[:, 160:176, 208:224] = 6000
    plain, bright = (
        write(tmp_path / f"{i}.tif", d, names=SENSORS["s2_l2a"].band_names) for i, d in enumerate((base, marked))
    )
    outs = [tmp_path / "a.tif", tmp_path / "b.tif"]
    for source, out in zip((plain, bright), outs, strict=True):
        assert call(f"--stride={stride}", "--overlap=48", out=out, sensors={"s2_l2a": source}) == 0
    difference = np.linalg.norm(tokens(outs[0]) - tokens(outs[1]), axis=-1)
    assert difference.shape == shape
    weight = np.where(difference > 0.7 * np.nanmax(difference), difference, 0)
    with rasterio.open(outs[0]) as found:
        rows, columns = np.nonzero(weight)
        xs, ys = (np.array(v) for v in found.xy(rows, columns))
        x, y = (np.average(v, weights=weight[rows, columns]) for v in (xs, ys))
    assert x == pytest.approx(WEST + 216 * 10, abs=40)
    assert y == pytest.approx(NORTH - 168 * 10, abs=40)


def test_tokens_do_not_depend_on_the_stride(l2a_scene: Path, tmp_path: Path) -> None:
    coarse, dense = tmp_path / "16.tif", tmp_path / "8.tif"
    for stride, out in ((16, coarse), (8, dense)):
        assert call(f"--stride={stride}", out=out, sensors={"s2_l2a": l2a_scene}) == 0
    assert np.allclose(tokens(dense)[::2, ::2][:18, :20], tokens(coarse)[:18, :20], atol=1e-4)


def test_one_window_equals_the_encoder(tmp_path: Path, tiny_encoder: Model) -> None:
    data = surface(96, 96, 12)
    source = write(tmp_path / "s.tif", data, names=SENSORS["s2_l2a"].band_names)
    out = tmp_path / "e.tif"
    assert call(out=out, sensors={"s2_l2a": source}) == 0
    import jax.numpy as jnp

    from terrafm_jax.models import terrafm
    from terrafm_jax.sensors import normalize

    image = normalize(np.moveaxis(data, 0, -1).astype(np.float32), *tiny_encoder.stats["s2_l2a"])[None]
    patches = {"s2_l2a": terrafm.patchify(jnp.asarray(image), 16)}
    expected = terrafm.encode(tiny_encoder.spec, tiny_encoder.backbone, patches).patches[0]
    assert np.allclose(tokens(out), expected, atol=1e-4)


# --- seams ---


def _jump(values: np.ndarray, seams: list[int], axis: int) -> float:
    """Mean cosine jump between neighbors across window borders over that elsewhere."""
    at, elsewhere = jumps(values, seams, axis)
    return float(at.mean() / elsewhere.mean())


@pytest.mark.parametrize("kind", ["gradient", "surface"])
def test_windows_leave_no_seams(tmp_path: Path, kind: str) -> None:
    size = 16 * 40
    if kind == "gradient":  # a constant gradient: whatever changes in steps comes from the windows
        y, x = np.mgrid[:size, :size]
        data = np.repeat((1000 + 2.0 * x + 1.0 * y)[None], 12, 0).astype(np.uint16)
    else:
        data = surface(size, size, 12)
    source = write(tmp_path / "s.tif", data, names=SENSORS["s2_l2a"].band_names)
    ratios = {}
    for overlap in (0, 112):
        out = tmp_path / f"{overlap}.tif"
        assert call(f"--overlap={overlap}", out=out, sensors={"s2_l2a": source}, window=224) == 0
        plan = Plan(grid_lib.Grid(rasterio.crs.CRS.from_string(CRS), WEST, NORTH, 10.0, size, size), 224, overlap, 16)
        found = borders(plan)
        ratios[overlap] = [_jump(tokens(out), found, axis) for axis in (0, 1)]
    assert max(ratios[112]) <= 1.05
    if kind == "gradient":
        assert max(ratios[0]) > 1.05, "the measure must see seams where there are some"


# --- edges, nodata, masks, areas ---


@pytest.mark.parametrize(("rows", "columns"), [(96, 96), (100, 97), (40, 200), (16, 16), (111, 127)])
def test_scenes_not_divisible_by_the_patch_are_covered_to_the_edge(tmp_path: Path, rows: int, columns: int) -> None:
    out = tmp_path / "e.tif"
    assert call(out=out, sensors={"s2_l2a": optical(tmp_path / "s.tif", rows, columns)}) == 0
    found = tokens(out)
    assert found.shape[:2] == (-(-rows // 16), -(-columns // 16))
    assert np.isfinite(found).all()


def test_a_token_counts_if_half_of_its_ground_within_the_scene_was_measured(tmp_path: Path) -> None:
    data = surface(100, 104, 12)  # the last row of tokens has 4 px of ground, the last column 8 px
    data[:, 98:, :48] = 0  # half of those 4 rows
    data[:, 97:, 48:80] = 0  # three of them
    data[:, :48, 100:] = 0  # half of the 8 columns
    data[:, 48:80, 99:] = 0  # five of them
    data[:, :8, :16] = 0  # half of a whole token
    data[:, :9, 16:32] = 0  # more than half
    out = tmp_path / "e.tif"
    source = write(tmp_path / "s.tif", data, names=SENSORS["s2_l2a"].band_names)
    assert call(out=out, sensors={"s2_l2a": source}) == 0
    missing = {(6, 3), (6, 4), (3, 6), (4, 6), (0, 1)}
    assert {tuple(at) for at in np.argwhere(~np.isfinite(tokens(out)).all(-1)).tolist()} == missing


def test_nodata_and_masks_stay_nodata(tmp_path: Path) -> None:
    data = surface(192, 192, 12)
    data[:, :64, :64] = 0  # nodata in all bands at once
    data[3, 100:120, 100:120] = 0  # zero in one band is dark ground
    source = write(tmp_path / "s.tif", data, names=SENSORS["s2_l2a"].band_names)
    mask = np.ones((1, 192, 192), np.uint8)
    mask[:, 128:, :] = 0
    keep = write(tmp_path / "m.tif", mask)
    scl = np.full((1, 96, 96), 4, np.uint8)
    scl[:, :, 80:] = 9  # high clouds over the right sixth, at 20 m
    classes = write(tmp_path / "scl.tif", scl, gsd=20)
    out = tmp_path / "e.tif"
    assert call(f"--mask={keep}", f"--mask=scl={classes}", out=out, sensors={"s2_l2a": source}) == 0
    finite = np.isfinite(tokens(out)).all(-1)
    expected = np.ones((12, 12), bool)
    expected[:4, :4] = False
    expected[8:] = False
    expected[:, 10:] = False
    assert np.array_equal(finite, expected)
    only = tmp_path / "only.tif"
    assert call(f"--mask=scl={classes}:4", out=only, sensors={"s2_l2a": source}) == 0
    assert np.isfinite(tokens(only)[:, 10:]).all()
    assert not np.isfinite(tokens(only)[:, :10]).any()


def test_area_of_interest_cuts_and_masks(l2a_scene: Path, tmp_path: Path) -> None:
    from rasterio.warp import transform_geom

    ring = [
        [WEST + 500, NORTH - 500],
        [WEST + 2500, NORTH - 500],
        [WEST + 500, NORTH - 2500],
        [WEST + 500, NORTH - 500],
    ]
    shape = transform_geom(CRS, "EPSG:4326", {"type": "Polygon", "coordinates": [ring]})
    path = tmp_path / "aoi.geojson"
    path.write_text(json.dumps({"type": "Feature", "geometry": shape, "properties": {}}))
    out = tmp_path / "e.tif"
    assert call(f"--aoi={path}", out=out, sensors={"s2_l2a": l2a_scene}) == 0
    found = tokens(out)
    assert 12 <= min(found.shape[:2]) <= max(found.shape[:2]) <= 14
    share = np.isfinite(found[..., 0]).mean()
    assert 0.4 < share < 0.62, "a triangle covers half of its box"
    west, south, east, north = rasterio.warp.transform_bounds(CRS, "EPSG:4326", WEST, NORTH - 1000, WEST + 1000, NORTH)
    box = tmp_path / "box.tif"
    assert call(f"--aoi={west},{south},{east},{north}", out=box, sensors={"s2_l2a": l2a_scene}) == 0
    assert min(tokens(box).shape[:2]) in (6, 7, 8)


def test_windows_outside_of_the_area_are_not_even_read(l2a_scene: Path, tmp_path: Path, caplog: Any) -> None:
    import pyarrow.parquet as pq

    # An L of two arms, one window wide each: its box holds 3 x 3 windows, the L meets 5 of them.
    x, y = WEST + 50, NORTH - 50
    ring = [
        (x, y),
        (x + 860, y),
        (x + 860, y - 1980),
        (x + 2880, y - 1980),
        (x + 2880, y - 2840),
        (x, y - 2840),
        (x, y),
    ]
    lons, lats = rasterio.warp.transform(CRS, "EPSG:4326", *zip(*ring, strict=True))
    shape = {"type": "Polygon", "coordinates": [list(zip(lons, lats, strict=True))]}
    path = tmp_path / "l.geojson"
    path.write_text(json.dumps(shape))
    out = tmp_path / "w.parquet"
    with caplog.at_level("INFO"):
        assert call(f"--aoi={path}", out=out, sensors={"s2_l2a": l2a_scene}) == 0
    assert len(pq.read_table(out)) == 5
    assert "5 windows encoded, 4 empty" in caplog.text


# --- several sensors, samplings, dates ---


def test_sensors_on_other_grids_are_warped_onto_one(tmp_path: Path) -> None:
    l2a = optical(tmp_path / "l2a.tif", 192, 192)
    # S1 at 20 m, shifted by one and a half of its pixels, larger than the optical scene.
    s1 = radar(tmp_path / "s1.tif", 140, 140, gsd=20, west=WEST - 330, north=NORTH + 330)
    out = tmp_path / "e.tif"
    assert call(out=out, sensors={"s2_l2a": l2a, "s1": s1}) == 0
    with rasterio.open(out) as found:
        assert tuple(found.transform)[:6] == (160.0, 0.0, WEST, 0.0, -160.0, NORTH)
        assert np.isfinite(found.read()).all()
    acquisitions = [inputs.resolve(f"{k}={v}", inputs.Declared()) for k, v in (("s2_l2a", l2a), ("s1", s1))]
    reader = read.SceneReader(acquisitions, grid_lib.target_grid(acquisitions))
    whole = reader.read(0, 0, 192, 192)
    for row, column in ((0, 0), (37, 90), (96, 96)):
        part = reader.read(row, column, 96, 96)
        for key in whole:
            assert np.allclose(part[key].values, whole[key].values[row : row + 96, column : column + 96], atol=2e-3), (
                key
            )


def test_a_window_without_one_sensor_is_encoded_without_it(tmp_path: Path, tiny_encoder: Model) -> None:
    l2a = optical(tmp_path / "l2a.tif", 96, 192)
    data = np.full((2, 96, 192), np.nan, np.float32)
    data[:, :, 96:] = -12
    s1 = write(tmp_path / "s1.tif", data, names=("VV", "VH"))
    both, alone = tmp_path / "both.tif", tmp_path / "alone.tif"
    assert call("--overlap=0", out=both, sensors={"s2_l2a": l2a, "s1": s1}) == 0
    assert call("--overlap=0", out=alone, sensors={"s2_l2a": l2a}) == 0
    assert np.allclose(tokens(both)[:, :6], tokens(alone)[:, :6], atol=1e-4)
    assert np.abs(tokens(both)[:, 6:] - tokens(alone)[:, 6:]).max() > 1e-2


def test_mixed_resolutions_and_files_per_band(tmp_path: Path) -> None:
    folder = tmp_path / "S2B_MSIL2A_20200223T032739_N9999_R018_T32TQM_20230924T183543"
    for band in SENSORS["s2_l2a"].bands:
        n = 1920 // band.gsd
        write(folder / f"{band.name}.tif", surface(n, n, 1, band.gsd), gsd=band.gsd)
    out = tmp_path / "e.tif"
    assert call(out=out, sensors={"s2_l2a": folder}) == 0
    with rasterio.open(out) as found:
        assert (found.height, found.width) == (12, 12)
        assert np.isfinite(found.read()).all()
        assert json.loads(found.tags()["TERRAFM_SOURCES"])["s2_l2a"][0]["time"] == "2020-02-23T03:27:39Z"


def test_missing_bands_are_left_out_of_the_stem(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rgb = write(tmp_path / "rgb.tif", surface(96, 96, 3), names=("Red", "green", "B2"))
    out = tmp_path / "e.tif"
    with caplog.at_level("INFO"):
        assert call(out=out, sensors={"s2_l2a": rgb}) == 0
    assert "B01" in caplog.text
    with rasterio.open(out) as found:
        assert json.loads(found.tags()["TERRAFM_BANDS"])["s2_l2a"] == ["B02", "B03", "B04"]


def test_gsd_averages_to_what_pretraining_saw(l2a_scene: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.tif"
    assert call("--gsd=pretraining", out=out, sensors={"s2_l2a": l2a_scene}) == 0
    with rasterio.open(out) as found:
        assert found.transform.a == 320
        assert found.tags()["TERRAFM_GSD"] == "20"
    acquisition = inputs.resolve(f"s2_l2a={l2a_scene}", inputs.Declared())
    half = read.SceneReader([acquisition], grid_lib.target_grid([acquisition], 20.0)).read(10, 10, 32, 32)["s2_l2a"]
    with rasterio.open(l2a_scene) as source:
        mean = source.read(1, window=((20, 84), (20, 84))).astype(float).reshape(32, 2, 32, 2).mean((1, 3))
    assert np.abs(half.values[..., 0] - mean).mean() < 25, "the triangle of two pixels is near the mean"


@pytest.mark.parametrize("composite", ["first", "median", "mean"])
def test_dates_are_composited_by_valid_pixels(tmp_path: Path, composite: str) -> None:
    values = (1000, 3000, 1600)
    dates = []
    for i, value in enumerate(values):
        data = np.full((12, 64, 64), value, np.uint16)
        data[:, :32] = 0 if i == 0 else data[:, :32]
        data[:, 60:] = 0
        dates.append(write(tmp_path / f"{i}.tif", data, names=SENSORS["s2_l2a"].band_names))
    acquisitions = [inputs.resolve(f"s2_l2a={d}", inputs.Declared()) for d in dates]
    reader = read.SceneReader(acquisitions, grid_lib.target_grid(acquisitions), composite=composite)
    found = reader.read(0, 0, 64, 64)["s2_l2a"]
    top, bottom = {"first": (3000, 1000), "median": (2300, 1600), "mean": (2300, 5600 / 3)}[composite]
    assert np.array_equal(found.valid, np.broadcast_to(np.arange(64)[:, None] < 60, (64, 64)))
    assert found.values[:32] == pytest.approx(top)
    assert found.values[32:60] == pytest.approx(bottom, rel=1e-5)


def test_units_end_in_the_same_features(tmp_path: Path) -> None:
    db, power = radar(tmp_path / "db.tif", 96, 96), radar(tmp_path / "p.tif", 96, 96, power=True)
    dn = optical(tmp_path / "dn.tif", 96, 96)
    shifted = write(tmp_path / "o.tif", surface(96, 96, 12) + 1000, names=SENSORS["s2_l2a"].band_names)
    share = (surface(96, 96, 12) / 10_000).astype(np.float32)
    reflectance = write(tmp_path / "r.tif", share, names=SENSORS["s2_l2a"].band_names)
    for key, first, second, flag in (
        ("s1", db, power, "--unit=s1=power"),
        ("s2_l2a", dn, reflectance, "--unit=s2_l2a=reflectance"),
        ("s2_l2a", dn, shifted, "--offset=s2_l2a=1000"),
    ):
        outs = [tmp_path / f"{flag[2:]}{n}.tif" for n in (1, 2)]
        assert call(out=outs[0], sensors={key: first}) == 0
        assert call(flag, out=outs[1], sensors={key: second}) == 0
        assert np.allclose(tokens(outs[0]), tokens(outs[1]), atol=2e-3), flag


@pytest.mark.parametrize("across", [8.983e-5, 8.983e-5 / 0.695])
def test_geographic_rasters_go_to_utm(tmp_path: Path, across: float) -> None:
    # Pixels as high as 10 m; as wide in degrees, or as wide in meters.
    source = write(
        tmp_path / "geo.tif", surface(160, 160, 12), crs="EPSG:4326", names=SENSORS["s2_l2a"].band_names,
        transform=rasterio.Affine(across, 0, 9.0, 0, -8.983e-5, 46.0),
    )  # fmt: skip
    out = tmp_path / "e.tif"
    assert call(out=out, sensors={"s2_l2a": source}) == 0
    with rasterio.open(out) as found:
        assert found.crs.to_epsg() == 32632
        assert found.transform.a == 160
        center = rasterio.warp.transform_bounds(found.crs, "EPSG:4326", *found.bounds)
    assert center[0] == pytest.approx(9.0, abs=0.003)
    assert center[3] == pytest.approx(46.0, abs=0.003)


@pytest.mark.real
def test_real_tiles_are_embedded_without_seams(real_data: Path, tmp_path: Path) -> None:
    base = real_data / "train_tiles" / "terramesh_224"
    out = tmp_path / "e.tif"
    sensors = {"s2_l2a": base / "S2L2A/637U_59R_1_3.tif", "s1": base / "S1RTC/637U_59R_1_3.tif"}
    names = f"--bands=s2_l2a={','.join(SENSORS['s2_l2a'].band_names)}"
    assert call(names, "--bands=s1=VV,VH", out=out, sensors=sensors) == 0
    with rasterio.open(sensors["s1"]) as source, rasterio.open(out) as found:
        assert found.bounds == pytest.approx(tuple(source.bounds))
        assert found.crs == source.crs
        assert np.isfinite(found.read()).all()
    native = next((real_data / "train_tiles" / "majortom_core_native").rglob("B02.tif")).parent
    cell = tmp_path / "cell.tif"
    assert call(out=cell, sensors={"s2_l2a": native}, window=224) == 0
    values = tokens(cell)
    plan = Plan(grid_lib.Grid(rasterio.crs.CRS.from_string(CRS), 0, 0, 10.0, 1068, 1068), 224, 112, 16)
    assert np.isfinite(values).all()
    found = [b for b in borders(plan) if b < values.shape[1]]
    assert max(_jump(values, found, axis) for axis in (0, 1)) <= 1.05


# (sensor, folder, bands as the files hold them, window): no real scene of these sensors is large, so files are pooled
SMALL = {
    "L1C": ("s2_l1c", "s2l1c_oscd_224", "B01,B02,B03,B04,B05,B06,B07,B08,B8A,B09,B10,B11,B12", 96),
    "S1 RTC": ("s1", "terramesh_224/S1RTC", "VV,VH", 96),
    "S1 GRD": ("s1", "sen1floods11_512/S1GRD", "VV,VH", 224),
}


@pytest.mark.real
@pytest.mark.parametrize("kind", SMALL)
def test_real_tiles_of_other_sensors_have_no_seams(real_data: Path, tmp_path: Path, kind: str) -> None:
    key, folder, bands, window = SMALL[kind]
    files = sorted((real_data / "train_tiles" / folder).glob("*.tif"))
    ratios = {}
    for overlap in (0, window // 2):
        found: list[list[np.ndarray]] = [[], []]
        for file in files:
            if "Paraguay" in file.name:  # nodata throughout
                continue
            out = tmp_path / f"{overlap}_{file.name}"
            arguments = (f"--bands={key}={bands}", f"--overlap={overlap}")
            assert call(*arguments, out=out, sensors={key: file}, window=window) == 0
            values = tokens(out)
            for axis in (0, 1):
                side = 16 * values.shape[axis]
                grid = grid_lib.Grid(rasterio.crs.CRS.from_string(CRS), 0, 0, 10.0, side, side)
                seams = borders(Plan(grid, window, overlap, 16))
                for kept, part in zip(found, jumps(values, seams, axis), strict=True):
                    kept.append(part)
        ratios[overlap] = np.nanmean(np.concatenate(found[0])) / np.nanmean(np.concatenate(found[1]))
    assert ratios[window // 2] <= 1.05
    assert ratios[0] > 1.05, "the measure must see seams where there are some"
