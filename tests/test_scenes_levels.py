"""Offset and level of Sentinel-2 scenes, as far as their pixels, names and bands tell them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scenes_fake import DARK, NAMES, THIRTEEN, fails, optical, surface, write

from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.inputs import Declared, resolve
from terrafm_jax.sensors import SENSORS


def test_the_sign_of_the_offset(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    scene = f"--sensor=s2_l2a={optical(tmp_path / 'a.tif', 64, 64)}"
    assert "ESA's ADD_OFFSET is what to add); give --offset s2_l2a=1000" in fails(
        capsys, scene, "--offset=s2_l2a=-1000"
    )
    assert "is a reflectance, expected DN" in fails(capsys, scene, "--offset=s2_l2a=0.1")
    assert "expected a number" in fails(capsys, scene, "--offset=s2_l2a=nan")
    assert "such as --offset s2_l2a=1000" in fails(capsys, scene, "--offset=1000")


def test_an_offset_that_was_never_inside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "dark.tif", DARK, names=NAMES)
    assert not resolve(f"s2_l2a={path}", Declared()).doubts
    with pytest.raises(SceneError, match=r"so the offset of 1000 was removed before or never inside; pass .*s2_l2a=0"):
        resolve(f"s2_l2a={path}", Declared(offset={"s2_l2a": 1000.0}))
    between = write(tmp_path / "between.tif", DARK + 450, names=NAMES)
    found = resolve(f"s2_l2a={between}", Declared(offset={"s2_l2a": 1000.0}))
    assert "between.tif: the darkest pixels" in found.doubts[0]
    odd = resolve(f"s2_l2a={write(tmp_path / 'late.tif', DARK + 1000, names=NAMES)}", Declared(offset={"s2_l2a": 900}))
    assert "add 1000 DN, never 900" in odd.doubts[0]
    assert "never 900" in caplog.text


def test_twelve_bands_called_level_1c(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    names = SENSORS["s2_l1c"].band_names
    found = resolve(f"s2_l1c={write(tmp_path / 'a.tif', DARK, names=names)}", Declared())
    assert "12 bands without B10, as Level-2A has them (Level-1C has 13)" in found.doubts[0]
    product = "S2A_MSIL1C_20200605T103031_N0209_R108_T32TPT_20200605T120000"
    assert not resolve(f"s2_l1c={write(tmp_path / f'{product}.tif', DARK, names=names)}", Declared()).doubts
    assert not resolve(f"s2_l2a={tmp_path / 'a.tif'}", Declared()).doubts
    assert "is the sensor s2_l2a?" in fails(capsys, f"--sensor=s2_l1c={write(tmp_path / 'b.tif', DARK)}")


def test_b10_that_is_another_band_tells_a_wrong_order_and_no_offset(tmp_path: Path) -> None:
    """EuroSAT's files, whose B8A is last, read in ESA's order: B10 is elsewhere, and dark."""
    delivered = surface(64, 64, 13) + 1500
    delivered[9] = 12
    path = write(tmp_path / "eurosat.tif", delivered.astype(np.uint16))
    with pytest.raises(SceneError, match=r"median of B10 .* is \d+ DN, that of B09 12: B09 is B10"):
        resolve(f"s2_l1c={path}", Declared(bands={"s2_l1c": THIRTEEN}))
    path = write(tmp_path / "late.tif", (delivered + 1000).astype(np.uint16))  # the offset proves nothing then
    with pytest.raises(SceneError, match=r"wrong band order.* that of B09 1012: B09 is B10; give the bands"):
        resolve(f"s2_l1c={path}", Declared(bands={"s2_l1c": THIRTEEN}, offset={"s2_l1c": 1000.0}))


def test_b10_tells_the_offset_of_level_1c(tmp_path: Path) -> None:
    bright = np.insert(surface(64, 64, 12) + 2000, 10, 1012, axis=0)  # too bright for any other evidence
    path = write(tmp_path / "late.tif", bright.astype(np.uint16), names=THIRTEEN)
    with pytest.raises(SceneError, match=r"B10 stand at 1012 DN.*pass --offset s2_l1c=1000"):
        resolve(f"s2_l1c={path}", Declared())
    found = resolve(f"s2_l1c={path}", Declared(offset={"s2_l1c": 1000.0}))
    assert (found.bands, found.doubts) == (NAMES, ())
    early = np.insert(surface(64, 64, 12), 10, 9, axis=0)
    path = write(tmp_path / "early.tif", early, names=THIRTEEN)
    assert not resolve(f"s2_l1c={path}", Declared()).doubts
    with pytest.raises(SceneError, match="B10 stand at 9 DN"):
        resolve(f"s2_l1c={path}", Declared(offset={"s2_l1c": 1000.0}))
    for band, data in zip(THIRTEEN, bright.astype(np.uint16), strict=True):
        write(tmp_path / "folder" / f"x_{band}.tif", data[None])
    with pytest.raises(SceneError, match="B10 stand at 1012 DN"):
        resolve(f"s2_l1c={tmp_path / 'folder'}", Declared())


def test_level_1c_given_as_level_2a(tmp_path: Path) -> None:
    data = np.insert(surface(64, 64, 12), 10, 9, axis=0)
    named = write(tmp_path / "x.tif", data, names=THIRTEEN)
    bare = write(tmp_path / "bare.tif", data)
    folder = tmp_path / "folder"
    for band, plane in zip(THIRTEEN, data, strict=True):
        write(folder / f"T32_{band}.tif", plane[None])
    listed = ",".join(map(str, sorted(folder.iterdir())))
    by_name = Declared(bands={"s2_l2a": THIRTEEN})
    for spec, declared in ((named, Declared()), (folder, Declared()), (bare, by_name), (listed, Declared())):
        with pytest.raises(SceneError, match="B10 means Level-1C: use s2_l1c"):
            resolve(f"s2_l2a={spec}", declared)
    with pytest.raises(SceneError, match=r"13 is the count of Level-1C .*use s2_l1c"):
        resolve(f"s2_l2a={bare}", Declared())
    item = {"type": "Feature", "id": "S2A_31UFT_20230101_0_L1C", "properties": {}, "assets": {}}
    (tmp_path / "item.json").write_text(json.dumps(item))
    with pytest.raises(SceneError, match="is a Level-1C item"):
        resolve(f"s2_l2a={tmp_path / 'item.json'}", Declared())
