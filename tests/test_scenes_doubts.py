"""Inputs that used to give a wrong result without a word: refused where that is sure, else warned of to the end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from rasterio.warp import transform
from scenes_fake import CRS, DARK, NAMES, NORTH, THIRTEEN, WEST, call, fails, optical, radar, surface, tokens, write

from data_prep.doubts import check_zeros
from data_prep.raster import BadInput, Raster
from data_prep.raster import Grid as RasterGrid
from terrafm_jax import checks
from terrafm_jax.scenes import flags, grid, inputs, read
from terrafm_jax.scenes import tags as tags_lib
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.inputs import Declared, resolve


def test_undeclared_zeros_have_one_limit_everywhere(tmp_path: Path) -> None:
    """Preparation and evaluation spoke up from 0.1 % on, embedding from 1 %."""
    power = 10.0 ** (np.random.default_rng(0).normal(-12, 3, (64, 64, 2)) / 10)
    decibels = (10 * np.log10(power)).astype(np.float32)
    decibels[:32, 0] = 0  # 0.8 % of the pixels, in both polarizations
    rasters = [
        Raster(band, RasterGrid("EPSG:32632", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 64, 64))
        for band in np.moveaxis(decibels, -1, 0)
    ]
    with pytest.raises(BadInput, match="exactly 0 dB"):
        check_zeros(rasters, "dB")
    bands = dict(zip(("VV", "VH"), np.moveaxis(decibels, -1, 0).reshape(2, -1), strict=True))
    (found,) = checks.values("s1", bands, checks.Declared("db"))
    assert "0.8% of the pixels are exactly 0 dB" in found.text
    assert "--nodata s1=0" in found.text
    bands["VH"] = bands["VH"] - 1  # zero in one polarization is bright ground
    assert checks.values("s1", bands, checks.Declared("db")) == []


# --- which files ---


def test_a_folder_of_several_products_or_dates(tmp_path: Path) -> None:
    twice, mixed, copies, nested = (tmp_path / n for n in ("twice", "mixed", "copies", "nested"))
    for date in ("20230101", "20230201"):
        for band in ("B02", "B03"):
            write(twice / date / f"T32TQM_{date}_{band}.tif", surface(64, 64, 1))
    write(mixed / "T32TQM_20230101_B02.tif", surface(64, 64, 1))
    write(mixed / "T32TQM_20230201_B03.tif", surface(64, 64, 1))
    for size in (20, 60):
        write(copies / f"T32TQM_20230101_B02_{size}m.tif", surface(64, 64, 1), gsd=size)
    with pytest.raises(SceneError, match=r"B02, B03 found more than once \(B02 in .*20230101_B02.tif, .*20230201_B02"):
        resolve(f"s2_l2a={twice}", Declared())
    with pytest.raises(SceneError, match=r"of several dates .20230101, 20230201."):
        resolve(f"s2_l2a={mixed}", Declared())
    assert resolve(f"s2_l2a={copies}", Declared()).paths[0].endswith("_20m.tif")
    ids = [f"S2B_MSIL2A_2023022{d}T032739_N0509_R018_T48QUE_20230224T183543.SAFE" for d in (3, 5)]
    for number, name in enumerate(ids, 1):
        for band in ("B02", "B03"):
            write(nested / name / "GRANULE" / "R10m" / f"T48QUE_{band}_10m.tif", surface(64, 64, 1))
        if number == 1:
            assert resolve(f"s2_l2a={nested}", Declared()).offset == 1000, "the product in it, with its baseline"
    with pytest.raises(SceneError, match=r"holds 2 products .S2B_MSIL2A_20230223T"):
        resolve(f"s2_l2a={nested}", Declared())


def test_a_band_named_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tif", surface(64, 64, 3), names=("B02", "blue", "B04"))
    with pytest.raises(SceneError, match=r"x.tif: names B02 twice"):
        resolve(f"s2_l2a={path}", Declared())
    one, two = (write(tmp_path / f"{n}.tif", surface(64, 64, 1), names=("B02",)) for n in "ab")
    with pytest.raises(SceneError, match="B02 found more than once"):
        resolve(f"s2_l2a={one},{two}", Declared())
    with pytest.raises(SceneError, match="--bands s2_l2a: names B02 twice"):
        resolve(f"s2_l2a={path}", Declared(bands={"s2_l2a": ("B02", "B02", "B04")}))


def test_names_that_contradict_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.tif", surface(64, 64, 3), names=("B02", "B03", "B04"))
    names = ("B04", "B03", "B02")
    with pytest.raises(SceneError, match=r"contradicts .*B04 for B02.*--bands s2_l2a=override,B04,B03,B02"):
        resolve(f"s2_l2a={path}", Declared(bands={"s2_l2a": names}))
    found = resolve(f"s2_l2a={path}", Declared(bands={"s2_l2a": ("override", *names)}))
    assert [(layer.band, layer.index) for layer in found.layers] == [("B02", 3), ("B03", 2), ("B04", 1)]
    with pytest.raises(SceneError, match="names the bands of one raster"):
        resolve(f"s2_l2a={path},{path}", Declared(bands={"s2_l2a": names}))


def test_ranges_of_bands_as_preparation_takes_them() -> None:
    args = ["--checkpoint=c", "--out=e.tif", "--sensor=s2_l1c=a.tif", "--bands=s2_l1c=override,B01..B08,B8A, B9..B12"]
    assert flags.declared(flags.scene_parser("").parse_args(args)).bands["s2_l1c"] == ("override", *THIRTEEN)


def test_flags_for_a_sensor_that_is_not_given(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scene = f"--sensor=s2_l2a={optical(tmp_path / 'a.tif', 64, 64)}"
    for flag in ("--unit=s1=power", "--offset=s2_l1c=1000", "--nodata=s1=0", "--bands=s1=VV,VH"):
        line = fails(capsys, scene, flag)
        assert f"names {flag.split('=')[1]}, but --sensor gives s2_l2a only" in line
    assert "s2_l2a has dn already" in fails(capsys, scene, "--unit=s2_l2a=dn", "--unit=s2_l2a=reflectance")


def test_all_faults_of_all_sensors_at_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    optical_, radar_ = write(tmp_path / "a.tif", surface(64, 64, 12)), write(tmp_path / "b.tif", surface(64, 64, 2))
    line = fails(capsys, f"--sensor=s2_l2a={optical_}", f"--sensor=s1={radar_}")
    assert "--bands s2_l2a=" in line
    assert "--bands s1=" in line


def test_grd_safe_is_told_from_a_folder_without_bands(tmp_path: Path) -> None:
    folder = tmp_path / "S1A_IW_GRDH_1SDV_20230101T050000_20230101T050025_046600_0595A0_1234.SAFE"
    (folder / "measurement").mkdir(parents=True)
    (folder / "measurement" / "s1a-iw-grd-vv-20230101t050000-20230101t050025-046600-0595a0-001.tiff").touch()
    with pytest.raises(SceneError, match="is Sentinel-1 GRD in radar geometry; terrain-correct it first"):
        resolve(f"s1={folder}", Declared())


# --- values ---


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ((surface(64, 64, 12) // 10).astype(np.uint8), "8-bit preview"),
        (surface(64, 64, 12) / np.float32(100), "look like percent"),
        ((surface(64, 64, 12) - np.float32(1500)) / np.float32(600), "look standardized"),
        (np.zeros((12, 64, 64), np.uint16), "nothing but zeros"),
        (np.full((12, 64, 64), np.nan, np.float32), "nothing but nodata"),
        (np.full((12, 64, 64), -9999, np.int16), "pass --nodata s2_l2a=-9999"),
    ],
)
def test_optical_values_that_are_no_dn(tmp_path: Path, values: np.ndarray, words: str) -> None:
    path = write(tmp_path / "x.tif", values, names=NAMES)
    with pytest.raises(SceneError, match=words):
        resolve(f"s2_l2a={path}", Declared())


def test_radar_that_is_no_power_nor_decibels(tmp_path: Path) -> None:
    with rasterio.open(radar(tmp_path / "db.tif", 64, 64)) as source:
        db = source.read()
    amplitude = 10 ** (db / 20)
    for name, values, unit, words in (
        ("amplitude", amplitude, "", r"power \(pass --unit s1=power\) or amplitude \(square"),
        ("dn", (amplitude * 2000).astype(np.uint16), "", "amplitude in DN: calibrate"),
        ("dn", (amplitude * 2000).astype(np.uint16), "power", "cannot be power; they look like amplitude"),
        ("sign", np.abs(db), "", "lost their sign"),
        ("sign", np.abs(db), "power", "cannot be power"),
        ("sign", np.abs(db), "db", "lost their sign"),
        ("power", 10 ** (db / 10), "", "look like power; pass --unit s1=power"),
        ("scores", (db + 15) / 4, "", "look standardized"),
    ):
        path = write(tmp_path / f"{name}.tif", values.astype(values.dtype), names=("VV", "VH"))
        with pytest.raises(SceneError, match=words):
            resolve(f"s1={path}", Declared(unit={"s1": unit} if unit else {}))
    high = resolve(
        f"s1={write(tmp_path / 'high.tif', amplitude * 3, names=('VV', 'VH'))}", Declared(unit={"s1": "linear"})
    )
    assert high.unit == "power"
    assert "if they are amplitude, square them" in high.doubts[0]
    for unit, values in (("db", db), ("power", 10 ** (db / 10))):
        said = Declared(unit={"s1": unit})
        right = resolve(f"s1={write(tmp_path / 'right.tif', values, names=('VV', 'VH'))}", said)
        other = resolve(f"s1={write(tmp_path / 'other.tif', values, names=('VH', 'VV'))}", said)
        assert not right.doubts
        assert "are they exchanged?" in other.doubts[0]


def test_complex_radar_is_not_taken_for_its_real_part(tmp_path: Path) -> None:
    parts = np.random.default_rng(0).normal(0, 40, (2, 2, 64, 64)).astype(np.float32)
    path = write(tmp_path / "slc.tif", parts[0] + 1j * parts[1], names=("VV", "VH"))
    with pytest.raises(SceneError, match=r"slc.tif: holds complex values \(SLC\)"):
        resolve(f"s1={path}", Declared())


def test_the_mask_inside_a_file_hides_its_pixels(tmp_path: Path) -> None:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(optical(tmp_path / "a.tif", 64, 64), "r+") as file:
        file.write_mask(np.where(np.arange(64)[:, None] < np.full(64, 9), 0, 255).astype(np.uint8))
    date = resolve(f"s2_l2a={tmp_path / 'a.tif'}", Declared())
    valid = read.SceneReader([date], grid.target_grid([date])).read(0, 0, 64, 64)["s2_l2a"].valid
    np.testing.assert_array_equal(valid, np.arange(64)[:, None] >= np.full(64, 9))


def test_scale_and_offset_of_the_file_count(tmp_path: Path) -> None:
    data = surface(64, 64, 12)
    plain = resolve(f"s2_l2a={write(tmp_path / 'plain.tif', data, names=NAMES)}", Declared())
    late = write(tmp_path / "late.tif", data + 1000, names=NAMES)
    with rasterio.open(late, "r+") as file:
        file.scales, file.offsets = [0.0001] * 12, [-0.1] * 12
    scaled = resolve(f"s2_l2a={late}", Declared())
    assert (scaled.unit, scaled.offset) == ("reflectance", 0.0)
    with pytest.raises(SceneError, match=r"states scale 0.0001 itself.*leave --unit out"):
        resolve(f"s2_l2a={late}", Declared(unit={"s2_l2a": "dn"}))
    radar_db = radar(tmp_path / "db.tif", 64, 64)
    with rasterio.open(radar_db) as source:
        db = source.read()
    packed = write(tmp_path / "packed.tif", np.round(db * 100).astype(np.int16), names=("VV", "VH"))
    with rasterio.open(packed, "r+") as file:
        file.scales = [0.01] * 2
    pixels = [read.SceneReader([a], grid.target_grid([a])).read(0, 0, 64, 64)["s2_l2a"].values for a in (plain, scaled)]
    assert np.allclose(*pixels, atol=0.01)
    found = [resolve(f"s1={p}", Declared()) for p in (radar_db, packed)]
    pixels = [read.SceneReader([a], grid.target_grid([a])).read(0, 0, 64, 64)["s1"].values for a in found]
    assert np.allclose(*pixels, atol=0.01)


# --- places and masks ---


def test_web_mercator_is_measured_on_the_ground(tmp_path: Path) -> None:
    (x,), (y,) = transform("EPSG:4326", "EPSG:3857", [10.3], [60.0])
    path = optical(tmp_path / "m.tif", 100, 100, crs="EPSG:3857", west=x, north=y, gsd=20.0)
    found = grid.target_grid([resolve(f"s2_l2a={path}", Declared())])
    assert found.crs.to_epsg() == 32632
    assert found.gsd == pytest.approx(20 * np.cos(np.radians(60)), rel=0.01)
    near = optical(tmp_path / "e.tif", 100, 100, crs="EPSG:3857", west=x, north=100_000, gsd=20.0)
    assert grid.target_grid([resolve(f"s2_l2a={near}", Declared())]).crs.to_epsg() == 3857
    europe = optical(tmp_path / "l.tif", 100, 100, crs="EPSG:3035", west=4_321_000, north=3_210_000)
    assert grid.target_grid([resolve(f"s2_l2a={europe}", Declared())]).gsd == 10


def test_masks_of_another_place(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scene = f"--sensor=s2_l2a={optical(tmp_path / 'a.tif', 64, 64)}"
    ones = np.ones((1, 64, 64), np.uint8)
    far = write(tmp_path / "far.tif", ones, west=WEST + 90_000)
    degrees = write(tmp_path / "degrees.tif", ones, crs="EPSG:4326", west=-60, north=-20, gsd=1e-4)
    for path in (far, degrees):
        for flag in (f"--mask={path}", f"--mask=scl={path}"):
            assert f"{path.name}: lies elsewhere than the scene" in fails(capsys, scene, flag)
    assert "--use-scl: no --sensor brings a scene classification" in fails(capsys, scene, "--use-scl")


@pytest.mark.usefixtures("loaded")
def test_a_scene_that_is_masked_throughout(l2a_scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import pyarrow.parquet as pq

    nothing = write(tmp_path / "none.tif", np.zeros((1, 300, 330), np.uint8))
    places = tmp_path / "p.csv"
    (lon,), (lat,) = transform(CRS, "EPSG:4326", [WEST + 1500], [NORTH - 1500])
    places.write_text(f"lon,lat\n{lon},{lat}\n")
    for out, more in (("e.tif", ()), ("e.zarr", ()), ("w.parquet", ()), ("p.parquet", (f"--points={places}",))):
        assert call(f"--mask={nothing}", *more, out=tmp_path / out, sensors={"s2_l2a": l2a_scene}) == 1
        assert "nothing was encoded" in capsys.readouterr().err
        assert not list(tmp_path.glob(f"{out}*"))
    places.write_text(f"lon,lat\n{lon},{lat}\n3,4\n")
    assert call(f"--points={places}", out=tmp_path / "p.parquet", sensors={"s2_l2a": l2a_scene}) == 0
    tags = pq.read_schema(tmp_path / "p.parquet").metadata
    assert tags[b"TERRAFM_WARNINGS"] == b"1 of 2 places outside the scene or --aoi"
    for text, words in ((f"{lat},{lon}", "with lon and lat swapped"), ("3,4", "give degrees of EPSG:4326")):
        places.write_text(f"lon,lat\n{text}\n")
        assert call(f"--points={places}", out=tmp_path / "q.parquet", sensors={"s2_l2a": l2a_scene}) == 1
        line = capsys.readouterr().err
        assert "all 1 places lie outside" in line
        assert words in line


# --- the end of a job ---


@pytest.mark.usefixtures("loaded")
def test_warnings_reach_the_last_line_and_the_tags(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = write(tmp_path / "late.tif", surface(96, 96, 12) // 4 + 950, names=NAMES)
    with caplog.at_level("INFO"):
        assert call(out=tmp_path / "e.tif", sensors={"s2_l2a": source}) == 0
    last = caplog.messages[-1]
    assert "e.tif; 1 warning(s): late.tif: the darkest pixels" in last
    with rasterio.open(tmp_path / "e.tif") as found:
        assert "still inside; if so, pass --offset s2_l2a=1000" in found.tags()["TERRAFM_WARNINGS"]


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("name", ["e.tif", "e.zarr", "w.parquet"])
def test_a_finished_output_is_kept(tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture, name: str) -> None:
    one, two = optical(tmp_path / "a.tif", 96, 96), write(tmp_path / "b.tif", DARK.repeat(2, 1), names=NAMES)
    out = tmp_path / name
    assert call(out=out, sensors={"s2_l2a": one}) == 0
    with caplog.at_level("INFO"):
        assert call(out=out, sensors={"s2_l2a": one}) == 0
    assert caplog.messages[-1].startswith("done already")
    assert call(out=out, sensors={"s2_l2a": two}) == 1
    assert "was made from other inputs or settings; choose another name, or pass --overwrite" in capsys.readouterr().err
    assert call("--overwrite", out=out, sensors={"s2_l2a": two}) == 0
    if name == "e.tif":
        assert tokens(out).shape[:2] == (8, 4)
        (tmp_path / "mine.tif").write_text("something of mine")
        assert call(out=tmp_path / "mine.tif", sensors={"s2_l2a": one}) == 1
        assert "was not made by this command" in capsys.readouterr().err


# --- comparing ---


def tags(**changed: Any) -> dict[str, str]:
    date = {"files": ["a.tif"], "product": changed.pop("product", "a"), "offset": 0.0, "unit": "dn"}
    found = {
        "TERRAFM_BANDS": json.dumps({"s2_l2a": ["B02", "B03"]}),
        "TERRAFM_GSD": "10",
        "TERRAFM_WINDOW": "96 px, overlap 48 px, stride 16 px",
        "TERRAFM_SOURCES": json.dumps({"s2_l2a": [date | changed.pop("date", {})]}),
    }
    return found | changed


def test_embeddings_that_cannot_be_compared() -> None:
    assert tags_lib.against(tags(), tags()) == ([], [])
    assert tags_lib.against(tags(), {}) == ([], [])
    old = tags(product="S2B_MSIL2A_20210223T032739_N0300_R018_T48QUE_20210224T183543")
    new = tags(product="S2B_MSIL2A_20230223T032739_N0509_R018_T48QUE_20230224T183543", date={"offset": 1000.0})
    assert tags_lib.against(old, new) == ([], []), "each product has its own baseline"
    for other, wrong, doubt in (
        (
            {"TERRAFM_BANDS": json.dumps({"s2_l2a": ["B02", "B04"]})},
            "bands of s2_l2a differ (B03, B04 in one only)",
            "",
        ),
        ({"TERRAFM_BANDS": json.dumps({"s1": ["VV"]})}, "sensors differ (s2_l2a and s1)", ""),
        ({"TERRAFM_GSD": "20"}, "samplings differ (10 and 20 m)", ""),
        ({"date": {"offset": 1000.0}}, "", "offsets of s2_l2a differ (0.0 and 1000.0)"),
        ({"date": {"unit": "reflectance"}}, "", "units of s2_l2a differ"),
        ({"TERRAFM_WINDOW": "224 px"}, "", "windows differ"),
        ({"TERRAFM_WARNINGS": "dark"}, "", "made with a warning: dark"),
    ):
        found = tags_lib.against(tags(), tags(**other))
        assert [len(x) for x in found] == [bool(wrong), bool(doubt)], found
        assert (wrong or doubt) in "".join(found[0] + found[1])


def test_units_are_named_in_any_case(tmp_path: Path) -> None:
    path = radar(tmp_path / "p.tif", 64, 64, power=True)
    for word in ("power", "linear", "Linear", "POWER"):
        assert resolve(f"s1={path}", Declared(unit={"s1": word})).unit == "power"
    with pytest.raises(SceneError, match="expected one of"):
        inputs.resolve(f"s1={path}", Declared(unit={"s1": "amplitude"}))
