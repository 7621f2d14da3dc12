"""GeoTIFF folders: the naming rule, manifests, the real tiles, large scenes, SAFE granules."""

from __future__ import annotations

import csv
import itertools
import json
from collections import Counter
from pathlib import Path, PurePath

import numpy as np
import pytest
import rasterio
from data_prep_cells import geotiff as tif
from data_prep_cells import manifest_bands, scene
from rasterio.transform import from_origin

from data_prep import geotiff
from data_prep.cell import Options
from data_prep.geotiff import blocks, guess_unit, named
from data_prep.ground import share_ground
from data_prep.manifest import from_manifest
from data_prep.raster import Grid, Raster
from data_prep.scenes import band_list, by_name, from_folder, stated_orders
from data_prep.splits import BlockSplit
from data_prep.worldcover import lonlat_outline
from terrafm_jax.sensors import S2_L1C, SENSORS


def prepare(source: Path, out: Path, *flags: str) -> int:
    return geotiff.main(
        ["--source", str(source), "--worldcover", "none", "--out", str(out), "--split-shares", "1,0,0", *flags]
    )


def records(out: Path) -> dict[str, dict]:
    import tensorflow_datasets as tfds

    return {r["tile_id"].decode(): r for r in tfds.builder_from_directory(out).as_data_source("train")}


@pytest.mark.parametrize(
    ("path", "cell", "sensor", "bands", "product"),
    [
        ("S1RTC/282D_485L_3_3.tif", "282D_485L_3_3", "s1", (), ""),
        ("282D_485L_3_3/S2L2A.tif", "282D_485L_3_3", "s2_l2a", (), ""),
        ("S2L2A/199U/199U_1099R/S2B_MSIL2A_20200223T032739_N9999_R018/B02.tif", "199U_1099R", "s2_l2a", ("B02",),
         "S2B_MSIL2A_20200223T032739_N9999_R018"),
        ("S2L2A/199U_1099R/cloud_mask.tif", "199U_1099R", "s2_l2a", ("cloud_mask",), ""),
        ("s2_l1c/paris/T31UDQ_20170829T105019_B01.tif", "paris", "s2_l1c", ("B01",), ""),
        ("S1GRD/A/S1A_IW_GRDH_1SDV_20170613T165043_VH.tif", "A", "s1", ("VH",), "S1A_IW_GRDH_1SDV_20170613T165043"),
        ("S2A_MSIL2A_20200605T103031_N0500_R108_T32TPT_20230401T000000.SAFE/GRANULE/L2A_T32TPT/IMG_DATA/R20m/"
         "T32TPT_20200605T103031_B8A_20m.jp2", "T32TPT_20200605T103031", "s2_l2a", ("B8A",),
         "S2A_MSIL2A_20200605T103031_N0500_R108_T32TPT_20230401T000000"),
    ],
)  # fmt: skip
def test_naming_rule(path: str, cell: str, sensor: str, bands: tuple[str, ...], product: str):
    found = by_name(PurePath(path))
    assert not isinstance(found, str), found
    assert found[0] == cell
    assert (found[1].sensor, found[1].bands, found[1].product) == (sensor, bands, product)


