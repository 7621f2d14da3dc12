"""Every named protocol in one table, and one function that runs any of them on extracted features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from terrafm_jax.evals import crossval, knn, linear, segmentation
from terrafm_jax.evals.datasets.base import DatasetInfo, few_shot, label_fraction
from terrafm_jax.evals.heads import upernet_layers
from terrafm_jax.evals.linear import FeatureSplit
from terrafm_jax.evals.metrics import Result
from terrafm_jax.evals.raw import standardize
from terrafm_jax.evals.segmentation import DenseSplit
from terrafm_jax.evals.store import Extracted

WHOLE_IMAGE = ("classification", "multilabel")
TASKS_OF: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(knn.PROTOCOLS, WHOLE_IMAGE),
    **dict.fromkeys(linear.PROBES, (*WHOLE_IMAGE, "regression")),
    "logreg": WHOLE_IMAGE,
    **dict.fromkeys(segmentation.DENSE, ("segmentation",)),
    "change-difference": ("change",),
}
# What a data set is evaluated with when nobody says.
DEFAULTS = {
    "classification": ("galileo-knn20",),
    "multilabel": ("galileo-knn20",),
    "segmentation": ("segmentation-linear",),
    "regression": ("galileo-linear",),
    "change": ("change-difference",),
}
HEADLINES = {
    "classification": "top1",
    "multilabel": "f1_micro",
    "segmentation": "miou",
    "regression": "rmse",
    "change": "f1_change",
}


class ProtocolError(ValueError):
    """An unknown protocol, or one that does not fit the task."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How much of the labels is used, and how often.

    Attributes:
      fraction: share of the train labels per class. shots: labels per class instead (0: fraction).
      seed: of the subset and of training. runs: repetitions of a probe (0: as the protocol says).
      resamples: bootstrap draws.
      epochs: replaces the protocol's epochs (0: as published); such results are labelled.
    """

    fraction: float = 1.0
    shots: int = 0
    seed: int = 0
    runs: int = 0
    resamples: int = 1000
    epochs: int = 0


def check(protocol: str, task: str = "") -> None:
    """Raises ProtocolError for an unknown protocol or one that cannot do ``task``."""
    if protocol not in TASKS_OF:
        raise ProtocolError(f"protocol {protocol!r}, expected one of {sorted(TASKS_OF)}")
    if task and task not in TASKS_OF[protocol]:
        fits = sorted(p for p, tasks in TASKS_OF.items() if task in tasks)
        raise ProtocolError(f"protocol {protocol} does not do {task}; these do: {fits}")


def headline(protocol: str, task: str) -> str:
    """The metric that the protocol's tables print."""
    if task == "multilabel":
        if protocol in knn.PROTOCOLS:
            return knn.PROTOCOLS[protocol].headline_multilabel
        return "map_macro" if protocol == "copernicus-linear" else "map_micro"
    return HEADLINES[task]


def is_dense(task: str) -> bool:
    return task in ("segmentation", "change")


def layers_for(protocol: str, depth: int) -> tuple[int, ...]:
    """Blocks whose maps a protocol needs; () is the last one."""
    dense = segmentation.DENSE.get(protocol)
    return upernet_layers(depth) if dense is not None and dense.head == "upernet" else ()


def subset(extracted: Extracted, task: str, options: Options) -> np.ndarray:
    """Rows of the train split that the options leave."""
    targets = extracted.targets
    if options.shots:
        if task != "classification":
            raise ProtocolError(f"--shots needs one class per sample; the task is {task}")
        return few_shot(targets, options.shots, options.seed)
    whole = np.zeros((len(targets), 1)) if is_dense(task) else targets
    return label_fraction(whole, options.fraction, options.seed)


def run(
    protocol: str, splits: Mapping[str, Extracted], info: DatasetInfo, options: Options, *, patch: int = 16,
    scale: bool = False,
) -> Result:  # fmt: skip
    """Runs one protocol.

    Args:
      splits: "train", "test" and, where the data set has it, "val".
      patch: pixels per patch of the encoder. scale: standardize features by the train split first.

    Raises:
      ProtocolError: see :func:`check`; a split is missing.
    """
    check(protocol, info.task)
    lacking = [s for s in ("train", "test") if s not in splits]
    if lacking:
        raise ProtocolError(f"{info.name}: protocol {protocol} needs splits {lacking}, the data set has {list(splits)}")
    rows = subset(splits["train"], info.task, options)
    if info.task == "change":
        result = _change(splits, info, options, rows)
    elif info.task == "segmentation":
        result = _dense(protocol, splits, info, options, rows, patch, scale)
    else:
        result = _whole_image(protocol, splits, info, options, rows, scale)
    settings = result.settings | {"fraction": options.fraction, "shots": options.shots, "seed": options.seed}
    trained = protocol in linear.PROBES or protocol in segmentation.DENSE
    epochs = f" (epochs={options.epochs})" if options.epochs and trained else ""
    return dataclasses.replace(result, settings=settings, protocol=result.protocol + epochs)


