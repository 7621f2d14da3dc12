"""Change, search and pictures from embeddings on disk; names of Major-TOM cells."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.crs import CRS
from rasterio.warp import transform

from terrafm_jax import embed
from terrafm_jax.scenes import analyze, flags, output, points
from terrafm_jax.scenes.grid import Grid
from terrafm_jax.scenes.readback import open_embedding, whole
from terrafm_jax.scenes.tags import WEIGHTS

GRID = Grid(CRS.from_epsg(32632), 600_000.0, 5_100_000.0, 160.0, 40, 50)
TAGS = {WEIGHTS: "abc"}


def stored(
    path: Path, tokens: np.ndarray, tags: dict[str, str] = TAGS, grid: Grid = GRID, dtype: str = "float32"
) -> Path:
    names = tuple(f"feature {i}" for i in range(tokens.shape[-1]))
    write = output.write_zarr if path.suffix == ".zarr" else output.write_cog
    write(path, tokens, grid, output.Meta(names, tags), dtype)
    return path


@pytest.fixture
def tokens() -> np.ndarray:
    values = np.random.default_rng(0).normal(size=(40, 50, 16)).astype(np.float32)
    values[:3, :4] = np.nan
    return values


def lonlat(row: int, column: int) -> tuple[float, float]:
    x, y = GRID.x + (column + 0.5) * GRID.gsd, GRID.y - (row + 0.5) * GRID.gsd
    (lon,), (lat,) = transform(GRID.crs, "EPSG:4326", [x], [y])
    return lon, lat


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_zarr_is_read_as_geotiff_is(tmp_path: Path, tokens: np.ndarray, dtype: str) -> None:
    tif, zarr = (stored(tmp_path / f"a.{kind}", tokens, dtype=dtype) for kind in ("tif", "zarr"))
    with open_embedding(tif) as first, open_embedding(zarr) as second:
        assert second.grid == first.grid
        assert (second.width, second.tags[WEIGHTS]) == (first.width, first.tags[WEIGHTS])
        assert np.array_equal(whole(second), whole(first), equal_nan=True)


def test_zarr_of_several_chunks(tmp_path: Path, tokens: np.ndarray) -> None:
    wide = np.tile(tokens, (1, 1, 100))
    with open_embedding(stored(tmp_path / "a.zarr", wide)) as found:
        blocks = list(found.blocks())
        assert [(r.stop - r.start, c.stop - c.start) for r, c in blocks] == [(36, 36), (36, 14), (4, 36), (4, 14)]
        for block in (*blocks, (slice(30, 40), slice(0, 50)), (slice(5, 6), slice(36, 37))):
            assert np.array_equal(found.read(block), wide[block], equal_nan=True)


def test_zarr_that_cannot_be_read_is_said(tmp_path: Path, tokens: np.ndarray, capsys: Any) -> None:
    def error(path: Path) -> str:
        assert embed.main(["picture", str(path), f"--out={tmp_path / 'p.png'}"]) == 1
        line = capsys.readouterr().err.strip()
        assert "\n" not in line
        return line

    assert "none.zarr: is no Zarr group that embed wrote" in error(tmp_path / "none.zarr")
    path = stored(tmp_path / "a.zarr", tokens)
    chunk, header = path / "embedding" / "0.0.0", path / "embedding" / ".zarray"
    chunk.write_bytes(chunk.read_bytes()[:-100])
    assert "truncated" in error(path)
    header.write_text(header.read_text().replace('"zlib"', '"blosc"'))
    assert "packed again by another program (blosc)" in error(path)


@pytest.mark.parametrize(("one", "two"), [("tif", "tif"), ("zarr", "tif"), ("zarr", "zarr")])
def test_change_is_one_minus_cosine(tmp_path: Path, tokens: np.ndarray, one: str, two: str) -> None:
    other = tokens.copy()
    other[10] = -tokens[10]
    other[20] = np.random.default_rng(1).normal(size=(50, 16))
    first, second = stored(tmp_path / f"a.{one}", tokens), stored(tmp_path / f"b.{two}", other)
    out = tmp_path / "c.tif"
    assert embed.main(["change", str(first), str(second), f"--out={out}"]) == 0
    with rasterio.open(out) as found:
        values = found.read(1)
        assert found.transform == GRID.transform
        assert f"a.{one} and b.{two}" in found.tags()["TERRAFM_CHANGE"]
    expected = 1 - (analyze.unit(tokens) * analyze.unit(other)).sum(-1)
    assert np.allclose(values, expected, atol=1e-5, equal_nan=True)
    assert np.allclose(values[10], 2, atol=1e-5)
    assert np.allclose(values[30], 0, atol=1e-5)


def test_a_map_of_change_has_a_picture_but_no_features(tmp_path: Path, tokens: np.ndarray, capsys: Any) -> None:
    other = tokens.copy()
    other[:, 25:] = -tokens[:, 25:]
    first, second = stored(tmp_path / "a.tif", tokens), stored(tmp_path / "b.tif", other)
    out, picture = tmp_path / "c.tif", tmp_path / "c.png"
    assert embed.main(["change", str(first), str(second), f"--out={out}"]) == 0
    assert embed.main(["picture", str(out), f"--out={picture}"]) == 0
    image = np.asarray(Image.open(picture))
    assert image[0, 0, 3] == 0, "nodata is transparent"
    factor = image.shape[0] // 40
    assert image[-1, 25 * factor - 1].tolist() == [0, 0, 0, 255]
    assert image[-1, 25 * factor].tolist() == [255, 255, 255, 255]
    lon, lat = lonlat(20, 30)
    for arguments in (
        ["change", str(out), str(first), f"--out={tmp_path / 'd.tif'}"],
        ["search", str(out), f"--query={first}", f"--point={lon},{lat}", f"--out={tmp_path / 'h.csv'}"],
        ["picture", str(out), f"--similar-to={lon},{lat}", f"--out={picture}"],
    ):
        capsys.readouterr()
        assert embed.main(arguments) == 1
        assert "c.tif: is a map of change" in capsys.readouterr().err


def test_change_refuses_what_cannot_be_compared(tmp_path: Path, tokens: np.ndarray, capsys: Any) -> None:
    first = stored(tmp_path / "a.tif", tokens)
    moved = stored(tmp_path / "b.tif", tokens, {WEIGHTS: "xyz"}, GRID.window(1, 0, 40, 50))
    assert embed.main(["change", str(first), str(moved), f"--out={tmp_path / 'c.tif'}"]) == 1
    line = capsys.readouterr().err
    assert "different grids" in line
    assert "different weights" in line
    with rasterio.open(tmp_path / "plain.tif", "w", driver="GTiff", height=4, width=4, count=1, dtype="uint8",
                       crs=GRID.crs, transform=GRID.transform) as plain:  # fmt: skip
        plain.write(np.zeros((1, 4, 4), np.uint8))
    for second, out, words in (
        ("plain.tif", "c.tif", "is no embedding of this program"),
        ("e.parquet", "c.tif", "e.parquet: holds windows or places, not tokens on a grid"),
        ("a.tif", "c.zarr", "change is written as GeoTIFF"),
    ):
        assert embed.main(["change", str(first), str(tmp_path / second), f"--out={tmp_path / out}"]) == 1
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(("dtype", "kind"), [("float32", "tif"), ("int8", "tif"), ("int8", "zarr")])
def test_search_finds_the_most_similar_of_many_files(tmp_path: Path, tokens: np.ndarray, dtype: str, kind: str) -> None:
    query = tokens[5, 7]
    noise = np.random.default_rng(3).normal(size=(40, 50, 16)).astype(np.float32)
    noise[33, 44] = 5 * query  # the same direction
    noise[1, 2] = query + 0.1
    first, second = (stored(tmp_path / f"{n}.{kind}", t, dtype=dtype) for n, t in (("a", tokens), ("b", noise)))
    rows = [
        output.window_row(GRID, (0, 0, 20, 20), vector, "p", "t", "m")
        for vector in np.stack([2 * query, -query, noise[0, 0]])
    ]
    windows = tmp_path / "w.parquet"
    output.write_windows(windows, rows, output.Meta((), TAGS))
    places, vectors = np.array([[12.0, 46.0], [13.0, 47.0]]), np.stack([np.full(16, np.nan), 3 * query])
    points.write_points(tmp_path / "p.parquet", places, {}, vectors, vectors, TAGS)
    out = tmp_path / "hits.csv"
    lon, lat = lonlat(5, 7)
    files = [str(f) for f in (first, second, windows, tmp_path / "p.parquet")]
    arguments = [f"--query={first}", f"--point={lon},{lat}", "--k=5", *files]
    assert embed.main(["search", *arguments, f"--out={out}"]) == 0
    with open(out) as file:
        hits = list(csv.DictReader(file))
    found = {(Path(h["file"]).name, int(h["row"]), int(h["column"])): float(h["lon"]) for h in hits}
    assert set(found) == {
        (f"a.{kind}", 5, 7), (f"b.{kind}", 33, 44), ("w.parquet", 0, 0), (f"b.{kind}", 1, 2), ("p.parquet", 1, 0),
    }  # fmt: skip
    assert found[(f"a.{kind}", 5, 7)] == pytest.approx(lon, abs=1e-6)
    assert found[("p.parquet", 1, 0)] == pytest.approx(13.0)
    scores = [float(h["similarity"]) for h in hits]
    assert scores == sorted(scores, reverse=True)
    assert embed.main(["search", *arguments, f"--out={tmp_path / 'hits.geojson'}"]) == 0
    assert len(json.loads((tmp_path / "hits.geojson").read_text())["features"]) == 5


def test_search_by_brute_force(tmp_path: Path, tokens: np.ndarray) -> None:
    path = stored(tmp_path / "a.tif", tokens)
    hits = analyze.search(tokens[8, 8], [path], 30)
    scores = analyze.unit(tokens) @ analyze.unit(tokens[8, 8])
    best = np.sort(scores[np.isfinite(scores)])[::-1][:30]
    assert np.allclose([h["similarity"] for h in hits], best, atol=1e-4)


def test_western_longitudes_are_no_flags() -> None:
    given = ["search", "a.tif", "--query", "a.tif", "--point", "-3.1,40", "--out", "h.csv"]
    assert flags.parse(given, "")[1].point == (-3.1, 40.0)
    assert flags.parse(["picture", "a.tif", "--similar-to", "-3,-4", "--out=p.png"], "")[1].similar_to == (-3.0, -4.0)
    scene = ["--checkpoint=x", "--sensor=s1=x.tif", "--out=e.tif", "--aoi", "-3,40,-2.5,41"]
    assert flags.parse(scene, "") == ("scene", flags.parse([*scene[:3], "--aoi=-3,40,-2.5,41"], "")[1])


def test_places_without_data_are_said(tmp_path: Path, tokens: np.ndarray, capsys: Any) -> None:
    path = stored(tmp_path / "a.tif", tokens)
    for (lon, lat), words in ((lonlat(1, 1), "no data at"), ((0.0, 0.0), "lies outside")):
        arguments = ["search", f"--query={path}", f"--point={lon},{lat}", f"--out={tmp_path / 'h.csv'}", str(path)]
        assert embed.main(arguments) == 1
        assert words in (said := capsys.readouterr().err)
    assert re.search(r"outside of longitudes [-\d.]+ to [-\d.]+, latitudes [-\d.]+ to [-\d.]+; give", said), said


@pytest.mark.parametrize("kind", ["tif", "zarr"])
def test_pictures(tmp_path: Path, tokens: np.ndarray, kind: str) -> None:
    values = tokens * 0.05
    values[..., 2] += np.linspace(-3, 3, 50)  # the main component runs from left to right
    path = stored(tmp_path / f"a.{kind}", values)
    assert embed.main(["picture", str(path), f"--out={tmp_path / 'pca.png'}"]) == 0
    image = np.asarray(Image.open(tmp_path / "pca.png"))
    factor = image.shape[0] // 40
    assert image.shape == (40 * factor, 50 * factor, 4)
    assert image[0, 0, 3] == 0, "nodata is transparent"
    assert image[-1, -1, 3] == 255
    means = image[10 * factor :, :, 0].mean(0)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) > 0.95
    lon, lat = lonlat(20, 30)
    out = tmp_path / "near.png"
    assert embed.main(["picture", str(path), f"--out={out}", f"--similar-to={lon},{lat}"]) == 0
    near = np.asarray(Image.open(out))
    assert near[20 * factor + 1, 30 * factor + 1, :3].tolist() == [255, 0, 0]


def test_a_picture_says_its_file_and_what_its_grays_mean(tmp_path: Path, tokens: np.ndarray, caplog: Any) -> None:
    first, second = stored(tmp_path / "a.tif", tokens), stored(tmp_path / "b.tif", tokens + 0.1)
    out, change, (lon, lat) = tmp_path / "p.png", tmp_path / "c.tif", lonlat(20, 30)
    assert embed.main(["change", str(first), str(second), f"--out={change}"]) == 0
    for file, flag, words in (
        (change, [], r"change \(1 - cosine\), black: [-\d.e]+, white: [-\d.e]+ or more -> .*p.png"),
        (first, [f"--similar-to={lon},{lat}"], r"cosine similarity, black: [-\d.e]+ or less, white: 1 -> .*p.png"),
        (first, [], r"variance of the three components: .* -> .*p.png"),
    ):
        caplog.clear()
        assert embed.main(["picture", str(file), f"--out={out}", *flag]) == 0
        assert re.search(words, caplog.text), caplog.text


def test_what_is_no_picture_is_refused_and_leaves_no_file(tmp_path: Path, tokens: np.ndarray, capsys: Any) -> None:
    path = stored(tmp_path / "a.tif", tokens)
    for name in ("p.jpg", "p.gif2", "p"):
        assert embed.main(["picture", str(path), f"--out={tmp_path / name}"]) == 1
        assert "give a .png" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["a.tif"]


@pytest.mark.parametrize(
    ("lat", "lon", "name"),
    [
        (17.90, 103.76, ("199U", "1099R")),
        (0.01, 0.01, ("0U", "0R")),
        (-0.01, -0.01, ("1D", "1L")),
        (-25.3156, -48.106, ("282D", "485L")),
        (-38.83, -72.478, ("433D", "629L")),
    ],
)
def test_majortom_cells(lat: float, lon: float, name: tuple[str, str]) -> None:
    assert output.majortom_cell(lat, lon) == name
