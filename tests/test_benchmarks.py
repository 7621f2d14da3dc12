"""Benchmarks in small: the ablation, and a comparison, where nothing but jax, flax, optax and torch can be imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUICK_FLAGS, child_environment, run_module

from benchmarks import ablation, end_to_end, everything, input_pipeline

# Stands for an image that lacks the rest of what the project installs.
BARE = """
import importlib.util
import sys

class Absent:
    names = {"grain", "array_record", "tensorflow", "tensorflow_datasets", "ml_collections", "rasterio", "pyarrow",
             "pandas", "tensorboardX", "tqdm", "sklearn", "h5py"}

    def find_spec(self, name, path=None, target=None):  # torch looks for some of these without importing them
        return importlib.util.spec_from_loader(name, self) if name.partition(".")[0] in self.names else None

    def create_module(self, spec):
        raise ModuleNotFoundError(f"No module named {spec.name!r} (bare install)", name=spec.name)

    def exec_module(self, module):
        raise AssertionError(module)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
def test_comparison_runs_on_a_bare_install(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "sitecustomize.py").write_text(BARE)
    out = tmp_path / "compare.json"
    words = "--size s --batch 2 --dtype float32 --steps 1 --rounds 1 --locals 1 --prototypes 64 --meters 960"
    command = [sys.executable, "-m", "benchmarks.compare", *words.split(), "--peers", "peer_eager", "--out", str(out)]
    env = child_environment(PYTHONPATH=str(tmp_path))
    check = subprocess.run([sys.executable, "-c", "import grain"], env=env, capture_output=True, text=True)
    assert "bare install" in check.stderr
    done = subprocess.run(
        [*command, "--set", "depth=1"], cwd=root, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found == json.loads(done.stdout.strip().splitlines()[-1])
    assert found["images_per_second"].keys() == {"ours", "peer_eager"}
    assert found["ours_over_peer"] > 0
    ours = found["results"]["ours"]
    assert ours["finite"]
    assert ours["versions"]["jax"]
    assert ours["hardware"] == "cpu"
    assert ours["compile_seconds"] > 0
    assert found["left_out"] == {}
    for said in (found, *found["results"].values()):
        assert said["command"].startswith("python -m benchmarks.")
        assert said["date"]
        assert "cores" in said["machine"]
        assert "gpu" in said
    assert "peer_eager" in everything.headline("compare_b", found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "flags", "keys"),
    [
        (
            "input_pipeline",
            "--tiles 16 --side 48 --seconds 0.1 --geotiffs 8 --memory-steps 4",
            ("loader", "share_of_plain_files", "times_torch_rasterio", "resident_megabytes"),
        ),
        (
            "data_prep",
            "--cells 1 --cell-size 240 --tile-size 120 --cells-per-shard 1 --repeat 1",
            ("ratio_cpu", "cells_per_hour_per_core", "major_tom_core_hours", "compression"),
        ),
    ],
)
def test_reading_and_preparation_say_what_was_measured_on_what(
    module: str, flags: str, keys: tuple[str, ...], root: Path
) -> None:
    pytest.importorskip("torch")
    command = [sys.executable, "-m", f"benchmarks.{module}", *flags.split()]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["command"] == f"python -m benchmarks.{module} {flags}"
    assert {"python", "numpy", "rasterio", "array_record"} <= set(found["versions"])
    assert "cores" in found["machine"]
    assert all(found[key] for key in keys)


def test_end_to_end_counts_the_bytes_it_reads_and_ships(tmp_path: Path) -> None:
    input_pipeline.write_records(tmp_path, 16, 48, "uncompressed")
    sizes = "width=48 depth=1 heads=3 fusion_heads=4 prototypes=64 locals=1 global_size=32 local_size=16"
    words = f"--data {tmp_path} --batch 8 --dtype float32 --steps 2 --rounds 1 --echo 2 --set".split()
    found = end_to_end.main([*words, *sizes.split()])
    stored = sum(path.stat().st_size for path in tmp_path.glob("*array_record*"))
    assert found["bytes_read_per_image"] == stored / 16 / 2
    # Per tile of 480 m in bytes: S1 at 10 m; both products of Sentinel-2 at 10, 20 and 60 m. Masks add a bit a pixel.
    pixels = 2 * 48**2 * 2 + 2 * (4 * 48**2 + 6 * 24**2 + 2 * 8**2) * 2
    assert pixels / 2 < found["bytes_shipped_per_image"] < 1.1 * pixels / 2
    assert found["images_per_second"].keys() == {"resident", "from_disk"}
    assert found["from_disk_over_resident"] > 0
    assert 0 < found["feeding_share"] < 1
    assert "from disk" in everything.headline("b_end_to_end", found)


@pytest.mark.slow
def test_ablation_trains_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rasterio")
    monkeypatch.setenv("XLA_FLAGS", QUICK_FLAGS)  # for the runs that it starts
    cells, tiles, out = (tmp_path / name for name in ("cells", "tiles", "out"))
    for command in (
        ("data_prep.synthetic", "--out", cells, "--cells", 12, "--heldout", 12, "--validation", 12, "--cell-size", 120),
        ("data_prep.majortom", "--source", cells, "--worldcover", cells / "worldcover",
         "--splits", cells / "splits.csv", "--tile-size", 60, "--out", tiles, "--tolerate", 0.5),
    ):  # fmt: skip
        done = run_module(*command)
        assert done.returncode == 0, done.stderr
    small = [
        "total_steps=2", "batch_size=8", "model.width=32", "model.heads=2", "model.depth=1", "model.prototypes=16",
        "views.global_size=32", "views.local_size=16", "views.locals=1", "knn.every=0", "log.pictures=False",
    ]  # fmt: skip
    arguments = ["--data", str(tiles), "--out", str(out), "--rows", "single", "full", "--seeds", "0", "--size", "64"]
    arguments += ["--set", *(f"config.{word}" for word in small)]
    assert ablation.main(arguments) == 0
    found = json.loads((out / "ablation.json").read_text())
    rows = {(row["row"], row["input"]): row for row in found["rows"]}
    assert set(rows) == {
        (name, given) for name in ("raw band statistics", "random init", "+ dual centering")
        for given in ("S2 L2A", "all sensors")
    } | {("single sensor", "S2 L2A")}  # fmt: skip
    assert all(0 <= row["top1"][0] <= 100 for row in rows.values())
    first = next(d for d in found["differences"] if d["row"] == "single sensor")
    expected = rows["single sensor", "S2 L2A"]["top1"][0] - rows["random init", "S2 L2A"]["top1"][0]
    assert first["top1"][0] == pytest.approx(expected)
    assert first["top1_tiles"][0] == pytest.approx(expected)
    assert (out / "ablation.png").stat().st_size > 10_000
