"""Dense probes on frozen patch features: linear per patch or UPerNet; and change by feature difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from terrafm_jax.evals import heads, metrics
from terrafm_jax.evals.datasets.base import by_image
from terrafm_jax.evals.linear import GALILEO_RATES
from terrafm_jax.evals.metrics import Result
from terrafm_jax.evals.store import Rows
from terrafm_jax.evals.versioned import Versioned

SHOWN = 16  # test images whose predictions of the first run are kept for the pictures
LOGIT_BYTES = 1 << 29  # logits of one step over the learning rates that train together

Carry = tuple[dict, dict, optax.OptState]  # parameters and statistics of a head, the state of its optimizer


@dataclasses.dataclass(frozen=True)
class DenseProtocol(Versioned):
    """One way to train a segmentation head on frozen maps.

    Attributes:
      head: ``linear`` (classes x p x p per patch) or ``upernet`` (maps of four blocks).
      rates: learning rates; the best mIoU on validation is taken.
      batch, weight_decay: inferred for galileo (its text gives neither).
    """

    name: str
    head: str
    rates: tuple[float, ...]
    epochs: int = 50
    batch: int = 16
    weight_decay: float = 0.01
    warmup: float = 0.1
    channels: int = 512
    runs: int = 1
    version: int = 1


DENSE: dict[str, DenseProtocol] = {
    p.name: p
    for p in (
        # Galileo's linear segmentation probe: AdamW, 50 epochs, the 16 rates of its linear probe.
        DenseProtocol("segmentation-linear", "linear", GALILEO_RATES, batch=64, runs=5),
        # Copernicus-Bench, frozen: UPerHead(512), FCN auxiliary 0.4, AdamW 1e-3, batch 16, 50 epochs.
        DenseProtocol("copernicus-upernet", "upernet", (1e-3,), weight_decay=0.01),
    )
}


@dataclasses.dataclass(frozen=True)
class DenseSplit:
    """maps: one [N, h, w, d] array (may lie on disk, any float type) per layer; targets int [N, H, W]; ids of both."""

    maps: tuple[np.ndarray | Rows, ...]
    targets: np.ndarray
    ids: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.targets)

    def take(self, rows: Sequence[int]) -> DenseSplit:
        rows = np.asarray(rows, int)
        ids = [self.ids[i] for i in rows] if self.ids else ()
        return DenseSplit(tuple(m[rows] for m in self.maps), self.targets[rows], ids)


def make_head(protocol: DenseProtocol, width: int, classes: int, patch: int) -> heads.Head:
    if protocol.head == "upernet":
        return heads.upernet_head(width, classes, protocol.channels)
    return heads.patch_linear_head(width, classes, patch)


def _features(maps: Sequence[Any]) -> heads.Features:
    arrays = tuple(jnp.asarray(m, jnp.float32) for m in maps)
    return heads.Features(arrays[-1].mean((1, 2)), arrays)


class _Fitted:
    """Heads of several learning rates that train together on the same batches."""

    def __init__(
        self, protocol: DenseProtocol, head: heads.Head, ignore: int, steps: int, rates: Sequence[float], seed: int
    ):
        warm = max(1, round(protocol.warmup * steps))
        curve = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm, max(steps, warm + 1), 0.0)
        adam, decay = optax.scale_by_adam(), protocol.weight_decay
        self.rates = jnp.asarray(rates, jnp.float32)

        def start(_rate: Array, key: Array) -> Carry:
            params, state = head.init(key)
            return params, state, adam.init(params)

        def step(rate: Array, carry: Carry, maps: tuple[Array, ...], targets: Array, n: int, key: Array) -> Carry:
            params, state, opt = carry

            def loss(p: dict) -> tuple[Array, dict]:
                outputs, new = head.apply(p, state, _features(maps), True, key)
                return heads.dense_loss(outputs, targets, ignore=ignore), new

            grads, state = jax.grad(loss, has_aux=True)(params)
            direction, opt = adam.update(grads, opt, params)
            scale = rate * curve(n)
            return jax.tree.map(lambda p, u: p - scale * (u + decay * p), params, direction), state, opt

        def predict(carry: Carry, maps: tuple[Array, ...], size: tuple[int, int]) -> Array:
            (logits, *_), _ = head.apply(carry[0], carry[1], _features(maps), False)
            return heads.resize(logits, size).argmax(-1).astype(jnp.uint8)

        # vmap would turn UPerNet's convolutions into grouped ones, which are slow: its rates train one by one.
        single = len(rates) == 1
        over = (lambda f, axes: f) if single else (lambda f, axes: jax.vmap(f, in_axes=axes))
        self.single, self.key = single, jax.random.key(seed)
        self.rates = self.rates[0] if single else self.rates
        self.carry = jax.jit(over(start, (0, None)))(self.rates, jax.random.fold_in(self.key, 0))
        self._step = jax.jit(over(heads.exact(step), (0, 0, None, None, None, None)), donate_argnums=1)
        self._predict = jax.jit(over(heads.exact(predict), (0, None, None)), static_argnums=2)

    def step(self, batch: DenseSplit, n: int) -> None:
        key = jax.random.fold_in(self.key, n + 1)
        self.carry = self._step(self.rates, self.carry, batch.maps, jnp.asarray(batch.targets), n, key)

    def predict(self, split: DenseSplit, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(predictions [rates, b, H, W], targets [b, H, W]) batch by batch."""
        for lo in range(0, len(split), size):
            batch = split.take(range(lo, min(lo + size, len(split))))
            found = np.asarray(self._predict(self.carry, batch.maps, batch.targets.shape[1:]))
            yield found[None] if self.single else found, batch.targets


