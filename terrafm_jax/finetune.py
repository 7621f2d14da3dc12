"""Fine-tuning: ``python -m terrafm_jax.finetune --config=configs/finetune/classification.py --workdir=DIR``.

Give ``--config.init_from=PATH --config.data.dir=DIR``. Resumes by itself. Exit codes: 0 complete or stopped on
request, 1 an error, with one line that says what to do, 2 wrong flags, 130 a second Ctrl-C.
"""

from __future__ import annotations

from absl import app, flags

from terrafm_jax.startup import begin, config_flag, one_line, parse_flags

_CONFIG = config_flag("configs/finetune", "configs/finetune/X.py[:argument], your file or one of the package's")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder of the run; resumed when it holds one")


def main(_argv: list[str]) -> None:
    begin()

    from terrafm_jax.config import ConfigError
    from terrafm_jax.evals.datasets.base import DatasetError
    from terrafm_jax.evals.features import FeatureError
    from terrafm_jax.finetuning.job import Job
    from terrafm_jax.finetuning.trainer import TuningError
    from terrafm_jax.training.checkpoint import CheckpointError
    from terrafm_jax.training.sharding import ShardingError
    from terrafm_jax.weights import WeightsError

    known = (ConfigError, DatasetError, FeatureError, TuningError, CheckpointError, ShardingError, WeightsError)
    with one_line(*known):
        try:
            Job(_CONFIG.value, _WORKDIR.value).run()
        except ValueError as error:
            if str(error).startswith("config."):  # a combination that only the network finds out
                raise ConfigError(error) from None
            raise


if __name__ == "__main__":
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
