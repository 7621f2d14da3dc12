"""Pretraining: ``python -m terrafm_jax.main --config=configs/vitb.py --workdir=DIR --config.data.dir=DATA``.

Resumes by itself. Exit codes: 0 complete, stopped at ``config.stop_at_step`` or interrupted by a
person; ``config.exit_code_preempted`` after SIGTERM with a checkpoint (a launcher requeues on it);
1 an error, with one line that says what to do; 2 wrong flags; 130 interrupted twice, and nothing saved since.
"""

from __future__ import annotations

import os

from absl import app, flags

from terrafm_jax.startup import config_flag, fail, interrupted, parse_flags, start_logging
from terrafm_jax.xla import cache_compilations

# Seconds without a sign of life after which a process counts as dead and the others end, too. JAX waits for 100.
HEARTBEAT = 30

_CONFIG = config_flag("configs", "configs/X.py[:argument], your file or one of the package's")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, local or gs://; resumed when it holds one")
_CPU_DEVICES = flags.DEFINE_integer("cpu_devices", 0, "pretend to have so many CPU devices (tests, dry runs)")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "join the other processes of the job (jax.distributed)")
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where the launcher does not tell")
_PROCESSES = flags.DEFINE_integer("processes", None, "number of processes, where the launcher does not tell")
_PROCESS = flags.DEFINE_integer("process", None, "index of this process, where the launcher does not tell")


def _start_jax() -> None:
    """Fake devices, the compile cache and the other processes: all that must precede the first use of a device."""
    import jax

    if _CPU_DEVICES.value:
        jax.config.update("jax_num_cpu_devices", _CPU_DEVICES.value)
    cache_compilations()
    if _DISTRIBUTED.value:
        jax.distributed.initialize(
            _COORDINATOR.value, _PROCESSES.value, _PROCESS.value, heartbeat_timeout_seconds=HEARTBEAT
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


def main(_argv: list[str]) -> None:
    start_logging()
    _start_jax()

    import jax

    from terrafm_jax.data.reader import TooManySkipped
    from terrafm_jax.data.shards import FetchError
    from terrafm_jax.evals.during_training import during_training
    from terrafm_jax.loader import read
    from terrafm_jax.training import loop
    from terrafm_jax.training.checkpoint import CheckpointError
    from terrafm_jax.training.tools import TrainingError

    try:
        outcome = loop.train(_CONFIG.value, _WORKDIR.value, during_training, read)
    except (ValueError, OSError, FetchError, TooManySkipped, CheckpointError, TrainingError) as e:
        # Faults of config, data, sensors and mesh are ValueErrors that say what to do; OSErrors name the file.
        if os.environ.get("TERRAFM_TRACEBACK"):
            raise
        fail(str(e))
    except KeyboardInterrupt:  # the second one: the first asks for a checkpoint
        interrupted()
    except jax.errors.JaxRuntimeError as e:
        if jax.process_count() == 1:
            raise
        # Collectives break off when the process at their other end is gone.
        fail(
            f"the step broke off, as it does when another process of the job ends: {_first_line(e)}. "
            "Started again, the run resumes from its newest checkpoint"
        )
    raise SystemExit(outcome.exit_code)


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
