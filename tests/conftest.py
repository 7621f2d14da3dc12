"""Shared test set-up: 8 fake CPU devices, a persistent compilation cache, strict rank promotion, sample data."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest
from absl import flags

import terrafm_jax  # noqa: F401  sets an XLA flag that CPU results depend on

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("TERRAFM_TEST_CACHE", Path(tempfile.gettempdir()) / "terrafm_jax_test_cache"))
# Subprocesses (commands under test) share the cache.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder with real Sentinel tiles; tests that ask for it are skipped where it is absent."""
    folder = Path(os.environ.get("TERRAFM_REAL_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "MANIFEST.csv").exists():
        pytest.skip("no real Sentinel tiles here (TERRAFM_REAL_DATA)")
    return folder


def run_module(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m ARGUMENTS`` in the checkout and returns what it printed; never raises on its exit code."""
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, **options)


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic cells in Major-TOM's layout, made by the public command; 120 px, four 60-px tiles each."""
    folder = tmp_path_factory.mktemp("synthetic")
    done = run_module("data_prep.synthetic", "--out", folder, "--cells", "32", "--seed", "7", "--cell-size", "120")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def prepared(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of those cells, made by the public command."""
    folder = tmp_path_factory.mktemp("prepared") / "tiles"
    done = run_module(
        "data_prep.majortom", "--source", synthetic, "--worldcover", synthetic / "worldcover", "--out", folder,
        "--tile-size", "60", "--workers", "2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder


# --- whole scenes ---


@pytest.fixture(scope="session")
def tiny_encoder() -> object:
    """A tiny network with random weights, as ``terrafm_jax.load`` returns it."""
    from scenes_fake import tiny_model

    return tiny_model()


@pytest.fixture
def loaded(tiny_encoder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--checkpoint`` means the tiny network, whatever it names."""
    from terrafm_jax import embed

    monkeypatch.setattr(embed, "_load", lambda args: tiny_encoder)


@pytest.fixture(scope="session")
def l2a_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Level-2A scene of 300 x 330 px at 10 m."""
    from scenes_fake import optical

    return optical(tmp_path_factory.mktemp("scene") / "l2a.tif")
