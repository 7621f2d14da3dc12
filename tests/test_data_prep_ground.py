"""Listed splits must not share ground: tiles that would are left out, and the cells are named."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import data_prep_cells
import numpy as np
import pytest
from data_prep_cells import make_cells, product_id, scene, worldcover, write_majortom
from rasterio.transform import from_origin
from rasterio.warp import transform

from data_prep import geotiff, majortom
from data_prep.ground import Place, radius, rivals, share_ground
from data_prep.raster import BadInput, Grid
from data_prep.worldcover import lonlat, lonlat_outline, project
from terrafm_jax.sensors import SENSORS


def _grid(x: float, y: float, side: int = 100, crs: str = "EPSG:32632", step: float = 10.0) -> Grid:
    return Grid(crs, (step, 0.0, x, 0.0, -step, y), side, side)


def test_edges_that_touch_are_not_shared_ground():
    grid = _grid(500_000, 5_000_000)
    assert share_ground(grid, grid)
    assert not share_ground(grid, _grid(501_000, 5_000_000))
    assert share_ground(grid, _grid(500_990, 5_000_990))
    assert not share_ground(grid, _grid(500_990, 5_001_000))
    assert not share_ground(grid, _grid(500_000, 5_000_000, crs="EPSG:32732")), "the other hemisphere"


def test_a_system_that_nobody_knows_is_told_from_one_without_a_place_for_the_point():
    there = np.array([500_000.0]), np.array([5_000_000.0])
    with pytest.raises(BadInput, match=r"CRS 'EPSG:999999' cannot be used \(.*999999"):
        lonlat("EPSG:999999", *there)
    with pytest.raises(BadInput, match="lie outside of CRS 'EPSG:32632'"):
        lonlat("EPSG:32632", there[0] * 1e3, there[1] * 1e3)


def test_footprints_across_systems_agree_with_their_points():
    """Random pairs in zones 32, 33 and in degrees, against a dense set of points of one inside the other."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(60):
        x, y = project("EPSG:32632", np.array([12.0]), np.array([rng.uniform(40, 70)]))
        grid = _grid(float(x[0]), float(y[0]))
        lon, lat = lonlat("EPSG:32632", x + rng.uniform(-1600, 1600), y + rng.uniform(-1600, 1600))
        if rng.random() < 0.3:
            other = _grid(float(lon[0]), float(lat[0]), crs="EPSG:4326", step=1e-4)
        else:
            x, y = project("EPSG:32633", lon, lat)
            other = _grid(float(x[0]), float(y[0]), crs="EPSG:32633")
        a, _, c, _, e, f = other.transform
        u, v = np.meshgrid(np.linspace(0, other.width, 41), np.linspace(0, other.height, 41))
        px, py = project("EPSG:32632", *lonlat(other.crs, (c + a * u).ravel(), (f + e * v).ravel()))
        left, bottom, right, top = grid.bounds()
        depth = np.minimum(np.minimum(px - left, right - px), np.minimum(py - bottom, top - py)).max()
        if abs(depth) > 50:  # the points are 25 m apart; closer calls are not theirs to make
            found.append(depth > 0)
            assert share_ground(grid, other) == found[-1], (grid, other, depth)
    assert 10 < sum(found) < len(found) - 10


def test_ground_across_the_antimeridian_is_shared_under_both_its_names():
    """181 degrees east and 179 degrees west: tiles of two splits overlapped there."""
    step = 1e-4
    east = Grid("EPSG:4326", (step, 0.0, 179.99, 0.0, -step, -16.0), 200, 200)
    west = Grid("EPSG:4326", (step, 0.0, -180.005, 0.0, -step, -16.0), 200, 200)
    far = Grid("EPSG:4326", (step, 0.0, -179.98, 0.0, -step, -16.0), 200, 200)
    (x,), (y,) = transform("EPSG:4326", "EPSG:32701", [180.0], [-16.01])
    utm = Grid("EPSG:32701", (10.0, 0.0, x - 500, 0.0, -10.0, y + 500), 100, 100)
    for one, other in ((east, west), (utm, west), (utm, east)):
        assert share_ground(one, other)
        assert share_ground(other, one)
    for one in (east, utm):
        assert not share_ground(one, far)
        assert not share_ground(far, one)


def test_rivals_are_near_and_outrank():
    def place(name: str, split: str | None, lat: float, lon: float = 180.0) -> Place:
        return Place(name, split, (lat, lon), 8.0, name)

    places = [
        place("a", "train", 10.0), place("b", "holdout", 10.1, -179.95), place("c", "validation", 10.05),
        place("d", None, 10.0), place("far", "holdout", 10.4), Place("nowhere", "holdout", None, 0.0, None),
    ]  # fmt: skip
    found = [sorted(r.cell for r in near) for near in rivals(places)]
    assert found == [["b", "c"], [], ["b"], ["a", "b", "c"], [], []]
    assert rivals([*places[:1], place("e", "train", 10.0)]) == [(), ()]
    assert 7.6 < radius(lonlat_outline(_grid(500_000, 5_000_000, 1068))) < 7.8


