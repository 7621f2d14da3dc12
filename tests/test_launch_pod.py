"""The pod launcher against a stand-in for ``gcloud``: what it asks for, deletes, starts again and stops."""

from __future__ import annotations

import os
import subprocess

import pytest
from launch_fake import FLAGS, POD, call, wait_for

# Keeps the pod's state in a file, fails at the next ``outage`` questions, and runs what is meant for the workers here.
GCLOUD = """#!/usr/bin/env bash
cd "{folder}"
echo "$*" >>log
case "$*" in
  *create*) echo ACTIVE >state ;;
  *delete*) rm -f state ;;
  *describe*)
    if [ -s outage ]; then
      sed -i 1d outage
      echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) UNAVAILABLE: try again" >&2
      exit 1
    fi
    cat state 2>/dev/null && exit
    echo "ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found" >&2
    exit 1 ;;
  *"git clone"*) exit "$(cat install 2>/dev/null || echo 0)" ;;
  *--command=*)
    for word; do [[ $word != --command=* ]] || text=${{word#--command=}}; done
    bash -c "$text" || code=$?
    if [ "${{code:-0}}" = 99 ]; then  # stands for a pod that is taken away
      echo SUSPENDED >state
      code=255
    fi
    exit "${{code:-0}}" ;;
esac
"""

# Training as ``plan`` says for this attempt: an exit code, or to wait for a signal. It must not be reached by a
# signal to the shell around it.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>attempts
read -r what < <(sed -n "$(wc -l <attempts)p" plan)
case $what in
  wait)
    trap 'echo TERM >>heard; sleep 0.5; exit 42' TERM
    echo >waiting
    for i in $(seq 6000); do sleep 0.05; done
    exit 9 ;;
  stopped*) touch stop ;;&
  *) exit "${what#stopped }" ;;
