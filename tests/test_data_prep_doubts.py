"""Values that are not what they are said to be: refused where that is sure, told where it only looks so."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from data_prep_cells import geotiff as tif
from data_prep_cells import manifest_bands, scene
from rasterio.control import GroundControlPoint
from rasterio.transform import from_origin

from data_prep import geotiff, inspect
from data_prep.doubts import check_cirrus, check_radar, looks_wrong
from data_prep.optical import _from_reflectance
from data_prep.raster import BadInput, Grid, Raster
from terrafm_jax.sensors import SENSORS

AFFINE = from_origin(600_000, 5_400_000, 10, 10)
GRID = Grid("EPSG:32632", (10.0, 0.0, 600_000.0, 0.0, -10.0, 5_400_000.0), 48, 48)
ESA = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12")
B8A_LAST = (*(name for name in ESA if name != "B8A"), "B8A")


def prepare(source: Path, out: Path, *flags: str) -> int:
    return geotiff.main(
        ["--source", str(source), "--worldcover", "none", "--out", str(out), "--split-shares", "1,0,0", *flags]
    )


def rejected(out: Path) -> dict[str, str]:
    rows = csv.DictReader((out / "rejected.csv").read_text().splitlines())
    return {row["unit"].split("/")[0]: row["reason"] for row in rows}


def records(out: Path) -> list[dict[str, Any]]:
    import tensorflow_datasets as tfds

    return list(tfds.builder_from_directory(out).as_data_source("train"))


def stack(seed: int, key: str, order: tuple[str, ...] = ()) -> np.ndarray:
    """All bands of a constructed scene on one grid, uint16 [bands, 48, 48]."""
    bands = scene(seed)[key]
    names = order or tuple(bands)
    return np.stack([np.kron(bands[n], np.ones((48 // bands[n].shape[0],) * 2, np.uint16)) for n in names])


def write(path: Path, pixels: np.ndarray, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tif(pixels, AFFINE, **how))


def manifest(folder: Path, *rows: dict[str, str]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with open(folder / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    return str(folder / "list.csv")


# --- order of bands ---------------------------------------------------------------------------


def test_unnamed_bands_are_refused_until_their_order_is_stated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Files as EuroSAT's: 13 bands without names, B8A at the end."""
    for cell in range(3):
        write(tmp_path / "in" / "S2L1C" / f"c{cell}.tif", stack(cell, "s2_l1c", B8A_LAST))
    assert prepare(tmp_path / "in", tmp_path / "out") == 1
    shown = capsys.readouterr().out
    assert "3 x bands without names; for example c0/p0" in shown
    assert "band 10 is dark as B10 is, so --bands s2_l1c=B01..B12,B8A may fit" in shown
    assert len(rejected(tmp_path / "out")) == 3
    assert prepare(tmp_path / "in", tmp_path / "out", "--bands", "s2_l1c=B01..B12,B8A") == 0
    for record in records(tmp_path / "out"):
        assert record["s2_l1c"]["offset"] == 0
        seed = int(record["cell"].decode()[1:])
        delivered = dict(zip(B8A_LAST, stack(seed, "s2_l1c", B8A_LAST), strict=True))
        for group, names in SENSORS["s2_l1c"].groups.items():
            for i, name in enumerate(names):
                assert (record["s2_l1c"][group]["dn"][..., i] == delivered[name]).all()
    capsys.readouterr()
    assert prepare(tmp_path / "in", tmp_path / "wrong", "--bands", "s2_l1c=B01..B08,B8A,B09..B12") == 1
    assert "3 x wrong band order" in capsys.readouterr().out
    assert "B09 is B10" in rejected(tmp_path / "wrong")["c0"]
    assert prepare(tmp_path / "in", tmp_path / "out", "--bands", "s2_l1c=B01..B08,B8A,B09..B12") == 1
    assert "--bands s2_l1c B01,B02" in capsys.readouterr().err, "another order is another data set"


def test_thirteen_bands_are_level_1c(tmp_path: Path):
    write(tmp_path / "in" / "S2L2A" / "c.tif", stack(0, "s2_l1c"))
    assert prepare(tmp_path / "in", tmp_path / "out") == 1
    assert "B10 means Level-1C" in rejected(tmp_path / "out")["c"]


