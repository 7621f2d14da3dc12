"""Inputs of scene embedding: names of bands, SAFE and STAC products, grids, places, real tiles."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from scenes_fake import CRS, NORTH, WEST, call, optical, radar, surface, tiny_model, tokens, write

from terrafm_jax.scenes import commands, points, products, read
from terrafm_jax.scenes import grid as grid_lib
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Grid, Plan
from terrafm_jax.scenes.inputs import Declared, resolve
from terrafm_jax.sensors import SENSORS, band_name

NAMES = SENSORS["s2_l2a"].band_names
PRODUCT = "S2B_MSIL2A_20230223T032739_N0509_R018_T48QUE_20230224T183543"


# --- what is found ---


def test_band_names_in_any_spelling(tmp_path: Path) -> None:
    wanted = ("B02", "B03", "B04", "B8A")
    for names in (("blue", "green", "red", "nir08"), ("B2", "B3", "B4", "B8A"), ("BLUE", "GREEN", "RED", "NIR_NARROW")):
        path = write(tmp_path / "x.tif", surface(32, 32, 4), names=names)
        assert resolve(f"s2_l2a={path}", Declared()).bands == wanted
    path = write(tmp_path / "x.tif", surface(32, 32, 5), names=("SCL", "B12", "noise", "B01", "cirrus"))
    found = resolve(f"sentinel-2-l2a={path}", Declared())
    assert [(layer.band, layer.index) for layer in found.layers] == [("B01", 4), ("B12", 2)]
    path = write(tmp_path / "y.tif", surface(32, 32, 2))
    assert resolve(f"s2_l2a={path}", Declared(bands={"s2_l2a": ("B8A", "red")})).bands == ("B04", "B8A")


@pytest.mark.parametrize(("across", "down"), [(10.0052, 10.0), (10.0, 10.0052), (9.97947, 9.99208)])
def test_pixels_that_are_nearly_square_add_no_row(tmp_path: Path, across: float, down: float) -> None:
    """64 x 64 pixels as EuroSAT's: the side that is a little longer ended in a row of its own."""
    path = write(tmp_path / "x.tif", surface(64, 64, 12), names=NAMES)
    with rasterio.open(path, "r+") as image:
        image.transform = rasterio.Affine(across, 0, WEST, 0, -down, NORTH)
    found = grid_lib.target_grid([resolve(f"s2_l2a={path}", Declared())])
    assert (found.height, found.width) == (64, 64)
    assert [grid_lib._pixels(n) for n in (64.2, 64.5, 10980.05, 10980.2)] == [65, 65, 10980, 10981]


def test_several_files_make_one_date(tmp_path: Path) -> None:
    fine = write(tmp_path / "fine.tif", surface(64, 64, 4), names=("B02", "B03", "B04", "B08"))
    coarse = write(tmp_path / "T32TQM_B11_20m.tif", surface(32, 32, 1), gsd=20)
    found = resolve(f"s2_l2a={fine},{coarse}", Declared())
    assert found.bands == ("B02", "B03", "B04", "B08", "B11")
    assert len(found.paths) == 2


def safe(folder: Path, offset: str | None = "-1000", level: str = "L2A") -> Path:
    root = folder / f"{PRODUCT.replace('L2A', level)}.SAFE"
    images = root / "GRANULE" / "L2A_T48QUE_A031" / "IMG_DATA"
    for band in SENSORS["s2_l2a"].bands:
        for gsd in sorted({band.gsd, 60}):
            n = 960 // gsd
            data = surface(n, n, 1, gsd) + (0 if gsd == band.gsd else 5)
            write(images / f"R{gsd}m" / f"T48QUE_20230223T032739_{band.name}_{gsd}m.tif", data, gsd=gsd)
    write(images / "R20m" / "T48QUE_20230223T032739_SCL_20m.tif", np.full((1, 48, 48), 4, np.uint8), gsd=20)
    write(images / "R10m" / "T48QUE_20230223T032739_TCI_10m.tif", np.zeros((3, 96, 96), np.uint8))
    for name in ("MSK_DETFOO_B02", "MSK_QUALIT_B02", "MSK_CLDPRB_20m"):  # sorts before IMG_DATA, to be a trap
        write(root / "GRANULE" / "L2A_T48QUE_A031" / "AUX_QI" / f"{name}.tif", np.ones((1, 96, 96), np.uint8))
    (images / "R10m" / "._T48QUE_20230223T032739_B02_10m.tif").write_bytes(b"\0\5\x16\7 left by macOS")
    text = f'<BOA_ADD_OFFSET band_id="0">{offset}</BOA_ADD_OFFSET>' if offset else ""
    (root / "MTD_MSIL2A.xml").write_text(f"<n>{text}</n>")
    return root


