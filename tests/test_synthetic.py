"""Synthetic cells: layout of the files, georeferencing, splits, nodata, offsets, planted defects."""

from __future__ import annotations

import csv
import dataclasses
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from conftest import run_module
from rasterio.enums import Resampling
from rasterio.io import MemoryFile
from rasterio.vrt import WarpedVRT

from data_prep.synthetic import command, geography, writer
from data_prep.synthetic.cell import Cell, fractions, render
from data_prep.synthetic.geography import CellPlan
from data_prep.synthetic.landscape import CLASSES, class_map
from data_prep.synthetic.plan import DEFECTS, plan_cells
from terrafm_jax import landcover
from terrafm_jax.sensors import SENSORS

SIZE, CELLS = 48, 16
S2_KEYS = ("s2_l1c", "s2_l2a")


@pytest.fixture(scope="module")
def plans() -> list[CellPlan]:
    return plan_cells(seed=3, size=96, cells=72, validation=12, heldout=24, classes="balanced")


@pytest.fixture(scope="module")
def cells(plans: list[CellPlan]) -> list[Cell]:
    return [render(p, cloudy=0.3, wedges=0.3) for p in plans]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "out"
    arguments = f"--out {folder} --cells {CELLS} --heldout 12 --seed 4 --cell-size {SIZE} --rows-per-part 10"
    assert command.main(arguments.split()) == 0
    return folder


def decode(data: bytes) -> tuple[np.ndarray, rasterio.DatasetReader]:
    with MemoryFile(data) as memory, memory.open() as source:
        return source.read(1), source.profile


# --- the plan ---------------------------------------------------------------------------------


def test_cells_spread_over_the_globe(plans: list[CellPlan]) -> None:
    zones = {p.epsg for p in plans}
    assert len(zones) > 15
    assert {z // 100 for z in zones} == {326, 327}
    assert len({p.name for p in plans}) == len(plans)
    assert any(abs(p.lon) > 179.9 for p in plans)
    assert any(abs(p.lat) < 0.1 for p in plans)


def test_splits_own_blocks_and_balance_classes(plans: list[CellPlan]) -> None:
    blocks: dict[tuple[int, int], set[str]] = {}
    for p in plans:
        blocks.setdefault(geography.block_of(p.lat, p.lon), set()).add(p.split)
    assert all(len(splits) == 1 for splits in blocks.values())
    assert Counter(p.landcover for p in plans if p.split == "holdout") == dict.fromkeys(CLASSES, 2)
    held = [(p.lat, p.lon * np.cos(np.radians(p.lat))) for p in plans if p.split != "train"]
    assert all(0.1 < lat % 3 < 2.9 for lat, _ in held)


def test_products_name_their_offset(plans: list[CellPlan]) -> None:
    seen = Counter()
    for p in plans:
        for key in S2_KEYS:
            if key in p.acquisitions:
                a = p.acquisitions[key]
                baseline = int(re.fullmatch(r"S2[AB]_MSIL\d._\d+T\d+_N(\d{4})_R\d{3}_T\w{5}_\d+T\d+", a.product)[1])
                assert a.offset == (1000 if 400 <= baseline < 9999 else 0)
                seen[key, a.offset] += 1
    assert min(seen[key, offset] for key in S2_KEYS for offset in (0, 1000)) > 10


@pytest.mark.parametrize("name", CLASSES)
def test_majority_share_of_a_tile(name: str) -> None:
    """35 to 95 % of every quadrant, and more than any other class."""
    for seed in range(4):
        drawn = class_map(np.random.default_rng(seed), 144, name)
        for r, c in ((0, 0), (0, 72), (72, 0), (72, 72)):
            shares = fractions(drawn[r : r + 72, c : c + 72])
            assert shares.argmax() == landcover.category(name)
            assert 0.35 <= shares.max() <= 0.95


def test_refuses_bad_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(SystemExit):
        command.parse(f"--out {tmp_path} --cells 0 --cell-size 100 --cloudy 2".split())
    told = capsys.readouterr().err
    assert all(word in told for word in ("--out", "--cells 0", "--cell-size 100", "--cloudy 2.0"))


def test_what_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    (tmp_path / "file").touch()
    assert command.main(["--out", str(tmp_path / "file" / "out"), "--cells", "1", "--cell-size", "24"]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"data_prep.synthetic: {tmp_path / 'file' / 'out'}: ")
    assert told.count("\n") == 1

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "generate", stop)
    assert command.main(["--out", str(tmp_path / "out"), "--cells", "1", "--cell-size", "24"]) == 130
    assert "is incomplete" in capsys.readouterr().err


