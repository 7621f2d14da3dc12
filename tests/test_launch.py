"""The launchers: clean shell, valid manifests, dry runs, and restarts exercised with fake devices and fake Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time

import jsonschema
import pytest
import yaml

FLAGS = ["--config=configs/vitb.py", "--workdir=gs://bucket/run 1", '--config.data.dir=gs://bucket/"data"']
POD = {
    "PROJECT": "p",
    "ZONE": "z",
    "NAME": "terrafm",
    "ACCELERATOR": "v5litepod-64",
    "REPOSITORY": "https://example.org/terrafm_jax.git",
}
GKE = {"NAME": "terrafm", "IMAGE": "registry/terrafm:1", "TOPOLOGY": "4x4", "CHIP": "v5e", "SLICES": "2"}
FAST = {"RESTART_DELAY": "0", "PYTHON": sys.executable}

# A stand-in for training: joins the job, adds over all devices, and ends as its plan says for this attempt.
WORKER = """
import os, pathlib, signal, sys, time
import jax
flags = dict(a.lstrip("-").split("=", 1) for a in sys.argv[1:] if "=" in a)
jax.config.update("jax_num_cpu_devices", int(flags.get("cpu_devices", 1)))
out = pathlib.Path(flags["workdir"])
given = (flags["coordinator"], int(flags["processes"]), int(flags["process"])) if "coordinator" in flags else ()
jax.distributed.initialize(*given)
rank = jax.process_index()
attempt = len(list(out.glob(f"start_{rank}_*")))
(out / f"start_{rank}_{attempt}").write_text(f"{jax.process_count()} {jax.device_count()} {jax.local_device_count()}")
from jax.experimental import multihost_utils
multihost_utils.sync_global_devices("all have started")
plan = flags["plan"].split(",")
code = plan[min(attempt, len(plan) - 1)]
if code == "wait":
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    limit = time.monotonic() + 60
    while not ended and time.monotonic() < limit:
        time.sleep(0.05)
    (out / f"saved_{rank}").write_text("")
    code = 42
if code == "hang1" and rank == 1:
    time.sleep(60)
if rank == 0 and code != "hang1":
    time.sleep(1)  # it holds the coordinator: the others leave first
os._exit(7 if code == "hang1" else int(code))
"""


def call(root, *command, env=None, **options):
    environment = {k: v for k, v in os.environ.items() if k not in {**POD, **GKE} and not k.startswith("SLURM")}
    return subprocess.run(
        [str(c) for c in command],
        cwd=root,
        env={**environment, **(env or {})},
        capture_output=True,
        text=True,
        timeout=180,
        **options,
    )


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


# --- dry runs ---------------------------------------------------------------------------------


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
        ("gke.sh", ["render"], {**GKE, "TOPOLOGY": "16"}, "expected AxB or AxBxC"),
        ("docker.sh", ["--extra", "rocm", "--"], {}, "expected cuda, tpu or nothing"),
        ("local.sh", ["--config=x"], {}, "come after --"),
    ],
)
def test_wrong_settings_are_named(root, script, arguments, env, message):
    found = call(root, f"launch/{script}", *arguments, env=env)
    assert found.returncode == 2
    assert message in found.stderr


def test_other_dry_runs(root):
    local = call(root, "launch/local.sh", "--dry-run", "--processes", 2, "--devices", 4, "--", *FLAGS)
    assert [f"--process={i} --cpu_devices=4" in local.stdout for i in range(2)] == [True, True]
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


# --- manifests --------------------------------------------------------------------------------


def rendered(root, **settings):
    found = call(root, "launch/gke.sh", "render", *FLAGS, env={**GKE, **settings})
    assert found.returncode == 0, found.stderr
    assert "@" not in found.stdout.replace("@FIELDS@", "")
    return yaml.safe_load(found.stdout)


@pytest.mark.parametrize(
    ("settings", "slices", "hosts", "chips"),
    [
        ({}, 2, 4, 4),
        ({"CHIP": "v5p", "TOPOLOGY": "4x4x8", "SLICES": "1"}, 1, 32, 4),
        ({"CHIP": "v6e", "TOPOLOGY": "1x1", "SLICES": "1"}, 1, 1, 1),
    ],
)
def test_jobset_fits_its_schema(root, settings, slices, hosts, chips):
    manifest = rendered(root, **settings)
    schema = json.loads((root / "launch/gke/jobset.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(manifest, schema)
    (job,) = manifest["spec"]["replicatedJobs"]
    inner = job["template"]["spec"]
    container = inner["template"]["spec"]["containers"][0]
    assert job["replicas"] == slices
    assert inner["parallelism"] == inner["completions"] == hosts
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["args"] == [*FLAGS, "--distributed"]


def test_jobset_restarts_on_the_preemption_exit_code(root):
    from terrafm_jax.config import base

    spec = rendered(root)["spec"]
    rules = spec["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"]["values"] == [base().exit_code_preempted]
    assert spec["failurePolicy"]["rules"][0]["action"] == "RestartJobSetAndIgnoreMaxRestarts"
    schema = json.loads((root / "launch/gke/jobset.schema.json").read_text())
    wrong = rendered(root)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["podFailurePolicy"]["rules"][0]["action"] = "Restart"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_dockerfile_installs_extras_that_exist(root):
    text = (root / "launch/Dockerfile").read_text()
    setup = (root / "setup.py").read_text()
    for extra in ("tpu", "cuda"):
        assert extra in text
        assert f'"{extra}":' in setup
    assert 'ENTRYPOINT ["python", "-m", "terrafm_jax.main"]' in text


# --- exercised --------------------------------------------------------------------------------


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "fake_training.py").write_text(WORKER)
    (tmp_path / "out").mkdir()
    return tmp_path


def started(worker):
    return sorted(p.name for p in (worker / "out").glob("start_*"))


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
    """Process 1 would sleep for a minute: the death of process 0 takes it down, twice."""
    begun = time.monotonic()
    found = local(root, worker, "hang1", "--processes", 2)
    assert found.returncode == 7
    assert time.monotonic() - begun < 110
    assert "restart 1 of 1" in found.stderr
    assert "restarts used up" in found.stderr
    assert len([n for n in started(worker) if n.startswith("start_0")]) == 2


@pytest.mark.slow
def test_local_passes_sigterm_on_and_ends_with_the_preemption_code(root, worker):
    command = ["launch/local.sh", "--processes", "2", "--module", "fake_training", "--"]
    command += [f"--workdir={worker / 'out'}", "--plan=wait"]
    env = {**os.environ, **FAST, "PYTHONPATH": str(worker)}
    job = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True)
    limit = time.monotonic() + 120
    while len(started(worker)) < 2 and time.monotonic() < limit:
        time.sleep(0.1)
    time.sleep(0.5)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=120)
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
os.abort() if sys.argv[2] == "abort" else time.sleep(60)
"""


