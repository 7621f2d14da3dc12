"""Bad input: every kind is set aside with its reason, and the cells around it are prepared."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_prep_cells import (
    columns,
    command,
    geotiff,
    make_cells,
    make_source,
    place,
    scene,
    worldcover,
    write_majortom,
)
from rasterio.transform import from_origin

from data_prep import chunks, majortom
from data_prep.doubts import check_sampling
from data_prep.raster import Grid


def broken(cells: int, defects: dict[int, str]) -> tuple[dict[str, list[dict]], dict[str, list[dict]]]:
    """Cells with one defect each, by number of the cell."""
    rows, metadata = make_cells(cells)
    for cell, defect in defects.items():
        row, meta = rows["s2_l2a"][cell], metadata["s2_l2a"][cell]
        left, top = place(cell)
        affine, bands = from_origin(left, top, 10, 10), scene(cell)["s2_l2a"]
        if defect == "truncated":
            row["B03"] = row["B03"][: len(row["B03"]) // 2]
        elif defect == "no image":
            row["B03"] = b"<html>503 Service Unavailable</html>"
        elif defect == "missing band":
            row["B8A"] = None
        elif defect == "wrong size":
            row["B03"] = geotiff(bands["B03"][:24], affine, nodata=0)
        elif defect == "wrong crs":
            row.update(columns("s2_l2a", bands, left, top, "EPSG:32633"))
            meta["crs"] = "EPSG:EPSG:32633"
        elif defect == "crs against metadata":
            meta["crs"] = "EPSG:EPSG:32633"
        elif defect == "no crs":
            row["B03"] = geotiff(bands["B03"], affine, crs=None)
        elif defect == "all nodata":
            row.update(columns("s2_l2a", {n: np.zeros_like(b) for n, b in bands.items()}, left, top, "EPSG:32632"))
        elif defect == "constant":
            row.update(columns("s2_l2a", {n: np.full_like(b, 77) for n, b in bands.items()}, left, top, "EPSG:32632"))
        elif defect == "nan":
            rows["s1"][cell]["vv"] = geotiff(np.full((48, 48), np.nan, np.float32), affine)
            rows["s1"][cell]["vh"] = rows["s1"][cell]["vv"]
        elif defect == "nan in optical":
            row["B03"] = geotiff(np.where(bands["B03"] > 400, bands["B03"], np.nan).astype(np.float32), affine)
        elif defect == "negative":
            row["B03"] = geotiff(bands["B03"].astype(np.int16) - 2000, affine)
        elif defect == "fractions":
            row["B03"] = geotiff(bands["B03"].astype(np.float32) / 10000, affine)
        elif defect == "other cell":
            meta["parquet_row"] = 0
        elif defect == "row too far":
            meta["parquet_row"] = 999
        else:
            raise ValueError(defect)
    return rows, metadata


REASONS = {
    1: ("truncated", "B03"),
    2: ("no image", "cannot be read as an image"),
    3: ("missing band", "missing band B8A"),
    4: ("wrong size", "wrong size, B02 is EPSG:32632 (48, 48)"),
    5: ("wrong crs", "wrong CRS"),
    6: ("crs against metadata", "metadata say EPSG:32633"),
    7: ("no crs", "no georeference"),
    8: ("all nodata", "black, 100.0 %"),
    9: ("constant", "one value in all pixels"),
    10: ("nan", "s1: black"),
    11: ("nan in optical", "NaN"),
    12: ("negative", "are no DN"),
    13: ("fractions", "fractional"),
    14: ("other cell", "row 0 holds 500U_60R"),
    15: ("row too far", "row 999"),
}


def test_every_kind_of_bad_input_is_quarantined_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    rows, metadata = broken(17, {cell: defect for cell, (defect, _) in REASONS.items()})
    write_majortom(tmp_path, rows, metadata)
    for west in (9, 12):
        for south in (45, 48):
            worldcover(tmp_path / "worldcover", west, south, np.full((30, 30), 10))
    out = tmp_path / "out"
    code = majortom.main(command(tmp_path, out, "--require", "s1,s2_l2a"))
    assert code == 3
    report = capsys.readouterr().out
    assert f"{len(REASONS)} cells REJECTED" in report
    assert f"cells: 2 prepared, {len(REASONS)} rejected, 0 without a tile (of {2 + len(REASONS)})" in report
    with open(out / "rejected.csv", newline="") as file:
        found = {row["unit"].split("/")[0]: row for row in csv.DictReader(file)}
    assert len(found) == len(REASONS)
    for cell, (defect, reason) in REASONS.items():
        row = found[f"{500 + cell}U_{60 + cell}R"]
        assert reason in row["reason"], f"{defect}: {row['reason']}"
        assert "S2A_MSIL2A" in row["products"]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rejected"] == len(REASONS)
    assert summary["tiles"] == {"train": 2 * 4}, "cells 0 and 16 are whole"
    counts = summary["rejected_reasons"]
    assert sum(counts.values()) == len(REASONS)
    assert (counts["wrong size"], counts["wrong CRS"], counts["black"]) == (1, 2, 2)
    assert majortom.main(command(tmp_path, out, "--require", "s1,s2_l2a", "--tolerate", "0.95")) == 0


def test_cells_that_leave_no_tile_are_counted_and_the_flag_behind_it_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_majortom(tmp_path, *make_cells(2))
    worldcover(tmp_path / "worldcover", 9, 48, np.full((4, 4), 10))
    worldcover(tmp_path / "worldcover", 9, 45, np.full((4, 4), 10))
    code = majortom.main(
        command(tmp_path, tmp_path / "out", "--block-degrees", "0.001", "--split-shares", "0.4,0.3,0.3")
    )
    assert code == 1
    shown = capsys.readouterr().out
    assert "cells: 0 prepared, 0 rejected, 2 without a tile (of 2)" in shown
    assert "look at: --block-degrees, --split-shares or --splits" in shown


def test_truncated_parquet_and_nothing_usable(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    write_majortom(tmp_path, *make_cells(2))
    worldcover(tmp_path / "worldcover", 9, 48, np.full((4, 4), 10))
    part = tmp_path / "Core-S2L2A" / "images" / "part_00000.parquet"
    part.write_bytes(part.read_bytes()[:-500])
    out = tmp_path / "out"
    assert majortom.main(command(tmp_path, out)) == 1
    shown = capsys.readouterr()
    assert "nothing prepared" in shown.out
    assert "cells: 0 prepared, 2 rejected, 0 without a tile (of 2)" in shown.out
    assert f"look at: {out / 'rejected.csv'}" in shown.out
    assert "2/2 cells looked at" in shown.err
    assert "prepared 2/2" not in shown.err
    rejected = list(csv.DictReader((out / "rejected.csv").read_text().splitlines()))
    assert len(rejected) == 2
    assert all("truncated" in row["reason"] for row in rejected)
    assert not (out / ".work").exists(), "the next start looks at the files again"
    metadata = tmp_path / "Core-S2L2A" / "metadata.parquet"
    metadata.write_bytes(metadata.read_bytes()[:-100])
    assert majortom.main(command(tmp_path, tmp_path / "other")) == 1
    assert "metadata.parquet cannot be read" in capsys.readouterr().err


def test_a_decoder_that_raises_anything_quarantines_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = make_source(tmp_path / "source", 3)
    original = chunks.prepare

    def odd(cell: Any, *rest: Any) -> Any:
        if cell.name == "502U_62R":
            raise ZeroDivisionError("deep inside a library")
        return original(cell, *rest)

    monkeypatch.setattr(chunks, "prepare", odd)
    out = tmp_path / "data"
    assert majortom.main(command(source, out)) == 3
    assert "502U_62R/p0" in (out / "rejected.csv").read_text()
    assert "ZeroDivisionError: deep inside" in (out / "rejected.csv").read_text()


@pytest.mark.parametrize(
    ("crs", "across", "down", "wrong"),
    [
        ("EPSG:32632", 10.0, 10.0, ""),
        ("EPSG:32632", 20.0, 20.0, ""),
        ("EPSG:32632", 10.0092, 10.0178, ""),
        ("EPSG:32632", 100.0, 100.0, "are 100 x 100 m"),
        ("EPSG:32632", 1.0, 1.0, "are 1 x 1 m"),
        ("EPSG:32632", 10.0, 20.0, "are 10 x 20 m"),
        ("EPSG:4326", 9e-5, 9e-5, ""),
        ("EPSG:4326", 25e-5, 9e-5, ""),  # at 70 degrees north
        ("EPSG:4326", 9e-3, 9e-3, "are 1e+03 x 1e+03 m"),
    ],
)
def test_pixels_of_no_sentinel_are_told(crs: str, across: float, down: float, wrong: str):
    found = check_sampling("s2_l2a", Grid(crs, (across, 0.0, 9.0, 0.0, -down, 60.0), 48, 48))
    assert (wrong in found) if wrong else not found
