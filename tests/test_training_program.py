"""The training program end to end, through its public command: resume, kill, signals, faults, every config."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from conftest import ROOT, run_module

pytestmark = pytest.mark.slow

TINY = (
    "--config.views.global_size=32", "--config.views.local_size=16", "--config.model.depth=1", "--config.knn.every=0",
    "--config.log.pictures=False",
)  # fmt: skip


def command(data: Path, workdir: Path, *extra: str, config: str = "demo:runlocal") -> list[str]:
    name, _, argument = config.partition(":")
    return [
        "terrafm_jax.main", f"--config=configs/{name}.py:{argument}", f"--workdir={workdir}",
        f"--config.data.dir={data}", *extra,
    ]  # fmt: skip


def train(data: Path, workdir: Path, *extra: str, config: str = "demo:runlocal", **options: object):
    return run_module(*command(data, workdir, *extra, config=config), **options)


def state_of(workdir: Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint by its path."""
    with ocp.StandardCheckpointer() as reader:
        tree = reader.restore(workdir.absolute() / "checkpoints" / str(step) / "state")
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    different = [k for k in a if a[k].tobytes() != b[k].tobytes()]
    assert not different, different


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty uninterrupted steps with a checkpoint every other step."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = train(prepared, workdir, *TINY, "--config.total_steps=40")
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize("config", ["vits", "vitb", "vitl", "demo"])
def test_every_config_runs_as_a_smoke_test_of_itself(config: str, prepared: Path, tmp_path: Path) -> None:
    done = train(prepared, tmp_path / "run", config=f"{config}:runlocal")
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"DONE", "metrics.jsonl", "config_resolved.json", "parameters.txt", "statistics.json", "views.png",
            "checkpoints", "teacher"} <= names  # fmt: skip
    for line in ("arguments and temporaries", "goodput"):  # what a step needs before it runs; what came of the time
        assert line in done.stderr
    found = rows(tmp_path / "run")
    losses = [row["loss"] for row in found if "loss" in row]
    assert len(losses) == 4
    assert np.all(np.isfinite(losses))
    for monitor in ("teacher_entropy", "kl", "center_norm", "center_distance", "feature_std", "grad_norm"):
        assert monitor in found[-2] or monitor in found[-1], monitor
    assert any("knn_top1" in key for row in found for key in row)


@pytest.mark.parametrize("row", ["single", "modality", "fusion"])
def test_every_row_of_the_ablation_runs(row: str, prepared: Path, tmp_path: Path) -> None:
    done = train(prepared, tmp_path / "run", *TINY, config=f"vits:{row},runlocal")
    assert done.returncode == 0, done.stderr


def test_four_steps_equal_two_and_two(prepared: Path, tmp_path: Path) -> None:
    for name, stops in (("once", [0]), ("twice", [2, 0])):
        for stop in stops:
            done = train(prepared, tmp_path / name, *TINY, f"--config.stop_at_step={stop}")
            assert done.returncode == 0, done.stderr
            assert (tmp_path / name / "DONE").exists() == (stop == 0)
    assert_same(state_of(tmp_path / "once", 4), state_of(tmp_path / "twice", 4))


