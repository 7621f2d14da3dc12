"""Shared test set-up: 8 fake CPU devices, a persistent compilation cache, strict rank promotion, real tiles."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")

import jax
import pytest
from absl import flags

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("TERRAFM_TEST_CACHE", Path(tempfile.gettempdir()) / "terrafm_jax_test_cache"))

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