def confusions(fitted: _Fitted, split: DenseSplit, classes: int, ignore: int, size: int) -> np.ndarray:
    """[rates, N, C, C] counts per image."""
    found: list[np.ndarray] = []
    for predictions, targets in fitted.predict(split, size):
        images = [
            [metrics.confusion_matrix(t, p, classes, ignore=ignore) for t, p in zip(targets, rate, strict=True)]
            for rate in predictions
        ]
        found.append(np.asarray(images))
    return np.concatenate(found, axis=1)


def dense_probe(
    protocol: DenseProtocol, train: DenseSplit, val: DenseSplit | None, test: DenseSplit, *, classes: int, patch: int,
    ignore: int = -1, runs: int = 0, seed: int = 0, resamples: int = 1000,
) -> Result:  # fmt: skip
    """Trains heads on frozen maps, chooses the learning rate on ``val``, reports mIoU of ``test`` (mean over runs)."""
    chosen_from = "val"
    if val is None or not len(val):
        images = by_image(train.ids or [str(i) for i in range(len(train))])
        order = np.random.default_rng(seed).permutation(len(images))
        held = max(1, len(images) // 5)
        val, train = (
            train.take(np.sort(np.concatenate([images[i] for i in part]))) for part in (order[:held], order[held:])
        )
        chosen_from = "a fifth of train"
    head = make_head(protocol, train.maps[-1].shape[-1], classes, patch)
    batch = min(protocol.batch, len(train))
    steps = -(-len(train) // batch) * protocol.epochs
    together = max(1, LOGIT_BYTES // (4 * batch * classes * int(np.prod(train.targets.shape[1:]))))
    together = 1 if protocol.head == "upernet" else together
    picked, rates, pictures = [], [], np.array([])
    for run in range(runs or protocol.runs):
        best: tuple[float, float, np.ndarray] | None = None
        for lo in range(0, len(protocol.rates), together):
            group = protocol.rates[lo : lo + together]
            fitted = _Fitted(protocol, head, ignore, steps, group, seed + run)
            _train(fitted, train, batch, protocol.epochs, seed + run)
            counts = partial(confusions, fitted, classes=classes, ignore=ignore, size=batch)
            scores = [metrics.from_confusion(c.sum(0))["miou"] for c in counts(val)]
            if np.isnan(scores).all():
                raise ValueError(f"no pixel of the validation images has a label but {ignore} (ignore)")
            at = int(np.nanargmax(scores))
            if best is None or scores[at] > best[0]:
                best = (scores[at], group[at], counts(test)[at])
                if not run:
                    some = fitted.predict(test.take(range(min(SHOWN, len(test)))), batch)
                    pictures = np.concatenate([p[at] for p, _ in some])
        rates.append(float(best[1]))
        picked.append(best[2])
    settings = {
        "rates": rates,
        "runs": len(picked),
        "train": len(train),
        "test": len(test),
        "rate chosen on": chosen_from,
    }
    result = score_segmentation(protocol.label, picked, settings, resamples, test.ids)
    return dataclasses.replace(result, predictions=pictures)


def _train(fitted: _Fitted, train: DenseSplit, batch: int, epochs: int, seed: int) -> None:
    n = 0
    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(train))
        for lo in range(0, len(order), batch):
            rows = np.resize(np.concatenate([order[lo:], order[:lo]]), batch)  # full batches: one compilation
            fitted.step(train.take(rows), n)
            n += 1


def score_segmentation(
    label: str, runs: Sequence[np.ndarray], settings: dict, resamples: int = 1000, ids: Sequence[str] = ()
) -> Result:
    """Result of one or several runs' confusion matrices [N, C, C] of samples; ``ids`` tell windows of one image."""
    images = [_of_images(c, ids) for c in runs]
    parts, count = [metrics.segmentation_metric(c.astype(np.float64)) for c in images], len(images[0])
    per_class = np.mean([metrics.ious(c.sum(0)) for c in runs], axis=0)
    found = metrics.bootstrap(metrics.mean_metric(parts), count, resamples=resamples)
    settings = settings | {"sd over runs": metrics.spread(parts, count)}
    return Result(label, "segmentation", found, per_class, np.array([]), runs[0].sum(0), None, settings)


def _of_images(matrices: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """[images, C, C]: windows of one image added up, to be resampled together. They are alike: as samples of their own
    they would make intervals too narrow.
    """
    return np.stack([matrices[rows].sum(0) for rows in by_image(ids)]) if ids else matrices


# --- change by feature difference -----------------------------------------------------------------------------


def feature_difference(first: np.ndarray, second: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Cosine distance of two patch maps [N, h, w, d], brought to [N, *size] bilinearly: float32 in 0..2."""
    a, b = (jnp.asarray(m, jnp.float32) for m in (first, second))
    norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    distance = 1.0 - (a * b).sum(-1) / jnp.maximum(norms, 1e-12)
    return np.asarray(heads.resize(distance[..., None], size)[..., 0])


def change_detection(
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    ignore: int = -1,
    resamples: int = 1000,
    ids: Sequence[str] = (),
) -> Result:
    """``change-difference/1``: nothing is trained; the distance with the best F1 on train is the threshold on test.

    Args:
      train, test: (distances [N, H, W], masks [N, H, W] with 1 = change).
      ids: of the test samples, to tell windows of one image.

    Reports F1 and IoU of change, mIoU, and the average precision of the distance as a ranking of pixels.
    """
    threshold = best_threshold(*(a[train[1] != ignore] for a in train))
    matrices = np.stack(
        [metrics.confusion_matrix(m, (d > threshold).astype(int), 2, ignore=ignore) for d, m in zip(*test, strict=True)]
    )
    matrices = _of_images(matrices, ids)

    def metric(weights: np.ndarray) -> dict[str, float]:
        matrix = np.tensordot(weights, matrices.astype(np.float64), 1)
        (_, fp), (fn, tp) = matrix
        f1 = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")
        iou = tp / max(tp + fp + fn, 1e-9)
        return {"f1_change": f1, "iou_change": iou, "miou": metrics.from_confusion(matrix)["miou"]}

    found = metrics.bootstrap(metric, len(matrices), resamples=resamples)
    counted = test[1] != ignore
    found["ap_change"] = metrics.Interval(metrics.average_precision(test[1][counted] == 1, test[0][counted]))
    total = matrices.sum(0)
    settings = {"threshold": float(threshold), "train": len(train[0]), "test": len(test[0])}
    return Result("change-difference/1", "change", found, metrics.ious(total), np.array([]), total, None, settings)


def best_threshold(distance: np.ndarray, change: np.ndarray) -> float:
    """The threshold with the best F1 of ``change == 1`` among 200 quantiles of the distances."""
    candidates = np.unique(np.quantile(distance, np.linspace(0, 1, 201)[:-1]))
    truth, best = change == 1, (-1.0, float(candidates[0]))
    for t in candidates:
        found = distance > t
        tp = float((found & truth).sum())
        score = 2 * tp / max(float(found.sum() + truth.sum()), 1.0)
        best = max(best, (score, float(t)))
    return best[1]
