"""The Slurm script with stand-ins for ``srun`` and ``scontrol``: joining, requeueing, counting."""

from __future__ import annotations

import os
import shutil

import pytest
from launch_fake import FAST, call, training


def fake_cluster(worker, tasks):
    """srun that starts ``tasks`` processes with Slurm's variables, scontrol that writes down what it was asked."""
    folder = worker / "bin"
    folder.mkdir()
    srun = f"""#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
code=0
for ((i = 0; i < {tasks}; i++)); do
  SLURM_PROCID=$i SLURM_LOCALID=$i SLURM_NTASKS={tasks} SLURM_STEP_NUM_TASKS={tasks} \\
    SLURM_STEP_NODELIST=localhost SLURM_STEP_NUM_NODES=1 "$@" &
done
for job in $(jobs -p); do wait "$job" || code=$?; done
exit $code
"""
    for name, text in {
        "srun": srun,
        "scontrol": f'#!/usr/bin/env bash\necho "$@" >>"{worker}/scontrol.log"\n',
    }.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_ID": str(1000 + os.getpid() % 3000)}


@pytest.mark.slow
def test_slurm_requeues_after_a_preemption(root, tmp_path):
    """jax.distributed joins the tasks through Slurm's variables; the batch script ends as the step did."""
    worker = training(tmp_path)
    env = fake_cluster(worker, 2) | {**FAST, "MODULE": "fake_training", "PYTHONPATH": str(worker)}
    arguments = [f"--workdir={worker / 'out'}", "--plan=42"]
    env |= {"JAX_PLATFORMS": "cpu", "SLURM_SUBMIT_DIR": str(worker)}
    found = call(root, "bash", copied(root, worker), *arguments, env=env)
    assert found.returncode == 42, found.stderr
    assert (worker / "out/start_1_0").read_text().startswith("2 ")
    assert (worker / "scontrol.log").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"


def copied(root, folder):
    """The script in a checkout of its own, where it leaves its count."""
    (folder / "launch").mkdir()
    for name in ("lib.sh", "slurm.sbatch"):
        shutil.copy(root / "launch" / name, folder / "launch" / name)
    return folder / "launch/slurm.sbatch"


@pytest.mark.parametrize(
    ("codes", "requeued"),
    [
        ([42, 42, 42, 3, 42, 3], [1, 1, 1, 1, 1, 0]),  # MAX_RESTARTS is 1: the second 3 is one too many
        ([3, 0, 3, 3], [1, 0, 1, 0]),  # complete: another start counts from the beginning
        ([143, 143, 42, 143, 143, 143], [1, 1, 1, 1, 1, 0]),  # MAX_EARLY is 2, in a row
    ],
)
def test_slurm_counts_failures_and_not_preemptions(root, tmp_path, codes, requeued):
    """Slurm's own count, which has both, must not matter."""
    script = copied(root, tmp_path)
    env = fake_cluster(tmp_path, 1) | {"MAX_RESTARTS": "1", "MAX_EARLY": "2", "SLURM_SUBMIT_DIR": str(tmp_path)}
    log = tmp_path / "scontrol.log"
    for i, (code, again) in enumerate(zip(codes, requeued, strict=True)):
        (tmp_path / "python").write_text(f"#!/bin/sh\nexit {code}\n")
        (tmp_path / "python").chmod(0o755)
        log.write_text("")
        more = {"SLURM_RESTART_COUNT": str(i), "PYTHON": str(tmp_path / "python")}
        found = call(root, "bash", script, "--workdir=RUN", env=env | more)
        assert found.returncode == code, found.stderr
        assert bool(log.read_text()) == bool(again), (i, found.stderr)
