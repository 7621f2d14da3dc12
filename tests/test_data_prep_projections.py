"""Sentinel tiles come in UTM or UPS: what lies in another projection was resampled, and is rejected."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from data_prep_cells import geotiff as tif
from data_prep_cells import scene
from rasterio.transform import from_origin
from rasterio.warp import transform

from data_prep import geotiff
from data_prep.raster import resampled


def prepare(source: Path, out: Path) -> int:
    return geotiff.main(["--source", str(source), "--worldcover", "none", "--out", str(out), "--split-shares", "1,0,0"])


@pytest.mark.parametrize(
    ("crs", "foreign"),
    [
        ("EPSG:32632", False), ("EPSG:25832", False), ("EPSG:4326", False), ("EPSG:4258", False),
        ("EPSG:32661", False), ("EPSG:5042", False), ("EPSG:3857", True), ("EPSG:3035", True), ("EPSG:3031", True),
        ("EPSG:27700", True), ("+proj=tmerc +lon_0=9 +k=0.9996 +x_0=500000 +datum=WGS84 +units=m", False),
        ("no such system", False),
    ],
)  # fmt: skip
def test_utm_ups_and_degrees_are_what_sentinel_tiles_come_in(crs: str, foreign: bool):
    assert resampled(crs) == foreign


def test_other_projections_are_rejected_with_all_their_files(tmp_path: Path):
    """They passed, although a pixel of Web Mercator is no 10 m and LAEA does not point north."""
    x, y = (v[0] for v in transform("EPSG:32632", "EPSG:3857", [600_000], [5_400_000]))
    u, v = (v[0] for v in transform("EPSG:32632", "EPSG:3035", [600_000], [5_400_000]))
    bands = scene(3)["s2_l2a"]
    for folder, left, top, crs in (("web", x, y, "EPSG:3857"), ("utm", 600_000, 5_400_000, "EPSG:32632")):
        (tmp_path / "in/S2L2A" / folder).mkdir(parents=True)
        for name, pixels in bands.items():
            affine = from_origin(left, top, 480 / len(pixels), 480 / len(pixels))
            (tmp_path / f"in/S2L2A/{folder}/{name}.tif").write_bytes(tif(pixels, affine, crs))
    for folder in ("utm", "alone"):  # beside Sentinel-2 it is warped, alone it would be the grid of the tiles
        (tmp_path / "in/S1RTC" / folder).mkdir(parents=True)
        for name, pixels in scene(3)["s1"].items():
            pixels = np.kron(pixels, np.ones((3, 3), np.float32))
            path = tmp_path / f"in/S1RTC/{folder}/{name}.tif"
            path.write_bytes(tif(pixels, from_origin(u - 500, v + 500, 10, 10), "EPSG:3035"))
    assert prepare(tmp_path / "in", tmp_path / "out") == 3
    with open(tmp_path / "out/rejected.csv", newline="") as file:
        reasons = {row["unit"].split("/")[0]: row["reason"] for row in csv.DictReader(file)}
    assert set(reasons) == {"web", "alone"}
    assert "no UTM, found EPSG:3857" in reasons["web"]
    assert all(f"{name}.tif" in reasons["web"] for name in bands)
    assert "EPSG:3035" in reasons["alone"]
    assert "VH.tif, VV.tif" in reasons["alone"]
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["rejected_reasons"] == {"projection is no UTM": 2}
    assert summary["tiles"] == {"train": 1}
    assert not summary["left_out"], "Sentinel-1 of the cell in UTM is there"
