"""The step's benchmarks: a comparison in small, where nothing but jax, flax, optax and torch can be imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Stands for an image that lacks the rest of what the project installs.
BARE = """
import sys

class Absent:
    names = {"grain", "array_record", "tensorflow", "tensorflow_datasets", "ml_collections", "rasterio", "pyarrow",
             "pandas", "tensorboardX", "tqdm", "sklearn", "h5py"}

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r} (bare install)", name=name)

sys.meta_path.insert(0, Absent())
"""


@pytest.mark.slow
def test_comparison_runs_on_a_bare_install(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    (tmp_path / "sitecustomize.py").write_text(BARE)
    out = tmp_path / "compare.json"
    words = "--size s --batch 2 --dtype float32 --steps 1 --rounds 1 --locals 1 --prototypes 64 --meters 960"
    command = [sys.executable, "-m", "benchmarks.compare", *words.split(), "--peers", "peer_eager", "--out", str(out)]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    check = subprocess.run([sys.executable, "-c", "import grain"], env=env, capture_output=True, text=True)
    assert "bare install" in check.stderr
    done = subprocess.run(
        [*command, "--set", "depth=1"], cwd=root, env=env, capture_output=True, text=True, timeout=300
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
