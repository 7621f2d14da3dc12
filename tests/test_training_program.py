"""The training program end to end, through its public command: resume, kill, signals, faults, every config."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, child_environment, run_module
from tiles_fake import fake_record, write_dataset
from tiny_training import FORTY, TINY, assert_same, command, state_of, train

pytestmark = pytest.mark.slow


BROKEN = ("--config.optim.base_lr=1e38", "--config.allow_config_change=True")


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def two_steps(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, stopped after two steps. To be copied."""
    workdir = tmp_path_factory.mktemp("two_steps") / "run"
    done = train(prepared, workdir, *FORTY, "--config.stop_at_step=2")
    assert done.returncode == 0, done.stderr
    assert not (workdir / "DONE").exists()
    return workdir


@pytest.mark.parametrize("config", ["vits", "vitb", "vitl", "demo"])
def test_every_config_runs_as_a_smoke_test_of_itself(config: str, prepared: Path, tmp_path: Path) -> None:
    done = train(prepared, tmp_path / "run", config=f"{config}:runlocal")
    assert done.returncode == 0, done.stderr
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"DONE", "metrics.jsonl", "config_resolved.json", "parameters.txt", "statistics.json", "views.png",
            "landcover.png", "checkpoints", "teacher"} <= names  # fmt: skip
    for line in ("arguments and temporaries", "goodput"):  # what a step needs before it runs; what came of the time
        assert line in done.stderr
    found = rows(tmp_path / "run")
    losses = [row["loss"] for row in found if "loss" in row]
    assert len(losses) == 4
    assert np.all(np.isfinite(losses))
    for monitor in ("teacher_entropy", "kl", "center_norm", "center_distance", "feature_std", "grad_norm"):
        assert monitor in found[-2] or monitor in found[-1], monitor
    accuracy = {row["step"]: row["knn_top1"] for row in found if "knn_top1" in row}
    assert list(accuracy) == [0, 4], "random weights first, then every config.knn.every"
    assert all(0 <= value <= 1 for value in accuracy.values())


# Training that prints how many programs came out of the compile cache, by JAX's own count.
COUNTED = """
import atexit, runpy
import jax

hits = []
jax.monitoring.register_event_listener(lambda e, **_: hits.append(e) if e == "/jax/compilation_cache/cache_hits" else 0)
atexit.register(lambda: print(len(hits)))
runpy.run_module("terrafm_jax.main", run_name="__main__", alter_sys=True)
"""


