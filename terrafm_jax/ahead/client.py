"""Devices of an absent TPU: libtpu can compile for them, but nothing can run on them."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from jax.stages import Compiled, Lowered

from terrafm_jax.ahead import hlo, kernels
from terrafm_jax.ahead.chips import Topology


def available() -> bool:
    """Whether the libtpu wheel is installed (``pip install terrafm_jax[tpu]``)."""
    return importlib.util.find_spec("libtpu") is not None


def prepare_environment() -> None:
    """Lets libtpu start on a machine without a TPU; call before the first compile-only client.

    By default libtpu queries a metadata server that does not exist here, and takes a lock that keeps
    a second process from compiling at the same time.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    _bundles()


@functools.lru_cache(maxsize=1)
def _bundles() -> Path:
    """Folder to which libtpu dumps the bundles of all it compiles, deleted when the process ends.

    Its flags are read once, when libtpu is loaded, and cannot select kernels: a step of 12 layers takes 0.6 GB.
    """
    folder = Path(tempfile.mkdtemp(prefix="terrafm_bundles_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = f"{given} {kernels.FLAGS.format(folder=folder)}".strip()
    return folder


def compile_only_devices(topology: Topology) -> list:
    """All devices of ``topology``, slice by slice. Raises RuntimeError where libtpu is not installed."""
    if not available():
        raise RuntimeError(f"compiling for {topology.name} needs the libtpu wheel: pip install 'terrafm_jax[tpu]'")
    prepare_environment()
    from jax.experimental import topologies

    grid = "x".join(map(str, topology.shape))
    rings = [topology.wraps(axis) for axis in range(len(topology.shape))]
    options: dict = {"chip_config_name": topology.chip.config, "wrap": (*rings, False)[:3]}
    if topology.slices > 1:
        options["num_slices"] = topology.slices
    name = f"{topology.chip.name}:{grid}"
    found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    if len(found) != topology.chips:
        raise RuntimeError(f"{topology.name}: expected {topology.chips} devices, the compiler lists {len(found)}")
    return list(found)


def compile_only(
    lowered: Lowered, options: Mapping[str, str | bool | int] | None = None
) -> tuple[Compiled, hlo.Module]:
    """Compiles for absent devices, with XLA ``options`` by name, without the persistent cache.

    That cache accepts the executable of a compile-only client but cannot read it back.

    Returns:
      The executable, and its program with the cycles of Pallas kernels filled in.
    """
    import jax

    key = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, key)
    jax.config.update(key, float("inf"))
    try:
        compiled = lowered.compile(compiler_options=dict(options or {}))
    finally:
        jax.config.update(key, before)
    module = hlo.parse(compiled.as_text())
    kernels.fill(module, _bundles())
    return compiled, module
