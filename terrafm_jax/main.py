"""Pretraining: ``python -m terrafm_jax.main --config=configs/vitb.py --workdir=DIR --config.data.dir=DATA``.

Resumes by itself. Exit codes: 0 complete, stopped at ``config.stop_at_step`` or interrupted by a
person; ``config.exit_code_preempted`` after SIGTERM with a checkpoint (a launcher requeues on it);
1 an error, with one line that says what to do; 2 wrong flags.
"""

from __future__ import annotations

import os

from absl import app, flags
from ml_collections import config_flags

from terrafm_jax.startup import fail, parse_flags, start_jax, start_logging

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/X.py[:argument]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run, local or gs://; resumed when it holds one")


def _read_weights(path: str) -> dict:
    from terrafm_jax.loader import read_params

    return read_params(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300].rstrip(".")


def main(_argv: list[str]) -> None:
    start_logging()
    start_jax()

    import jax

    from terrafm_jax.data.reader import TooManySkipped
    from terrafm_jax.data.shards import FetchError
    from terrafm_jax.evals.during_training import during_training
    from terrafm_jax.training import loop
    from terrafm_jax.training.checkpoint import CheckpointError
    from terrafm_jax.training.run import TrainingError

    try:
        outcome = loop.train(_CONFIG.value, _WORKDIR.value, during_training, _read_weights)
    except (ValueError, OSError, FetchError, TooManySkipped, CheckpointError, TrainingError) as e:
        # Faults of config, data, sensors and mesh are ValueErrors that say what to do; OSErrors name the file.
        if os.environ.get("TERRAFM_TRACEBACK"):
            raise
        fail(str(e))
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
