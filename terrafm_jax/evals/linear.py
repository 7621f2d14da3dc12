"""Linear probes on frozen class tokens: all learning rates of a sweep train at once, as one vmapped program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from terrafm_jax.evals import heads, metrics
from terrafm_jax.evals.datasets.base import held_out
from terrafm_jax.evals.knn import score_classification
from terrafm_jax.evals.metrics import Result
from terrafm_jax.evals.versioned import Versioned

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

# Parameters and statistics of a head, the state of its optimizer, the steps taken.
Carry = tuple[dict, dict, optax.OptState, Array]

GALILEO_RATES = (1e-4, 3e-4, 5e-4, 8e-4, 1e-3, 3e-3, 5e-3, 8e-3, 1e-2, 3e-2, 5e-2, 8e-2, 1e-1, 3e-1, 5e-1, 8e-1)


@dataclasses.dataclass(frozen=True)
class ProbeProtocol(Versioned):
    """One way to train a linear layer on frozen features.

    Attributes:
      rates: learning rates; the best on validation is taken. ``multilabel_rates`` replaces them for several labels.
      schedule: ``warmup-cosine`` (10 % linear warm-up, cosine to 0) or ``onecycle`` (torch's defaults).
      affine: of the batch norm before the layer.
      runs: repetitions with other seeds; metrics are means over them.
      batch, weight_decay: not in the published text where the comment in PROBES says so.
    """

    name: str
    optimizer: str
    rates: tuple[float, ...]
    schedule: str
    epochs: int = 50
    batch: int = 64
    weight_decay: float = 0.0
    affine: bool = True
    runs: int = 5
    multilabel_rates: tuple[float, ...] = ()
    version: int = 1


PROBES: dict[str, ProbeProtocol] = {
    p.name: p
    for p in (
        # Published: batch norm + linear, AdamW, 50 epochs, warm-up 10 %, 16 rates, 5 runs. Batch and decay: inferred.
        ProbeProtocol("galileo-linear", "adamw", GALILEO_RATES, "warmup-cosine", batch=128, weight_decay=0.01),
        # Published: batch norm without affine, SGD, OneCycle, batch 64, 50 epochs, rate 0.1 (1 for BigEarthNet).
        ProbeProtocol("copernicus-linear", "sgd", (0.1,), "onecycle", affine=False, runs=1, multilabel_rates=(1.0,)),
    )
}


def schedule(protocol: ProbeProtocol, steps: int) -> Callable[[Array], Array]:
    """Learning rate over steps with peak 1 (the rates multiply it)."""
    if protocol.schedule == "onecycle":
        return optax.cosine_onecycle_schedule(steps, 1.0, pct_start=0.3, div_factor=25.0, final_div_factor=1e4)
    warm = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(0.0, 1.0, warm, max(steps, warm + 1), 0.0)


@dataclasses.dataclass(frozen=True)
class FeatureSplit:
    """Features [N, d] and targets: int [N], bool [N, C] or float [N]."""

    features: np.ndarray
    targets: np.ndarray

    def take(self, rows: np.ndarray) -> FeatureSplit:
        return FeatureSplit(self.features[rows], self.targets[rows])


def task_of(targets: np.ndarray) -> str:
    targets = np.asarray(targets)
    if targets.ndim == 2:
        return "multilabel"
    return "classification" if np.issubdtype(targets.dtype, np.integer) else "regression"


def _classes(told: int, *splits: FeatureSplit) -> int:
    """Columns of multilabel targets; else what the caller told, or what the labels show."""
    if splits[0].targets.ndim == 2:
        return splits[0].targets.shape[1]
    return told or int(max(split.targets.max() for split in splits)) + 1


def _loss(task: str, logits: Array, targets: Array) -> Array:
    if task == "multilabel":
        return heads.binary_cross_entropy(logits, targets)
    if task == "regression":
        return jnp.mean((logits[:, 0] - targets) ** 2)
    return heads.cross_entropy(logits, targets)


def fit(
    protocol: ProbeProtocol, train: FeatureSplit, outputs: int, rates: Sequence[float], seeds: Sequence[int]
) -> Callable[[np.ndarray], np.ndarray]:
    """Trains len(seeds) x len(rates) probes at once; returns features [n, d] -> logits [seeds, rates, n, outputs]."""
    task = task_of(train.targets)
    train_all, logits = _programs(protocol, task, train.features.shape[1], outputs)
    y = jnp.asarray(train.targets.astype(np.float32 if task != "classification" else int))
    fitted = train_all(jnp.asarray(train.features), y, jnp.asarray(rates, jnp.float32), jnp.asarray(seeds))
    return lambda rows: np.concatenate(
        [np.asarray(logits(fitted, jnp.asarray(rows[i : i + 4096]))) for i in range(0, len(rows), 4096)], axis=2
    )


@functools.lru_cache(maxsize=32)  # the folds of a cross-validation share one compilation
def _programs(protocol: ProbeProtocol, task: str, width: int, outputs: int) -> tuple[Callable, Callable]:
    head = heads.linear_head(width, outputs, affine=protocol.affine)
    adam = optax.scale_by_adam() if protocol.optimizer == "adamw" else optax.trace(0.9)

    def one(x: Array, y: Array, rate: Array, seed: Array) -> tuple[Any, Any]:
        count, batch = len(x), min(protocol.batch, len(x))
        per_epoch = -(-count // batch)
        curve = schedule(protocol, per_epoch * protocol.epochs)
        key = jax.random.key(seed)
        params, state = head.init(jax.random.fold_in(key, 0))

        def epoch(carry: Carry, index: Array) -> tuple[Carry, None]:
            order = jax.random.permutation(jax.random.fold_in(key, index + 1), count)
            order = jnp.resize(order, (per_epoch, batch))  # the last batch is filled from the front of the epoch

            def step(carry: Carry, rows: Array) -> tuple[Carry, None]:
                params, state, opt, n = carry

                def loss(p: dict) -> tuple[Array, dict]:
                    (logits, *_), new = head.apply(p, state, heads.Features(x[rows]), True)
                    return _loss(task, logits, y[rows]), new

                grads, state = jax.grad(loss, has_aux=True)(params)
                direction, opt = adam.update(grads, opt, params)
                scale = rate * curve(n)
                decay = protocol.weight_decay
                params = jax.tree.map(lambda p, u: p - scale * (u + decay * p), params, direction)
                return (params, state, opt, n + 1), None

            return jax.lax.scan(step, carry, order)

        start = (params, state, adam.init(params), jnp.zeros((), jnp.int32))
        (params, state, _, _), _ = jax.lax.scan(epoch, start, jnp.arange(protocol.epochs))
        return params, state

    def single(params: Any, state: Any, rows: Array) -> Array:
        return head.apply(params, state, heads.Features(rows))[0][0]

    over_rates = jax.vmap(heads.exact(one), in_axes=(None, None, 0, None))
    train_all = jax.jit(jax.vmap(over_rates, in_axes=(None, None, None, 0)))
    of_all = jax.vmap(jax.vmap(heads.exact(single), (0, 0, None)), (0, 0, None))
    logits = jax.jit(lambda fitted, rows: of_all(*fitted, rows))
    return train_all, logits


def _scores(task: str, logits: np.ndarray) -> np.ndarray:
    if task == "multilabel":
        return 1.0 / (1.0 + np.exp(-np.clip(logits, -60, 60)))
    if task == "classification":
        shifted = np.exp(logits - logits.max(-1, keepdims=True))
        return shifted / shifted.sum(-1, keepdims=True)
    return logits


def quality(task: str, scores: np.ndarray, targets: np.ndarray) -> float:
    """What selection on validation maximizes: accuracy, micro mAP, or minus RMSE."""
    if task == "multilabel":
        return metrics.mean_average_precision(targets, scores)["map_micro"]
    if task == "classification":
        return float((scores.argmax(-1) == targets).mean())
    return -float(np.sqrt(np.mean((scores[:, 0] - targets) ** 2)))


def hold_out(train: FeatureSplit, seed: int) -> tuple[FeatureSplit, FeatureSplit]:
    """(rest, held out): a stratified fifth of the train split (``datasets.base.held_out``)."""
    rest, held = held_out(train.targets, seed)
    return train.take(rest), train.take(held)


def linear_probe(
    protocol: ProbeProtocol, train: FeatureSplit, val: FeatureSplit | None, test: FeatureSplit, *, classes: int = 0,
    runs: int = 0, seed: int = 0, resamples: int = 1000,
) -> Result:  # fmt: skip
    """Trains on ``train``, chooses the rate of each run on ``val``, reports means over runs on ``test``.

    Without ``val`` a fifth of ``train`` is held out. Regression targets are standardized for training.
    """
    task = task_of(train.targets)
    chosen_from = "val"
    if val is None or not len(val.targets):
        (train, val), chosen_from = hold_out(train, seed), "a fifth of train"
    center, scale = 0.0, 1.0
    if task == "regression":
        center, scale = float(np.mean(train.targets)), float(np.std(train.targets)) or 1.0
    outputs = 1 if task == "regression" else _classes(classes, train, val, test)
    rates = protocol.multilabel_rates if task == "multilabel" and protocol.multilabel_rates else protocol.rates
    seeds = [seed + i for i in range(runs or protocol.runs)]
    scaled = FeatureSplit(train.features, (train.targets - center) / scale) if task == "regression" else train
    predict = fit(protocol, scaled, outputs, rates, seeds)
    on_val, on_test = (_scores(task, predict(s.features)) * scale + center for s in (val, test))
    best = [int(np.argmax([quality(task, s, val.targets) for s in run])) for run in on_val]
    picked = [on_test[i, b] for i, b in enumerate(best)]
    settings = {
        "rates": [float(rates[b]) for b in best], "runs": len(seeds), "train": len(train.targets),
        "test": len(test.targets), "rate chosen on": chosen_from,
    }  # fmt: skip
    return mean_of_runs(protocol.label, task, picked, test.targets, settings, resamples)


def mean_of_runs(
    label: str, task: str, runs: Sequence[np.ndarray], targets: np.ndarray, settings: dict, resamples: int = 1000
) -> Result:
    """Result whose metrics are means over runs (scores [n, C] each), with intervals over the test samples.

    Confusion and values by class are over all runs as well: the figure of a row must show what its number says.
    """
    targets = np.asarray(targets)
    if task == "regression":
        parts = [metrics.regression_metric(targets, s[:, 0]) for s in runs]
        found = metrics.bootstrap(metrics.mean_metric(parts), len(targets), resamples=resamples)
        mean = np.mean([s[:, 0] for s in runs], axis=0)
        return Result(label, task, found, np.array([]), mean, None, None, settings)
    each = [score_classification(label, s, targets, settings, resamples=0) for s in runs]
    if task == "multilabel":
        parts = [metrics.multilabel_metric(targets, s > 0.5, s) for s in runs]
    else:
        parts = [metrics.classification_metric(targets, s.argmax(1), s.shape[1]) for s in runs]
    draws = resamples // 5 if task == "multilabel" else resamples
    found = metrics.bootstrap(metrics.mean_metric(parts), len(targets), resamples=draws)
    settings = settings | {"sd over runs": metrics.spread(parts, len(targets))}
    whole = {"metrics": found, "settings": settings, "runs": np.stack([r.predictions for r in each])}
    if task == "classification":
        matrix = np.sum([r.confusion for r in each], axis=0)
        return dataclasses.replace(each[0], confusion=matrix, per_class=metrics.recalls(matrix), **whole)
    return dataclasses.replace(each[0], per_class=np.mean([r.per_class for r in each], axis=0), **whole)


LOGREG_C = tuple(10.0**e for e in range(-6, 5))


def logistic_regression(
    train: FeatureSplit, val: FeatureSplit | None, test: FeatureSplit, *, classes: int = 0,
    cs: Sequence[float] = LOGREG_C, seed: int = 0, resamples: int = 1000, refit_on_val: bool = True,
) -> Result:  # fmt: skip
    """``logreg/1``: scikit-learn's L-BFGS, C from 1e-6 to 1e4 chosen on val, refitted on train and val together.

    The protocol of torchgeo-bench. Without ``refit_on_val`` on train alone, and the label says so: of few train labels,
    those of a whole val split would outnumber them. Features are standardized over what is fitted (not in the published
    text; without it L-BFGS does not converge at large C). Several labels: one-versus-rest.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    task = task_of(train.targets)
    if task == "regression":
        raise ValueError("logreg: targets are numbers, not classes; use a linear probe")
    whole, label = train, "logreg/1"
    if val is None or not len(val.targets):
        train, val = hold_out(train, seed)
    elif not refit_on_val:
        label += " (fitted on train alone)"
    else:
        whole = FeatureSplit(*(np.concatenate([getattr(train, f), getattr(val, f)]) for f in ("features", "targets")))
    outputs = _classes(classes, whole, val, test)

    def fitted(c: float, on: FeatureSplit) -> Pipeline:
        model = LogisticRegression(C=c, max_iter=1000)
        return make_pipeline(StandardScaler(), OneVsRestClassifier(model) if task == "multilabel" else model).fit(
            on.features, on.targets
        )

    def scores(model: Pipeline, rows: np.ndarray) -> np.ndarray:
        found = model.predict_proba(rows)
        if task == "multilabel":
            return found
        full = np.zeros((len(rows), outputs))
        full[:, model.classes_.astype(int)] = found
        return full

    # Many small fits: the threads of the matrix library cost more than they give.
    threads = 1 if train.features.size < 1 << 22 else None
    with threadpool_limits(threads):
        found = [quality(task, scores(fitted(c, train), val.features), val.targets) for c in cs]
        best = cs[int(np.argmax(found))]
        on_test = scores(fitted(best, whole), test.features)
    settings = {"C": best, "train": len(whole.targets), "test": len(test.targets)}
    return score_classification(label, on_test, test.targets, settings, resamples=resamples)
