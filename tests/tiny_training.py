"""Tiny pretraining runs through the public command, and the bits of their checkpoints."""

from __future__ import annotations

import subprocess
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from conftest import run_module

TINY = (
    "--config.views.global_size=32", "--config.views.local_size=16", "--config.model.depth=1", "--config.knn.every=0",
    "--config.log.pictures=False",
)  # fmt: skip
# The schedules' length is part of the compiled step: runs of one length share it, wherever they stop.
FORTY = (*TINY, "--config.total_steps=40")


def command(data: Path | str, workdir: Path | str, *extra: str, config: str = "demo:runlocal") -> list[str]:
    name, _, argument = config.partition(":")
    return [
        "terrafm_jax.main", f"--config=configs/{name}.py:{argument}", f"--workdir={workdir}",
        f"--config.data.dir={data}", *extra,
    ]  # fmt: skip


def train(
    data: Path, workdir: Path, *extra: str, config: str = "demo:runlocal", **options: object
) -> subprocess.CompletedProcess[str]:
    return run_module(*command(data, workdir, *extra, config=config), **options)


def state_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(workdir.absolute() / "checkpoints" / str(step) / "state")
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Bit by bit."""
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].tobytes() != b[k].tobytes()]
    assert not different, different