def test_killed_at_random_moments_it_resumes_bitwise(prepared: Path, straight: Path, tmp_path: Path) -> None:
    """SIGKILL at ten and more random points, at least three of them while a checkpoint is being written."""
    workdir, dice = tmp_path / "run", random.Random(1)
    kills = during_save = 0
    while kills < 10 or during_save < 3:
        assert kills < 40, f"{during_save} of {kills} kills met a save"
        process = subprocess.Popen(
            [sys.executable, "-m", *command(prepared, workdir, *TINY, "--config.total_steps=40")],
            cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for_save = kills % 2 == 0
        deadline = time.monotonic() + dice.uniform(4, 12)
        while process.poll() is None and (time.monotonic() < deadline or wait_for_save):
            saving = list((workdir / "checkpoints").glob("*tmp*"))
            if wait_for_save and saving:
                break
            time.sleep(0.0005)
        saving = bool(list((workdir / "checkpoints").glob("*tmp*")))
        finished = process.poll() is not None
        process.kill()
        process.wait()
        if finished:  # it ran to its end: take its last checkpoints away and go on
            for old in (workdir / "checkpoints").iterdir():
                subprocess.run(["rm", "-rf", str(old)], check=True)
            (workdir / "DONE").unlink(missing_ok=True)
            continue
        kills, during_save = kills + 1, during_save + saving
    done = train(prepared, workdir, *TINY, "--config.total_steps=40")
    assert done.returncode == 0, done.stderr
    assert_same(state_of(workdir, 40), state_of(straight, 40))
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 0)])
def test_a_signal_checkpoints_the_current_step(
    number: int, code: int, prepared: Path, straight: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    arguments = command(prepared, workdir, *TINY, "--config.total_steps=40", "--config.checkpoint.every=1000")
    process = subprocess.Popen([sys.executable, "-m", *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (workdir / "metrics.jsonl").exists() or '"loss"' not in (workdir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(steps) == 1
    assert 0 < steps[0] < 40
    assert not (workdir / "DONE").exists()
    assert train(prepared, workdir, *TINY, "--config.total_steps=40").returncode == 0
    assert_same(state_of(workdir, 40), state_of(straight, 40))


def test_nonfinite_losses_abort_and_keep_the_last_good_checkpoint(prepared: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    assert train(prepared, workdir, *TINY, "--config.stop_at_step=2").returncode == 0
    broken = ("--config.optim.base_lr=1e38", "--config.allow_config_change=True", "--config.total_steps=12")
    done = train(prepared, workdir, *TINY, *broken)
    assert done.returncode == 1
    assert "not finite for 3 steps in a row" in done.stderr
    good = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    for step in good:
        assert all(np.all(np.isfinite(v)) for v in state_of(workdir, step).values()), step


def test_a_full_disk_leaves_the_previous_checkpoint(prepared: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    assert train(prepared, workdir, *TINY, "--config.stop_at_step=2").returncode == 0
    before = state_of(workdir, 2)
    limit = 150_000  # bytes a file: less than one checkpoint, more than the logs

    def full() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = train(prepared, workdir, *TINY, preexec_fn=full, env=environment)
    assert done.returncode == 1, done.stderr
    assert "disk is full" in done.stderr
    assert "step 2 is complete" in done.stderr
    assert_same(before, state_of(workdir, 2))
    assert train(prepared, workdir, *TINY).returncode == 0


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--config.objective.alfa=1"], "alfa"),
        (["--config.batch_size=many"], "batch_size"),
        (["--config.data.sampling=random"], "data.sampling"),
        (["--config.data.dir=/nonexistent"], "/nonexistent"),
        (["--config.data.dir="], "config.data.dir"),
        (["--config.model.heads=5"], "heads"),
        (["--config.mesh.fsdp=7"], "fsdp"),
    ],
)
def test_wrong_settings_are_one_clear_line(extra: list[str], message: str, prepared: Path, tmp_path: Path) -> None:
    done = train(prepared, tmp_path / "run", *extra)
    assert done.returncode in (1, 2), done.stderr
    assert message in done.stderr
    if done.returncode == 1:
        assert "Traceback" not in done.stderr


def test_weights_alone_can_start_another_run(prepared: Path, straight: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    done = train(prepared, workdir, *TINY, f"--config.init_from={straight}", "--config.stop_at_step=1")
    assert done.returncode == 0, done.stderr
    assert "weights taken from" in done.stderr
    theirs, mine = state_of(straight, 40), state_of(workdir, 1)
    key = next(k for k in theirs if "params" in k and "fc1" in k and "kernel" in k)
    assert np.abs(theirs[key] - mine[key]).max() < 0.1 * np.abs(theirs[key]).max()
