"""The launchers: clean shell, wrong settings, dry runs; the files test_launch_* exercise them one by one."""

from __future__ import annotations

import os
import re
import shutil
import stat
import sys

import pytest
from launch_fake import FLAGS, GKE, POD, call


def scripts(root):
    return sorted([*root.glob("launch/*.sh"), *root.glob("launch/*.sbatch")])


def test_shell_scripts_are_clean(root):
    checker = shutil.which("shellcheck", path=f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}")
    if checker is None:
        pytest.skip("shellcheck is not installed")
    found = call(root, checker, "-x", *scripts(root))
    assert found.returncode == 0, found.stdout


def test_scripts_are_executable_and_explain_themselves(root):
    assert len(scripts(root)) >= 5
    for script in scripts(root):
        text = script.read_text()
        if script.name != "lib.sh":
            assert script.stat().st_mode & stat.S_IXUSR, script
            assert text.startswith("#!/usr/bin/env bash\n# "), script


def test_tpu_pod_dry_run_prints_every_command(root):
    found = call(root, "launch/tpu_pod.sh", "--dry-run", "up", *FLAGS, env=POD)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert [line.split()[3] for line in lines] == ["queued-resources"] * 2 + ["tpu-vm"] * 2
    assert "--runtime-version=v2-alpha-tpuv5-lite" in lines[0]
    assert "--node-id=terrafm" in lines[0]
    assert ".\\[tpu\\]" in lines[2]
    assert "gs://bucket/run" in lines[3]
    assert "--distributed" in lines[3]


def test_tpu_pod_with_two_slices_runs_on_both(root):
    env = {**POD, "SLICES": "2", "SPOT": "1"}
    found = call(root, "launch/tpu_pod.sh", "--dry-run", "up", *FLAGS, env=env)
    assert "--node-count=2 --node-prefix=terrafm --spot" in found.stdout
    assert [f"ssh terrafm-{i}" in found.stdout for i in range(2)] == [True, True]


@pytest.mark.parametrize(
    ("script", "arguments", "env", "message"),
    [
        ("tpu_pod.sh", ["create"], {"PROJECT": "p"}, "set ZONE NAME ACCELERATOR"),
        ("tpu_pod.sh", ["create"], {**POD, "ACCELERATOR": "v2-8"}, "expected v4-N"),
        ("tpu_pod.sh", ["dance"], POD, "unknown action dance"),
        ("gke.sh", ["render"], {"NAME": "n"}, "set IMAGE TOPOLOGY CHIP"),
        ("gke.sh", ["render"], {**GKE, "CHIP": "v9"}, "expected v4, v5e, v5p or v6e"),
        ("gke.sh", ["render"], {**GKE, "TOPOLOGY": "16"}, "expected one of 1x1"),
        ("gke.sh", ["render"], {**GKE, "NAME": "7b"}, "NAME=7b: expected"),
        ("gke.sh", ["render"], {**GKE, "NAME": "a" * 41}, "at most 40"),
        ("docker.sh", ["--extra", "rocm", "--"], {}, "expected cuda, tpu or nothing"),
        ("local.sh", ["--config=x"], {}, "come after --"),
        ("local.sh", ["--devices", 0, "--", *FLAGS], {"CUDA_VISIBLE_DEVICES": "4"}, "CUDA_VISIBLE_DEVICES=4 names 1"),
        ("local.sh", ["--processes", "2"], {}, "no flags of training"),
        ("tpu_pod.sh", ["up"], POD, "no flags of training"),
        ("gke.sh", ["apply"], GKE, "no flags of training"),
        ("docker.sh", [], {}, "no flags of training"),
        ("mount_bucket.sh", ["bucket"], {}, "expected BUCKET FOLDER"),
        ("slurm.sbatch", ["--config=x"], {}, "not in a Slurm job: sbatch launch/slurm.sbatch"),
    ],
)
def test_wrong_settings_are_named(root, script, arguments, env, message):
    found = call(root, "bash", f"launch/{script}", *arguments, env=env)
    assert found.returncode == 2
    assert message in found.stderr


@pytest.mark.parametrize("script", ["tpu_pod.sh", "gke.sh", "docker.sh", "local.sh", "slurm.sbatch", "mount_bucket.sh"])
def test_help_is_the_comment_at_the_top(root, script):
    found = call(root, "bash", f"launch/{script}", "--help")
    assert found.returncode == 0, found.stderr
    assert f"  launch/{script}" in found.stdout or f"sbatch --nodes=8 --partition=gpu launch/{script}" in found.stdout
    assert "set -euo" not in found.stdout
    assert "SBATCH" not in found.stdout
    assert found.stderr == ""


def test_other_dry_runs(root):
    local = call(root, "launch/local.sh", "--dry-run", "--processes", 2, "--devices", 4, "--", *FLAGS)
    assert [f"--process={i} --cpu_devices=4" in local.stdout for i in range(2)] == [True, True]
    for given, used in (("", ["0", "1"]), ("4,6,7", ["4", "6"])):
        on_gpus = call(
            root, "launch/local.sh", "--dry-run", "--devices", 0, "--", *FLAGS, env={"CUDA_VISIBLE_DEVICES": given}
        )
        assert re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", on_gpus.stdout) == used, "those that are ours"
    slurm = call(root, "bash", "launch/slurm.sbatch", *FLAGS, env={"DRY_RUN": "1"})
    assert slurm.stdout.startswith("srun ")
    assert "scontrol requeue" in slurm.stdout
    docker = call(root, "launch/docker.sh", "--extra", "cuda", "--dry-run", "--", *FLAGS)
    assert "docker build" in docker.stdout
    assert "--gpus all" in docker.stdout
    xpk = call(
        root, "launch/gke.sh", "--dry-run", "xpk", *FLAGS, env={**GKE, "CLUSTER": "c", "PROJECT": "p", "ZONE": "z"}
    )
    assert "--tpu-type=v5litepod-16 --num-slices=2" in xpk.stdout
    assert "--restart-on-exit-codes=42" in xpk.stdout
