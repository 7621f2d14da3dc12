"""What people type wrong in the commands of preparation, and get wrong in a folder: one message says all of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_prep_cells import geotiff as tif
from rasterio.transform import from_origin

from data_prep import geotiff


def prepare(source: Path, out: Path, *flags: str) -> int:
    places = ["--source", str(source), "--worldcover", "none", "--out", str(out)]
    return geotiff.main([*places, "--tile-size", "48", *flags])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One cell of three sensors at 10 m; no file names its bands."""
    rng, place = np.random.default_rng(0), from_origin(600_000, 5_400_000, 10, 10)
    for name, bands in (("S2L2A", 12), ("S2L1C", 12)):
        (tmp_path / "in" / name).mkdir(parents=True)
        pixels = rng.integers(200, 3000, (bands, 48, 48)).astype(np.uint16)
        (tmp_path / "in" / name / "c.tif").write_bytes(tif(pixels, place))
    (tmp_path / "in" / "S1RTC").mkdir()
    (tmp_path / "in" / "S1RTC" / "c.tif").write_bytes(tif(rng.normal(-12, 3, (2, 48, 48)).astype(np.float32), place))
    return tmp_path / "in"


def test_sensors_without_names_of_bands_are_all_told_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(folder, folder.parent / "out") == 1
    shown = capsys.readouterr().out
    assert all(f"--bands {key}=" in shown for key in ("s1", "s2_l1c", "s2_l2a")), shown
    flags = ("--bands", "s1=VV,VH", "--bands", "s2_l2a=B01..B08,B8A,B09,B11,B12")
    assert prepare(folder, folder.parent / "out", *flags) == 1
    shown = capsys.readouterr().out
    assert "--bands s2_l1c=" in shown
    assert "--bands s1=" not in shown


def test_the_folder_of_the_source_is_no_place_for_the_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    assert prepare(folder, folder / ".") == 1
    assert "is the folder of the source" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