def test_twelve_bands_called_level_1c_look_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Level-2A under the name of Level-1C was prepared without a word; a product id that says L1C is believed."""
    order = SENSORS["s2_l1c"].band_names
    flag = f"--bands=s2_l1c={','.join(order)}"
    for cell in ("S2L1C/a", "S2L1C/b", "S2A_MSIL1C_20200605T103031_N0209_R108_T32TPT_20200605T120000"):
        write(tmp_path / "in" / f"{cell}.tif", stack(0, "s2_l1c", order))
    assert prepare(tmp_path / "in", tmp_path / "out", flag) == 0
    assert "LOOKS WRONG: 2 cells: s2_l1c of 12 bands without B10, as Level-2A" in capsys.readouterr().out
    assert inspect.main([str(tmp_path / "out")]) == 0
    assert "looks wrong: 2 cells: s2_l1c of 12 bands" in capsys.readouterr().out
    assert prepare(tmp_path / "in", tmp_path / "unnamed") == 1
    assert all("is the sensor s2_l2a?" in reason for reason in rejected(tmp_path / "unnamed").values())


def test_two_unnamed_polarizations_are_not_guessed(tmp_path: Path):
    write(tmp_path / "in" / "S1RTC" / "c.tif", np.stack(list(scene(0)["s1"].values())))
    assert prepare(tmp_path / "in", tmp_path / "out") == 1
    assert "--bands s1=VV,VH" in rejected(tmp_path / "out")["c"]
    assert prepare(tmp_path / "in", tmp_path / "out", "--bands", "s1=VV,VH") == 0


@pytest.mark.real
def test_eurosat_files_in_the_wrong_order(real_data: Path):
    """Right order: none refused. Wrong order: all but open water, where B10 is no darker than the infrared."""
    wrong = []
    for path in sorted(real_data.glob("eval_labelled/eurosat_ms/*/*.tif")):
        with rasterio.open(path) as source:
            pixels = source.read()
        valid = dict.fromkeys(ESA, np.ones(pixels.shape[1:], bool))
        check_cirrus(dict(zip(B8A_LAST, pixels, strict=True)), valid)
        try:
            check_cirrus(dict(zip(ESA, pixels, strict=True)), valid)
        except BadInput:
            wrong.append(path.parent.name)
    assert len(wrong) >= 105
    assert "SeaLake" not in wrong


@pytest.mark.real
def test_no_real_tile_is_refused(real_data: Path):
    """Level-1C with and without offset, clouds and desert; gamma0 and sigma0 in dB."""
    seen = {"s2_l1c": 0, "s1": 0}
    for file, names in manifest_bands(real_data).items():
        with rasterio.open(real_data / file) as source:
            bands = dict(zip(names, source.read(), strict=True))
        if "B10" in bands and "eurosat" not in file:
            check_cirrus(bands, {name: band > 0 for name, band in bands.items()})
            seen["s2_l1c"] += 1
    for path in [
        *real_data.glob("train_tiles/*/S1*/*.tif"),
        *real_data.glob("train_tiles/ssl4eo_s12_native/s1/**/*.tif"),
    ]:
        with rasterio.open(path) as source:
            for band in source.read():
                check_radar(path.name, Raster(band, GRID, source.nodata), "dB")
                seen["s1"] += 1
    assert seen["s2_l1c"] >= 12
    assert seen["s1"] >= 15


# --- radar ------------------------------------------------------------------------------------


def radar(seed: int = 0) -> np.ndarray:
    """Power of VV, VH float32 [2, 48, 48], about -11 dB."""
    return np.stack(list(scene(seed)["s1"].values()))


@pytest.mark.parametrize(
    ("made", "unit", "reason"),
    [
        (lambda p: np.sqrt(p) * 600, "power", "implausible backscatter, median +22"),
        (lambda p: np.abs(10 * np.log10(p)), "power", "implausible backscatter, median +10"),
        (lambda p: np.abs(10 * np.log10(p)), "dB", "hardly ever below zero"),
        (lambda p: p, "dB", "hardly ever below zero"),
        (lambda p: 10 * np.log10(p), "power", "is it dB?"),
        (lambda p: np.rint(1000 * np.log10(p)).astype(np.int16), "dB", "scaled dB?"),
        (lambda p: np.where(np.arange(48) < 4, np.float32(-99), 10 * np.log10(p)), "dB", "manifest's nodata column"),
        (lambda p: np.clip(p * 255, 0, 255).astype(np.uint8), "power", "8-bit"),
        (lambda p: 10 * np.log10(p) + 0j, "dB", "complex values (SLC)"),
    ],
)
def test_radar_that_is_not_what_its_unit_says(made: Any, unit: str, reason: str):
    with pytest.raises(BadInput) as caught:
        check_radar("VV", Raster(made(radar()[0]), GRID), unit)
    assert reason in str(caught.value)


def test_radar_as_it_should_be():
    power = radar()[0]
    for extra in (0.0, -32768.0, np.nan):
        check_radar("VV", Raster(np.where(np.arange(48) < 4, np.float32(extra), power), GRID), "power")
    check_radar("VV", Raster(np.where(np.arange(48) < 40, np.float32(-99), power), GRID), "power")
    decibel = 10 * np.log10(power)
    for extra in (-9999.0, -32768.0, np.nan, -np.inf):
        check_radar("VV", Raster(np.where(np.arange(48) < 4, np.float32(extra), decibel), GRID), "dB")
    check_radar("VV", Raster(np.where(np.arange(48) < 4, np.float32(-99), decibel), GRID, -99.0), "dB")
    check_radar("VV", Raster(np.full((48, 48), np.nan, np.float32), GRID), "dB")


def test_a_wrong_radar_cell_is_quarantined_and_the_job_goes_on(tmp_path: Path):
    names = ("--bands", "s1=VV,VH")
    write(tmp_path / "in" / "S1RTC" / "good.tif", radar(0))
    write(tmp_path / "in" / "S1RTC" / "amplitude.tif", np.sqrt(radar(1)) * 600)
    write(tmp_path / "in" / "S1RTC" / "absolute.tif", np.abs(10 * np.log10(radar(2))))
    assert prepare(tmp_path / "in", tmp_path / "out", *names) == 3
    assert set(rejected(tmp_path / "out")) == {"amplitude", "absolute"}
    assert prepare(tmp_path / "in", tmp_path / "dB", *names, "--s1-unit", "dB") == 1
    assert prepare(tmp_path / "in", tmp_path / "linear", *names, "--s1-unit", "LINEAR") == 3


def test_radar_geometry_must_be_terrain_corrected(tmp_path: Path):
    path = tmp_path / "in" / "S1A_IW_GRDH_1SDV_20210613T165043_20210613T165108_038324_0485C1_EE7E.SAFE" / "measurement"
    path.mkdir(parents=True)
    points = [GroundControlPoint(r, c, 10 + c / 1e4, 48 - r / 1e4) for r in (0, 47) for c in (0, 47)]
    with rasterio.open(
        path / "s1a-iw-grd-vv-001.tiff", "w", driver="GTiff", count=1, height=48, width=48, dtype="uint16",
        gcps=points, crs="EPSG:4326",
    ) as out:  # fmt: skip
        out.write(np.full((48, 48), 300, np.uint16), 1)
    assert prepare(tmp_path / "in", tmp_path / "out") == 1
    assert all("terrain-correct it first" in reason for reason in rejected(tmp_path / "out").values())


# --- units ------------------------------------------------------------------------------------


def test_a_flag_with_an_unknown_unit(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        prepare(tmp_path, tmp_path / "out", "--s1-unit", "amplitude")
    assert "expected dB or power (= linear) for s1" in capsys.readouterr().err


def test_manifest_faults_are_named_all_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    row = {"file": "a.tif", "location": "a", "sensor": "s2_l2a", "units": "DN", "date": "2022-06-01", "nodata": ""}
    dates = ("01.06.2022", "06/01/2022", "2022-13-41", "1922-06-01")
    rows = [row | {"date": date} for date in dates]
    path = manifest(
        tmp_path, row, *rows, row | {"units": "radiance", "date": "soon"}, row | {"nodata": "none"},
        row | {"sensor": "s1", "units": "amplitude", "date": "2022-06-01T10:30:21Z"},
        row | {"date": "2015-2017 (some days)"},
    )  # fmt: skip
    assert prepare(tmp_path, tmp_path / "out", "--manifest", path) == 1
    message = capsys.readouterr().err
    for line, text in enumerate(dates, 3):
        assert f"line {line}: date '{text}': expected YYYY-MM-DD" in message
    assert "line 7: units 'radiance': expected DN" in message
    assert "date 'soon'" in message
    assert "line 8: nodata 'none': expected a number" in message
    assert "line 9: units 'amplitude': expected dB or power (= linear)" in message
    assert "line 2" not in message
    assert "line 10" not in message, "bare years are a statement, too"


def test_reflectance_is_stored_as_the_dn_it_came_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    order = SENSORS["s2_l2a"].band_names
    dn = stack(3, "s2_l2a", order)
    dn[:, :5] = 0
    product = "S2A_MSIL2A_20220612T103021_N0400_R108_T32UPU_20220612T120000"
    row = {"file": "a.tif", "location": "a", "sensor": "s2_l2a", "bands": ",".join(order), "product": product}
    write(tmp_path / "a.tif", (dn / 10000).astype(np.float32))
    assert prepare(tmp_path, tmp_path / "plain", "--manifest", manifest(tmp_path, row)) == 1
    assert "units column of a manifest or with --s2-unit" in rejected(tmp_path / "plain")["a"]
    path = manifest(tmp_path, row | {"units": "Reflectance"})
    assert prepare(tmp_path, tmp_path / "out", "--manifest", path) == 0
    (record,) = records(tmp_path / "out")
    for group, names in SENSORS["s2_l2a"].groups.items():
        for i, name in enumerate(names):
            assert (record["s2_l2a"][group]["dn"][..., i] == dn[order.index(name)]).all()
    assert record["s2_l2a"]["kind"] == b"L2A, from reflectance"
    assert (record["s2_l2a"]["offset"], record["s2_l2a"]["nodata"]) == (0, pytest.approx(5 / 48))
    assert prepare(tmp_path, tmp_path / "flag", "--manifest", manifest(tmp_path, row), "--s2-unit", "reflectance") == 0
    assert prepare(tmp_path, tmp_path / "out", "--manifest", manifest(tmp_path, row)) == 1
    assert "other statements in the manifest" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda x: x.astype(np.float16), "no multiple of 1/10000"),
        (lambda x: (x + np.roll(x, 1)).astype(np.float32) / 2, "no multiple of 1/10000"),
        (lambda x: (x * 10000).astype(np.float32), "are no reflectance"),
        (lambda x: (x * 10000).astype(np.uint16), "whole numbers"),
        (lambda x: (x - 0.1).astype(np.float32), "are no reflectance"),
    ],
)
def test_reflectance_that_no_dn_stands_for(made: Any, reason: str):
    values = stack(3, "s2_l2a")[1] / 10000
    with pytest.raises(BadInput) as caught:
        _from_reflectance("s2_l2a", "B02", Raster(made(values), GRID))
    assert reason in str(caught.value)


def test_every_dn_survives_reflectance_in_32_bits():
    dn = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    found = _from_reflectance("s2_l2a", "B02", Raster((dn / np.float32(10000)).astype(np.float32), GRID))
    assert (found == dn).all()
    assert (_from_reflectance("s2_l2a", "B02", Raster(dn.astype(np.float32) * np.float32(1e-4), GRID)) == dn).all()


# --- messages ---------------------------------------------------------------------------------


def test_previews_and_undeclared_nodata(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    order = SENSORS["s2_l2a"].band_names
    dn = stack(0, "s2_l2a", order)
    write(tmp_path / "in" / "S2L2A" / "preview.tif", np.clip(dn // 16, 0, 255).astype(np.uint8))
    holes = dn.astype(np.int16)
    holes[:, :9] = -9999
    write(tmp_path / "in" / "S2L2A" / "holes.tif", holes)
    assert prepare(tmp_path / "in", tmp_path / "out", "--bands", "s2_l2a=" + ",".join(order)) == 1
    found = rejected(tmp_path / "out")
    assert "8-bit values are a preview" in found["preview"]
    assert "if -9999 means nodata, name it in the nodata column of a manifest" in found["holes"]
    row = {"file": "in/S2L2A/holes.tif", "location": "holes", "sensor": "s2_l2a", "bands": ",".join(order)}
    path = manifest(tmp_path, row | {"nodata": "-9999"}, row | {"sensor": "Landsat-8"}, row | {"sensor": "DEM"})
    capsys.readouterr()
    assert prepare(tmp_path, tmp_path / "good", "--manifest", path) == 0
    message = capsys.readouterr().err
    assert "2 rows are LEFT OUT, their sensor is unknown: 'DEM' (1), 'Landsat-8' (1)" in message
    assert "s2_l2a" in message


def test_reasons_are_not_grouped_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for cell in range(3):
        write(tmp_path / "my data" / "S2L2A" / f"c{cell}.tif", stack(cell, "s2_l2a"))
    assert prepare(tmp_path / "my data", tmp_path / "out", "--bands", "s2_l2a=B02,B03") == 1
    shown = capsys.readouterr().out
    assert f"3 cells REJECTED, see {tmp_path / 'out' / 'rejected.csv'}" in shown
    assert "3 x 12 bands, but 2 are named: B02, B03; for example c0/p0" in shown


def test_a_folder_that_names_no_sensor(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write(tmp_path / "in" / "tile_1.tif", stack(0, "s2_l2a"))
    write(tmp_path / "in" / "tile_2.tif", stack(0, "s2_l2a"))
    assert prepare(tmp_path / "in", tmp_path / "out") == 1
    message = capsys.readouterr().err
    assert "2 x no sensor in the name" in message
    assert "--manifest" in message
    assert "S2L2A/<cell>.tif" in message
    (tmp_path / "empty").mkdir()
    assert prepare(tmp_path / "empty", tmp_path / "out") == 1
    assert "no GeoTIFF" in capsys.readouterr().err


def test_files_of_one_scene_must_agree(tmp_path: Path):
    rows = []
    for name, pixels, unit in zip(("VV", "VH"), radar(), ("linear", "dB"), strict=True):
        write(tmp_path / f"{name}.tif", pixels)
        rows.append({"file": f"{name}.tif", "location": "a", "sensor": "s1", "bands": name, "units": unit})
    assert prepare(tmp_path, tmp_path / "out", "--manifest", manifest(tmp_path, *rows)) == 1
    assert "different units" in rejected(tmp_path / "out")["a"]


# --- a whole data set -------------------------------------------------------------------------


def statistics(key: str, **middle: float) -> dict[str, Any]:
    """As statistics.json holds them: published means as medians, p99 two deviations above; some medians replaced."""
    s = SENSORS[key]
    levels = [
        [middle.get(n, m), middle.get(f"{n}_p99", middle.get(n, m) + 2 * d)]
        for n, m, d in zip(s.band_names, s.mean, s.std, strict=True)
    ]
    entry = {"bands": list(s.band_names), "percentile_ranks": [50, 99], "percentiles": levels}
    return {"sensors": {key: entry}}


def test_impossible_statistics_look_wrong():
    for key in SENSORS:
        assert looks_wrong(statistics(key)) == []
    assert "medians below zero (B09 -986)" in looks_wrong(statistics("s2_l1c", B09=-986))[0]
    assert "as dark as B10" in looks_wrong(statistics("s2_l1c", B09=11))[0]
    assert "median 22.0 dB" in looks_wrong(statistics("s1", VV=22.0))[0]
    assert "p99 12.0 dB" in looks_wrong(statistics("s1", VV_p99=12.0))[0]
    assert "exchanged" in looks_wrong(statistics("s1", VV=-19.0, VH=-12.0))[0]
    assert "standard deviations" in looks_wrong(statistics("s2_l1c", B02=9000.0))[0]
    dark = dict.fromkeys(SENSORS["s2_l2a"].band_names, 90.0)
    assert "8-bit" in looks_wrong(statistics("s2_l2a", **dark, **{f"{n}_p99": 250.0 for n in dark}))[0]


def test_what_looks_wrong_is_told_by_report_summary_and_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Level-2A from which somebody has subtracted 1000 that was not there: all cells alike."""
    order = SENSORS["s2_l2a"].band_names
    write(tmp_path / "a.tif", np.full((12, 48, 48), 400, np.uint16) + stack(1, "s2_l2a", order) % 50)
    row = {"file": "a.tif", "location": "a", "sensor": "s2_l2a", "bands": ",".join(order), "offset": "1000"}
    assert prepare(tmp_path, tmp_path / "out", "--manifest", manifest(tmp_path, row)) == 0
    assert "LOOKS WRONG: s2_l2a: medians below zero (B01" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out" / "summary.json").read_text())["looks_wrong"]) == 1
    assert inspect.main([str(tmp_path / "out")]) == 0
    assert "looks wrong: s2_l2a: medians below zero" in capsys.readouterr().out
    assert '<p class="wrong">looks wrong: s2_l2a' in (tmp_path / "out" / "inspect" / "index.html").read_text()