def test_a_second_start_takes_its_step_from_the_users_cache(prepared: Path, tmp_path: Path) -> None:
    """The folder is the user's own, and a start that resumes asks for the same program as the first."""
    ours = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    env = {k: v for k, v in child_environment(HOME=str(tmp_path), PYTHONPATH=str(ROOT)).items() if k not in ours}
    (tmp_path / "counted.py").write_text(COUNTED)
    cache = tmp_path / ".cache" / "terrafm_jax"

    def start(stop: int) -> tuple[int, set[str]]:
        """(programs found in the cache, the steps that are there afterwards)"""
        _, *flags = command(prepared, tmp_path / "run", *FORTY, f"--config.stop_at_step={stop}")
        done = subprocess.run(
            [sys.executable, str(tmp_path / "counted.py"), *flags], cwd=ROOT, env=env, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return int(done.stdout), {p.name for p in cache.glob("jit_step-*-cache")}

    found, steps = start(1)
    assert (found, len(steps)) == (0, 1)
    for other in cache.iterdir():
        if not other.name.startswith("jit_step-"):
            other.unlink()  # so that what is found next is the step
    found, again = start(2)
    assert found > 0
    assert again == steps


@pytest.mark.parametrize("row", ["single", "modality", "fusion"])
def test_every_row_of_the_ablation_runs(row: str, prepared: Path, tmp_path: Path) -> None:
    done = train(prepared, tmp_path / "run", *TINY, config=f"vits:{row},runlocal")
    assert done.returncode == 0, done.stderr


def test_tiles_of_two_sizes_have_a_program_each(tmp_path: Path) -> None:
    """Both are compiled beside each other; each is used, and neither twice."""
    data = write_dataset(tmp_path / "data", [fake_record(i, 48 if i % 2 else 96) for i in range(40)])
    done = train(
        data, tmp_path / "run", *FORTY, "--config.data.canvases=2", "--config.stop_at_step=12", "--config.knn.every=0",
        "--config.data.statistics=published",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 canvas bucket(s)" in done.stderr
    assert [done.stderr.count(f"compiled step for canvas {number}") for number in (1, 2, 3)] == [1, 1, 0]
    assert [done.stderr.count(f"compiling the step for canvas {number}") for number in (1, 2, 3)] == [1, 1, 0]
    assert done.stderr.index("compiling the step") < done.stderr.index("compiled step")
    assert np.all(np.isfinite([row["loss"] for row in rows(tmp_path / "run") if "loss" in row]))


def test_four_steps_equal_two_and_two(prepared: Path, straight: Path, two_steps: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    done = train(prepared, workdir, *FORTY, "--config.stop_at_step=4")
    assert done.returncode == 0, done.stderr
    assert "resumed step 2" in done.stderr
    assert not (workdir / "DONE").exists()
    assert (straight / "DONE").exists()
    assert_same(state_of(workdir, 4), state_of(straight, 4))


def test_workers_change_nothing_and_leave_nothing(
    prepared: Path, straight: Path, two_steps: Path, tmp_path: Path
) -> None:
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    done = train(prepared, workdir, *FORTY, "--config.stop_at_step=4", "--config.data.workers=2")
    assert done.returncode == 0, done.stderr
    assert_same(state_of(workdir, 4), state_of(straight, 4))
    assert "leaked" not in done.stderr, "Python's word for shared memory that is still there at its end"


def test_killed_at_random_moments_it_resumes_bitwise(prepared: Path, straight: Path, tmp_path: Path) -> None:
    """SIGKILL at ten and more random points, at least three of them while a checkpoint is being written."""
    workdir, dice = tmp_path / "run", random.Random(1)
    kills = during_save = 0
    while kills < 10 or during_save < 3:
        assert kills < 40, f"{during_save} of {kills} kills met a save"
        process = subprocess.Popen(
            [sys.executable, "-m", *command(prepared, workdir, *FORTY)],
            cwd=ROOT, env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
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
    done = train(prepared, workdir, *FORTY)
    assert done.returncode == 0, done.stderr
    assert_same(state_of(workdir, 40), state_of(straight, 40))
    assert not list((workdir / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 42), (signal.SIGINT, 0)])
def test_a_signal_checkpoints_the_current_step(
    number: int, code: int, prepared: Path, straight: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    arguments = [sys.executable, "-m", *command(prepared, workdir, *FORTY, "--config.checkpoint.every=1000")]
    process = subprocess.Popen(arguments, cwd=ROOT, env=child_environment(), stderr=subprocess.PIPE, text=True)
    while not (workdir / "metrics.jsonl").exists() or '"loss"' not in (workdir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code, errors
    assert ("a second Ctrl-C" in errors) == (number == signal.SIGINT)
    steps = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(steps) == 1
    assert 0 < steps[0] < 40
    assert not (workdir / "DONE").exists()
    assert train(prepared, workdir, *FORTY).returncode == 0
    assert_same(state_of(workdir, 40), state_of(straight, 40))


def test_nonfinite_losses_abort_and_keep_the_last_good_checkpoint(
    prepared: Path, two_steps: Path, tmp_path: Path
) -> None:
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    broken = (*BROKEN, "--config.checkpoint.every=100")
    done = train(prepared, workdir, *FORTY, *broken)
    assert done.returncode == 1
    assert "not finite for 3 steps in a row" in done.stderr
    assert f"last good checkpoint is {workdir}/checkpoints/2;" in done.stderr
    assert (workdir / "report.html").exists()
    good = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    assert f"The last good checkpoint is {workdir / 'checkpoints' / str(max(good))};" in done.stderr
    for step in good:
        assert all(np.all(np.isfinite(v)) for v in state_of(workdir, step).values()), step


NEVER_KEPT = {
    "in the run": ("1e40", "--config.checkpoint.every=1", "parameters, teacher or moments are not finite"),
    "at its end": ("1e40", "--config.total_steps=3", "parameters, teacher or moments are not finite"),
    "after a loss": ("1e38", "--config.total_steps=4", "loss or gradient not finite at the end"),
}


@pytest.mark.parametrize(("rate", "setting", "message"), NEVER_KEPT.values(), ids=NEVER_KEPT)
def test_a_state_that_is_not_finite_is_never_kept(
    rate: str, setting: str, message: str, prepared: Path, two_steps: Path, tmp_path: Path
) -> None:
    """The loss of step 3 is finite, what the update makes of the parameters is not, or is out of all bounds."""
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    settings = ("--config.checkpoint.every=100", "--config.allow_config_change=True", setting)
    done = train(prepared, workdir, *FORTY, f"--config.optim.base_lr={rate}", *settings)
    assert done.returncode == 1
    assert message in done.stderr
    assert f"last good checkpoint is {workdir}/checkpoints/2" in done.stderr
    assert not (workdir / "DONE").exists()
    assert [p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()] == ["2"]


def test_a_checkpoint_may_be_past_the_step_to_stop_at(prepared: Path, two_steps: Path, tmp_path: Path) -> None:
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    done = train(prepared, workdir, *FORTY, "--config.stop_at_step=1")
    assert done.returncode == 0, done.stderr
    assert "stopped at step 2 of 40" in done.stderr


# Training on a disk with room for files as large as its logs, but not for a checkpoint. Not by preexec_fn, which would
# run Python in a fork of this process, whose other threads may hold any lock.
FULL = """
import resource, runpy, signal

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
runpy.run_module("terrafm_jax.main", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_leaves_the_previous_checkpoint(
    prepared: Path, straight: Path, two_steps: Path, tmp_path: Path
) -> None:
    workdir = shutil.copytree(two_steps, tmp_path / "run")
    before = state_of(workdir, 2)
    (tmp_path / "full.py").write_text(FULL)
    _, *flags = command(prepared, workdir, *FORTY)
    # It may read compiled programs and not write any, which would be cut off, too.
    environment = child_environment(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1e9", PYTHONPATH=str(tmp_path))
    done = run_module("full", *flags, env=environment)
    assert done.returncode == 1, done.stderr
    assert "disk is full" in done.stderr
    assert "step 2 is complete" in done.stderr
    assert_same(before, state_of(workdir, 2))
    assert train(prepared, workdir, *FORTY, "--config.stop_at_step=4").returncode == 0
    assert_same(state_of(workdir, 4), state_of(straight, 4))


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
    done = train(prepared, workdir, *FORTY, f"--config.init_from={straight}", "--config.stop_at_step=1")
    assert done.returncode == 0, done.stderr
    assert "weights taken from" in done.stderr
    theirs, mine = state_of(straight, 40), state_of(workdir, 1)
    key = next(k for k in theirs if "params" in k and "fc1" in k and "kernel" in k)
    assert np.abs(theirs[key] - mine[key]).max() < 0.1 * np.abs(theirs[key]).max()


def test_statistics_are_the_data_sets_unless_the_published_ones_are_asked_for(prepared: Path, tmp_path: Path) -> None:
    from configs.demo import get_config
    from terrafm_jax.sensors import Statistics
    from terrafm_jax.training.plan import make_plan

    config = get_config("runlocal")
    config.data.dir = str(prepared)
    own = make_plan(config, str(tmp_path)).spec.stats
    config.data.statistics = "published"
    published = make_plan(config, str(tmp_path)).spec.stats
    counted = json.loads((prepared / "statistics.json").read_text())["sensors"]["s2_l2a"]
    np.testing.assert_allclose(own["s2_l2a"][0], counted["mean"], rtol=1e-6)
    np.testing.assert_array_equal(published["s2_l2a"][0], Statistics.published()["s2_l2a"][0])
    assert not np.allclose(own["s2_l2a"][0], published["s2_l2a"][0], rtol=1e-2)
