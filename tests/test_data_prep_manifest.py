"""What a manifest or a folder says, and that it must not say two things at once."""

from __future__ import annotations

import os
from pathlib import Path, PurePath

import numpy as np
import pytest

from data_prep.manifest import from_manifest
from data_prep.scenes import by_name, from_folder
from data_prep.units import stated_nodata, stated_unit


def manifest(root: Path, *lines: str) -> Path:
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    return root / "list.csv"


def test_a_place_in_two_splits_is_refused(tmp_path: Path):
    """The last row used to win, so that a place that was held out could be trained on."""
    rows = ("a.tif,here,s2_l2a,holdout", "b.tif,here,s1,", "c.tif,here,s1,train", "d.tif,there,s1,train")
    path = manifest(tmp_path, "file,location,sensor,split", *rows)
    with pytest.raises(ValueError, match=r"list.csv: line 4: split 'train', but 'here' is in 'holdout' before$"):
        from_manifest(path, tmp_path, {})
    scenes, _ = from_manifest(manifest(tmp_path, "file,location,sensor,split", *rows[:2], rows[3]), tmp_path, {})
    assert {s.cell: s.split for s in scenes} == {"here": "holdout", "there": "train"}


@pytest.mark.parametrize(
    ("text", "nodata"),
    [
        ("dB, nodata -99", "-99"), ("dB, NoData -99.5", "-99.5"), ("dB; nodata=-9999", "-9999"),
        ("dB, nodata: 0", "0"), ("dB, no-data value -3.4e+38", "-3.4e+38"), ("dB, nodata nan", "nan"), ("dB", ""),
    ],
)  # fmt: skip
def test_nodata_in_the_words_of_units(tmp_path: Path, text: str, nodata: str):
    assert stated_nodata(text) == nodata
    assert stated_unit("s1", text) == "dB"
    ((scene,), _) = from_manifest(
        manifest(tmp_path, "file,location,sensor,units", f'a.tif,a,s1,"{text}"'), tmp_path, {}
    )
    np.testing.assert_equal(scene.files[0].nodata, float(nodata) if nodata else None)


def test_sensors_of_a_place_are_joined_by_time(tmp_path: Path):
    """Level 1C was joined to Level 2A in order, so that one missing date joined all later ones to another's."""
    days = {"s2_l2a": ("02", "03"), "s2_l1c": ("01", "02T10:30:21", "03"), "s1": ("29", "04", "02")}
    rows = [f"{key}_{d[:2]}.tif,here,{key},2021-06-{d}" for key, found in days.items() for d in found]
    scenes, _ = from_manifest(manifest(tmp_path, "file,location,sensor,date", *rows), tmp_path, {})
    assert [[Path(f.path).stem for f in s.files] for s in scenes] == [
        ["s1_02", "s2_l1c_02", "s2_l2a_02"],
        ["s1_04", "s2_l1c_03", "s2_l2a_03"],
        ["s1_02", "s2_l1c_01"],
    ]


def test_sensors_without_times_are_joined_in_order(tmp_path: Path):
    rows = [
        f"{key}_{n}.tif,here,{key}" for key in ("s1", "s2_l1c", "s2_l2a") for n in range(3 if key == "s2_l1c" else 2)
    ]
    scenes, _ = from_manifest(manifest(tmp_path, "file,location,sensor", *rows), tmp_path, {})
    assert [[Path(f.path).stem for f in s.files] for s in scenes] == [
        ["s1_0", "s2_l1c_0", "s2_l2a_0"],
        ["s1_1", "s2_l1c_1", "s2_l2a_1"],
        ["s1_1", "s2_l1c_2"],
    ]
    one_day = [f"{row},2021-06-01" for row in rows[:2]]
    radar, _ = from_manifest(manifest(tmp_path, "file,location,sensor,date", *one_day), tmp_path, {})
    assert [[Path(f.path).stem for f in s.files] for s in radar] == [["s1_0"], ["s1_1"]]


def test_names_that_no_record_can_hold_are_named(tmp_path: Path):
    """They ended the planning with the words of a codec, which name no file."""
    (tmp_path / "S1RTC").mkdir()
    (tmp_path / "S1RTC" / "good.tif").touch()
    try:
        open(os.fsencode(tmp_path / "S1RTC") + b"/Gr\xf6n.tif", "wb").close()
    except OSError:
        pytest.skip("the file system takes UTF-8 alone")
    with pytest.raises(ValueError, match=r"names of files are not UTF-8: 'S1RTC/Gr\\udcf6n.tif'; rename"):
        from_folder(tmp_path)


@pytest.mark.parametrize(
    ("key", "text", "unit"),
    [
        ("s1", "gamma0 backscatter in dB (float64 holding float16-precision values)", "dB"), ("s1", "LINEAR", "power"),
        ("s1", "linear power", "power"), ("s1", "DB, nodata -99", "dB"), ("s1", "", ""), ("s1", "nodata -99", ""),
        ("s2_l2a", "dn", "DN"), ("s2_l2a", "uint16 DN (BOA reflectance*10000)", "DN"),
        ("s2_l1c", "Reflectance", "reflectance"), ("s2_l1c", "TOA reflectance x 10000", "DN"),
    ],
)  # fmt: skip
def test_words_of_units(key: str, text: str, unit: str):
    assert stated_unit(key, text) == unit


@pytest.mark.parametrize(
    ("key", "text"),
    [("s1", "amplitude"), ("s1", "amplitude in dB"), ("s1", "DN"), ("s1", "sigma0"), ("s1", "dB, was linear"),
     ("s2_l2a", "dB"), ("s2_l2a", "radiance"), ("s2_l2a", "percent")],
)  # fmt: skip
def test_unknown_units_are_refused(key: str, text: str):
    with pytest.raises(ValueError, match="expected"):
        stated_unit(key, text)


def test_what_the_naming_rule_leaves_out():
    safe = "S2A_MSIL2A_20200605T103031_N0500_R108_T32TPT_20230401T000000.SAFE/GRANULE/L2A_T32TPT/IMG_DATA"
    assert by_name(PurePath(f"{safe}/R20m/T32TPT_20200605T103031_B02_20m.jp2")) == "band resampled by ESA"
    assert by_name(PurePath(f"{safe}/R10m/T32TPT_20200605T103031_TCI_10m.jp2")) == "no band of the model"
    assert by_name(PurePath("somewhere/DEM.tif")) == "no sensor in the name"
