"""Real processes on loopback (jax.distributed, gloo): the same training as in one process, and what ends a job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, child_environment, run_module

pytestmark = pytest.mark.slow

STEPS = 40
FLAGS = (
    "--config=configs/demo.py:runlocal", f"--config.total_steps={STEPS}", "--config.checkpoint.every=20",
    "--config.views.global_size=32", "--config.views.local_size=16", "--config.model.depth=1",
    "--config.log.pictures=False", "--config.mesh.fsdp=2", "--config.knn.every=40", "--config.knn.batch_size=16",
)  # fmt: skip


def launch(data: Path, workdir: Path, processes: int, devices: int, *extra: str) -> subprocess.Popen:
    command = ["launch/local.sh", "--processes", str(processes), "--devices", str(devices), "--", *FLAGS]
    command += [f"--workdir={workdir}", f"--config.data.dir={data}", *extra]
    env = child_environment(PYTHON=sys.executable, RESTART_DELAY="0")
    with log_of(workdir).open("a") as log:  # a pipe that nobody reads would block the job once it is full
        return subprocess.Popen(command, cwd=ROOT, env=env, stderr=log)


def log_of(workdir: Path) -> Path:
    return workdir.with_suffix(".log")


def rows(workdir: Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def losses(workdir: Path) -> dict[int, float]:
    """Loss by step; of a repeated step the last."""
    return {row["step"]: row["loss"] for row in rows(workdir) if "loss" in row}


def accuracy(workdir: Path) -> list[float]:
    return [row["knn_top1"] for row in rows(workdir) if "knn_top1" in row]


def saved(workdir: Path) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def state_of(workdir: Path) -> dict[str, np.ndarray]:
    folder = workdir.absolute() / "checkpoints" / str(STEPS) / "state"
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as reader:
        saved_as = reader.metadata(folder).item_metadata.tree  # four devices of several processes; read it with one
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved_as)
        tree = reader.restore(folder, like)
    return {jax.tree_util.keystr(p): np.asarray(x) for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def assert_same_training(workdir: Path, reference: Path) -> None:
    """Every loss within 1e-4 (another or a missing example changes it by more) and every tensor of the state within
    1 % of its largest value: what rounding in another order becomes over forty steps of Adam.
    """
    expected, found = losses(reference), losses(workdir)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-4)
    assert accuracy(workdir)[-1] == pytest.approx(accuracy(reference)[-1], abs=0.05)
    theirs, mine = state_of(reference), state_of(workdir)
    assert mine.keys() == theirs.keys()
    for name in theirs:
        a, b = (with_gradient(name, state[name]) for state in (mine, theirs))
        assert np.abs(a - b).max() <= 0.01 * max(np.abs(b).max(), 1e-6), name


def with_gradient(name: str, value: np.ndarray) -> np.ndarray:
    """Without the bias of the keys: softmax does not see it, so its gradient is rounding, which Adam blows up."""
    return np.delete(value.reshape(3, -1), 1, axis=0) if name.endswith("['qkv']['bias']") else value


@pytest.fixture(scope="module")
def reference(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process with four devices, forty uninterrupted steps."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    arguments = [*FLAGS, f"--workdir={workdir}", f"--config.data.dir={prepared}", "--cpu_devices=4"]
    done = run_module("terrafm_jax.main", *arguments)
    assert done.returncode == 0, done.stderr
    return workdir


def test_two_processes_then_four_equal_one(prepared: Path, reference: Path, tmp_path: Path) -> None:
    """Each process reads its own part of every batch; the second half runs with another number of them."""
    for processes, devices, extra in ((2, 2, ["--config.stop_at_step=20"]), (4, 1, [])):
        job = launch(prepared, tmp_path / "run", processes, devices, *extra)
        assert job.wait(timeout=300) == 0, log_of(tmp_path / "run").read_text()
    starts = [(row["processes"], row["devices"], row["step"]) for row in rows(tmp_path / "run") if "processes" in row]
    assert starts == [(2, 4, 0), (4, 4, 20)]
    assert_same_training(tmp_path / "run", reference)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_step(job: subprocess.Popen, workdir: Path, starts: int) -> None:
    """Until the start with this number has logged a step."""
    limit = time.monotonic() + 240
    while True:
        found = rows(workdir)
        begun = [i for i, row in enumerate(found) if row.get("event") == "start"]
        if len(begun) >= starts and any("loss" in row for row in found[begun[starts - 1] :]):
            return
        assert job.poll() is None, log_of(workdir).read_text()
        assert time.monotonic() < limit, log_of(workdir).read_text()
        time.sleep(0.005)


def test_a_signal_saves_and_a_death_ends_the_job_and_both_are_resumed(
    prepared: Path, reference: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    job = launch(prepared, workdir, 2, 2, "--config.checkpoint.every=1000")
    wait_for_step(job, workdir, 1)
    os.kill(children(job.pid)[1], signal.SIGTERM)  # one process alone is told, all save the same step
    wait_for_step(job, workdir, 2)
    (step,) = saved(workdir)
    assert 0 < step < STEPS

    os.kill(children(job.pid)[1], signal.SIGKILL)
    assert job.wait(timeout=300) == 0, log_of(workdir).read_text()
    starts = [row["step"] for row in rows(workdir) if row.get("event") == "start"]
    assert starts == [0, step, step], log_of(workdir).read_text()
    log = log_of(workdir).read_text()
    for line in ("preempted with a checkpoint: starting again", "stopping the others", "restart 1 of 3"):
        assert line in log, log
    assert_same_training(workdir, reference)