esac
"""


@pytest.fixture
def pod(tmp_path):
    """Environment of a launcher whose workers are the folder ``terrafm_jax`` here."""
    checkout = tmp_path / "terrafm_jax"
    (checkout / ".venv/bin").mkdir(parents=True)
    for path, text in {
        tmp_path / "gcloud": GCLOUD.format(folder=tmp_path),
        checkout / ".venv/bin/python": PYTHON,
    }.items():
        path.write_text(text)
        path.chmod(0o755)
    more = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "POLL_SECONDS": "0.1", "RESTART_DELAY": "0"}
    return {**POD, **more, "MAX_RESTARTS": "1", "MAX_EARLY": "1"}


def plan(tmp_path, *attempts):
    (tmp_path / "terrafm_jax/plan").write_text("\n".join(map(str, attempts)) + "\n")


def attempts(tmp_path):
    return (tmp_path / "terrafm_jax/attempts").read_text().splitlines()


def asked(tmp_path, what):
    return (tmp_path / "log").read_text().count(f"queued-resources {what}")


def test_pod_is_asked_for_again_when_it_is_taken_away(root, pod, tmp_path):
    plan(tmp_path, 99, 0)
    found = call(root, "launch/tpu_pod.sh", "up", *FLAGS, env=pod)
    assert found.returncode == 0, found.stderr
    assert [asked(tmp_path, what) for what in ("create", "delete")] == [2, 1]
    assert "taken away" in found.stderr
    expected = f"-m terrafm_jax.main {' '.join(FLAGS)} --distributed"
    assert attempts(tmp_path) == [expected] * 2


def test_a_pod_whose_state_cannot_be_asked_is_left_alone(root, pod, tmp_path):
    """Three questions in a row fail, at the start and again after a preemption."""
    plan(tmp_path, 0)
    (tmp_path / "outage").write_text("x\n" * 3)
    (tmp_path / "state").write_text("ACTIVE\n")
    found = call(root, "launch/tpu_pod.sh", "up", *FLAGS, env=pod)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("UNAVAILABLE: try again") == 3
    python = tmp_path / "terrafm_jax/.venv/bin/python"
    python.write_text(PYTHON.replace("read -r", "printf 'x\\nx\\nx\\n' >../outage\nread -r", 1))
    (tmp_path / "terrafm_jax/attempts").unlink()
    plan(tmp_path, 42, 0)
    found = call(root, "launch/tpu_pod.sh", "up", *FLAGS, env=pod)
    assert found.returncode == 0, found.stderr
    assert "preempted with a checkpoint" in found.stderr
    assert [asked(tmp_path, what) for what in ("create", "delete")] == [0, 0]


@pytest.mark.parametrize(
    ("codes", "ends", "runs"),
    [((42, 42, 42, 7, 0), 0, 5), ((7, 7), 7, 2), ((143, 42, 143, 0), 0, 4), ((143, 143), 143, 2)],
)
def test_only_failures_of_training_count(root, pod, tmp_path, codes, ends, runs):
    plan(tmp_path, *codes)
    found = call(root, "launch/tpu_pod.sh", "up", *FLAGS, env=pod)
    assert found.returncode == ends, found.stderr
    assert len(attempts(tmp_path)) == runs
    assert [asked(tmp_path, what) for what in ("create", "delete")] == [1, 0]


def test_an_installation_that_fails_counts_and_does_not_end_well(root, pod, tmp_path):
    (tmp_path / "install").write_text("128")
    found = call(root, "launch/tpu_pod.sh", "up", *FLAGS, env=pod)
    assert found.returncode == 1, found.stderr
    assert "1 restarts used up" in found.stderr


def begin(root, pod, tmp_path, action):
    job = subprocess.Popen(
        ["launch/tpu_pod.sh", action, *FLAGS], cwd=root, env={**os.environ, **pod}, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "terrafm_jax/waiting", job)
    return job


@pytest.mark.parametrize("action", ["up", "run"])
def test_stop_tells_python_to_save_and_ends_the_restarting(root, pod, tmp_path, action):
    plan(tmp_path, "wait", 0)
    (tmp_path / "terrafm_jax/stop").touch()  # of an earlier day
    job = begin(root, pod, tmp_path, action)
    stop = call(root, "launch/tpu_pod.sh", "stop", env=pod)
    assert stop.returncode == 0, stop.stderr
    assert "to save and end" in stop.stdout
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    assert (tmp_path / "terrafm_jax/heard").read_text() == "TERM\n"
    assert len(attempts(tmp_path)) == 1
    assert ("stopped on request" in errors) == (action == "up")
    assert "nothing is running" in call(root, "launch/tpu_pod.sh", "stop", env=pod).stdout


def test_stop_between_two_starts_is_heard(root, pod, tmp_path):
    """Python fails by itself while the mark is set: it is not started a second time."""
    plan(tmp_path, "stopped 7", 0)
    found = call(root, "launch/tpu_pod.sh", "up", *FLAGS, env=pod)
    assert found.returncode == 0, found.stderr
    assert "stopped on request" in found.stderr
    assert len(attempts(tmp_path)) == 1


def test_what_a_broken_connection_left_running_saves_before_the_next_start(root, pod, tmp_path):
    plan(tmp_path, "wait", 0)
    job = begin(root, pod, tmp_path, "run")
    found = call(root, "launch/tpu_pod.sh", "run", *FLAGS, env=pod)
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "terrafm_jax/heard").read_text() == "TERM\n"
    job.communicate(timeout=300)
    assert job.returncode == 42
    assert len(attempts(tmp_path)) == 2


def test_every_new_pod_is_set_up(root, pod, tmp_path):
    plan(tmp_path, 99, 0)
    found = call(root, "launch/tpu_pod.sh", "up", *FLAGS, env=pod | {"SETUP": "launch/mount_bucket.sh B /mnt/b"})
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "log").read_text().count(".[tpu]; launch/mount_bucket.sh B /mnt/b\n") == 2


def test_a_bucket_is_mounted_once_with_its_cache(root, tmp_path):
    """Stand-ins for gcsfuse, sudo and mountpoint; the folder counts as a mount once gcsfuse was called."""
    (tmp_path / "sudo").write_text('#!/bin/sh\nexec "$@"\n')
    (tmp_path / "gcsfuse").write_text(f'#!/bin/sh\necho "$*" >>"{tmp_path}/log"\n')
    (tmp_path / "mountpoint").write_text(f'#!/bin/sh\ntest -e "{tmp_path}/log"\n')
    for name in ("sudo", "gcsfuse", "mountpoint"):
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
    for _ in range(2):
        done = call(root, "launch/mount_bucket.sh", "gs://bucket", tmp_path / "data", 123, env=env)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "data").is_dir()
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert line.startswith("-o ro ")
    assert "--file-cache-max-size-mb=123" in line
    assert line.endswith(f" bucket {tmp_path / 'data'}")
    assert call(root, "launch/mount_bucket.sh", "bucket").returncode == 2
