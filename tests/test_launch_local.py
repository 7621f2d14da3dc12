"""The local launcher with real processes: restarts, signals, and which process it says was lost."""

from __future__ import annotations

import os
import runpy
import signal
import socket
import subprocess

import pytest
from launch_fake import FAST, call, started, training, wait_for


@pytest.fixture
def worker(tmp_path):
    return training(tmp_path)


def local(root, worker, plan, *options):
    return call(
        root, "launch/local.sh", *options, "--module", "fake_training", "--",
        f"--workdir={worker / 'out'}", f"--plan={plan}",
        env={**FAST, "PYTHONPATH": str(worker), "MAX_RESTARTS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_local_processes_join_and_restart_after_a_preemption(root, worker):
    found = local(root, worker, "42,0", "--processes", 2, "--devices", 4)
    assert found.returncode == 0, found.stderr
    assert started(worker) == ["start_0_0", "start_0_1", "start_1_0", "start_1_1"]
    assert (worker / "out/start_1_0").read_text() == "2 8 4"
    assert "preempted with a checkpoint" in found.stderr


@pytest.mark.slow
def test_local_gives_up_after_max_restarts_and_stops_the_others(root, worker):
    """Process 1 would sleep for ten minutes: the death of process 0 takes it down, twice."""
    found = local(root, worker, "hang1", "--processes", 2)
    assert found.returncode == 7
    assert "restart 1 of 1" in found.stderr
    assert "restarts used up" in found.stderr
    assert len([n for n in started(worker) if n.startswith("start_0")]) == 2


def test_the_port_is_none_that_a_connection_may_take_meanwhile(root, monkeypatch, tmp_path):
    """The coordinator needs seconds to get to it; the system hands out the ports of connections from a known range."""
    found = runpy.run_path(str(root / "launch/free_port.py"))
    free_port, held = found["free_port"], tmp_path / "range"
    monkeypatch.setitem(free_port.__globals__, "OUTGOING", held)
    held.write_text("10200\t60999\n")
    assert max(free_port() for _ in range(50)) < 10200
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        only = taken.getsockname()[1]
        monkeypatch.setitem(free_port.__globals__, "LOWEST", only)
        held.write_text(f"{only + 1}\t65535\n")
        assert free_port() not in (0, only), "any, where all of these are taken"
    held.write_text("1024\t65535\n")
    assert free_port() > 0


def test_wrong_flags_are_not_tried_again(root, tmp_path):
    (tmp_path / "refuses.py").write_text("raise SystemExit(2)")
    found = call(
        root, "launch/local.sh", "--processes", "1", "--module", "refuses", "--", "--config=x",
        env={**FAST, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert found.returncode == 2
    assert "wrong flags, which another start does not mend" in found.stderr
    assert "restart" not in found.stderr


@pytest.mark.slow
def test_local_passes_sigterm_on_and_ends_with_the_preemption_code(root, worker):
    command = ["launch/local.sh", "--processes", "2", "--module", "fake_training", "--"]
    command += [f"--workdir={worker / 'out'}", "--plan=wait"]
    env = {**os.environ, **FAST, "PYTHONPATH": str(worker)}
    job = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True)
    for process in (0, 1):
        wait_for(worker / f"out/listens_{process}", job)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 42, errors
    assert (worker / "out/saved_0").exists()
    assert (worker / "out/saved_1").exists()


# One process is killed; the other notices at once and aborts, as JAX does, or hears nothing.
MOURNER = """
import fcntl, os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
life = open(here / "life", "w")
if "--process=1" in sys.argv:
    fcntl.flock(life, fcntl.LOCK_EX)
    (here / "up").touch()
    while not (here / "heard").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
while not (here / "up").exists():
    time.sleep(0.01)
(here / "heard").touch()
fcntl.flock(life, fcntl.LOCK_EX)
os.abort() if sys.argv[2] == "abort" else time.sleep(600)
"""


@pytest.mark.parametrize("other", ["abort", "hang"])
def test_local_names_the_process_that_was_lost_in_its_last_line(root, tmp_path, other):
    """And not the one that noticed, though that one is looked at first and both are gone by then."""
    (tmp_path / "mourner.py").write_text(MOURNER)
    found = call(
        root, "launch/local.sh", "--module", "mourner", "--", tmp_path, other,
        # One that aborts gets the time it takes; one that hears nothing is not to be waited for.
        env={**FAST, "PYTHONPATH": str(tmp_path), "MAX_RESTARTS": "0", "GRACE": "1" if other == "hang" else "300"},
    )  # fmt: skip
    assert found.returncode == 137, found.stderr
    *before, last, _ = found.stderr.splitlines()
    assert "the job ended because of process 1 of 2 (SIGKILL, exit code 137)" in last
    assert "dmesg" in last
    assert "resumes from the newest checkpoint" in last
    assert any("process 0 of 2 still waits for it: SIGKILL" in line for line in before) == (other == "hang")


def test_local_told_to_stop_before_its_processes_can_listen_ends_as_preempted(root, tmp_path):
    """Or while it waits to start again: nobody is there to hear of it."""
    (tmp_path / "early.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, 'up').touch()\ntime.sleep(600)"
    )
    command = ["launch/local.sh", "--processes", "1", "--module", "early", "--"]
    env = {**os.environ, **FAST, "PYTHONPATH": str(tmp_path), "MAX_RESTARTS": "1"}
    job = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "up", job)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 42, errors
    assert "starting again" not in errors

    (tmp_path / "early.py").write_text("raise SystemExit(7)")
    job = subprocess.Popen(command, cwd=root, env=env | {"RESTART_DELAY": "3"}, stderr=subprocess.PIPE, text=True)
    assert any("restart 1 of 1" in line for line in job.stderr)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 7, errors
    assert "used up" not in errors
