"""Real processes on loopback (jax.distributed, gloo): the same training as in one process, and what ends a job."""

from __future__ import annotations

import json
import os
import runpy
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


# Training whose process 1 is handed every batch late.
LATE = """
import runpy, time
import jax
from terrafm_jax.data import pipeline

make = pipeline.make_loader

def late(*args, **kwargs):
    loader = make(*args, **kwargs)
    if jax.process_index() == 1:
        kind, take, last = type(loader), type(loader).__next__, [time.monotonic()]

        def take_late(self):
            # By a step at least: on a crowded machine half a second is too small a part of one to be told.
            time.sleep(max(0.5, min(5.0, time.monotonic() - last[0])))
            batch = take(self)
            last[0] = time.monotonic()
            return batch

        kind.__next__ = take_late
    return loader

pipeline.make_loader = late
runpy.run_module("terrafm_jax.main", run_name="__main__", alter_sys=True)
"""


def launch(
    data: Path, workdir: Path, processes: int, devices: int, *extra: str, module: Path | None = None
) -> subprocess.Popen:
    command = ["launch/local.sh", "--processes", str(processes), "--devices", str(devices)]
    env = child_environment(PYTHON=sys.executable, RESTART_DELAY="0")
    if module is not None:
        command += ["--module", module.stem]
        env["PYTHONPATH"] = f"{module.parent}{os.pathsep}{env.get('PYTHONPATH', '')}"
    command += ["--", *FLAGS, f"--workdir={workdir}", f"--config.data.dir={data}", *extra]
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
    """Each process reads its own part of every batch; the second half runs with another number of them.

    In the first half process 1 gets its batches late: that is said, and changes no number.
    """
    (tmp_path / "late.py").write_text(LATE)
    for processes, devices, extra, module in (
        (2, 2, ["--config.stop_at_step=20"], tmp_path / "late.py"), (4, 1, [], None),
    ):  # fmt: skip
        job = launch(prepared, tmp_path / "run", processes, devices, *extra, module=module)
        assert job.wait(timeout=900) == 0, log_of(tmp_path / "run").read_text()
    said = [text for row in rows(tmp_path / "run") if row["step"] <= 20 for text in row.get("warnings", ())]
    late = [text for text in said if text.startswith("stragglers")]
    assert any("process 1 (" in text for text in late), said
    waits = [row["device_share"] for row in rows(tmp_path / "run") if row["step"] < 20 and "device_share" in row]
    assert np.median(waits) > 0.2  # process 0 waits for process 1, in whichever of its calls
    assert f"{late[0]}\n" in log_of(tmp_path / "run").read_text()
    starts = [(row["processes"], row["devices"], row["step"]) for row in rows(tmp_path / "run") if "processes" in row]
    assert starts == [(2, 4, 0), (4, 4, 20)]
    assert_same_training(tmp_path / "run", reference)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for_step(job: subprocess.Popen, workdir: Path, starts: int) -> None:
    """Until the start with this number has logged a step."""
    limit = time.monotonic() + 600
    while True:
        found = rows(workdir)
        begun = [i for i, row in enumerate(found) if row.get("event") == "start"]
        if len(begun) >= starts and any("loss" in row for row in found[begun[starts - 1] :]):
            return
        assert job.poll() is None, log_of(workdir).read_text()
        assert time.monotonic() < limit, log_of(workdir).read_text()
        time.sleep(0.005)


PROMPTLY = 150  # seconds, generously: a heartbeat is missed after 30, on a machine that others crowd


def assert_says_why(log: Path) -> None:
    """The line of the process that is left: ours where the step raised, else JAX's, which ends it in another thread."""
    text = log.read_text()
    assert "error: process 0 of 2: the step broke off" in text or "indicates that another task died" in text, text


def wait_for_text(path: Path, text: str, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while text not in path.read_text():
        assert time.monotonic() < limit, path.read_text()
        time.sleep(0.05)


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
    wait_for_text(log_of(workdir), "restart 1 of 3", PROMPTLY)
    lines = log_of(workdir).read_text().splitlines()
    restart = next(i for i, line in enumerate(lines) if "restart 1 of 3" in line)
    assert "the job ended because of process 1 of 2 (SIGKILL, exit code 137)" in lines[restart - 1], lines
    assert job.wait(timeout=900) == 0, log_of(workdir).read_text()
    starts = [row["step"] for row in rows(workdir) if row.get("event") == "start"]
    assert starts == [0, step, step], log_of(workdir).read_text()
    log = log_of(workdir).read_text()
    for line in ("preempted with a checkpoint: starting again", "restart 1 of 3"):
        assert line in log, log
    # The other one notices by itself, too, and may have ended before the launcher looks again.
    assert "stopping the others" in log or "the step broke off" in log, log
    assert_same_training(workdir, reference)


def two_processes(data: Path, workdir: Path, *extra: str) -> list[subprocess.Popen]:
    """A job without a launcher; what each process says goes to ``0.log`` and ``1.log`` beside the workdir."""
    address = f"localhost:{runpy.run_path(str(ROOT / 'launch/free_port.py'))['free_port']()}"
    jobs = []
    for i in range(2):
        command = [sys.executable, "-m", "terrafm_jax.main", *FLAGS, f"--workdir={workdir}"]
        command += [f"--config.data.dir={data}", "--cpu_devices=2", "--distributed", f"--coordinator={address}", *extra]
        with (workdir.parent / f"{i}.log").open("w") as log:
            jobs.append(
                subprocess.Popen(
                    [*command, "--processes=2", f"--process={i}"], cwd=ROOT, env=child_environment(), stderr=log
                )
            )
    log_of(workdir).touch()
    return jobs


def test_ctrl_c_to_one_process_is_the_same_end_for_all(prepared: Path, tmp_path: Path) -> None:
    """The one that was interrupted ended with 0 and the others with 42, on which a launcher would have begun again."""
    workdir = tmp_path / "run"
    jobs = two_processes(prepared, workdir, "--config.checkpoint.every=1000")
    try:
        wait_for_step(jobs[0], workdir, 1)
        jobs[1].send_signal(signal.SIGINT)
        codes = [job.wait(timeout=PROMPTLY) for job in jobs]
        assert codes == [0, 0], [(tmp_path / f"{i}.log").read_text() for i in range(2)]
        (step,) = saved(workdir)
        assert 0 < step < STEPS
    finally:
        for job in jobs:
            job.kill()


def test_a_death_ends_the_other_process_without_a_launcher(prepared: Path, tmp_path: Path) -> None:
    """Where each host starts its own process and nobody watches them all, the one that is left must end by itself."""
    workdir = tmp_path / "run"
    jobs = two_processes(prepared, workdir)
    try:
        wait_for_step(jobs[0], workdir, 1)
        jobs[1].kill()
        assert jobs[0].wait(timeout=PROMPTLY) != 0, (tmp_path / "0.log").read_text()
        assert_says_why(tmp_path / "0.log")
    finally:
        for job in jobs:
            job.kill()