@pytest.mark.parametrize("other", ["abort", "hang"])
def test_local_names_the_process_that_was_lost_in_its_last_line(root, tmp_path, other):
    """And not the one that noticed, though that one is looked at first and both are gone by then."""
    (tmp_path / "mourner.py").write_text(MOURNER)
    found = call(
        root, "launch/local.sh", "--module", "mourner", "--", tmp_path, other,
        env={**FAST, "PYTHONPATH": str(tmp_path), "MAX_RESTARTS": "0", "GRACE": "1"},
    )  # fmt: skip
    assert found.returncode == 137, found.stderr
    *before, last, _ = found.stderr.splitlines()
    assert "the job ended because of process 1 of 2 (SIGKILL, exit code 137)" in last
    assert "dmesg" in last
    assert "resumes from the newest checkpoint" in last
    assert any("process 0 of 2 still waits for it: SIGKILL" in line for line in before) == (other == "hang")


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
def test_slurm_requeues_after_a_preemption(root, worker):
    """jax.distributed joins the tasks through Slurm's variables; the batch script ends as the step did."""
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
CONTAINER = """#!{python}
import pathlib, signal, sys, time

def save(number, _frame):
    with open("{folder}/heard", "a") as file:
        print(signal.Signals(number).name, file=file)
    sys.exit(42 if number == signal.SIGTERM else 0)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, save)
with open("{folder}/started", "a") as file:
    print(sys.argv[1], file=file)
time.sleep(60)
"""


def wait_for(path, job, seconds=60):
    limit = time.monotonic() + seconds
    while not path.exists():
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < limit, path
        time.sleep(0.05)


@pytest.mark.parametrize(("number", "ends"), [(signal.SIGTERM, 42), (signal.SIGINT, 0)])
def test_docker_passes_signals_on_and_does_not_start_again(root, tmp_path, number, ends):
    """To the whole group, as a terminal does at Ctrl-C: the container hears of it once."""
    docker = tmp_path / "docker"
    docker.write_text(CONTAINER.format(python=sys.executable, folder=tmp_path))
    docker.chmod(0o755)
    env = {**os.environ, **FAST, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = ["launch/docker.sh", "--no-build", "--", "--workdir=/runs/s"]
    job = subprocess.Popen(
        command, cwd=root, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True,
        # Tests that run in the background inherit that SIGINT is ignored, and a shell cannot trap what it inherits so.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    wait_for(tmp_path / "started", job)
    os.killpg(job.pid, number)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == ends, errors
    assert (tmp_path / "heard").read_text() == f"{number.name}\n"
    assert (tmp_path / "started").read_text() == "run\n"


def test_local_told_to_stop_before_its_processes_can_listen_ends_as_preempted(root, tmp_path):
    """Or while it waits to start again: nobody is there to hear of it."""
    (tmp_path / "early.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path)!r}, 'up').touch()\ntime.sleep(60)"
    )
    command = ["launch/local.sh", "--processes", "1", "--module", "early", "--"]
    env = {**os.environ, **FAST, "PYTHONPATH": str(tmp_path), "MAX_RESTARTS": "1"}
    job = subprocess.Popen(command, cwd=root, env=env, stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "up", job)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 42, errors
    assert "starting again" not in errors

    (tmp_path / "early.py").write_text("raise SystemExit(7)")
    job = subprocess.Popen(command, cwd=root, env=env | {"RESTART_DELAY": "3"}, stderr=subprocess.PIPE, text=True)
    assert any("restart 1 of 1" in line for line in job.stderr)
    job.send_signal(signal.SIGTERM)
    _, errors = job.communicate(timeout=60)
    assert job.returncode == 7, errors
    assert "used up" not in errors
