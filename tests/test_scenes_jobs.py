"""Whole-scene jobs: interruption, formats on disk, places, dry run."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from scenes_fake import CRS, NORTH, WEST, call, tokens, write
from weights_samples import sample

from terrafm_jax.inference import Model
from terrafm_jax.scenes import commands, inputs, output, read, run, store
from terrafm_jax.scenes import grid as grid_lib
from terrafm_jax.scenes.encoder import WindowEncoder
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Plan
from terrafm_jax.scenes.places import Places
from terrafm_jax.sensors import SENSORS

pytestmark = pytest.mark.usefixtures("loaded")


# --- interruption ---


def _job(l2a_scene: Path, out: Path, tiny_encoder: Model, batch: int = 8) -> tuple[run.Job, store.Unfinished]:
    acquisition = inputs.resolve(f"s2_l2a={l2a_scene}", inputs.Declared())
    reader = read.SceneReader([acquisition], grid_lib.target_grid([acquisition]))
    plan = Plan(reader.grid, 96, 48, 16, batch=batch)
    unfinished = store.Unfinished(out, plan, 24, "mark")
    return run.Job(WindowEncoder(tiny_encoder, reader.bands, batch), reader, plan, 24, unfinished), unfinished


def test_an_interrupted_job_ends_with_the_same_bytes(l2a_scene: Path, tmp_path: Path, tiny_encoder: Model) -> None:
    whole, unfinished = _job(l2a_scene, tmp_path / "whole.tif", tiny_encoder)
    summary = whole.run()
    assert summary.encoded == summary.windows
    expected, cls = unfinished.rows_path.read_bytes(), unfinished.cls_path.read_bytes()
    stops = 0
    for after in (1, 2, 1, 1, None):
        job, unfinished = _job(l2a_scene, tmp_path / "parts.tif", tiny_encoder)
        if after is None:
            rest = job.run()
            assert 0 < rest.resumed < rest.windows == rest.resumed + rest.encoded
            assert rest.square_kilometers == pytest.approx(summary.square_kilometers * rest.encoded / rest.windows)
        else:
            with pytest.raises(run.Stopped, match="goes on from there"):
                job.run(stop_after=after)
            stops += 1
    assert stops == 4
    assert unfinished.rows_path.read_bytes() == expected
    assert unfinished.cls_path.read_bytes() == cls


def test_a_job_killed_between_snapshots_goes_on(l2a_scene: Path, tmp_path: Path, tiny_encoder: Model) -> None:
    whole, unfinished = _job(l2a_scene, tmp_path / "whole.tif", tiny_encoder)
    whole.run()
    expected = unfinished.rows_path.read_bytes()
    job, unfinished = _job(l2a_scene, tmp_path / "parts.tif", tiny_encoder)
    with pytest.raises(run.Stopped):
        job.run(stop_after=2)
    # Rows written after the last snapshot, as a kill leaves them: they must be overwritten.
    with np.load(unfinished.folder / "snapshot.npz") as saved:
        first = int(saved["first"])
    assert first == 6
    unfinished.write_rows(first, np.full((3, 21, 24), 7.0))
    job, unfinished = _job(l2a_scene, tmp_path / "parts.tif", tiny_encoder)
    job.run(save_seconds=0)
    assert unfinished.rows_path.read_bytes() == expected


def test_a_signal_ends_the_job_after_a_snapshot(l2a_scene: Path, tmp_path: Path, tiny_encoder: Model) -> None:
    job, unfinished = _job(l2a_scene, tmp_path / "e.tif", tiny_encoder)
    inner, calls, before = job._encode, [], signal.getsignal(signal.SIGTERM)

    def encode(windows: run.Windows) -> Any:
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return inner(windows)

    job._encode = encode
    with pytest.raises(run.Stopped, match="the same command goes on"):
        job.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert len(calls) < len(job._chunks)
    assert (unfinished.folder / "snapshot.npz").exists()


@pytest.mark.parametrize(("terminal", "words"), [(True, "4/4"), (False, "4 of 4 windows")])
def test_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, caplog: Any, terminal: bool, words: str
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with caplog.at_level("INFO"), commands._Progress(4, "window") as progress:
        progress(3)
        progress(1)
    assert words in (capsys.readouterr().err if terminal else caplog.text)


def test_what_a_finished_job_left_goes_with_the_next_start(
    l2a_scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the output was in place: the unfinished result stayed for good, larger than the output."""
    out, left = tmp_path / "e.tif", tmp_path / "e.tif.partial"
    with monkeypatch.context() as killed:
        killed.setattr(store.Unfinished, "remove", lambda self: None)
        assert call(out=out, sensors={"s2_l2a": l2a_scene}) == 0
    assert left.is_dir()
    made = out.read_bytes()
    assert call(out=out, sensors={"s2_l2a": l2a_scene}) == 0
    assert (left.exists(), out.read_bytes()) == (False, made)