# --- pixels -----------------------------------------------------------------------------------


def test_values_are_plausible(cells: list[Cell]) -> None:
    for cell in cells:
        for key, product in cell.products.items():
            for name, values in product.bands.items():
                gsd = 10 if key == "s1" else round(product.true[name].a)
                assert values.dtype == (np.float32 if key == "s1" else np.uint16)
                if key != "s1":
                    assert values.shape == (96 * 10 // gsd,) * 2
                    harmonized = values[values > 0].astype(int) - product.acquired.offset
                    assert harmonized.max() < 16000, (key, name)
    vv = np.concatenate([c.products["s1"].bands["vv"].ravel() for c in cells if "s1" in c.products])
    assert set(np.unique(vv[vv <= 0])) == {-32768.0}
    assert -16 < 10 * np.log10(np.median(vv[vv > 0])) < -8


def test_level_1c_brightens_the_blue_and_carries_cirrus(cells: list[Cell]) -> None:
    """The atmosphere adds to the coastal band; B10 separates products with and without the offset."""
    added = []
    for cell in cells:
        if all(k in cell.products for k in S2_KEYS):
            l1c, l2a = (cell.products[k] for k in S2_KEYS)
            added.append(np.median(l1c.bands["B01"]) - l1c.acquired.offset)
            added[-1] -= np.median(l2a.bands["B01"]) - l2a.acquired.offset
        if "s2_l1c" in cell.products:
            product = cell.products["s2_l1c"]
            darkest = np.percentile(product.bands["B10"][product.bands["B10"] > 0], 1)
            assert (darkest > 500) == (product.acquired.offset == 1000)
    assert np.median(added) > 400


def test_nodata_is_zero_in_all_bands_at_once(cells: list[Cell]) -> None:
    """A wedge covers every band; no measured pixel is zero in every band of its sampling."""
    seen = 0
    for cell in cells:
        for key in S2_KEYS:
            if key not in cell.products:
                continue
            product = cell.products[key]
            for gsd, first in ((10, "B02"), (20, "B05"), (60, "B01")):
                stack = np.stack([v for n, v in product.bands.items() if round(product.true[n].a) == gsd])
                empty = (stack == 0).all(0)
                np.testing.assert_array_equal(empty, product.bands[first] == 0)
                assert empty.mean() == pytest.approx(product.nodata, abs=0.06 if gsd == 60 else 0.02)
            seen += product.nodata > 0
    assert seen > 10


def test_headers_misplace_coarse_bands(cells: list[Cell]) -> None:
    """All bands claim one corner off the grid; content lies on multiples of its own sampling."""
    for cell in cells:
        for key in S2_KEYS:
            if key in cell.products:
                product = cell.products[key]
                assert len({(a.c, a.f) for a in product.claimed.values()}) == 1
                for name, true in product.true.items():
                    claimed = product.claimed[name]
                    assert true.c % true.a == 0
                    assert true.f % true.a == 0
                    assert abs(true.c - claimed.c) <= true.a / 2 + 1e-6
                    assert abs(true.f - claimed.f) <= true.a / 2 + 1e-6


def _best_shift(fine: np.ndarray, coarse: np.ndarray, factor: int) -> tuple[int, int]:
    """Shift in fine pixels at which the fine band, averaged, correlates best with the coarse one."""
    reach, n = min(4, factor), coarse.shape[0] - 2
    best = {}
    for r in range(-reach, reach + 1):
        for c in range(-reach, reach + 1):
            part = fine[factor + r :, factor + c :][: n * factor, : n * factor]
            mean = part.reshape(n, factor, n, factor).mean((1, 3))
            best[r, c] = np.corrcoef(mean.ravel(), coarse[1:-1, 1:-1].ravel())[0, 1]
    return max(best, key=best.__getitem__)


@pytest.mark.parametrize(("name", "factor"), [("B8A", 2), ("B09", 6)])
def test_content_lies_where_snapping_puts_it(plans: list[CellPlan], name: str, factor: int) -> None:
    """The correlation with B08 peaks at the difference of the snapped corners, not at zero."""
    plan = next(p for p in plans if p.split == "holdout" and p.landcover == "bare")
    moved = 0
    for shift in (0, 9, 14, 25, 42):
        origin = plan.origin[0] + shift, plan.origin[1] - 2 * shift
        product = render(dataclasses.replace(plan, origin=origin), cloudy=0, wedges=0).products["s2_l2a"]
        fine, coarse = product.true["B08"], product.true[name]
        expected = round((fine.f - coarse.f) / 10), round((coarse.c - fine.c) / 10)
        values = product.bands["B08"].astype(float), product.bands[name].astype(float)
        assert _best_shift(*values, factor) == expected
        moved += expected != (0, 0)
    assert moved >= 2


def test_nuisance_belongs_to_the_product(plans: list[CellPlan]) -> None:
    """Another overpass leaves the map and changes the gain; levels of one overpass have gains of their own."""
    plan = next(p for p in plans if p.split == "holdout" and p.landcover == "tree")
    same = {k: dataclasses.replace(a, stream=2, offset=0) for k, a in plan.acquisitions.items() if k != "s1"}
    first = render(dataclasses.replace(plan, acquisitions=same), cloudy=0)
    later = {k: dataclasses.replace(a, stream=9) for k, a in same.items()}
    second = render(dataclasses.replace(plan, acquisitions=later), cloudy=0)
    np.testing.assert_array_equal(first.truth(), second.truth())
    for key in same:
        levels = [[v.mean() for v in c.products[key].bands.values()] for c in (first, second)]
        assert np.abs(np.log(np.divide(*levels))).max() > 0.02
    blues = [np.median(c.products["s2_l2a"].bands["B02"]) for c in (first, second)]
    assert blues[0] != blues[1]


@pytest.mark.parametrize("name", ["grass", "crop", "tree"])
def test_leaves_are_green_in_the_summer_of_their_hemisphere(plans: list[CellPlan], name: str) -> None:
    """NDVI of one cell, moved and seen again: seasons far from the equator, opposite across it, hardly any near it."""
    plan = next(p for p in plans if p.landcover == name and "s2_l2a" in p.acquisitions)

    def ndvi(lat: float, month: int) -> float:
        seen = plan.acquisitions["s2_l2a"]
        seen = dataclasses.replace(seen, time=seen.time.replace(month=month, day=18))
        there = dataclasses.replace(plan, lat=lat, acquisitions={"s2_l2a": seen})
        product = render(there, cloudy=0, wedges=0).products["s2_l2a"]
        red, infrared = (product.bands[b].astype(float) - seen.offset for b in ("B04", "B08"))
        return float(np.median((infrared - red) / (infrared + red)))

    january, april, july = (ndvi(50, month) for month in (1, 4, 7))
    swing = july - january
    assert swing > 0.05
    assert january + 0.2 * swing < april < july - 0.2 * swing
    assert ndvi(-50, 1) - ndvi(-50, 7) > 0.8 * swing
    assert abs(ndvi(2, 1) - ndvi(2, 7)) < 0.1 * swing


def test_structure_is_common_to_all_sensors() -> None:
    """Dunes show in optical and radar: the bands correlate over a bare cell although speckled."""
    plan = next(p for p in plan_cells(seed=3, size=192, cells=1, heldout=12) if p.landcover == "bare")
    products = render(plan, cloudy=0, wedges=0).products
    b4 = products["s2_l2a"].bands["B04"][:180, :180].astype(float)
    vv = 10 * np.log10(np.maximum(products["s1"].bands["vv"][:180, :180], 1e-5))
    assert abs(np.corrcoef(b4.ravel(), vv.ravel())[0, 1]) > 0.15


# --- files ------------------------------------------------------------------------------------


def test_parquet_layout(files: Path) -> None:
    """Every row a row group of GeoTIFF bytes at native sampling, and metadata that points at it."""
    for key, folder in writer.FOLDERS.items():
        parts = sorted((files / folder / "images").glob("part_*.parquet"))
        assert [p.name for p in parts] == [f"part_{i:05d}.parquet" for i in range(len(parts))]
        metadata = pq.read_table(files / folder / "metadata.parquet").to_pylist()
        assert sum(pq.ParquetFile(p).metadata.num_rows for p in parts) == len(metadata)
        expected = ["VV", "VH"] if key == "s1" else [b.name for b in SENSORS[key].bands + SENSORS[key].dropped]
        for part in parts:
            file = pq.ParquetFile(part)
            assert file.num_row_groups == file.metadata.num_rows
            names = set(file.schema_arrow.names) - {"product_id", "grid_cell", "timestamp", "thumbnail", "cloud_mask"}
            assert {n.upper() for n in names} == set(expected)
        for row in metadata[::5]:
            file = pq.ParquetFile(files / folder / row["parquet_url"])
            image = file.read_row_group(row["parquet_row"]).to_pylist()[0]
            assert (image["grid_cell"], image["product_id"]) == (row["grid_cell"], row["product_id"])
            assert image["thumbnail"].startswith(b"\x89PNG")
            for name in names:
                values, profile = decode(image[name])
                assert profile["crs"].to_epsg() == int(row["crs"].split(":")[-1])
                assert profile["nodata"] == (-32768 if key == "s1" else 0)
                if key != "s1":
                    assert values.shape[0] * profile["transform"].a == SIZE * 10
    crs = pq.read_table(files / "Core-S2L2A" / "metadata.parquet")["crs"].to_pylist()
    assert any(c.startswith("EPSG:EPSG:") for c in crs)


def test_truth_and_splits(files: Path) -> None:
    truth = pq.read_table(files / "truth.parquet").to_pylist()
    with open(files / "splits.csv", encoding="utf-8") as file:
        splits = {row["grid_cell"]: row["split"] for row in csv.DictReader(file)}
    assert splits == {row["grid_cell"]: row["split"] for row in truth}
    assert Counter(splits.values()) == {"train": CELLS, "holdout": 12}
    for row in truth:
        values, _ = decode(row["landcover_map"])
        np.testing.assert_allclose(fractions(values), row["fractions"], atol=1e-6)
        assert set(row["quadrant_majority"]) == {row["landcover"]}


def test_worldcover_reproduces_the_map(files: Path) -> None:
    """Files lie on the real lattice, cost little, and give the truth back by nearest neighbor."""
    paths = sorted((files / "worldcover").glob("*.tif"))
    lookup = landcover.code_to_index()
    for path in paths:
        assert path.stat().st_size < 200_000
        with rasterio.open(path) as source:
            assert source.shape == (36000, 36000)
            assert source.nodata == 0
            corner = re.fullmatch(r"ESA_WorldCover_10m_2021_v200_([NS])(\d\d)([EW])(\d{3})_Map\.tif", path.name)
            south = int(corner[2]) * (1 if corner[1] == "N" else -1)
            west = int(corner[4]) * (1 if corner[3] == "E" else -1)
            assert source.bounds == pytest.approx((west, south, west + 3, south + 3))
            assert (south % 3, west % 3) == (0, 0)
    for row in pq.read_table(files / "truth.parquet").to_pylist():
        expected, profile = decode(row["landcover_map"])
        found = np.zeros(expected.shape, np.uint8)
        grid = dict(crs=f"EPSG:{row['epsg']}", transform=profile["transform"], width=SIZE, height=SIZE)
        for block in _near(row["lat"], row["lon"]):
            path = files / "worldcover" / writer.worldcover_name(block)
            if path.exists():
                with rasterio.open(path) as source, WarpedVRT(source, resampling=Resampling.nearest, **grid) as view:
                    found = np.maximum(found, view.read(1))
        assert np.mean(lookup[found] == expected) > 0.97, row["grid_cell"]


def _near(lat: float, lon: float) -> set[tuple[int, int]]:
    around = (-0.2, 0, 0.2)
    return {geography.block_of(lat + i, (lon + j + 180) % 360 - 180) for i in around for j in around}


def test_files_do_not_depend_on_workers(files: Path, tmp_path: Path) -> None:
    arguments = f"--out {tmp_path / 'out'} --cells {CELLS} --heldout 12 --seed 4 --cell-size {SIZE} --rows-per-part 10"
    done = run_module("data_prep.synthetic", *arguments.split(), "--workers", "2")  # workers must find its functions
    assert done.returncode == 0, done.stderr
    written = {p.relative_to(files): p for p in files.rglob("*") if p.is_file()}
    again = {p.relative_to(tmp_path / "out"): p for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert set(written) == set(again)
    assert [n for n in written if written[n].read_bytes() != again[n].read_bytes()] == []


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects(plans: list[CellPlan], defect: str) -> None:
    """Every kind of planted fault is in the bytes, in the truth, and nowhere else."""
    plan = dataclasses.replace(next(p for p in plans if len(p.acquisitions) == 3), defect=defect)
    cell = render(plan)
    assert writer.truth_row(cell)["defect"] == defect
    key, name = ("s1", "vv") if defect == "nan" else ("s2_l2a", "B03")
    data = writer.image_row(cell, key)[name]
    clean = writer.image_row(render(dataclasses.replace(plan, defect="")), key)[name]
    if defect in ("duplicate", "offset conflict"):
        assert data == clean
    elif defect == "missing band":
        assert data is None
    elif defect in ("truncated tif", "not a tif"):
        with pytest.raises(rasterio.errors.RasterioError):
            decode(data)
    else:
        (values, profile), (good, header) = decode(data), decode(clean)
        wrong = {
            "all nodata": not values.any(),
            "wrong size": values.shape[0] == good.shape[0] // 2,
            "wrong crs": profile["crs"] != header["crs"],
            "nan": bool(np.isnan(values).all()),
        }
        assert [fault for fault, found in wrong.items() if found] == [defect]