def test_bands_from_descriptions_never_from_their_number():
    assert named("s1", ("VH", "VV")) == ("VH", "VV")
    assert named("s1", ("bands", "bands")) == (), "junk counts as none"
    assert named("s2_l1c", (None,) * 13) == ()
    every = tuple(f"B{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, "8A", 9, 11, 12))
    assert named("s2_l2a", every) == SENSORS["s2_l2a"].band_names
    assert named("s1", ("VV", "angle", "VH")) == ("VV", "", "VH"), "all bands, and one of no use"
    assert named("s2_l2a", (*every, "SCL", None)) == (*SENSORS["s2_l2a"].band_names, "", "")
    assert named("s2_l2a", (*every[:-1], "SCL")) == (), "B12 may be what is called SCL"
    assert named("s2_l2a", (*every, "B10")) == (), "B10 means Level-1C"
    assert band_list("s2_l1c", "B1..B8, B8A, B9", "x")[-3:] == ("B08", "B8A", "B09")
    with pytest.raises(ValueError, match="B77"):
        band_list("s2_l1c", "B1, B77", "x")
    with pytest.raises(ValueError, match="B10 means Level-1C"):
        band_list("s2_l2a", "B01..B12,B8A", "x")
    assert stated_orders(["S2L1C=B01..B12,B8A"])["s2_l1c"][-4:] == ("B10", "B11", "B12", "B8A")
    for wrong in ("s2_l1c", "landsat=B1", "s1=VV,VW"):
        with pytest.raises(ValueError, match=r"expected|VW"):
            stated_orders([wrong])


def test_unit_of_sentinel_1_from_its_values():
    grid = Grid("EPSG:32632", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 8, 8)
    power = np.random.default_rng(0).gamma(2, 0.05, (8, 8)).astype(np.float32)
    assert guess_unit({"VV": Raster(power, grid)}) == "power"
    assert guess_unit({"VV": Raster(10 * np.log10(power), grid)}) == "dB"
    power[0] = -32768
    assert guess_unit({"VV": Raster(power, grid, -32768)}) == "power"


# --- the real tiles ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Most of the real tiles, prepared through their own manifest."""
    out = tmp_path_factory.mktemp("real") / "data"
    groups = "terramesh_224,worldcover_coded_DERIVED,majortom_core_native,ssl4eo_s12_native,s1_rtc_vv_only,"
    groups += "sen1floods11_512,s2l2a_hydro_256,s2l1c_oscd_native,bigearthnet_native,s2l2a_boadella"
    code = prepare(
        real_data, out, "--manifest", str(real_data / "MANIFEST.csv"), "--select", f"group={groups}",
        "--select", "kind=tile,landcover",
    )  # fmt: skip
    assert code == 3, "a chip of NaN and a single polarization are rejected"
    return out


@pytest.mark.real
def test_rejected_real_files(real: Path):
    rejected = {r["unit"]: r["reason"] for r in csv.DictReader((real / "rejected.csv").read_text().splitlines())}
    assert set(rejected) == {"Paraguay_34417/p0", "SE France 31T/p0"}
    assert "black" in rejected["Paraguay_34417/p0"]
    assert "missing band VH" in rejected["SE France 31T/p0"]


@pytest.mark.real
def test_offsets_of_the_real_cells(real: Path, real_data: Path):
    """L1C and L2A are decided separately: 282D has 1000 and 0, 433D 1000 twice, 637U none; all agree with the index."""
    truth = {row["location"]: row for row in csv.DictReader((real_data / "tile_index.csv").read_text().splitlines())}
    checked = 0
    for record in records(real).values():
        row = truth.get(record["cell"].decode())
        for key, column in (("s2_l1c", "L1C_offset"), ("s2_l2a", "L2A_offset")):
            if row and record[key]["present"] and row[column] not in ("", "?"):
                assert record[key]["offset"] == float(row[column]), (row["location"], key)
                checked += 1
    assert checked >= 10


@pytest.mark.real
def test_real_pixels_come_back(real: Path, real_data: Path):
    found, orders = records(real), manifest_bands(real_data)
    for cell in ("282D_485L_3_3", "433D_629L_3_1", "637U_59R_1_3"):
        record = found[f"{cell}/r0_c0"]
        assert [bool(record[key]["present"]) for key in SENSORS] == [True] * 3
        assert record["s1"]["kind"] == b"RTC gamma0"
        for key, folder in (("s1", "S1RTC"), ("s2_l1c", "S2L1C"), ("s2_l2a", "S2L2A")):
            with rasterio.open(real_data / f"train_tiles/terramesh_224/{folder}/{cell}.tif") as source:
                delivered = dict(
                    zip(orders[f"train_tiles/terramesh_224/{folder}/{cell}.tif"], source.read(), strict=True)
                )
                transform = source.transform
            for group, bands in SENSORS[key].groups.items():
                stored = record[key][group]["dn"]
                assert stored.shape[:2] == (224, 224), "the stored sampling is a property of each group"
                assert record[key][group]["transform"] == pytest.approx(tuple(transform)[:6])
                for i, band in enumerate(bands):
                    if key == "s1":
                        assert np.abs(stored[..., i] / 100 - delivered[band]).max() <= 0.0051
                    else:
                        assert (stored[..., i] == delivered[band]).all()
        assert record["landcover"] < 11, "its own land-cover map was used"
    native = found["199U_1099R/r534_c0"]
    assert native["s2_l2a"]["10m"]["dn"].shape == (534, 534, 4)
    assert native["s2_l2a"]["60m"]["dn"].shape == (89, 89, 2)
    assert native["s2_l2a"]["10m"]["transform"].tolist() == [10, 0, 362610, 0, -10, 1987090 - 5340], "snapped by itself"
    assert native["s2_l2a"]["60m"]["transform"].tolist() == [60, 0, 362640, 0, -60, 1987080 - 5340]
    assert native["s2_l2a"]["offset_source"] == b"pixels"
    assert native["s2_l2a"]["cloud"] == 0


@pytest.mark.real
def test_degrees_dates_and_single_sensors(real: Path):
    found = records(real)
    ssl4eo = found["0000200 (Punjab, IN, 73.29E 30.48N region)/r0_c0"]
    assert ssl4eo["crs"] == b"EPSG:4326"
    assert [ssl4eo["s2_l1c"][g]["dn"].shape[0] for g in ("10m", "20m", "60m")] == [264, 132, 44]
    assert ssl4eo["s1"]["10m"]["dn"].shape == (264, 264, 2)
    assert ssl4eo["s1"]["10m"]["transform"] == pytest.approx(ssl4eo["s2_l2a"]["10m"]["transform"]), "warped to S2"
    assert ssl4eo["s1"]["kind"] == b"GRD sigma0"
    nigeria = found["Nigeria_812045/r0_c0"]
    assert [bool(nigeria[key]["present"]) for key in SENSORS] == [True, False, False]
    assert 0.001 < nigeria["s1"]["nodata"] < 0.004
    spain = found["Spain_7370579/r0_c0"]
    assert [bool(spain[key]["present"]) for key in SENSORS] == [True, True, False]
    dates = sorted(r["s2_l2a"]["time"].decode() for name, r in found.items() if name.startswith("Boadella"))
    assert dates == ["2020-01-13", "2020-01-28", "2020-06-21", "2020-09-14", "2022-03-08", "2022-06-01"]
    assert len(json.loads((real / "layouts.json").read_text())) <= 12


@pytest.mark.real
def test_ground_extents_of_native_ssl4eo_agree_with_its_content(real: Path):
    """In EPSG:4326 the headers tell the truth: through the transforms B8A correlates best with B08 at zero shift."""
    from terrafm_jax.data.tiles import geometry

    record = next(r for name, r in records(real).items() if name.startswith("0000200"))
    y0, sy, x0, sx = geometry(record, "s2_l2a", "20m")
    fine = record["s2_l2a"]["10m"]["dn"][..., SENSORS["s2_l2a"].groups["10m"].index("B08")].astype(np.float64)
    coarse = record["s2_l2a"]["20m"]["dn"][..., SENSORS["s2_l2a"].groups["20m"].index("B8A")].astype(np.float64)
    assert (sy, sx) == pytest.approx((132, 132), rel=1e-4)
    n = 120
    best = {}
    for dy in range(-2, 3):
        for dx in range(-2, 3):
            rows = np.floor((np.arange(n) + 4.5 - y0) * 2 + dy).astype(int)
            cols = np.floor((np.arange(n) + 4.5 - x0) * 2 + dx).astype(int)
            part = fine[np.ix_(rows, cols)] + fine[np.ix_(rows - 1, cols)] + fine[np.ix_(rows, cols - 1)]
            part = part + fine[np.ix_(rows - 1, cols - 1)]
            best[dy, dx] = np.corrcoef(part.ravel(), coarse[4 : 4 + n, 4 : 4 + n].ravel())[0, 1]
    top = max(best, key=lambda k: best[k])
    assert abs(top[0]) <= 1
    assert abs(top[1]) <= 1


@pytest.mark.real
def test_a_real_product_counts_once_and_at_its_own_sampling(real_data: Path, tmp_path: Path):
    """Four patches of BigEarthNet lie there twice: as files per band, and stacked with 60 m bands at 10 m."""
    found, skipped = from_manifest(
        real_data / "MANIFEST.csv", real_data,
        {"group": {"bigearthnet_native", "bigearthnet_stacked_120"}, "kind": {"tile"}},
    )  # fmt: skip
    cells = [scene.cell for scene in found]
    assert len(set(cells)) == len(cells) == 11
    assert skipped["same product of the cell again"] == 4, "the stacked ones"
    native = [s for s in found if sum(f.sensor == "s2_l2a" for f in s.files) == 12]
    assert len(native) == 4


@pytest.mark.real
def test_real_tiles_that_share_ground_share_their_split(real: Path):
    """Six dates of a reservoir among others: however blocks are drawn, no two splits hold the same ground."""
    grids = []
    for record in records(real).values():
        key = next(k for k in ("s2_l2a", "s2_l1c", "s1") if record[k]["present"])
        ten = record[key]["10m"]
        grids.append(Grid(record["crs"].decode(), tuple(ten["transform"].tolist()), *ten["dn"].shape[:2]))
    meeting = [(i, j) for i, j in itertools.combinations(range(len(grids)), 2) if share_ground(grids[i], grids[j])]
    assert len(meeting) >= 15, "each date of the reservoir with each other"
    kept: Counter[str] = Counter()
    for seed in range(20):
        blocks = BlockSplit((0.4, 0.3, 0.3), degrees=0.1, seed=seed)
        splits = [blocks.split(*lonlat_outline(grid)) for grid in grids]
        pairs = [{splits[i], splits[j]} for i, j in meeting]
        assert all(len(pair - {None}) <= 1 for pair in pairs)
        kept.update(split for pair in pairs for split in pair if split)
    assert len(kept) == 3, "pairs were found in every split"


# --- constructed folders ----------------------------------------------------------------------


def write_scene(root: Path, size: int, key: str = "s2_l2a") -> dict[str, np.ndarray]:
    """A native scene as one file per band in the way of a SAFE product's names; returns its bands."""
    bands = scene(5, size)[key]
    root.mkdir(parents=True)
    for name, pixels in bands.items():
        step = next(b.gsd for b in (*S2_L1C.bands, *S2_L1C.dropped) if b.name == name)
        (root / f"T32TPT_20200605T103031_{name}.tif").write_bytes(
            tif(pixels, from_origin(600_000, 5_400_000, step, step))
        )
    return bands


def test_large_scenes_are_read_block_by_block(tmp_path: Path):
    bands = write_scene(tmp_path / "in" / "S2L2A" / "big", 240)
    assert prepare(tmp_path / "in", tmp_path / "out", "--tile-size", "24", "--stride", "24") == 0
    found = records(tmp_path / "out")
    assert len(found) == 100
    whole = np.zeros_like(bands["B02"])
    for record in found.values():
        assert record["cell"].decode().startswith("big@r")
        for group, step in (("10m", 10), ("20m", 20), ("60m", 60)):
            part = record["s2_l2a"][group]
            row = round((5_400_000 - part["transform"][5]) / step)
            col = round((part["transform"][2] - 600_000) / step)
            names = SENSORS["s2_l2a"].groups[group]
            n = part["dn"].shape[0]
            for i, name in enumerate(names):
                assert (part["dn"][..., i] == bands[name][row : row + n, col : col + n]).all()
            if group == "10m":
                whole[row : row + n, col : col + n] += 1
    assert (whole == 1).all(), "every pixel is in one tile"


def test_blocks_of_a_scene_leave_nothing_out():
    options = Options(tile_size=534, stride=534)
    grid = Grid("EPSG:32632", (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 10980, 10980)
    found = blocks(grid, options)
    assert all(b is not None and b[0] % 6 == 0 and b[1] % 6 == 0 for b in found)
    covered = {r for b in found if b is not None for r in range(b[0], b[0] + b[2] - 533, 534)}
    assert covered == set(range(0, 10980 - 533, 534))
    assert blocks(Grid("EPSG:32632", grid.transform, 1068, 1068), options) == [None]


def test_safe_granules_in_jpeg_2000(tmp_path: Path):
    """Level 1C and 2A of one overpass become one cell; resampled copies of ESA are left alone."""
    level_1c, level_2a = scene(8, 48)["s2_l1c"], scene(8, 48, 1000)["s2_l2a"]
    for level, bands in (("L1C", level_1c), ("L2A", level_2a)):
        safe = f"S2A_MSI{level}_20200605T103031_N0500_R108_T32TPT_20230401T000000.SAFE"
        for name, pixels in bands.items():
            step = next(b.gsd for b in (*S2_L1C.bands, *S2_L1C.dropped) if b.name == name)
            folder = tmp_path / "in" / safe / "GRANULE" / f"{level}_T32TPT_A0" / "IMG_DATA"
            suffix = ""
            if level == "L2A":
                folder, suffix = folder / f"R{step}m", f"_{step}m"
            folder.mkdir(parents=True, exist_ok=True)
            _jp2(folder / f"T32TPT_20200605T103031_{name}{suffix}.jp2", pixels, step)
            if level == "L2A" and step == 10:
                (folder.parent / "R20m").mkdir(exist_ok=True)
                _jp2(folder.parent / "R20m" / f"T32TPT_20200605T103031_{name}_20m.jp2", pixels[::2, ::2], 20)
        masks = tmp_path / "in" / safe / "GRANULE" / f"{level}_T32TPT_A0" / "QI_DATA"
        masks.mkdir()  # baseline 04.00 and later deliver masks as images, some of them called after bands
        for name in ("MSK_DETFOO_B02", "MSK_QUALIT_B8A", "MSK_CLASSI_B00", "MSK_CLDPRB_20m"):
            _jp2(masks / f"{name}.jp2", np.zeros((48, 48), np.uint16), 10)
    scenes, skipped = from_folder(tmp_path / "in")
    assert len(scenes) == 1
    assert skipped == {"band resampled by ESA": 4, "quality mask": 8}
    assert prepare(tmp_path / "in", tmp_path / "out", "--tile-size", "48") == 0
    (record,) = records(tmp_path / "out").values()
    assert record["cell"] == b"T32TPT_20200605T103031"
    assert (record["s2_l1c"]["offset"], record["s2_l2a"]["offset"]) == (0, 1000)
    assert b"against product id" in record["s2_l1c"]["offset_source"], "N0500, but dark: somebody subtracted it"
    for key, bands in (("s2_l1c", level_1c), ("s2_l2a", level_2a)):
        for group, names in SENSORS[key].groups.items():
            for i, name in enumerate(names):
                assert (record[key][group]["dn"][..., i] == bands[name]).all()


def _jp2(path: Path, pixels: np.ndarray, step: int) -> None:
    with rasterio.open(
        path, "w", driver="JP2OpenJPEG", count=1, height=pixels.shape[0], width=pixels.shape[1], dtype="uint16",
        crs="EPSG:32632", transform=from_origin(600_000, 5_400_000, step, step), QUALITY="100", REVERSIBLE="YES",
    ) as out:  # fmt: skip
        out.write(pixels, 1)


def test_duplicates_and_dead_links_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """One product of a cell in two folders, and one row of a manifest twice: once each, whatever the order."""
    product = "S2B_MSIL2A_20200605T103031_N0300_R018_T32TPT_20200605T143000"
    for copy in "ba":
        write_scene(tmp_path / "in" / copy / "S2L2A" / "here" / product, 48)
    (tmp_path / "in" / "S2L2A").mkdir()
    (tmp_path / "in" / "S2L2A" / "gone.tif").symlink_to(tmp_path / "nowhere.tif")
    (tmp_path / "in" / "b" / "S2L2A" / "here" / product / "._B02.tif").write_bytes(b"left by macOS")
    assert prepare(tmp_path / "in", tmp_path / "out", "--tile-size", "48") == 0
    assert list(records(tmp_path / "out")) == ["here/r0_c0"]
    said = capsys.readouterr().out
    assert "1 files: hidden file" in said
    assert "12 files: same product of the cell again" in said
    assert "1 files: link that leads nowhere" in said
    paths = sorted((tmp_path / "in" / "a").rglob("*.tif"))
    lines = [f"{path.relative_to(tmp_path)},here,S2L2A,{path.stem.split('_')[-1]}" for path in (*paths, paths[3])]
    (tmp_path / "list.csv").write_text("\n".join(["file,location,sensor,bands", *lines]) + "\n")
    flags = ("--manifest", str(tmp_path / "list.csv"), "--tile-size", "48")
    assert prepare(tmp_path, tmp_path / "listed", *flags) == 0
    assert "1 files: same product of the cell again" in capsys.readouterr().out


def test_manifest_says_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Junk file names, an odd band order, offset, split and nodata: all from the manifest."""
    bands = scene(2, 48)
    affine = from_origin(600_000, 5_400_000, 10, 10)
    order = [*[b for b in SENSORS["s2_l2a"].band_names if b != "B8A"], "B8A"]
    stack = np.stack(
        [np.kron(bands["s2_l2a"][b], np.ones((48 // bands["s2_l2a"][b].shape[0],) * 2, np.uint16)) for b in order]
    )
    (tmp_path / "a1.tif").write_bytes(tif(stack, affine))
    radar = 10 * np.log10(np.stack([bands["s1"]["VV"], bands["s1"]["VH"]]))
    radar[:, :6] = -99
    (tmp_path / "a2.tif").write_bytes(tif(radar, affine))
    manifest = tmp_path / "list.csv"
    columns = ("file", "location", "sensor", "bands", "units", "offset", "split", "use")
    lines = [
        ("a1.tif", "here", "S2L2A", ",".join(order), "DN", "1000", "holdout", "yes"),
        ("a2.tif", "here", "Sentinel-1 GRD (dB)", "VV,VH", "dB, nodata -99", "", "", "yes"),
        ("a3.tif", "there", "S2L2A", "", "", "", "", "no"),
    ]
    rows = [dict(zip(columns, line, strict=True)) for line in lines]
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "out"
    assert prepare(tmp_path, out, "--manifest", str(manifest), "--select", "use=yes") == 0
    assert "source: 1 scenes, 1 units, 1 files: not selected" in capsys.readouterr().out, "nothing is left out silently"
    import tensorflow_datasets as tfds

    (record,) = tfds.builder_from_directory(out).as_data_source("holdout")
    assert (record["s2_l2a"]["offset"], record["s2_l2a"]["offset_source"]) == (1000, b"manifest")
    assert (record["s2_l2a"]["20m"]["dn"][..., 3] == stack[order.index("B8A")]).all()
    assert record["s1"]["nodata"] == pytest.approx(6 / 48)
    rows[0]["bands"] = "B02,B99"
    rows[1] |= {"split": "test"}
    rows.append(rows[0] | {"bands": "", "offset": "-1000"})
    with open(manifest, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    assert prepare(tmp_path, tmp_path / "x", "--manifest", str(manifest), "--select", "use=yes") == 1
    message = capsys.readouterr().err
    assert "line 2" in message
    assert "B99" in message
    assert "line 3: split 'test'" in message
    assert "line 5: offset -1000: expected the DN to subtract, 0..1000" in message
    assert prepare(tmp_path, tmp_path / "x", "--manifest", str(manifest), "--select", "what=yes") == 1
    assert "what" in capsys.readouterr().err