def test_a_job_is_known_by_its_fields_and_not_by_the_names_of_classes(l2a_scene: Path) -> None:
    date = inputs.resolve(f"s2_l2a={l2a_scene}", inputs.Declared())
    target = grid_lib.target_grid([date])
    reader = read.SceneReader([date], target)

    class Renamed(Plan):
        """The same by another name."""

    mark = run.signature(Plan(target, 64, 32, 16), reader, None)
    assert run.signature(Renamed(target, 64, 32, 16), reader, None) == mark
    assert run.signature(Plan(target, 64, 48, 16), reader, None) != mark
    shifted = target.window(0, 1, target.height, target.width)
    assert run.signature(Plan(shifted, 64, 32, 16), reader, None) != mark
    other = dataclasses.replace(target, crs=rasterio.CRS.from_epsg(32631))
    assert run.signature(Plan(other, 64, 32, 16), reader, None) != mark


def test_other_settings_do_not_resume(l2a_scene: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "e.tif"
    acquisition = inputs.resolve(f"s2_l2a={l2a_scene}", inputs.Declared())
    plan = Plan(grid_lib.target_grid([acquisition]), 96, 48, 16, batch=8)
    other = store.Unfinished(out, plan, 24, "other")
    blender = store.Blender(plan, 24)
    other.open(blender)
    other.save(blender, 1)
    assert call(out=out, sensors={"s2_l2a": l2a_scene}) == 1
    assert "belongs to other inputs" in capsys.readouterr().err


# --- formats ---


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_formats_hold_the_same_numbers(l2a_scene: Path, tmp_path: Path, dtype: str, tiny_encoder: Model) -> None:
    exact = tmp_path / "exact.tif"
    assert call(out=exact, sensors={"s2_l2a": l2a_scene}) == 0
    expected = tokens(exact)
    tolerance = {"float32": 0, "float16": 2e-3, "int8": np.nanmax(np.abs(expected)) / 127 * 0.51}[dtype]
    cog = tmp_path / "e.tif"
    assert call(f"--dtype={dtype}", out=cog, sensors={"s2_l2a": l2a_scene}) == 0
    assert np.array_equal(np.isnan(tokens(cog)), np.isnan(expected))
    assert np.nanmax(np.abs(tokens(cog) - expected)) <= tolerance
    zarr = tmp_path / "e.zarr"
    assert call(f"--dtype={dtype}", out=zarr, sensors={"s2_l2a": l2a_scene}) == 0
    header = json.loads((zarr / "embedding" / ".zarray").read_text())
    assert np.dtype(header["dtype"]) == np.dtype(dtype)
    with rasterio.open(f'ZARR:"{zarr}":/embedding') as found:  # GDAL's reader, not ours
        stored = np.moveaxis(found.read(), 0, 0)
    assert stored.size == expected.size
    assert json.loads((zarr / ".zattrs").read_text())["TERRAFM_WEIGHTS"] == tiny_encoder.weights_hash


def test_windows_as_geoparquet(l2a_scene: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    import shapely

    out = tmp_path / "w.parquet"
    assert call(out=out, sensors={"s2_l2a": l2a_scene}) == 0
    table = pq.read_table(out)
    assert set(table.column_names) == {
        "unique_id", "embedding", "timestamp", "product_id", "grid_cell", "grid_row_u", "grid_col_r", "geometry",
        "centre_lat", "centre_lon", "utm_footprint", "utm_crs", "pixel_bbox",
    }  # fmt: skip
    assert len(table) == 16
    assert len(set(table["unique_id"].to_pylist())) == 16
    geo = json.loads(table.schema.metadata[b"geo"])
    assert geo["columns"]["geometry"]["encoding"] == "WKB"
    left, top, right, bottom = table["pixel_bbox"][0].as_py()
    assert (right - left, bottom - top) == (96, 96)
    shape = shapely.from_wkb(table["geometry"][0].as_py())
    x, y = WEST + (left + 48) * 10, NORTH - (top + 48) * 10
    (lon,), (lat,) = rasterio.warp.transform(CRS, "EPSG:4326", [x], [y])
    assert shape.centroid.x == pytest.approx(lon, abs=1e-5)
    assert shape.centroid.y == pytest.approx(lat, abs=1e-5)
    assert table["centre_lat"][0].as_py() == pytest.approx(lat, abs=1e-9)
    assert np.asarray(table["embedding"][0].as_py()).shape == (24,)


def test_blocks_of_many_bands_stay_small() -> None:
    for bands, itemsize in ((768, 4), (1024, 4), (768, 1), (24, 4)):
        size = output.block_size(bands, itemsize)
        assert size % 16 == 0
        assert size * size * bands * itemsize < 64 << 20


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_overviews_are_means_of_valid_pixels(tmp_path: Path, dtype: str) -> None:
    tokens_ = np.random.default_rng(0).normal(size=(40, 1100, 3)).astype(np.float32)
    tokens_[:5, :7] = np.nan
    grid = grid_lib.Grid(rasterio.crs.CRS.from_string(CRS), WEST, NORTH, 160.0, 40, 1100)
    out = tmp_path / "e.tif"
    output.write_cog(out, tokens_, grid, output.Meta(("a", "b", "c"), {}), dtype)
    with rasterio.open(out) as found:
        assert found.overviews(1) == [2, 4]
        assert found.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        step = np.array(found.scales)[:, None, None] if dtype == "int8" else 1.0
    with rasterio.open(out, overview_level=0) as found:
        half = found.read().astype(np.float32)
        assert found.shape == (20, 550)
    quads = tokens_.reshape(20, 2, 550, 2, 3).transpose(4, 0, 2, 1, 3).reshape(3, 20, 550, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # quads without any value
        expected = np.nanmean(quads, -1)
    nodata = np.isnan(expected)
    assert np.array_equal(nodata, half == -128 if dtype == "int8" else np.isnan(half))
    assert np.abs(half * step - expected)[~nodata].max() <= {"float32": 1e-6, "float16": 2e-3, "int8": 0.04}[dtype]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory from /proc")
def test_memory_of_writing_and_of_reading_one_band(tmp_path: Path) -> None:
    # 600 x 700 tokens of 192 features are 320 MB; writing and reading one band must stay far below. With blocks of
    # 3 MB: writing takes about ten blocks, whatever the size, and ten of 50 MB would be more than the whole.
    code = """
import sys, threading, time
from pathlib import Path
import numpy as np, rasterio
from rasterio.crs import CRS
from terrafm_jax.scenes import output
from terrafm_jax.scenes.grid import Grid
# Resident memory, with the pages of mapped files, looked at all the time. The system's own peak will not do: it begins
# with the memory of the process that started this one, so that beside a large one nothing seems to be added.
def own():
    with open("/proc/self/status") as status:
        return int(next(line for line in status if line.startswith("VmRSS")).split()[1]) / 1024
def watch():
    while True:
        seen.append(own())
        time.sleep(0.002)
folder, seen = Path(sys.argv[1]), []
if sys.argv[2] == "write":
    with open(folder / "t.f32", "wb") as file:
        for row in range(600):
            file.write((np.arange(700 * 192, dtype=np.float32) % 977 - row).tobytes())
    output.block_size = lambda *_: 64
    before = own()
    threading.Thread(target=watch, daemon=True).start()
    tokens = np.memmap(folder / "t.f32", np.float32, "r", shape=(600, 700, 192))
    grid = Grid(CRS.from_epsg(32632), 0, 0, 160.0, 600, 700)
    output.write_cog(folder / "t.tif", tokens, grid, output.Meta(("f",) * 192, {}), sys.argv[3])
else:
    before = own()
    threading.Thread(target=watch, daemon=True).start()
    with rasterio.Env(GDAL_CACHEMAX=64), rasterio.open(folder / "t.tif") as file:
        assert file.read(17).shape == (600, 700)
        assert file.overviews(1) == [2]
print(max(seen) - before)
"""
    for args, limit in ((("write", "float32"), 140), (("read", ""), 140)):
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), *args], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert float(done.stdout) < limit, (args, done.stdout)


# --- points, dry run ---

PLACES = [(WEST + 1600, NORTH - 1600), (WEST + 20, NORTH - 20), (WEST - 9000, NORTH)] * 4  # more than a batch


def _csv(path: Path) -> Path:
    lons, lats = rasterio.warp.transform(CRS, "EPSG:4326", *zip(*PLACES, strict=True))
    rows = [f"p{i},{lon},{lat}" for i, (lon, lat) in enumerate(zip(lons, lats, strict=True))]
    path.write_text("\n".join(["name,lon,lat", *rows]))
    return path


def test_vectors_at_points(l2a_scene: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "p.parquet"
    assert call(f"--points={_csv(tmp_path / 'p.csv')}", out=out, sensors={"s2_l2a": l2a_scene}) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"p.csv", "p.parquet"}
    table = pq.read_table(out)
    assert table["name"].to_pylist() == [f"p{i}" for i in range(12)]
    for column in ("embedding", "class_token"):
        vectors = np.array(table[column].to_pylist()).reshape(4, 3, -1)
        assert np.isfinite(vectors[:, :2]).all()
        assert np.isnan(vectors[:, 2]).all(), "outside of the scene"
        assert np.allclose(vectors[1:, :2], vectors[:1, :2], atol=1e-4)
        assert np.abs(vectors[0, 0] - vectors[0, 1]).max() > 1e-2
    # One window around the place: the four tokens at its middle.
    part = tmp_path / "part.tif"
    with rasterio.open(l2a_scene) as source:
        window = rasterio.windows.Window(160 - 48, 160 - 48, 96, 96)
        write(
            part, source.read(window=window), names=SENSORS["s2_l2a"].band_names, west=WEST + 1120, north=NORTH - 1120
        )
    alone = tmp_path / "alone.tif"
    assert call(out=alone, sensors={"s2_l2a": part}) == 0
    assert np.allclose(table["embedding"][0].as_py(), tokens(alone)[2:4, 2:4].mean((0, 1)), atol=1e-3)


def _places(l2a_scene: Path, out: Path, tiny_encoder: Model, inside: np.ndarray | None = None) -> tuple[Places, Any]:
    acquisition = inputs.resolve(f"s2_l2a={l2a_scene}", inputs.Declared())
    reader = read.SceneReader([acquisition], grid_lib.target_grid([acquisition]))
    encode = WindowEncoder(tiny_encoder, reader.bands, 3)
    job = Places(encode, reader, Plan(reader.grid, 96, 0, 16, batch=3), np.array(PLACES), 24, inside)
    return job, store.UnfinishedPlaces(out, 24, "mark")


def test_interrupted_places_end_with_the_same_bytes(l2a_scene: Path, tmp_path: Path, tiny_encoder: Model) -> None:
    whole, unfinished = _places(l2a_scene, tmp_path / "whole.parquet", tiny_encoder)
    expected = whole.run(unfinished)
    shown: list[int] = []
    for after in (1, 1, None):
        job, unfinished = _places(l2a_scene, tmp_path / "parts.parquet", tiny_encoder)
        if after:
            with pytest.raises(run.Stopped, match="of 8 places, everything is kept"):
                job.run(unfinished, stop_after=after)
            # Written after the last snapshot, as a kill leaves it: it must be overwritten.
            unfinished.write(unfinished.open(), np.full((2, 2, 24), 7.0))
        else:
            found = job.run(unfinished, progress=shown.append)
    assert shown == [4 + 6, 2], "places outside and done before, then the rest"
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found, expected, strict=True))
    with pytest.raises(SceneError, match="belongs to other inputs"):
        store.UnfinishedPlaces(tmp_path / "parts.parquet", 24, "other").open()


