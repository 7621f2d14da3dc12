"""Fine-tuning: ``python -m terrafm_jax.finetune --config=configs/finetune/classification.py --workdir=DIR``.

Give ``--config.init_from=PATH --config.data.dir=DIR``. Resumes by itself. Exit codes: 0 complete or stopped on
request, 1 an error, with one line that says what to do, 2 wrong flags.
"""

from __future__ import annotations

import logging
import sys

from absl import app, flags
from ml_collections import config_flags

from terrafm_jax.xla import cache_compilations

_CONFIG = config_flags.DEFINE_config_file("config", None, "configs/finetune/X.py[:argument]")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; resumed when it holds one")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    cache_compilations()

    from terrafm_jax.config import ConfigError
    from terrafm_jax.evals.datasets.base import DatasetError
    from terrafm_jax.evals.features import FeatureError
    from terrafm_jax.finetuning.job import Job
    from terrafm_jax.finetuning.trainer import TuningError
    from terrafm_jax.training.checkpoint import CheckpointError
    from terrafm_jax.training.sharding import ShardingError
    from terrafm_jax.weights import WeightsError

    known = (ConfigError, DatasetError, FeatureError, TuningError, CheckpointError, ShardingError, WeightsError)
    try:
        Job(_CONFIG.value, _WORKDIR.value).run()
    except known as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None
    except ValueError as e:
        if not str(e).startswith("config."):
            raise
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main)
