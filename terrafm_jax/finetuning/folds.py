"""Fine-tuning of data sets that fit into memory, one compiled program per fit: cross-validation asks for hundreds.

Small sets have no validation split to spare, so each training fold lends a fifth to choose the learning rate; the
network is then trained again on the whole fold.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from terrafm_jax.evals.datasets.base import DatasetInfo, held_out
from terrafm_jax.evals.features import Encoder, ImageBatch
from terrafm_jax.evals.versioned import Versioned
from terrafm_jax.finetuning import network
from terrafm_jax.finetuning.data import steps_per_epoch
from terrafm_jax.finetuning.network import Adam, Batch, Flat, TuneSpec

PROTOCOL = "fold-finetune"
Carry = tuple[Flat, Flat, Flat, dict]  # parameters, Adam's moments, the head's running statistics


@dataclasses.dataclass(frozen=True)
class Recipe(Versioned):
    """``fold-finetune/2`` [ours]: whole network with batch norm + linear, AdamW, warm-up 10 %, cosine, flips.

    The rate is the best of ``rates`` on a held-out fifth of the training fold; then all of the fold is trained on and
    the last epoch taken. Nothing else is chosen on labels. Version 2 predicts with batch-norm statistics of the final
    weights, measured over at most 16 batches of the rows trained on; version 1 took the running ones, which lag behind
    a network that trains.
    """

    name = PROTOCOL
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    epochs: int = 30
    batch_size: int = 32
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    version: int = 2


def order(rows: np.ndarray, batch_size: int, epochs: int, seed: int) -> np.ndarray:
    """int [steps, batch_size]: rows of every batch; each epoch shows all of them, its last batch is filled up."""
    steps, rng = steps_per_epoch(len(rows), batch_size), np.random.default_rng(seed)
    epoch = [np.resize(rng.permutation(rows), (steps, batch_size)) for _ in range(epochs)]
    return np.concatenate(epoch)


@functools.lru_cache(maxsize=8)
def _program(spec: TuneSpec, recipe: Recipe) -> Callable[..., Array]:
    @jax.jit
    def fit(backbone: Any, stats: Any, data: Mapping[str, Any], seed: Array, rate: Array, rows: Array) -> Array:
        adam = Adam(rows.shape[0], round(0.1 * rows.shape[0]), weight_decay=recipe.weight_decay)
        key = jax.random.key(seed)
        trainable, frozen, head = network.init(spec, backbone, key)
        zeros = {k: jnp.zeros_like(v) for k, v in trainable.items()}

        def take(chosen: Array) -> Batch:
            batch = {k: {s: v[chosen] for s, v in data[k].items()} for k in ("images", "offset")}
            return {**batch, "bands": data["bands"]}

        def loss(trainable: Flat, head: dict, batch: Batch, targets: Array, key: Array) -> tuple[Array, dict]:
            params = network.merged(spec, trainable, frozen)
            outputs, head = network.forward(spec, params, head, stats, batch, train=True, key=key)
            return network.loss(spec, outputs, targets, None, recipe.label_smoothing), head

        def step(carry: Carry, now: tuple[Array, Array]) -> tuple[Carry, None]:
            (trainable, mu, nu, head), (count, chosen) = carry, now
            flip_key, net_key = jax.random.split(jax.random.fold_in(key, count))
            batch, targets = network.flip(flip_key, take(chosen), data["targets"][chosen])
            grads, head = jax.grad(loss, has_aux=True)(trainable, head, batch, targets, net_key)
            trainable, mu, nu, _ = adam.update(spec, trainable, grads, mu, nu, count, rate)
            return (trainable, mu, nu, head), None

        start = (trainable, zeros, zeros, head)
        (trainable, _, _, head), _ = jax.lax.scan(step, start, (jnp.arange(rows.shape[0]), rows))
        params = network.merged(spec, trainable, frozen)

        first = rows[: min(rows.shape[0] // recipe.epochs, network.MEASURED)]  # of one epoch, which shows every row
        found = jax.lax.map(lambda chosen: network.measured(spec, params, head, stats, take(chosen)), first)
        head = jax.tree.map(lambda x: x.mean(0), found)
        (logits, *_), _ = network.forward(spec, params, head, stats, data)
        return logits

    return fit


@dataclasses.dataclass
class Tuner:
    """Fine-tunes one encoder on any rows of ``images``; encoders of one shape share their compiled programs.

    Attributes:
      images: all samples [N, ...]. targets: classes int [N]. inputs: sensors, fused when several.
    """

    encoder: Encoder
    images: ImageBatch
    targets: np.ndarray
    inputs: tuple[str, ...]
    info: DatasetInfo
    recipe: Recipe = Recipe()

    def __post_init__(self) -> None:
        self.encoder.check(self.inputs)
        self.spec = TuneSpec(
            self.encoder.spec, self.inputs, "classification", len(self.info.classes), "linear",
            image_size=self.encoder.image_size, head_norm=True,
        )  # fmt: skip
        self._data = {
            "images": {k: jnp.asarray(self.images.images[k]) for k in self.inputs},
            "bands": {k: jnp.asarray(self.images.bands[k]) for k in self.inputs},
            "offset": {k: jnp.asarray(self.images.offset[k]) for k in self.inputs},
            "targets": jnp.asarray(self.targets, jnp.int32),
        }

    def logits(self, rows: np.ndarray, rate: float, seed: int) -> np.ndarray:
        """float32 [N, C] of all samples after training on ``rows``."""
        r = self.recipe
        shown = order(rows, r.batch_size, r.epochs, seed)
        fit = _program(self.spec, r)
        stats = {k: self.encoder.stats[k] for k in self.inputs}
        return np.asarray(fit(self.encoder.params, stats, self._data, seed, jnp.float32(rate), jnp.asarray(shown)))

    def classify(self, train: np.ndarray, test: np.ndarray, seed: int = 0) -> np.ndarray:
        """Classes of the rows ``test`` after choosing the rate and training on ``train``."""
        rates = self.recipe.rates
        if len(rates) > 1:
            rest, held = (train[rows] for rows in held_out(self.targets[train], seed))
            scores = []
            for rate in rates:
                found = self.logits(rest, rate, seed)[held]
                scores.append((found.argmax(1) == self.targets[held]).mean())
            rates = (rates[int(np.argmax(scores))],)
        return self.logits(train, rates[0], seed)[test].argmax(1)
