"""Cutting in legal multiples, and splits that share no ground."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from data_prep.cell import Options
from data_prep.quality import cloud_share, is_black, is_constant, nodata_share
from data_prep.raster import BadInput, Grid, normalize_crs
from data_prep.splits import BlockSplit, read_splits, unit_hash
from data_prep.tiling import Window, check_multiple, cut, on_grid, whole, windows
from data_prep.times import iso_time
from data_prep.worldcover import lonlat_outline


def test_legal_sizes():
    for size in (240, 480, 534, 1068, 6):
        check_multiple(size, "--tile-size")
    with pytest.raises(ValueError, match=r"--tile-size 224.*nearest legal: 222 or 228"):
        check_multiple(224, "--tile-size")
    with pytest.raises(ValueError, match=r"nearest legal: 6$"):
        check_multiple(0, "--stride")
    assert whole(535, native=True) == 534
    assert whole(535, native=False) == 535
    assert (whole(13, native=True), whole(2, native=False)) == (12, 2)
    for length, native, least in ((11, True, "20 and 60 m at least 12"), (1, False, "pixels: at least 2")):
        with pytest.raises(BadInput, match=least):
            whole(length, native)
    with pytest.raises(ValueError, match="--tile-size 6: expected at least 12"):
        Options(tile_size=6)


def test_windows_cover_a_cell():
    found = windows(1068, 1068, 534, 534)
    assert [w.name for w in found] == ["r0_c0", "r0_c534", "r534_c0", "r534_c534"]
    assert len(windows(1068, 1068, 534, 264)) == 9
    assert windows(264, 120, 534, 534) == [Window(0, 0, 264, 120)]
    assert all(w.row + w.height <= 1000 for w in windows(1000, 1000, 240, 120))


@pytest.mark.parametrize("size", [240, 480, 534])
def test_a_tile_covers_the_same_ground_at_every_sampling(size: int):
    """The snapped grids of a Major-TOM cell start up to 30 m apart; each tile stays within half a 60 m pixel."""
    finest = Grid("EPSG:32648", (10.0, 0.0, 362610.0, 0.0, -10.0, 1987090.0), 1068, 1068)
    others = {
        20: Grid("EPSG:32648", (20.0, 0.0, 362620.0, 0.0, -20.0, 1987080.0), 534, 534),
        60: Grid("EPSG:32648", (60.0, 0.0, 362640.0, 0.0, -60.0, 1987080.0), 178, 178),
    }
    for window in windows(1068, 1068, size, size):
        ground = np.array(finest.window(window.row, window.col, window.height, window.width).bounds())
        for gsd, grid in others.items():
            part = on_grid(window, finest, grid)
            assert (part.height, part.width) == (size * 10 // gsd, size * 10 // gsd)
            assert 0 <= part.row <= grid.height - part.height
            there = np.array(grid.window(part.row, part.col, part.height, part.width).bounds())
            assert np.abs(there - ground).max() <= gsd / 2


def test_cutting_over_the_edge_pads():
    pixels = np.arange(16, dtype=np.int16).reshape(4, 4)
    assert (cut(pixels, Window(1, 1, 2, 2), -1) == pixels[1:3, 1:3]).all()
    found = cut(pixels, Window(-1, 2, 3, 4), -1)
    assert found.tolist() == [[-1] * 4, [2, 3, -1, -1], [6, 7, -1, -1]]
    assert (cut(pixels, Window(9, 9, 2, 2), -1) == -1).all()


def _footprint(lon: float, lat: float, side: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    return np.array([lon - side, lon + side]), np.array([lat - side, lat + side])


def test_no_two_splits_share_ground():
    """20,000 tiles of 5 km all over the world and in every zone: any two that overlap have the same split."""
    rng = np.random.default_rng(0)
    split = BlockSplit((0.6, 0.2, 0.2), degrees=1.0)
    found: dict[str, list[tuple[float, float, float, float]]] = {"train": [], "validation": [], "holdout": []}
    lost = 0
    for lon, lat in zip(
        rng.uniform(-184, 184, 20_000), rng.uniform(40, 60, 20_000) * rng.choice([-1, 1], 20_000), strict=True
    ):
        area = _footprint(lon, lat)
        name = split.split(*area)
        if name is None:
            lost += 1
            continue
        west = (area[0][0] + 180) % 360
        found[name].append((west, area[1][0], west + 0.1, area[1][1]))
    assert 0.02 < lost / 20_000 < 0.3
    assert min(map(len, found.values())) > 1000
    for one, other in itertools.combinations(found, 2):
        a, b = np.array(found[one]), np.array(found[other])
        for turn in (-360.0, 0.0, 360.0):
            shifted = b + np.array([turn, 0, turn, 0])
            order = np.argsort(shifted[:, 0])
            shifted = shifted[order]
            first = np.searchsorted(shifted[:, 0], a[:, 0] - 0.1001)
            last = np.searchsorted(shifted[:, 0], a[:, 2])
            for i in range(len(a)):
                near = shifted[first[i] : last[i]]
                overlap = (
                    (near[:, 0] < a[i, 2]) & (near[:, 2] > a[i, 0]) & (near[:, 1] < a[i, 3]) & (near[:, 3] > a[i, 1])
                )
                assert not overlap.any()


def test_neighboring_zones_do_not_leak():
    """The same ground cut in two UTM zones gets one split or none, never two."""
    split = BlockSplit((0.5, 0.25, 0.25), degrees=0.5)
    from rasterio.warp import transform

    for lat in np.arange(-60, 80, 3.7):
        names = set()
        for crs in ("EPSG:32632", "EPSG:32633"):
            (x,), (y,) = transform("EPSG:4326", crs, [12.0], [lat])
            names.add(split.split(*lonlat_outline(Grid(crs, (10.0, 0.0, x - 2670, 0.0, -10.0, y + 2670), 534, 534))))
        assert len(names - {None}) <= 1


def test_blocks_at_the_antimeridian_and_the_pole():
    split = BlockSplit()
    east, west = split.blocks(*_footprint(179.98, 10.0)), split.blocks(*_footprint(-179.98, 10.0))
    assert east & west
    assert len(split.blocks(np.array([-180.0, 180.0]), np.array([89.2, 89.9]))) >= 1
    assert split.blocks(*_footprint(540.0, 10.0)) == split.blocks(*_footprint(180.0, 10.0))


def test_shares_of_blocks():
    split = BlockSplit((0.8, 0.1, 0.1))
    places = list(itertools.product(range(60, 120), range(200)))
    names = [split.split_of_block(place) for place in places]
    assert np.mean([n == "train" for n in names]) == pytest.approx(0.8, abs=0.02)
    assert np.mean([n == "holdout" for n in names]) == pytest.approx(0.1, abs=0.015)
    assert names != [
        BlockSplit((0.8, 0.1, 0.1), seed=1).split_of_block((r, c)) for r in range(60, 120) for c in range(200)
    ]
    with pytest.raises(ValueError, match="sum to 1"):
        BlockSplit((0.5, 0.1, 0.1))
    assert 0 <= unit_hash("a") < 1
    assert unit_hash("a") != unit_hash("b")


def test_split_files_name_every_fault(tmp_path: Path):
    path = tmp_path / "splits.csv"
    path.write_text("grid_cell,split\nA,train\nB,holdout\nA,train\n")
    assert read_splits(path) == {"A": "train", "B": "holdout"}
    path.write_text("grid_cell,split\nA,train\nB,test\nA,validation\n")
    with pytest.raises(ValueError, match=r"B: split 'test'.*A: in"):
        read_splits(path)
    path.write_text("cell,split\n")
    with pytest.raises(ValueError, match="grid_cell"):
        read_splits(path)


def test_quality_measures():
    valid = {"10m": np.ones((12, 12), bool), "60m": np.zeros((2, 2), bool)}
    valid["10m"][:3] = False
    assert nodata_share(valid) == 0.25
    assert not is_black(0.25)
    assert is_black(1.0)


def test_constant_pixels_are_no_measurement():
    flat, everywhere = np.full((40, 40), 7), np.ones((40, 40), bool)
    assert is_constant(flat, everywhere)
    one = flat.copy()
    one[5, 7] = 8  # none of the few pixels that are looked at first
    assert not is_constant(one, everywhere)
    assert is_constant(one, one == 7)
    assert not is_constant(flat, ~everywhere), "nothing measured is another fault"
    first = flat.copy()
    first[0, 0] = 0
    assert not is_constant(first, everywhere)
    assert is_constant(first, first > 0)


def test_cloud_share_and_its_source():
    mask = np.array([[0, 1], [2, 3]], np.uint8)
    assert cloud_share(mask, 90.0) == (0.5, "cloud mask")
    empty = np.zeros((2, 2), np.uint8)
    share, source = cloud_share(empty, 100.0)
    assert share == 1.0
    assert "empty" in source, "the mask is all zero on fully overcast cells"
    assert cloud_share(empty, None) == (0.0, "cloud mask")
    assert cloud_share(None, 12.0) == (0.12, "metadata")
    assert np.isnan(cloud_share(None, None)[0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("20200223T032739", "2020-02-23T03:27:39Z"),
        ("2020-02-23 03:27:39.024", "2020-02-23T03:27:39Z"),
        ("2020-02-23T03:27:39+02:00", "2020-02-23T01:27:39Z"),
        ("2017-06-13", "2017-06-13"),
        ("S2B_MSIL2A_20200223T032739_N9999", "2020-02-23T03:27:39Z"),
        ("2019-09-17 (S1) / 2019-09-18 (S2)", "2019-09-17"),
        ("soon", ""),
        (None, ""),
        ("2020-13-45", ""),
    ],
)
def test_times(given: str | None, expected: str):
    assert iso_time(given) == expected


def test_crs_spellings():
    for text in ("EPSG:EPSG:32648", "epsg:32648", "32648", " EPSG:32648 "):
        assert normalize_crs(text) == "EPSG:32648"
    assert normalize_crs("PROJCS[...]") == "PROJCS[...]"
