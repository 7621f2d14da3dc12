"""Bad input of scene embedding: each a one-line error that names the file and the remedy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.control import GroundControlPoint
from scenes_fake import CRS, NORTH, WEST, optical, radar, surface, tiny_model, write

from terrafm_jax import embed
from terrafm_jax.scenes import commands, read
from terrafm_jax.scenes import grid as grid_lib
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Grid, Plan
from terrafm_jax.scenes.inputs import Declared, resolve
from terrafm_jax.sensors import SENSORS

NAMES = SENSORS["s2_l2a"].band_names


def fails(capsys: pytest.CaptureFixture, *args: str) -> str:
    code = embed.main(["--checkpoint=none.pth", "--out=e.tif", *args])
    line = capsys.readouterr().err.strip()
    assert code == 1
    assert "\n" not in line, line
    return line


def test_files_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "notes.tif"
    text.write_text("no raster")
    plain = optical(tmp_path / "plain.tif", 64, 64)
    bare = write(tmp_path / "bare.tif", surface(64, 64, 12), names=NAMES, crs=None)
    turned = optical(tmp_path / "turned.tif", 64, 64, transform=Affine(10, 2, WEST, 2, -10, NORTH))
    unnamed = write(tmp_path / "unnamed.tif", surface(64, 64, 12))
    junk = write(tmp_path / "junk.tif", surface(64, 64, 3), names=("stackstac-1a", "stackstac-1a", "bands"))
    empty = write(tmp_path / "empty.tif", np.full((2, 64, 64), -9999, np.float32), nodata=-9999, names=("VV", "VH"))
    for argument, words in {
        f"s2_l2a={text}": ("notes.tif", "GeoTIFF"),
        f"s2_l2a={tmp_path / 'missing.tif'}": ("missing.tif", "no such file"),
        f"s2_l2a={bare}": ("bare.tif", "coordinate reference system", "gdal_edit"),
        f"s2_l2a={turned}": ("turned.tif", "rotated", "gdalwarp"),
        f"s2_l2a={unnamed}": ("unnamed.tif", "12 bands have no names", "--bands s2_l2a="),
        f"s2_l2a={junk}": ("junk.tif", "--bands s2_l2a="),
        f"s1={empty}": ("empty.tif", "nothing but nodata"),
        f"s5={plain}": ("s5", "expected one of"),
        "s2_l2a": ("NAME=FILE",),
        f"s2_l2a={tmp_path}/nothing.json": ("nothing.json", "STAC"),
    }.items():
        line = fails(capsys, f"--sensor={argument}")
        assert all(word in line for word in words), line


def test_radar_geometry_is_told_from_a_missing_crs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "s1a-iw-grd-vv.tiff"
    corners = [(0, 0), (0, 64), (64, 0), (64, 64)]
    gcps = [GroundControlPoint(row=r, col=c, x=9 + c / 6e3, y=46 - r / 6e3 + c / 4e4) for r, c in corners]
    with rasterio.open(
        path, "w", driver="GTiff", height=64, width=64, count=2, dtype="float32", gcps=gcps, crs="EPSG:4326"
    ) as file:
        file.write(np.full((2, 64, 64), 0.1, np.float32))
    line = fails(capsys, f"--sensor=s1={path}", "--bands=s1=VV,VH")
    assert "s1a-iw-grd-vv.tiff: is in radar geometry" in line
    assert "terrain-corrected" in line


def test_wrong_band_count_and_unknown_bands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "x.tif", surface(64, 64, 12))
    line = fails(capsys, f"--sensor=s2_l2a={path}", "--bands=s2_l2a=B02,B03")
    assert "x.tif: holds 12 bands, --bands s2_l2a names 2" in line
    line = fails(capsys, f"--sensor=s2_l2a={path}", f"--bands=s2_l2a={','.join(NAMES[:11])},B99")
    assert "unknown bands ['B99']" in line


def test_truncated_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = optical(tmp_path / "cut.tif", 256, 256, tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    path.write_bytes(path.read_bytes()[:-40_000])
    line = fails(capsys, f"--sensor=s2_l2a={path}")
    assert "cut.tif" in line
    assert "truncated" in line or "cannot be opened" in line


def test_units_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    share = write(tmp_path / "r.tif", (surface(64, 64, 12) / 10_000).astype(np.float32), names=NAMES)
    whole = optical(tmp_path / "dn.tif", 64, 64)
    db, power = radar(tmp_path / "db.tif", 64, 64), radar(tmp_path / "power.tif", 64, 64, power=True)
    for args, remedy in (
        ((f"--sensor=s2_l2a={share}",), "--unit s2_l2a=reflectance"),
        ((f"--sensor=s2_l2a={whole}", "--unit=s2_l2a=reflectance"), "--unit s2_l2a=dn"),
        ((f"--sensor=s1={power}",), "--unit s1=power"),
        ((f"--sensor=s1={db}", "--unit=s1=power"), "--unit s1=db"),
        ((f"--sensor=s1={db}", "--unit=s1=dn"), "--unit s1=dn: expected one of ['db', 'power'] (linear = power)"),
    ):
        assert remedy in fails(capsys, *args)


def test_a_declared_unit_wins_over_appearances(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    odd = write(tmp_path / "dim.tif", np.full((12, 64, 64), 1.5, np.float32), names=NAMES)
    bright = write(tmp_path / "bright.tif", np.full((2, 64, 64), 3.0, np.float32), names=("VV", "VH"))
    for path, key, unit in ((odd, "s2_l2a", "dn"), (bright, "s1", "db")):
        with pytest.raises(SceneError, match=f"--unit {key}="):
            resolve(f"{key}={path}", Declared())
        caplog.clear()
        assert resolve(f"{key}={path}", Declared(unit={key: unit})).unit == unit
        assert "taken as declared" in caplog.text


def test_values_that_nobody_declared_as_nodata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = surface(64, 64, 12).astype(np.float32)
    data[:, :20] = -9999
    path = write(tmp_path / "fill.tif", data, names=NAMES)
    with pytest.raises(SceneError, match="pass --nodata s2_l2a=-9999"):
        resolve(f"s2_l2a={path}", Declared())
    date = resolve(f"s2_l2a={path}", Declared(nodata={"s2_l2a": -9999.0}))
    assert "--nodata" not in caplog.text
    assert not read.SceneReader([date], grid_lib.target_grid([date])).read(0, 0, 64, 64)["s2_l2a"].valid[:20].any()


def test_impossible_values_count_as_nodata(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = (surface(64, 64, 12) / 10_000).astype(np.float32)
    data[4, 30, 31] = 1e30
    date = resolve(f"s2_l2a={write(tmp_path / 'r.tif', data, names=NAMES)}", Declared(unit={"s2_l2a": "reflectance"}))
    valid = read.SceneReader([date], grid_lib.target_grid([date])).read(0, 0, 64, 64)["s2_l2a"].valid
    assert np.argwhere(~valid).tolist() == [[30, 31]]
    assert "r.tif: holds values beyond 65535" in caplog.text


def test_dark_water_is_no_reflectance(tmp_path: Path) -> None:
    dark = np.ones((12, 64, 64), np.uint16)
    dark[:, ::7, ::5] = 2
    path = write(tmp_path / "water.tif", dark, names=NAMES)
    assert resolve(f"s2_l2a={path}", Declared()).unit == "dn"


def test_an_offset_still_inside_is_pointed_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "x.tif", surface(64, 64, 12) // 4 + 950, names=NAMES)
    resolve(f"s2_l2a={path}", Declared())
    assert "--offset s2_l2a=1000" in caplog.text
    caplog.clear()
    resolve(f"s2_l2a={path}", Declared(offset={"s2_l2a": 1000.0}))
    assert not caplog.text


def test_sensors_that_do_not_meet(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    first = optical(tmp_path / "a.tif", 64, 64)
    second = radar(tmp_path / "b.tif", 64, 64, west=WEST + 90_000)
    line = fails(capsys, f"--sensor=s2_l2a={first}", f"--sensor=s1={second}")
    assert "do not meet" in line
    assert "s1 (690000" in line
    line = fails(capsys, f"--sensor=s2_l2a={first}", "--aoi=0,0,1,1")
    assert "--aoi" in line


def test_settings_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = f"--sensor=s2_l2a={optical(tmp_path / 'a.tif', 64, 64)}"
    for args, words in (
        (("--gsd=fine",), "--gsd fine"),
        (("--gsd=300",), "at least 16 x 16"),
        (("--crs=EPSG:4326",), "is not metric"),
        (("--crs=EPSG:nonsense",), "--crs EPSG:nonsense"),
        (("--window=100", "--overlap=33", "--stride=5"), "--overlap 33"),
        (("--aoi=nowhere.geojson",), "--aoi nowhere.geojson: no such file"),
        (("--crs=3857",), "meters are 0.69 m on the ground here; pass EPSG:32632"),
        (("--mask=nowhere.tif",), "nowhere.tif"),
        (("--offset=s2_l2a=much",), "--offset s2_l2a=much"),
        (("--points=p.csv",), "give OUT.parquet"),
        (("--out=e.jpg",), "unknown suffix '.jpg'"),
        ((f"--out={tmp_path / 'a.tif' / 'e.tif'}",), "choose another"),
    ):
        assert words in fails(capsys, path, *args)


def test_flags_that_make_no_sense(capsys: pytest.CaptureFixture) -> None:
    base = ["--checkpoint=x", "--sensor=s2_l2a=x.tif", "--out=e.tif"]
    for flags in ([*base, "--threads=0"], [*base, "--batch=-2"], [*base, "--stride=0"], [*base, "--window=few"]):
        with pytest.raises(SystemExit) as left:
            embed.main(flags)
        assert left.value.code == 2
        assert flags[-1].partition("=")[0] in capsys.readouterr().err


def test_areas_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scene = f"--sensor=s2_l2a={optical(tmp_path / 'a.tif', 64, 64)}"
    shape = {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 0]]]}
    for name, content in {
        "point.geojson": '{"type": "Point", "coordinates": [1, 2]}',
        "text.geojson": "POLYGON ((0 0, 1 0, 1 1, 0 0))",
        "crs.geojson": str({**shape, "crs": {"properties": {"name": "EPSG:0"}}}).replace("'", '"'),
    }.items():
        (tmp_path / name).write_text(content)
        line = fails(capsys, scene, f"--aoi={tmp_path / name}")
        assert f"{name}: holds no GeoJSON polygon" in line
        assert ("found Point; places go to --points" in line) == (name == "point.geojson")
    (tmp_path / "area.gpkg").write_bytes(b"SQLite format 3")
    assert ".gpkg is not read; convert it: ogr2ogr" in fails(capsys, scene, f"--aoi={tmp_path / 'area.gpkg'}")


def test_weights_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    l2a, s1 = optical(tmp_path / "a.tif", 64, 64), radar(tmp_path / "b.tif", 64, 64)
    both = (f"--sensor=s2_l2a={l2a}", f"--sensor=s1={s1}")
    assert "none.pth: not found" in fails(capsys, *both)
    monkeypatch.setattr(commands, "_load", lambda args: tiny_model(fusion=False))
    assert "no fusion" in fails(capsys, *both)
    monkeypatch.setattr(commands, "_load", lambda args: tiny_model(sensors=("s2_l2a",)))
    assert "--sensor s1: these weights know ['s2_l2a'] only" in fails(capsys, *both)


class _Evil:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path(self.target),))

    def __init__(self, target: Path):
        self.target = str(target)


def test_hostile_and_truncated_weights(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scene = f"--sensor=s2_l2a={optical(tmp_path / 'a.tif', 64, 64)}"
    ran = tmp_path / "it_ran"
    hostile = tmp_path / "hostile.pth"
    hostile.write_bytes(pickle.dumps(_Evil(ran)))
    code = embed.main([f"--checkpoint={hostile}", scene, f"--out={tmp_path / 'e.tif'}"])
    line = capsys.readouterr().err.strip()
    assert (code, ran.exists()) == (1, False)
    assert "hostile.pth" in line
    assert "\n" not in line
    short = tmp_path / "short.safetensors"
    short.write_bytes((5000).to_bytes(8, "little") + b'{"cls_token":')
    assert embed.main([f"--checkpoint={short}", scene, f"--out={tmp_path / 'e.tif'}"]) == 1
    line = capsys.readouterr().err.strip()
    assert "short.safetensors" in line
    assert "\n" not in line


def test_a_full_disk_is_said_and_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from terrafm_jax.scenes import store

    plan = Plan(Grid(grid_lib.CRS.from_string(CRS), WEST, NORTH, 10.0, 320, 320), 96, 48, 16)
    unfinished = store.Unfinished(tmp_path / "e.tif", plan, 4, "mark")
    blender = store.Blender(plan, 4)
    unfinished.open(blender)
    unfinished.save(blender, 3)

    def full(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(SceneError, match="No space left on device"):
        unfinished.save(blender, 5)
    assert store.Unfinished(tmp_path / "e.tif", plan, 4, "mark").open(store.Blender(plan, 4)) == 3