def test_places_outside_of_the_area_are_not_wanted(l2a_scene: Path, tmp_path: Path, tiny_encoder: Model) -> None:
    inside = np.ones((19, 21), bool)
    inside[0, 0] = False  # the second of three places
    job, _ = _places(l2a_scene, tmp_path / "p.parquet", tiny_encoder, inside)
    assert job.wanted.tolist() == [0, 3, 6, 9]


def test_dry_run_of_places_says_what_it_would_take(l2a_scene: Path, tmp_path: Path, caplog: Any) -> None:
    given = f"--points={_csv(tmp_path / 'p.csv')}"
    with caplog.at_level("INFO"):
        assert call("--dry-run", given, out=tmp_path / "p.parquet", sensors={"s2_l2a": l2a_scene}) == 0
    assert "dry run: 8 places in 1 batches" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_dry_run_says_what_it_would_take(l2a_scene: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "e.tif"
    with caplog.at_level("INFO"):
        assert call("--dry-run", out=out, sensors={"s2_l2a": l2a_scene}) == 0
    for word in ("windows", "memory", "s encoding", "19 x 21 tokens"):
        assert word in caplog.text
    assert not out.exists()
    assert not list(tmp_path.iterdir())


def test_the_benchmark_says_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip("torch")
    from benchmarks import embed_scene
    from terrafm_jax.export import formats

    formats.write_folder(sample(head=False), tmp_path / "folder")
    flags = f"--checkpoint {tmp_path / 'folder'} --pixels 240 --sensors s2_l2a,s1 --batch 8 --repeats 2 --torch"
    monkeypatch.setattr(sys, "argv", ["embed_scene", *flags.split()])
    embed_scene.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["windows"], found["encoded_with_padding"], found["gsd"]) == (4, 4, 10)
    assert found["square_kilometers"] == pytest.approx(2.4 * 2.4)
    assert {name: len(turns) for name, turns in found["wall_seconds"].items()} == {"encode": 2, "scene": 2, "torch": 2}
    assert found["encoder_share_of_processor_time"] > 0
