"""What the tests of the launchers share: settings, a stand-in for training, and how a script is called."""

from __future__ import annotations

import os
import subprocess
import sys
import time

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
    (out / f"listens_{rank}").touch()
    limit = time.monotonic() + 300
    while not ended:
        if time.monotonic() > limit:
            sys.exit("no signal came")
        time.sleep(0.05)
    (out / f"saved_{rank}").write_text("")
    code = 42
if code == "hang1" and rank == 1:
    time.sleep(600)
(out / f"leaves_{rank}_{attempt}").touch()
if rank == 0 and code != "hang1":  # it holds the coordinator: the others leave first
    while len(list(out.glob(f"leaves_*_{attempt}"))) < jax.process_count():
        time.sleep(0.05)
    time.sleep(1)
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
        timeout=900,  # only guards against hanging
        **options,
    )


def training(folder):
    """Puts the stand-in into ``folder``, where ``PYTHONPATH`` has to lead; it notes its starts under ``out``."""
    (folder / "fake_training.py").write_text(WORKER)
    (folder / "out").mkdir()
    return folder


def started(worker):
    return sorted(p.name for p in (worker / "out").glob("start_*"))


def wait_for(path, job, seconds=300):
    limit = time.monotonic() + seconds
    while not path.exists():
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < limit, path
        time.sleep(0.05)
