"""Evaluation: ``python -m terrafm_jax.evaluate --checkpoint PATH --suite folder --data DIR [--protocol NAME]``.

Features are computed once and cached by weights hash; a second call continues. Writes ``results.jsonl``,
``results.md`` (published rows beside ours), ``figures/`` and ``predictions/`` to ``--out``. Several ``--checkpoint``
compare side by side. Exit codes: 0 all rows there, 1 an error or a failed row, 2 wrong flags, 130 interrupted.
"""

from __future__ import annotations

import dataclasses

from absl import app, flags

from terrafm_jax.startup import begin, config_flag, list_flag, one_line, parse_flags, refuse

config_flag("configs/eval", "configs/eval/X.py: values for the flags below; a flag given wins")
_CHECKPOINT = flags.DEFINE_multi_string(
    "checkpoint", None, "PATH, raw, random:SIZE[:SEED] or random@PATH[:SEED]; NAME= in front names it; repeatable"
)
_SUITE = flags.DEFINE_string("suite", None, "geobench, geobench2, copernicus, tfds, folder, or a published layout")
_DATA = flags.DEFINE_string("data", None, "folder of the suite (folder: or a YAML file)")
_OUT = flags.DEFINE_string("out", None, "folder for results; default: eval_out")
_PROTOCOL = list_flag("protocol", None, "protocols, by name; default: one that fits each task")
_NAMES = list_flag("names", None, "data sets of the suite; default: all that are there")
_INPUTS = list_flag("inputs", None, "sensors: s1, s2_l2a, s1+s2_l2a, each, fused; default: each and fused")
_FRACTIONS = list_flag("fractions", None, "shares of the train labels, e.g. 0.01,0.05,0.2,1")
_SHOTS = list_flag("shots", None, "labels per class, e.g. 1,5,10")
_SEEDS = flags.DEFINE_integer("seeds", None, "repetitions where labels are drawn")
_RUNS = flags.DEFINE_integer("runs", None, "repetitions of a probe; default: as its protocol says")
_EPOCHS = flags.DEFINE_integer("epochs", None, "epochs of probes instead of the published ones (rows are labelled)")
_FOLDS = flags.DEFINE_integer("folds", None, "cross-validate over all splits in so many folds (one class per sample)")
_REPEATS = flags.DEFINE_integer("repeats", None, "repetitions of the cross-validation; default 10")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "network input in px, 0 for the images' own; default 224")
_BATCH = flags.DEFINE_integer("batch_size", None, "images at once; default 32")
_LIMIT = flags.DEFINE_integer("limit", None, "samples per split at most (rows are labelled)")
_TILE = flags.DEFINE_integer("tile", None, "cut segmentation images into windows of so many px")
_DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "of the encoder's products; default: its own")
_CACHE = flags.DEFINE_string("cache", None, "folder of the feature cache; none: no cache; default OUT/cache")
_FIGURES = flags.DEFINE_bool("figures", None, "draw figures; default yes")
_UPSTREAM = flags.DEFINE_bool(
    "upstream_l2a_stem", None, "released weights: send L2A through the L1C stem, as the published numbers did"
)
_BANDS = flags.DEFINE_enum("bands", None, ["corrected", "as_labelled"], "geobench: which band order to believe")
_PARTITION = flags.DEFINE_string("partition", None, "geobench: e.g. 0.01x_train")


def _numbers(name: str, texts: list[str] | None, kind: type) -> list | None:
    try:
        return texts and [kind(text) for text in texts]
    except ValueError:
        refuse(f"--{name}={','.join(texts)}: expected {'whole ' * (kind is int)}numbers between commas")


def settings() -> dict:
    """Values of the config file, replaced by the flags that were given."""
    config = flags.FLAGS.config
    found = dict(config.to_dict()) if config else {}
    given = {
        "checkpoints": _CHECKPOINT.value, "suite": _SUITE.value, "data": _DATA.value, "out": _OUT.value,
        "protocols": _PROTOCOL.value, "names": _NAMES.value, "inputs": _INPUTS.value, "seeds": _SEEDS.value,
        "fractions": _numbers("fractions", _FRACTIONS.value, float), "shots": _numbers("shots", _SHOTS.value, int),
        "runs": _RUNS.value, "epochs": _EPOCHS.value,
        "image_size": _IMAGE_SIZE.value, "folds": _FOLDS.value, "repeats": _REPEATS.value,
        "batch_size": _BATCH.value, "limit": _LIMIT.value, "tile": _TILE.value,
        "upstream_l2a_stem": _UPSTREAM.value, "dtype": _DTYPE.value, "cache": _CACHE.value, "figures": _FIGURES.value,
    }  # fmt: skip
    found.update({k: v for k, v in given.items() if v is not None})
    options = dict(found.get("options", {}))
    options.update({k: v for k, v in (("bands", _BANDS.value), ("partition", _PARTITION.value)) if v is not None})
    found["options"] = options
    lacking = [f"--{k.removesuffix('s')}" for k in ("checkpoints", "suite", "data") if not found.get(k)]
    if lacking:
        refuse(f"give {', '.join(lacking)}; --help lists all flags")
    return {"out": "eval_out", **{k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}}


def main(_argv: list[str]) -> None:
    begin()
    wanted = settings()

    from terrafm_jax.evals import report
    from terrafm_jax.evals.datasets.base import DatasetError
    from terrafm_jax.evals.features import FeatureError
    from terrafm_jax.evals.progress import bar
    from terrafm_jax.evals.protocols import ProtocolError
    from terrafm_jax.evals.session import Session, Settings
    from terrafm_jax.weights import WeightsError

    known = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(set(wanted) - known)
    if unknown:
        refuse(f"--config: unknown fields {unknown}, expected some of {sorted(known)}")
    with one_line(DatasetError, FeatureError, ProtocolError, WeightsError):
        session = Session(Settings(**wanted), progress=bar)
        rows = session.run()
    print((session.out / "results.md").read_text())
    print(f"written to {session.out}: results.md, results.jsonl, figures, predictions")
    raise SystemExit(1 if report.failures(rows) else 0)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