def test_many_dates_of_one_place_count_as_one_rival_per_split():
    """Every scene listed every other one: planning thousands of dates was quadratic, and so was each tile of them."""
    splits = ("train", "validation", "holdout")
    places = [Place(f"c{i}", splits[i % 3], (50.0, 9.0), 8.0, _grid(600_000, 5_400_000)) for i in range(3000)]
    places.append(Place("beside", "holdout", (50.01, 9.0), 8.0, _grid(600_000, 5_401_100)))
    found = rivals(places)
    assert sorted(map(str, found[0])) == [
        "beside (holdout)", "c1 (validation) and 999 more of this footprint",
        "c2 (holdout) and 999 more of this footprint",
    ]  # fmt: skip
    assert sorted(r.cell for r in found[1]) == ["beside", "c2"]
    assert found[2] == ()
    assert len({id(near) for near in found}) <= 4, "those that ask the same share an answer"


@pytest.fixture
def neighbors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three cells of 480 m that overlap their neighbor by 120 m."""
    monkeypatch.setattr(data_prep_cells, "place", lambda cell: (602_412.2 + 360 * cell, 5_402_388.2))
    write_majortom(tmp_path, *make_cells(3))
    for west in (9, 12):
        worldcover(tmp_path / "worldcover", west, 48, np.full((30, 30), 10))
    return tmp_path


def _records(out: Path, split: str) -> dict[str, dict]:
    import tensorflow_datasets as tfds

    return {r["tile_id"].decode(): r for r in tfds.builder_from_directory(out).as_data_source(split)}


def test_training_gives_way_to_evaluation(neighbors: Path, capsys: pytest.CaptureFixture[str]):
    (neighbors / "splits.csv").write_text("grid_cell,split\n500U_60R,train\n501U_61R,holdout\n502U_62R,train\n")
    flags = ["--source", str(neighbors), "--worldcover", str(neighbors / "worldcover"), "--tile-size", "24"]
    flags += ["--out", str(neighbors / "out"), "--splits", str(neighbors / "splits.csv")]
    assert majortom.main(flags) == 0
    train, holdout = _records(neighbors / "out", "train"), _records(neighbors / "out", "holdout")
    assert len(holdout) == 4, "evaluation loses nothing"
    assert sorted(train) == [f"{c}/r{r}_c{x}" for c, x in (("500U_60R", 0), ("502U_62R", 24)) for r in (0, 24)]
    for one in train.values():
        for other in holdout.values():
            assert not share_ground(*(_tile_grid(r) for r in (one, other)))
    summary = json.loads((neighbors / "out" / "summary.json").read_text())
    assert summary["left_out"] == {"shares ground with another split": 4}
    assert summary["cells_sharing_ground_examples"] == [
        "500U_60R (train) gives way to 501U_61R (holdout)", "502U_62R (train) gives way to 501U_61R (holdout)",
    ]  # fmt: skip
    assert "500U_60R (train) gives way to 501U_61R (holdout)" in capsys.readouterr().out


def test_a_rival_that_cannot_be_read_claims_nothing(neighbors: Path):
    """Its cell is rejected anyway; the others must not be."""
    rows, metadata = make_cells(3)
    rows["s2_l2a"][1]["B09"] = b"no image"
    write_majortom(neighbors, rows, metadata)
    (neighbors / "splits.csv").write_text("grid_cell,split\n500U_60R,train\n501U_61R,holdout\n502U_62R,train\n")
    flags = ["--source", str(neighbors), "--worldcover", str(neighbors / "worldcover"), "--tile-size", "24"]
    flags += ["--out", str(neighbors / "out"), "--splits", str(neighbors / "splits.csv")]
    assert majortom.main(flags) == 3
    assert len(_records(neighbors / "out", "train")) == 8


def _tile_grid(record: dict) -> Grid:
    ten = record["s2_l2a"]["10m"]
    return Grid(record["crs"].decode(), tuple(ten["transform"].tolist()), *ten["dn"].shape[:2])


def test_one_place_under_two_names_of_a_manifest(tmp_path: Path):
    """What the manifest names keeps the ground; a copy that it does not name is drawn by block and gives way."""
    bands = scene(2, 48)["s2_l2a"]
    stack = np.stack([np.kron(b, np.ones((48 // b.shape[0],) * 2, np.uint16)) for b in bands.values()])
    for name in ("one", "two"):
        (tmp_path / f"{name}.tif").write_bytes(data_prep_cells.geotiff(stack, from_origin(6e5, 5.4e6, 10, 10)))
    (tmp_path / "far.tif").write_bytes(data_prep_cells.geotiff(stack, from_origin(6.3e5, 5.4e6, 10, 10)))
    with open(tmp_path / "list.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "location", "sensor", "bands", "product", "split"])
        for name, split in (("one", "validation"), ("two", ""), ("far", "")):
            order = ",".join(SENSORS["s2_l2a"].band_names)
            writer.writerow([f"{name}.tif", name, "S2L2A", order, product_id("s2_l2a", 2), split])
    flags = ["--source", str(tmp_path), "--manifest", str(tmp_path / "list.csv"), "--worldcover", "none"]
    flags += ["--out", str(tmp_path / "out"), "--tile-size", "48", "--split-shares", "1,0,0"]
    assert geotiff.main(flags) == 0
    assert list(_records(tmp_path / "out", "validation")) == ["one/r0_c0"]
    assert list(_records(tmp_path / "out", "train")) == ["far/r0_c0"]


def test_buckets_are_no_output_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        majortom.main(["--source", "x", "--worldcover", "none", "--out", "gs://bucket/data"])
    assert stop.value.code == 2
    assert "mount the bucket" in capsys.readouterr().err
    assert majortom.main(["--source", "x", "--worldcover", "s3://maps", "--out", "out"]) == 1
    assert "s3://maps" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
