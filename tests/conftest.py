"""Shared test set-up: 8 fake CPU devices, a persistent compilation cache, strict rank promotion, sample data."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
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
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
flags.FLAGS.mark_as_parsed()  # grain's workers read absl flags

# A train step compiles in a third of the time without XLA's optimizations. Commands under test always do without;
# this process only where it is told to: what compares numbers with a reference keeps the compiler as users have it.
# XLA ends the process at a flag that it does not know: jaxlib 0.12 has no other emitters any more.
QUICK_COMPILE = "--xla_backend_optimization_level=0"
if jax.__version_info__ < (0, 11):
    QUICK_COMPILE += " --xla_cpu_use_fusion_emitters=false"
_FLAGS = os.environ.get("XLA_FLAGS", "")  # of a worker they hold those of the process that started it
QUICK_FLAGS = _FLAGS if QUICK_COMPILE in _FLAGS else f"{_FLAGS} {QUICK_COMPILE}".strip()
if os.environ.get("TERRAFM_TEST_COMPILE") == "quick":  # XLA reads its flags at the first computation
    os.environ["XLA_FLAGS"] = QUICK_FLAGS

# Files whose tests carry the marker ``reference``.
REFERENCE = {
    "test_models_parity", "test_models_fusion", "test_models_compute", "test_objective", "test_optim",
    "test_step_torch", "test_views", "test_views_resample", "test_stems", "test_export",
    "test_export_hub",
}  # fmt: skip

# The files that take longest, longest first: the last one to start should be short. The order is all that counts.
LONGEST = (
    "test_training_program", "test_multiprocess", "test_benchmarks", "test_notebooks", "test_finetune", "test_step",
    "test_demo", "test_launch_local", "test_bucket", "test_export", "test_crossvalidate", "test_evals_session",
    "test_data_prep_robust", "test_data_prep_geotiff", "test_synthetic_difficulty", "test_synthetic",
    "test_models_parity", "test_models_compute", "test_step_torch", "test_scenes_jobs", "test_scenes_embed",
    "test_data_prep_remote",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the references, and puts long files first, so that the workers, which take whole files, end together."""
    rank = {name: i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    for item in items:
        if item.path.stem in REFERENCE:
            item.add_marker("reference")


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


def child_environment(**more: str) -> dict[str, str]:
    """The environment of a command under test."""
    return {**os.environ, "XLA_FLAGS": QUICK_FLAGS, **more}


def run_module(
    *arguments: object, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """Runs ``python -m ARGUMENTS`` in the checkout and returns what it printed; never raises on its exit code."""
    command = [sys.executable, "-m", *map(str, arguments)]
    env = env or child_environment()
    return subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600, check=False, **options
    )


# --- data and runs that several files share ---


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder ``name`` of this test session, filled by the first worker that asks; the others wait for it."""
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, complete = base / name, base / f"{name}.complete"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not complete.exists():
            shutil.rmtree(folder, ignore_errors=True)  # half a folder of a worker that failed
            make(folder)
            complete.touch()
    return folder


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic cells in Major-TOM's layout, made by the public command; 120 px, four 60-px tiles each."""

    def make(folder: Path) -> None:
        done = run_module("data_prep.synthetic", "--out", folder, "--cells", 32, "--seed", 7, "--cell-size", 120)
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "synthetic", make)


@pytest.fixture(scope="session")
def prepared(synthetic: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared data set of those cells, made by the public command."""

    def make(folder: Path) -> None:
        done = run_module(
            "data_prep.majortom", "--source", synthetic, "--worldcover", synthetic / "worldcover", "--out", folder,
            "--tile-size", 60, "--workers", 2,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "tiles", make)


@pytest.fixture(scope="session")
def straight(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of forty uninterrupted steps with a checkpoint every other step; every fourth one stays."""
    import tiny_training

    def make(folder: Path) -> None:
        done = tiny_training.train(prepared, folder, *tiny_training.FORTY, "--config.checkpoint.keep_every=4")
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "straight", make)


# --- whole scenes ---


@pytest.fixture(scope="session")
def tiny_encoder() -> object:
    """A tiny network with random weights, as ``terrafm_jax.load`` returns it."""
    from scenes_fake import tiny_model

    return tiny_model()


@pytest.fixture
def loaded(tiny_encoder: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """``--checkpoint`` means the tiny network, whatever it names."""
    from terrafm_jax.scenes import commands

    monkeypatch.setattr(commands, "_load", lambda args: tiny_encoder)


@pytest.fixture(scope="session")
def l2a_scene(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Level-2A scene of 300 x 330 px at 10 m."""
    from scenes_fake import optical

    return optical(tmp_path_factory.mktemp("scene") / "l2a.tif")
