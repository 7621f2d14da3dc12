"""Major-TOM parquet to a TFDS data set: lossless, joined, deduplicated, deterministic."""

from __future__ import annotations

import json
from pathlib import Path

import data_prep_cells
import numpy as np
import pytest
from data_prep_cells import SIZE, make_cells, make_source, place, product_id, scene, worldcover, write_majortom
from rasterio.warp import transform

from data_prep import cli, majortom
from data_prep.majortom import Row, join
from terrafm_jax.data.tiles import INDEX_DTYPE, geometry, unpack_valid
from terrafm_jax.sensors import SENSORS, Statistics


def prepare(source: Path, out: Path, *flags: str) -> int:
    return majortom.main(
        ["--source", str(source), "--worldcover", str(source / "worldcover"), "--out", str(out), "--tile-size", "24",
         "--split-shares", "1,0,0", *flags]
    )  # fmt: skip


def records(out: Path, split: str = "train") -> list[dict]:
    import tensorflow_datasets as tfds

    return list(tfds.builder_from_directory(out).as_data_source(split))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("majortom"), 4)


@pytest.fixture(scope="module")
def prepared(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "data"
    assert prepare(source, out) == 0
    return out


def test_every_pixel_comes_back(prepared: Path):
    """S2 bit-identical to the delivered DN (offset still in), S1 to 0.01 dB, tile by tile."""
    found = {r["tile_id"].decode(): r for r in records(prepared)}
    assert len(found) == 16
    for cell in range(4):
        delivered = scene(cell, SIZE, 1000 if cell % 3 == 1 else 0)
        for row in (0, 24):
            for col in (0, 24):
                record = found[f"{500 + cell}U_{60 + cell}R/r{row}_c{col}"]
                for key, sensor in SENSORS.items():
                    assert record[key]["present"]
                    for group, bands in sensor.groups.items():
                        k = int(group[:-1]) // 10
                        for i, band in enumerate(bands):
                            part = delivered[key][band][row // k : (row + 24) // k, col // k : (col + 24) // k]
                            stored = record[key][group]["dn"][..., i]
                            if key == "s1":
                                assert np.abs(stored / 100 - 10 * np.log10(part)).max() <= 0.0051
                            else:
                                assert (stored == part).all()


def test_metadata_of_a_record(prepared: Path):
    found = {r["tile_id"].decode(): r for r in records(prepared)}
    record = found["501U_61R/r24_c0"]
    assert record["crs"] == b"EPSG:32632"
    assert record["s2_l2a"]["product"].decode() == product_id("s2_l2a", 1, "N0400")
    assert (record["s2_l2a"]["kind"], record["s1"]["kind"]) == (b"L2A", b"RTC gamma0")
    assert record["s2_l2a"]["time"] == b"2021-06-11T10:30:21Z"
    assert record["s1"]["orbit"] == b"descending"
    assert record["s2_l1c"]["offset"] == 1000
    assert b"agree" in record["s2_l1c"]["offset_source"]
    assert found["500U_60R/r0_c0"]["s2_l1c"]["offset"] == 0
    assert record["s2_l2a"]["cloud"] == pytest.approx(0.125)
    left, top = place(1)
    ten = record["s2_l2a"]["10m"]["transform"]
    assert ten.tolist() == [10, 0, round(left / 10) * 10, 0, -10, round(top / 10) * 10 - 240]
    for group, step in (("20m", 20), ("60m", 60)):
        transform = record["s2_l2a"][group]["transform"]
        assert transform[2] % step == 0
        assert transform[5] % step == 0
        assert abs(transform[2] - ten[2]) <= step / 2
    y0, sy, x0, sx = geometry(record, "s2_l2a", "60m")
    assert (sy, sx) == (4, 4)
    assert abs(y0) <= 0.5
    assert abs(x0) <= 0.5
    valid = unpack_valid(record["s2_l2a"]["20m"]["valid"], 12)
    assert valid.all()
    assert record["fractions"].sum() == pytest.approx(1)
    assert record["landcover_map"].shape == (24, 24)


def test_files_beside_the_shards(prepared: Path):
    found = records(prepared)
    index = np.load(prepared / "index_train.npy")
    assert index.dtype == INDEX_DTYPE
    assert len(index) == len(found) == 16
    layouts = json.loads((prepared / "layouts.json").read_text())
    for row, record in zip(index, found, strict=True):
        assert row["landcover"] == record["landcover"]
        assert row["lat"] == pytest.approx(record["lat"], abs=1e-4)
        assert row["lon"] == pytest.approx(record["lon"], abs=1e-4)
        assert row["present"] == 7
        for name, shape in layouts[row["layout"]].items():
            key, group = name.split("/")
            assert list(record[key][group]["dn"].shape[:2]) == shape
    assert (prepared / "rejected.csv").read_text() == "unit,products,reason\n"
    assert not (prepared / ".work").exists()


def test_statistics_are_those_of_the_harmonized_pixels(prepared: Path):
    """Mean, std, extremes and percentiles equal NumPy over all pixels with the offset subtracted."""
    text = (prepared / "statistics.json").read_text()
    stats, data = Statistics.from_json(text), json.loads(text)
    found = records(prepared)
    for key, sensor in SENSORS.items():
        for group, bands in sensor.groups.items():
            for i, band in enumerate(bands):
                values = np.concatenate(
                    [
                        (r[key][group]["dn"][..., i].astype(np.float64) * sensor.scale - r[key]["offset"]).ravel()
                        for r in found
                    ]
                )
                b = sensor.band_names.index(band)
                assert stats.mean[key][b] == pytest.approx(values.mean(), rel=1e-6)
                assert stats.std[key][b] == pytest.approx(values.std(), rel=1e-5)
                entry = data["sensors"][key]
                assert entry["min"][b] == pytest.approx(values.min())
                assert entry["max"][b] == pytest.approx(values.max())
                rank = entry["percentile_ranks"].index(50)
                assert entry["percentiles"][b][rank] == pytest.approx(np.percentile(values, 50, method="inverted_cdf"))
                assert entry["nodata"][b] == 0
    assert sum(data["classes"]["train"].values()) == 16
    assert sum(data["landcover_share"].values()) == pytest.approx(1, abs=1e-4)


def test_workers_and_shard_order_do_not_change_a_byte(source: Path, tmp_path: Path):
    assert prepare(source, tmp_path / "one", "--cells-per-shard", "1") == 0
    assert prepare(source, tmp_path / "two", "--cells-per-shard", "1", "--workers", "2") == 0
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == two
    assert sum("array_record" in name for name in one) == 4


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def _row(cell: str, product: str, time: str = "2021-06-01T00:00:00Z", row: int = 0) -> Row:
    return Row(cell, product, time, None, 48.0, 10.0, "EPSG:32632", "part_00000.parquet", row, "")


def test_duplicates_go_by_cell_and_product_never_by_cell_alone():
    a, b = "S2A_MSIL2A_20210601T103021_N0300_x", "S2A_MSIL2A_20210701T103021_N0300_x"
    rows = {
        "s2_l2a": [_row("A", a, row=3), _row("A", a, row=1), _row("A", b), _row("B", a)],
        "s2_l1c": [_row("A", b.replace("L2A", "L1C")), _row("A", a.replace("L2A", "L1C"))],
        "s1": [_row("A", "S1x", "2021-06-28T00:00:00Z"), _row("A", "S1y", "2021-06-03T00:00:00Z")],
    }
    units, counts = join(rows, ["s2_l2a"])
    assert counts["duplicates_s2_l2a"] == 1
    assert [u["s2_l2a"].cell for u in units] == ["A", "A", "B"]
    assert units[0]["s2_l2a"].row == 1, "of equal rows the first by file and row stays"
    assert units[0]["s2_l1c"].product == a.replace("L2A", "L1C"), "levels of one overpass belong together"
    assert units[1]["s2_l1c"].product == b.replace("L2A", "L1C")
    assert "s2_l1c" not in units[2]
    shuffled = {key: found[::-1] for key, found in rows.items()}
    assert join(shuffled, ["s2_l2a"])[0] == units
    assert len(join(rows, ["s2_l1c", "s1"])[0]) == 2


def test_single_sensors_and_second_products(tmp_path: Path):
    """S1 alone, L1C alone and two products of one cell all become records with the right presence flags."""
    rows, metadata = make_cells(3)
    del rows["s2_l2a"][0], metadata["s2_l2a"][0], rows["s2_l1c"][0], metadata["s2_l1c"][0]
    del rows["s1"][1], metadata["s1"][1]
    again = scene(99)["s2_l2a"]
    from data_prep_cells import columns

    other = {**rows["s2_l2a"][1], "product_id": "S2B_MSIL2A_20210901T103021_N0300_R108_T32UPU_20210901T120000"}
    other.update(columns("s2_l2a", again, *place(2), "EPSG:32632"))
    rows["s2_l2a"].append(other)
    metadata["s2_l2a"].append({**metadata["s2_l2a"][1], "product_id": other["product_id"]})
    for key in rows:
        for i, entry in enumerate(metadata[key]):
            entry["parquet_row"] = i
    write_majortom(tmp_path, rows, metadata)
    worldcover(tmp_path / "worldcover", 9, 48, np.full((30, 30), 10))
    worldcover(tmp_path / "worldcover", 12, 48, np.full((30, 30), 10))
    out = tmp_path / "out"
    assert prepare(tmp_path, out, "--require", "", "--tile-size", "48") == 0
    present = {r["tile_id"].decode(): "".join("01"[bool(r[k]["present"])] for k in SENSORS) for r in records(out)}
    assert present == {
        "500U_60R/r0_c0": "100",
        "501U_61R/r0_c0": "011",
        "502U_62R/r0_c0": "111",
        "502U_62R/p1/r0_c0": "101",
    }
    assert sorted(np.load(out / "index_train.npy")["present"].tolist()) == [1, 5, 6, 7]
    absent = next(r for r in records(out) if not r["s2_l1c"]["present"])
    assert absent["s2_l1c"]["20m"]["dn"].shape == (2, 2, 6)
    assert prepare(tmp_path, tmp_path / "some", "--require", "s1,s2_l1c,s2_l2a", "--tile-size", "48") == 0
    assert len(records(tmp_path / "some")) == 1


def test_offset_is_decided_once_per_product(tmp_path: Path):
    """A bright cell of a harmonized product abstains alone; its neighbor knows better, and both follow it."""
    rows, metadata = make_cells(2)
    shared = "S2A_MSIL2A_20210610T103021_N0500_R108_T32UPU_20210612T120000"
    from data_prep_cells import columns

    bright = {n: p + np.uint16(4000) for n, p in scene(0)["s2_l2a"].items()}
    rows["s2_l2a"][0].update(columns("s2_l2a", bright, *place(0), "EPSG:32632"))
    rows["s2_l2a"][1].update(columns("s2_l2a", scene(1)["s2_l2a"], *place(1), "EPSG:32632"))
    for row in (*rows["s2_l2a"], *metadata["s2_l2a"]):
        row["product_id"] = shared
    write_majortom(tmp_path, rows, metadata)
    for west in (9, 12):
        worldcover(tmp_path / "worldcover", west, 48, np.full((30, 30), 10))
    out = tmp_path / "out"
    assert prepare(tmp_path, out) == 0
    assert {float(r["s2_l2a"]["offset"]) for r in records(out)} == {0.0}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["offset_conflicts"] == 1
    assert "pixels against product id" in summary["offset_conflict_examples"][0]


def test_holes_in_the_metadata_cost_a_cell_at_most(tmp_path: Path):
    """A missing latitude or row number ended the planning of all."""
    rows, metadata = make_cells(3)
    for key in rows:
        metadata[key][0]["centre_lat"] = float("nan")
        metadata[key][1]["centre_lon"] = None
    metadata["s2_l2a"][2]["parquet_row"] = None
    write_majortom(tmp_path, rows, metadata)
    flags = ["--source", str(tmp_path), "--worldcover", "none", "--out", str(tmp_path / "out"), "--tile-size", "24"]
    assert majortom.main([*flags, "--split-shares", "1,0,0"]) == 3
    assert "502U_62R/p0" in (tmp_path / "out/rejected.csv").read_text()
    assert {r["cell"].decode() for r in records(tmp_path / "out")} == {"500U_60R", "501U_61R"}


def test_wrong_arguments_are_named_before_any_work(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for flags, message in (
        (["--tile-size", "224"], "nearest legal: 222 or 228"),
        (["--bbox", "5", "60", "10", "50"], "--bbox 5 60 10 50: expected west, south, east, north in degrees"),
        (["--bbox", "5e5", "5e6", "6e5", "5.1e6"], "--bbox 500000 5e+06 600000 5.1e+06: expected west"),
        (["--require", "s3"], "s3"),
        (["--split-shares", "0.5,0.1,0.1"], "sum to 1"),
        (["--split-shares", "nan,0.1,0.1"], "sum to 1"),
        (["--workers", "0"], "--workers 0: expected at least 1"),
        (["--cells-per-shard", "-1"], "--cells-per-shard -1: expected at least 1"),
        (["--tolerate", "5"], "--tolerate 5.0: expected 0..1"),
    ):
        assert prepare(source, tmp_path / "x", *flags) == 1
        assert message in capsys.readouterr().err
    assert majortom.main(["--source", str(tmp_path), "--worldcover", "none", "--out", str(tmp_path / "x")]) == 1
    assert "Core-S2L2A/metadata.parquet" in capsys.readouterr().err
    lonely = worldcover(tmp_path / "wc", 0, 0, np.zeros((4, 4))).parent
    assert majortom.main(["--source", str(source), "--worldcover", str(lonely), "--out", str(tmp_path / "x")]) == 1
    assert "N48E009" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_maps_beside_the_center_are_asked_for_before_any_work(tmp_path: Path, monkeypatch, capsys):
    """The center of the cell lies in one map, a third of its ground in the next, which is not there."""
    (x,), (y,) = transform("EPSG:4326", "EPSG:32632", [12.0], [48.5])
    monkeypatch.setattr(data_prep_cells, "place", lambda cell: (x - 320.0, y + 240.0))
    write_majortom(tmp_path, *make_cells(1))
    worldcover(tmp_path / "worldcover", 9, 48, np.full((30, 30), 10))
    assert prepare(tmp_path, tmp_path / "out") == 1
    assert "1 maps are missing: N48E012" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert prepare(tmp_path, tmp_path / "out", "--worldcover-missing", "sea") == 0


def test_boxes_of_longitude_and_latitude(source: Path, tmp_path: Path):
    for box, inside, outside in (
        ((-180, -90, 180, 90), [(10.0, 10.0), (-80.0, -180.0), (0.0, 180.0)], []),
        ((0, -90, 360, 90), [(10.0, -10.0)], []),
        ((170, -20, -170, 20), [(0.0, 175.0), (0.0, -175.0), (20.0, 180.0)], [(0.0, 165.0), (21.0, 175.0)]),
        ((5, 45, 11, 48), [(46.0, 5.0)], [(46.0, 4.9), (44.0, 6.0), (46.0, -175.0)]),
    ):
        assert all(cli.in_bbox(box, *place) for place in inside), box
        assert not any(cli.in_bbox(box, *place) for place in outside), box
    assert prepare(source, tmp_path / "out", "--bbox", "-180", "-90", "180", "90", "--limit", "1") == 0


def test_parts_that_were_not_downloaded_are_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Neither rejected nor asked for their land cover; a cell keeps the sensors whose parts are there."""
    rows, metadata = make_cells(4)
    for key, cell in (("s2_l2a", 3), ("s1", 2), ("s1", 3)):
        metadata[key][cell]["parquet_url"] = "https://example.org/images/part_00007.parquet"
    metadata["s2_l2a"][3] |= {"centre_lat": -30.0, "centre_lon": 100.0}
    write_majortom(tmp_path, rows, metadata)
    for west in (9, 12):
        worldcover(tmp_path / "worldcover", west, 48, np.full((30, 30), 10))
    assert prepare(tmp_path, tmp_path / "out", "--tile-size", "48") == 0
    assert [r["s1"]["present"] for r in records(tmp_path / "out")] == [True, True, False]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["rows_without_part_s2_l2a"], summary["rows_without_part_s1"]) == (1, 2)
    assert "Core-S1RTC: 2 of 4 rows" in capsys.readouterr().err


def test_another_job_does_not_touch_a_finished_data_set(
    source: Path, prepared: Path, capsys: pytest.CaptureFixture[str]
):
    before = files(prepared)
    assert prepare(source, prepared) == 0, "the same command again changes nothing"
    assert prepare(source, prepared, "--max-nodata", "0.1") == 1
    assert "choose another --out" in capsys.readouterr().err
    assert files(prepared) == before


def test_ocean_is_thinned_and_coasts_are_spared(tmp_path: Path):
    rows, metadata = make_cells(8)
    write_majortom(tmp_path, rows, metadata)
    codes = np.zeros((30, 30))
    for west in (9, 12):
        worldcover(tmp_path / "worldcover", west, 48, codes)
    out = tmp_path / "out"
    assert prepare(tmp_path, out, "--tile-size", "48", "--sea-keep", "0.4") == 0
    summary = json.loads((out / "summary.json").read_text())
    assert 0 < summary["tiles"]["train"] < 8
    assert summary["left_out"]["open ocean"] == 8 - summary["tiles"]["train"]
    assert np.load(out / "index_train.npy")["sea"].all()
    (tmp_path / "splits.csv").write_text(
        "grid_cell,split\n" + "".join(f"{500 + i}U_{60 + i}R,holdout\n" for i in range(8))
    )
    held = tmp_path / "held"
    assert prepare(tmp_path, held, "--tile-size", "48", "--splits", str(tmp_path / "splits.csv")) == 0
    assert json.loads((held / "summary.json").read_text())["tiles"] == {"holdout": 8}