def test_safe_product(tmp_path: Path) -> None:
    root = safe(tmp_path)
    found = resolve(f"s2_l2a={root}", Declared())
    assert found.bands == NAMES
    for layer in found.layers:
        gsd = next(b.gsd for b in SENSORS["s2_l2a"].bands if b.name == layer.band)
        assert layer.path.endswith(f"_{layer.band}_{gsd}m.tif"), "the native sampling wins over the 60 m copy"
    assert found.offset == 1000
    assert found.time == "2023-02-23T03:27:39Z"
    assert found.classes.endswith("SCL_20m.tif")
    assert resolve(f"s2_l2a={root}", Declared(offset={"s2_l2a": 0.0})).offset == 0
    with pytest.raises(SceneError, match="is a Level-2A product"):
        resolve(f"s2_l1c={root}", Declared())
    shutil.rmtree(root)
    assert resolve(f"s2_l2a={safe(tmp_path, None)}", Declared()).offset == 1000, "from the baseline N0509"


def test_products_are_embedded_by_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SAFE folder and a STAC item of the same pixels and offset give the same tokens."""
    monkeypatch.setattr(commands, "_load", lambda args: tiny_model())
    root = safe(tmp_path)
    outs = [tmp_path / "safe.tif", tmp_path / "stac.tif", tmp_path / "clear.tif"]
    assert call(out=outs[0], sensors={"s2_l2a": root}) == 0
    assets = {
        band.name: {"href": str(next(root.rglob(f"*_{band.name}_{band.gsd}m.tif"))), "eo:bands": [{"name": band.name}]}
        for band in SENSORS["s2_l2a"].bands
    }
    scl = np.full((1, 48, 48), 4, np.uint8)
    scl[:, :, 24:] = 9
    assets["scl"] = {"href": str(write(next(root.rglob("*SCL*")), scl, gsd=20))}
    item = {"type": "Feature", "id": PRODUCT, "properties": {"s2:processing_baseline": "05.09"}, "assets": assets}
    (tmp_path / "item.json").write_text(json.dumps(item))
    assert call(out=outs[1], sensors={"s2_l2a": tmp_path / "item.json"}) == 0
    assert call("--use-scl", out=outs[2], sensors={"s2_l2a": tmp_path / "item.json"}) == 0
    found = [tokens(out) for out in outs]
    assert found[0].shape == (6, 6, 24)
    assert np.array_equal(found[0], found[1])
    assert np.isfinite(found[2][:, :3]).all()
    assert np.isnan(found[2][:, 3:]).all()
    with rasterio.open(outs[0]) as source:
        (date,) = json.loads(source.tags()["TERRAFM_SOURCES"])["s2_l2a"]
    assert (date["offset"], date["product"], date["time"]) == (1000, PRODUCT, "2023-02-23T03:27:39Z")


def test_own_classification_takes_clouds_out(tmp_path: Path) -> None:
    root = safe(tmp_path)
    scl = np.full((1, 48, 48), 4, np.uint8)
    scl[:, :24] = 9
    path = next(root.rglob("*SCL*"))
    write(path, scl, gsd=20)
    date = resolve(f"s2_l2a={root}", Declared())
    valid = read.SceneReader([date], grid_lib.target_grid([date]), use_classes=True).read(0, 0, 96, 96)["s2_l2a"].valid
    assert not valid[:48].any()
    assert valid[48:].all()


@pytest.mark.parametrize(
    ("product", "offset"),
    [("S2A_MSIL2A_x_N0400_y", 1000), ("S2A_MSIL2A_x_N0301_y", 0), ("S2A_N9999_z", 0), ("x_N0511", 1000), ("scene", 0)],
)
def test_offset_from_the_product_id(product: str, offset: float) -> None:
    assert products.offset_of(product) == offset


def stac(folder: Path, **properties: Any) -> Path:
    write(folder / "data" / "b02.tif", surface(64, 64, 1))
    write(folder / "data" / "rest.tif", surface(64, 64, 2))
    assets = {
        "blue": {"href": "./data/b02.tif", "eo:bands": [{"name": "B02", "common_name": "blue"}]},
        "pair": {"href": "data/rest.tif", "eo:bands": [{"name": "red"}, {"name": "nir08"}]},
        "preview": {"href": "data/none.png", "roles": ["overview"], "eo:bands": [{"name": "B03"}]},
        "scl": {"href": "data/scl.tif"},
    }
    assets["blue"] |= properties.pop("asset", {})
    item = {"type": "Feature", "id": PRODUCT, "properties": {"datetime": "2023-02-23T03:27:39Z", **properties}}
    path = folder / "item.json"
    path.write_text(json.dumps({**item, "assets": assets}))
    return path


@pytest.mark.parametrize(
    ("properties", "offset"),
    [
        ({}, 1000),
        ({"earthsearch:boa_offset_applied": True}, 0),
        ({"s2:processing_baseline": "03.01"}, 0),
        ({"s2:processing_baseline": "05.09"}, 1000),
        (
            {"asset": {"raster:bands": [{"scale": 0.0001, "offset": -0.1}]}, "earthsearch:boa_offset_applied": True},
            1000,
        ),
    ],
)
def test_stac_item(tmp_path: Path, properties: dict[str, Any], offset: float) -> None:
    found = resolve(f"s2_l2a={stac(tmp_path, **properties)}", Declared())
    assert found.bands == ("B02", "B04", "B8A")
    assert found.offset == offset
    assert found.time == "2023-02-23T03:27:39Z"
    assert [layer.index for layer in found.layers] == [1, 1, 2]


def test_stac_item_of_sentinel_1(tmp_path: Path) -> None:
    for name in ("vv", "vh"):
        write(tmp_path / f"{name}.tif", np.full((1, 64, 64), 0.05, np.float32))
    assets = {name: {"href": f"./{name}.tif", "roles": ["data"]} for name in ("vh", "vv")}
    item = {"type": "Feature", "id": "S1A_IW_GRDH_rtc", "properties": {"datetime": "2023-01-02T00:00:00Z"}}
    (tmp_path / "s1.json").write_text(json.dumps({**item, "assets": assets}))
    found = resolve(f"s1={tmp_path / 's1.json'}", Declared(unit={"s1": "power"}))
    assert (found.bands, found.offset, found.time) == (("VV", "VH"), 0, "2023-01-02T00:00:00Z")
    values = read.SceneReader([found], grid_lib.target_grid([found])).read(0, 0, 32, 32)["s1"].values
    assert values == pytest.approx(10 * np.log10(0.05), abs=1e-4)


# --- grids, windows, points ---


def test_every_token_is_covered_by_windows() -> None:
    crs = grid_lib.CRS.from_string(CRS)
    for height, width in ((16, 16), (96, 300), (513, 210), (1068, 1068)):
        for window, overlap, stride in ((96, 48, 16), (96, 0, 8), (224, 112, 16), (64, 48, 4)):
            plan = Plan(Grid(crs, 0, 0, 10.0, height, width), window, overlap, stride, batch=4)
            seen = np.zeros(plan.shape, int)
            last = -1
            for chunk in plan.chunks():
                assert chunk.row >= last
                last = chunk.row
                assert len(chunk.columns) <= 4
                for column in chunk.columns:
                    seen[plan.tokens_of(chunk, column)] += 1
                    assert chunk.row + chunk.height < height + 16
                    assert column + chunk.width < width + 16
            assert seen.min() >= 1, (height, width, window, stride)


@pytest.mark.parametrize(("width", "batch", "fill"), [(1068, 16, 9), (10_980, 16, 14), (10_980, 1, 1), (224, 16, 1)])
def test_chunks_of_a_row_are_equally_long(width: int, batch: int, fill: int) -> None:
    plan = Plan(Grid(grid_lib.CRS.from_string(CRS), 0, 0, 10.0, 224, width), 224, 112, 16, batch=batch)
    lengths = [len(chunk.columns) for chunk in plan.chunks()]
    assert plan.fill == max(lengths) == fill
    assert sum(lengths) / (fill * len(lengths)) > 0.95, "few windows are computed for nothing"


def test_grid_keeps_the_pixels_of_the_reference(tmp_path: Path) -> None:
    fine = optical(tmp_path / "a.tif", 100, 100)
    wide = radar(tmp_path / "b.tif", 90, 200, west=WEST + 205, north=NORTH - 95)
    both = [resolve(f"s2_l2a={fine}", Declared()), resolve(f"s1={wide}", Declared())]
    found = grid_lib.target_grid(both)
    assert (found.x - WEST) % 10 == 0
    assert (NORTH - found.y) % 10 == 0
    assert found.x <= WEST + 205
    assert found.bounds[2] >= WEST + 1000
    assert (found.height, found.width) == (91, 80)


def test_points_in_three_formats(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "p.csv").write_text("Lon,LAT,name\n9.5,46.1,a\n-3,2,b\n")
    features = [
        {"type": "Feature", "geometry": {"type": "Point", "coordinates": xy}, "properties": {"name": n}}
        for xy, n in (((9.5, 46.1), "a"), ((-3, 2), "b"))
    ]
    (tmp_path / "p.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    table = pa.table({"longitude": [9.5, -3.0], "latitude": [46.1, 2.0], "name": ["a", "b"]})
    pq.write_table(table, tmp_path / "p.parquet")
    for name in ("p.csv", "p.geojson", "p.parquet"):
        places, columns = points.read_points(tmp_path / name)
        assert places.tolist() == [[9.5, 46.1], [-3.0, 2.0]]
        assert columns["name"] == ["a", "b"]
    for text, words in (
        ("a,b\n1,2\n", "hold no lon"),
        ("lon,lat\n500,2\n", "no degrees"),
        ("lon,lat\nx,2\n", "no number"),
    ):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(SceneError, match=words):
            points.read_points(tmp_path / "bad.csv")


@pytest.mark.real
def test_real_tiles_are_neither_refused_nor_misread(real_data: Path) -> None:
    tiles = sorted((real_data / "train_tiles").glob("terramesh_224/S2L2A/*.tif"))
    tiles += sorted((real_data / "train_tiles").glob("s2l2a_*/**/*.tif"))
    seen = 0
    for path in tiles:
        with rasterio.open(path) as source:
            named = any(d and band_name(d, SENSORS["s2_l2a"]) for d in source.descriptions)  # or junk, or none
        declared = Declared() if named else Declared(bands={"s2_l2a": NAMES})
        assert resolve(f"s2_l2a={path}", declared).unit == "dn", path
        seen += 1
    assert seen >= 20
    for path in sorted((real_data / "train_tiles").glob("terramesh_224/S1RTC/*.tif")):
        acquisition = resolve(f"s1={path}", Declared(bands={"s1": ("VV", "VH")}))
        assert acquisition.unit == "db"


def test_blending_weights_sum_to_one_inside() -> None:
    plan = Plan(Grid(grid_lib.CRS.from_string(CRS), 0, 0, 10.0, 960, 960), 224, 112, 16)
    taper = plan.taper(14)
    assert taper[:7] + taper[7:] == pytest.approx(np.ones(7), abs=1e-6)
    assert (taper > 0).all()
