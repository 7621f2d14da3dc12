"""Looking at a prepared data set, and tiles written back as GeoTIFF exactly onto their source."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from data_prep_cells import SIZE, make_source, place, scene
from PIL import Image

from data_prep import inspect, majortom, pictures
from data_prep.dataset import DataSet
from terrafm_jax import landcover
from terrafm_jax.sensors import SENSORS


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = make_source(tmp_path_factory.mktemp("inspect"), 4)
    out = source / "out"
    flags = ["--source", str(source), "--worldcover", str(source / "worldcover"), "--out", str(out)]
    assert (
        majortom.main([*flags, "--tile-size", "24", "--split-shares", "0.5,0.25,0.25", "--block-degrees", "0.3"]) == 0
    )
    return out


def test_text_and_page(prepared: Path, capsys: pytest.CaptureFixture[str]):
    assert inspect.main([str(prepared), "--tiles", "6"]) == 0
    text = capsys.readouterr().out
    for wanted in (
        "tiles,",
        "s1 + s2_l1c + s2_l2a",
        "10m 24x24",
        "harmonized DN",
        "published mean",
        "lost between splits",
    ):
        assert wanted in text
    assert "Tree cover" in text or "Grassland" in text
    page = prepared / "inspect" / "index.html"
    html = page.read_text()
    names = {"map.png", "classes.png", "tiles.png", "bands_s1.png", "bands_s2_l1c.png", "bands_s2_l2a.png"}
    assert {p.name for p in page.parent.glob("*.png")} == names
    for name in names:
        assert f'src="{name}"' in html
        pixels = np.asarray(Image.open(page.parent / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 200
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, f"{name} is blank"
    assert "CC-BY-SA-4.0" in html


def test_a_reader_that_goes_away_early(prepared: Path, tmp_path: Path):
    """As in ``| head``: no traceback, and the page is there."""
    command = [sys.executable, "-m", "data_prep.inspect", str(prepared), "--out", str(tmp_path), "--tiles", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        err = process.stderr.read().decode()
    assert (process.returncode, err) == (0, "")
    assert (tmp_path / "index.html").exists()


def test_exported_tile_lies_exactly_on_its_source(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = DataSet.open(prepared)
    split = next(iter(data.splits))
    tile = data.record(split, 0)["tile_id"]
    assert inspect.main([str(prepared), "--export", tile, str(tmp_path / "a")]) == 0
    assert inspect.main([str(prepared), "--export", f"{split}:0", str(tmp_path / "b")]) == 0
    assert [p.name for p in sorted((tmp_path / "a").iterdir())] == [p.name for p in sorted((tmp_path / "b").iterdir())]
    cell = int(tile[:3]) - 500
    row, col = (int(x[1:]) for x in tile.split("/")[1].split("_"))
    delivered = scene(cell, SIZE, 1000 if cell % 3 == 1 else 0)
    checked = 0
    for path in (tmp_path / "a").glob("*m.tif"):
        key = next(k for k in SENSORS if f"_{k}_" in path.name)
        group = path.stem.rsplit("_", 1)[1]
        step = int(group[:-1])
        with rasterio.open(path) as source:
            assert source.crs.to_epsg() == 32632
            assert source.descriptions == SENSORS[key].groups[group]
            left, top = (round(v / step) * step for v in place(cell))
            assert tuple(source.transform)[:6] == (step, 0, left + col * 10, 0, -step, top - row * 10)
            pixels = source.read()
            assert source.tags().get("OFFSET_SOURCE", "") == ("product id, pixels agree" if key != "s1" else "")
        k = step // 10
        for band, stored in zip(SENSORS[key].groups[group], pixels, strict=True):
            part = delivered[key][band][row // k : (row + 24) // k, col // k : (col + 24) // k]
            if key == "s1":
                assert np.abs(stored - 10 * np.log10(part)).max() <= 0.0051
            else:
                assert (stored == part).all()
            checked += 1
    assert checked == 2 + 12 + 12
    (cover,) = (tmp_path / "a").glob("*landcover.tif")
    with rasterio.open(cover) as source:
        assert set(np.unique(source.read(1))) <= {0, 255, *(c.code for c in landcover.CATEGORIES if c.code)}
        assert source.colormap(1)[10] == (0, 100, 0, 255)
    capsys.readouterr()


def test_nodata_is_masked_in_the_export(tmp_path: Path):
    from data_prep.export import export
    from data_prep.records import record
    from terrafm_jax.data.tiles import pack_valid

    blank = record(
        parts={}, nodata={}, landcover_map=None, tile_id="a/r0_c0", cell="a", crs="EPSG:32632", lat=0.0, lon=0.0,
        landcover=0, fractions=np.zeros(landcover.NUM_CATEGORIES, np.float32),
    )  # fmt: skip
    valid = np.ones((12, 12), bool)
    valid[:, :3] = False
    dn = np.full((12, 12, 2), -1234, np.int16)
    dn[:, :3] = -32768
    blank["s1"] |= {
        "present": True,
        "10m": {"dn": dn, "valid": pack_valid(valid), "transform": np.array([10.0, 0, 600_000, 0, -10, 5_400_000])},
    }
    (path,) = export(blank, tmp_path)
    with rasterio.open(path) as source:
        assert (source.read_masks(1) == np.where(valid, 255, 0)).all()
        assert source.read(1)[valid] == pytest.approx(-12.34)


def test_pictures_name_the_products_they_show():
    def record(**kinds: str) -> dict:
        return {key: {"present": key in kinds, "kind": kinds.get(key, "")} for key in SENSORS}

    records = [record(s1="GRD sigma0", s2_l1c="L1C"), record(s2_l1c="L1C", s2_l2a="L2A"), record(s1="RTC gamma0")]
    assert pictures._sample(records, "s1").startswith("Sentinel-1, tiles: 1 GRD sigma0, 1 RTC gamma0\n")
    assert pictures._sample(records, "s2_l1c").startswith("Sentinel-2, tiles: 2 L1C; offset subtracted\n")
    shown = [pictures._shown_sensors(r) for r in records]
    assert shown == [["s2_l1c", "s1"], ["s2_l2a"], ["s1"]]


def test_errors_say_what_is_there(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert inspect.main([str(prepared), "--export", "nowhere/r0_c0", str(tmp_path)]) == 1
    assert "no tile 'nowhere/r0_c0'" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert inspect.main([str(prepared), "--export", "train:0", str(tmp_path / "file")]) == 1
    assert capsys.readouterr().err.startswith(f"data_prep.inspect: {tmp_path / 'file'}: ")
    assert inspect.main([str(tmp_path)]) == 1
    assert "dataset_info.json" in capsys.readouterr().err
    (tmp_path / ".work").mkdir()
    assert inspect.main([str(tmp_path)]) == 1
    assert "unfinished" in capsys.readouterr().err