def run_folds(
    protocol: str,
    whole: Extracted,
    info: DatasetInfo,
    options: Options,
    folds: int,
    repeats: int,
    *,
    scale: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Result:
    """Repeated stratified cross-validation of a protocol over all samples of a data set.

    A probe runs once per fold, whatever its protocol says: the repetitions draw anew already.

    Raises ProtocolError unless every sample has one class.
    """
    if info.task != "classification":
        raise ProtocolError(f"--folds: needs one class per sample, {info.name} is {info.task}")
    inner = dataclasses.replace(options, resamples=0, runs=1)
    label = protocol

    def classify(train: np.ndarray, test: np.ndarray) -> np.ndarray:
        nonlocal label
        parts = {k: Extracted(whole.cls[r], whole.targets[r], []) for k, r in (("train", train), ("test", test))}
        found = run(protocol, parts, info, inner, scale=scale)
        label = found.protocol
        return found.predictions

    predictions = crossval.cross_validate(
        classify, whole.targets, folds=folds, repeats=repeats, seed=options.seed, progress=progress
    )
    label += f", {folds}-fold x {repeats}"
    settings = {"folds": folds}
    return crossval.result(label, predictions, whole.targets, len(info.classes), settings, options.resamples)


def _shorter(protocol: Any, options: Options) -> Any:
    return dataclasses.replace(protocol, epochs=options.epochs) if options.epochs else protocol


def _whole_image(
    protocol: str, splits: Mapping[str, Extracted], info: DatasetInfo, options: Options, rows: np.ndarray, scale: bool
) -> Result:
    parts = {k: FeatureSplit(e.cls, e.targets) for k, e in splits.items()}
    parts["train"] = parts["train"].take(rows)
    if scale:
        names = ["train", *(k for k in parts if k != "train")]
        scaled = standardize(*(parts[k].features for k in names))
        parts = {k: FeatureSplit(rows, parts[k].targets) for k, rows in zip(names, scaled, strict=True)}
    train, val, test = parts["train"], parts.get("val"), parts["test"]
    classes = len(info.classes)
    if protocol in knn.PROTOCOLS:
        return knn.knn_classify(
            train.features, train.targets, test.features, test.targets, protocol,
            classes=classes, resamples=options.resamples,
        )  # fmt: skip
    if protocol == "logreg":
        return linear.logistic_regression(
            train, val, test, classes=classes, seed=options.seed, resamples=options.resamples,
            refit_on_val=options.fraction == 1 and not options.shots,
        )  # fmt: skip
    return linear.linear_probe(
        _shorter(linear.PROBES[protocol], options), train, val, test,
        classes=classes, runs=options.runs, seed=options.seed, resamples=options.resamples,
    )  # fmt: skip


def _dense(
    protocol: str, splits: Mapping[str, Extracted], info: DatasetInfo, options: Options, rows: np.ndarray, patch: int,
    scale: bool,
) -> Result:  # fmt: skip
    parts = {k: DenseSplit(e.maps, e.targets, e.ids) for k, e in splits.items()}
    train = parts["train"].take(rows)
    if scale:
        mean = tuple(m.astype(np.float32).mean((0, 1, 2)) for m in train.maps)
        std = tuple(np.maximum(m.astype(np.float32).std((0, 1, 2)), 1e-6) for m in train.maps)
        parts = {k: _scaled(p, mean, std) for k, p in parts.items()}
        train = _scaled(train, mean, std)
    return segmentation.dense_probe(
        _shorter(segmentation.DENSE[protocol], options), train, parts.get("val"), parts["test"],
        classes=len(info.classes), patch=patch, ignore=info.ignore, runs=options.runs, seed=options.seed,
        resamples=options.resamples,
    )  # fmt: skip


def _scaled(split: DenseSplit, mean: tuple, std: tuple) -> DenseSplit:
    maps = zip(split.maps, mean, std, strict=True)
    return dataclasses.replace(split, maps=tuple((m[slice(None)] - a) / b for m, a, b in maps))


def _change(splits: Mapping[str, Extracted], info: DatasetInfo, options: Options, rows: np.ndarray) -> Result:
    def distances(e: Extracted, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        first, second, masks = e.maps[-1][keep], e.after[-1][keep], e.targets[keep]
        return segmentation.feature_difference(first, second, masks.shape[1:]), masks

    test = splits["test"]
    found = distances(splits["train"], rows), distances(test, np.arange(len(test.targets)))
    return segmentation.change_detection(*found, ignore=info.ignore, resamples=options.resamples, ids=test.ids)
