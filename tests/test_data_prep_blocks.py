"""A scene that is read block by block becomes what it would become if it were read at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_prep_cells import geotiff as tif
from rasterio.transform import from_origin

from data_prep import geotiff
from data_prep.cell import Options, Prepared, prepare
from data_prep.chunks import Unit
from data_prep.scenes import from_folder
from data_prep.worldcover import WorldCover

LEFT, TOP, SIZE = 600_000, 5_400_000, 240
OPTIONS = Options(tile_size=24, stride=24)
ORDER = {"s2_l2a": ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")}


def write(root: Path, optical: np.ndarray, name: str = "S2L2A/a.tif") -> Path:
    (root / name).parent.mkdir(parents=True)
    (root / name).write_bytes(tif(optical, from_origin(LEFT, TOP, 10, 10)))
    return root


def prepared(root: Path) -> tuple[Prepared, list[Prepared]]:
    """The only scene of a folder at once, and by its blocks."""
    (scene,), _ = from_folder(root)
    source = geotiff.GeoTiffs(bands={**ORDER, "s1": ("VV", "VH")})
    units, _ = geotiff.units_of(scene, OPTIONS, "train")
    assert len(units) > 4
    found = [prepare(source.read(u), WorldCover(None, {}), OPTIONS) for u in (Unit("a", 0, (scene, None)), *units)]
    return found[0], found[1:]


@pytest.mark.parametrize(("step", "shift"), [(40, (-43, 47)), (10, (-5, 5)), (20, (-20, 40))])
def test_radar_on_another_grid_has_no_seams(tmp_path: Path, step: int, shift: tuple[int, int]):
    """In the CRS of the scene, but of larger or shifted pixels: those around a block count at its edge."""
    rng = np.random.default_rng(1)
    write(tmp_path, rng.integers(100, 3000, (12, SIZE, SIZE)).astype(np.uint16))
    count = SIZE * 10 // step + 8
    power = rng.gamma(4.0, 0.02, (2, count, count)).astype(np.float32)
    (tmp_path / "S1RTC").mkdir()
    (tmp_path / "S1RTC/a.tif").write_bytes(tif(power, from_origin(LEFT + shift[0], TOP + shift[1], step, step)))
    whole, blocks = prepared(tmp_path)

    def by_place(tiles: list) -> dict[tuple[float, ...], np.ndarray]:
        groups = {t.parts["s2_l2a"].finest.transform: t.parts["s1"].groups["10m"] for t in tiles}
        return {place: np.stack([*g.bands, g.valid]) for place, g in groups.items()}

    expected, found = by_place(whole.tiles), by_place([t for p in blocks for t in p.tiles])
    assert found.keys() == expected.keys()
    assert len(found) == 100
    for place, pixels in found.items():
        np.testing.assert_array_equal(pixels, expected[place])


@pytest.mark.parametrize("unit", ["DN", "reflectance"])
def test_one_offset_for_all_blocks_of_a_scene(tmp_path: Path, unit: str):
    """Ice in a corner cannot tell, the rest can: no file names a product that would hold the blocks together."""
    rng = np.random.default_rng(2)
    pixels = rng.integers(1010, 3000, (12, SIZE, SIZE)).astype(np.uint16)
    pixels[:, : SIZE // 2, : SIZE // 2] += 5000
    if unit == "reflectance":
        pixels = (pixels / 10_000).astype(np.float32)
    write(tmp_path / "in", pixels, "a/S2L2A.tif")
    write(tmp_path / "in", pixels[:, : SIZE // 2, : SIZE // 2], "b/S2L2A.tif")  # a scene of its own
    bands = "--bands=s2_l2a=" + ",".join(ORDER["s2_l2a"])
    flags = ["--tile-size", "24", "--split-shares", "1,0,0", "--worldcover", "none", "--s2-unit", unit, bands]
    assert geotiff.main(["--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), *flags]) == 0
    import tensorflow_datasets as tfds

    records = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    offsets = {(r["cell"].decode()[0], float(r["s2_l2a"]["offset"])) for r in records}
    assert offsets == {("a", 1000.0), ("b", 0.0)}


def test_too_many_shapes_are_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An index has one byte for the shapes: the job ended after the last cell, and each time again."""
    (tmp_path / "in/S1RTC").mkdir(parents=True)
    rng = np.random.default_rng(0)
    sizes = [(24 + 6 * i, 24 + 6 * j) for i in range(17) for j in range(16)]
    for rows, columns in sizes:
        power = rng.gamma(4.0, 0.02, (2, rows, columns)).astype(np.float32)
        path = tmp_path / f"in/S1RTC/{rows}_{columns}.tif"
        path.write_bytes(tif(power, from_origin(LEFT, TOP, 10, 10)))
    where = ["--source", str(tmp_path / "in"), "--worldcover", "none", "--bands=s1=VV,VH", "--split-shares", "1,0,0"]
    assert geotiff.main([*where, "--out", str(tmp_path / "out"), "--cells-per-shard", "300"]) == 1
    said = capsys.readouterr().err
    assert "more than 256 different shapes of tiles; cut them to a common --tile-size 534 or less" in said
    assert "all images hold 24" in said
    assert not (tmp_path / "out").exists()
    few = ["--out", str(tmp_path / "few"), "--tile-size", "48", "--limit", "5"]
    assert geotiff.main([*where, *few]) == 0


def test_an_impossible_georeference_does_not_stop_the_planning(tmp_path: Path):
    """PROJ raises errors of its own where it cannot say where an image lies: one image in a thousand ended the job."""
    (tmp_path / "in/S1RTC").mkdir(parents=True)
    power = np.random.default_rng(0).gamma(4.0, 0.02, (2, 24, 24)).astype(np.float32)
    for name, left, top in (("good", LEFT, TOP), ("bad", 1e8, 1e8)):
        (tmp_path / f"in/S1RTC/{name}.tif").write_bytes(tif(power, from_origin(left, top, 10, 10)))
    where = ["--source", str(tmp_path / "in"), "--worldcover", "none", "--bands=s1=VV,VH", "--tile-size", "24"]
    assert geotiff.main([*where, "--out", str(tmp_path / "out")]) == 3
    assert (
        "bad/p0,,\"coordinates lie outside of CRS 'EPSG:32632': x 100000000..100000240, y"
        in (tmp_path / "out/rejected.csv").read_text()
    )
