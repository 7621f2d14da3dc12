"""Few labels: ``python -m terrafm_jax.crossvalidate --checkpoint RUN --data FOLDER --out OUT``.

Repeated stratified cross-validation of a small labelled data set (one class per image, a few hundred images), for
raw band statistics, the checkpoint's network untrained, and the checkpoint: kNN, linear probes and fine-tuning on the
same folds, with paired intervals. Several ``--checkpoint`` of one name (``NAME=PATH``) are seeds of one arm. Writes
``results.md``, ``results.json`` and ``results.png``; a second call continues. Exit codes: 0, 1 an error, 2 wrong flags,
130 interrupted.
"""

from __future__ import annotations

from pathlib import Path

from absl import app, flags

from terrafm_jax.startup import begin, list_flag, one_line, parse_flags

_CHECKPOINT = flags.DEFINE_multi_string("checkpoint", None, "[NAME=]PATH, one per seed; default name: pretrained")
_SUITE = flags.DEFINE_string("suite", "folder", "as evaluate's")
_DATA = flags.DEFINE_string("data", None, "folder of the suite (folder: or a YAML file)")
_NAME = flags.DEFINE_string("name", "", "data set of the suite; may be left out when there is only one")
_OUT = flags.DEFINE_string("out", None, "folder for results")
_INPUTS = flags.DEFINE_string("inputs", "", "sensors, e.g. s2_l1c or s1+s2_l2a; default: all shared ones, fused")
_PROTOCOL = list_flag(
    "protocol", ["galileo-knn20", "torchgeo-bench-knn5", "logreg", "galileo-linear", "fold-finetune"],
    "protocols of evaluate, and fold-finetune",
)  # fmt: skip
_FOLDS = flags.DEFINE_integer("folds", 5, "folds")
_REPEATS = flags.DEFINE_integer("repeats", 10, "repetitions with other folds")
_TUNE_REPEATS = flags.DEFINE_integer("tune_repeats", 2, "repetitions of fold-finetune, the first ones of the others")
_RANDOM = flags.DEFINE_integer("random_seeds", 3, "untrained networks")
_RATES = list_flag("rates", None, "learning rates of fold-finetune; default: its recipe's")
_EPOCHS = flags.DEFINE_integer("epochs", 0, "epochs of fold-finetune; default: its recipe's")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "network input in px; 0: the images' own")


def main(_argv: list[str]) -> None:
    begin()

    from terrafm_jax.evals.datasets.base import DatasetError
    from terrafm_jax.evals.features import FeatureError
    from terrafm_jax.evals.progress import bar
    from terrafm_jax.evals.protocols import ProtocolError
    from terrafm_jax.finetuning.experiment import Experiment
    from terrafm_jax.weights import WeightsError

    with one_line(DatasetError, FeatureError, ProtocolError, WeightsError, ValueError):
        experiment = Experiment(
            checkpoints=tuple(_CHECKPOINT.value), suite=_SUITE.value, data=_DATA.value, out=Path(_OUT.value),
            name=_NAME.value, inputs=_INPUTS.value, protocols=tuple(_PROTOCOL.value), folds=_FOLDS.value,
            repeats=_REPEATS.value, tune_repeats=_TUNE_REPEATS.value, random_seeds=_RANDOM.value,
            image_size=_IMAGE_SIZE.value, rates=tuple(float(r) for r in _RATES.value or ()), epochs=_EPOCHS.value,
        )  # fmt: skip
        experiment.run(lambda text: print(text, flush=True), bar)
    print((experiment.out / "results.md").read_text())
    print(f"written to {experiment.out}: results.md, results.json, results.png")


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "data", "out"])
    app.run(main, flags_parser=parse_flags)
