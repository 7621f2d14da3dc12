"""The Docker script with a stand-in for ``docker``: the image, restarts, signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from launch_fake import FAST, call, wait_for


def test_dockerfile_installs_extras_that_exist(root):
    text = (root / "launch/Dockerfile").read_text()
    setup = (root / "setup.py").read_text()
    for extra in ("tpu", "cuda"):
        assert extra in text
        assert f'"{extra}":' in setup
    assert 'ENTRYPOINT ["python", "-m", "terrafm_jax.main"]' in text


@pytest.mark.parametrize(
    ("codes", "ends", "runs"),
    [("42 42 0", 0, 3), ("7 0", 0, 2), ("7 7", 7, 2), ("143 143 42 143 7 0", 0, 6), ("143 143 143", 143, 3)],
)
def test_docker_starts_again_after_a_preemption(root, tmp_path, codes, ends, runs):
    """A fake docker whose containers end with these codes, one after the other."""
    docker = tmp_path / "docker"
    docker.write_text(
        f"""#!/usr/bin/env bash
cd "{tmp_path}"
echo "$*" >>log
[ "$1" = run ] || exit 0
codes=({codes})
exit "${{codes[$(grep -c ^run log) - 1]}}"
"""
    )
    docker.chmod(0o755)
    env = {**FAST, "MAX_RESTARTS": "1", "MAX_EARLY": "2", "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    found = call(root, "launch/docker.sh", "--", "--workdir=/runs/s", env=env)
    assert found.returncode == ends, found.stderr
    log = (tmp_path / "log").read_text().splitlines()
    assert [line.split()[0] for line in log] == ["build"] + ["run"] * runs
    assert all(line.endswith("terrafm:cpu --workdir=/runs/s") for line in log[1:])


# A container that saves when it is told to: the docker client hands on the signals it gets. (A shell that is started
# beside another one cannot listen to SIGINT; Python and the client can.)
CONTAINER = """
import pathlib, signal, sys, time

def save(number, _frame):
    with open("{folder}/heard", "a") as file:
        print(signal.Signals(number).name, file=file)
    sys.exit(42 if number == signal.SIGTERM else 0)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save)
with open("{folder}/starts", "a") as file:
    print(sys.argv[1], file=file)
pathlib.Path("{folder}/started").touch()  # only now: a signal would keep the line from being written
time.sleep(600)
"""


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, 42), (signal.SIGINT, 0)])
def test_docker_passes_signals_on_and_does_not_start_again(root, tmp_path, number, ends):
    """To the whole group, as a terminal does at Ctrl-C: the container hears of it once."""
    docker = tmp_path / "docker"
    (tmp_path / "container.py").write_text(CONTAINER.format(folder=tmp_path))
    # Not in the first line of the script itself: no interpreter with a space in its path is found there.
    docker.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/container.py" "$@"\n')
    docker.chmod(0o755)
    env = {**os.environ, **FAST, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    # Tests that run in the background inherit that SIGINT is ignored, and a shell cannot trap what it inherits so. In a
    # process of its own: preexec_fn would run Python in a fork of this one, whose other threads may hold any lock.
    listening = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.argv[1], sys.argv[1:])"
    )
    command = [sys.executable, "-c", listening, "launch/docker.sh", "--no-build", "--", "--workdir=/runs/s"]
    job = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
    wait_for(tmp_path / "started", job)
    os.killpg(job.pid, number)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == ends, errors
    assert (tmp_path / "heard").read_text() == f"{number.name}\n"
    assert (tmp_path / "starts").read_text() == "run\n"
