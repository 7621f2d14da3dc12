"""Pretraining: ``python -m terrafm_jax.main --config=configs/vitb.py --workdir=DIR --config.data.dir=DATA``.

Resumes by itself. Exit codes: 0 complete, stopped at ``config.stop_at_step`` or interrupted by a
person; ``config.exit_code_preempted`` after SIGTERM with a checkpoint (a launcher requeues on it);
1 an error, with one line that says what to do; 2 wrong flags.
"""

from __future__ import annotations

import logging
import os
import sys

from absl import app, flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/X.py[:argument]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, local or gs://; resumed when it holds one")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other processes of the job (jax.distributed)")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the launcher does not tell")
_PROCESSES = flags.DEFINE_integer("processes", None, "number of processes, where the launcher does not tell")
_PROCESS = flags.DEFINE_integer("process", None, "index of this process, where the launcher does not tell")
_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "pretend to have so many CPU devices (tests, dry runs)")


def start_jax() -> None:
    """Sets JAX up before anything touches a device: fake devices, compile cache, other processes."""
    import jax

    if _DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _DEVICES.value)
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if cache is None:
        cache = os.path.join(os.path.expanduser("~"), ".cache", "terrafm_jax")
        jax.config.update("jax_compilation_cache_dir", cache)
    if _DISTRIBUTED.value:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)


def _read_weights(path: str) -> dict:
    from terrafm_jax.loader import read_params

    return read_params(path)


def main(_argv: list[str]) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    for noisy in ("absl", "orbax", "jax", "grain"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    start_jax()

    from terrafm_jax.data.reader import TooManySkipped
    from terrafm_jax.evals.during_training import during_training
    from terrafm_jax.training import loop
    from terrafm_jax.training.checkpoint import CheckpointError
    from terrafm_jax.training.meter import TrainingError

    try:
        outcome = loop.train(_CONFIG.value, _WORKDIR.value, during_training, _read_weights)
    except (
        ValueError,
        TooManySkipped,
        CheckpointError,
        TrainingError,
    ) as e:
        # Faults of config, data, sensors and mesh are ValueErrors whose message says what to do.
        if os.environ.get("TERRAFM_TRACEBACK"):
            raise
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None
    raise SystemExit(outcome.exit_code)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
