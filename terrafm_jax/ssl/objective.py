"""DINO's cross-entropy between views with TerraFM's two centers.

Method: DINO (arXiv 2104.14294) for the loss, the sharpening and the center; TerraFM (arXiv 2506.06281)
for the second center, which only follows samples of frequent land-cover categories. With ``alpha`` = 1
the second center drops out and what remains is DINO.

Everything is fp32, global (plain means over the whole batch, whatever the mesh), and free of state.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class ObjectiveSpec:
    """Hyper-parameters of the objective; durations in steps.

    The temperatures, ``alpha`` and the EMA range are the paper's; the warm-up of the temperature, the
    student's temperature and ``center_momentum`` are DINO's, on which the paper is silent.
    """

    student_temp: float = 0.1
    teacher_temp_start: float = 0.04
    teacher_temp: float = 0.06
    teacher_temp_warmup_steps: int = 0
    ema_start: float = 0.996
    ema_end: float = 1.0
    alpha: float = 0.8
    center_momentum: float = 0.9

    def __post_init__(self) -> None:
        faults = []
        for name in ("student_temp", "teacher_temp_start", "teacher_temp"):
            if not 0 < getattr(self, name) <= 10:
                faults.append(f"{name} = {getattr(self, name)}, expected 0 < value <= 10")
        for name in ("ema_start", "ema_end", "alpha", "center_momentum"):
            if not 0 <= getattr(self, name) <= 1:
                faults.append(f"{name} = {getattr(self, name)}, expected 0 <= value <= 1")
        if self.teacher_temp_warmup_steps < 0:
            faults.append(f"teacher_temp_warmup_steps = {self.teacher_temp_warmup_steps}, expected >= 0")
        if faults:
            raise ValueError("objective: " + "; ".join(faults))


class Centers(NamedTuple):
    """EMA means of the teacher's outputs: over all samples, and over those of frequent categories. Each [K]."""

    overall: jax.Array
    frequent: jax.Array


class CenterSums(NamedTuple):
    """What a batch, or a part of one, contributes to the centers: sums over samples and views, and counts."""

    overall: jax.Array  # [K]
    count: jax.Array  # []
    frequent: jax.Array  # [K]
    frequent_count: jax.Array  # []


def init_centers(prototypes: int) -> Centers:
    """Both centers start at zero, as DINO's does."""
    return Centers(jnp.zeros((prototypes,), jnp.float32), jnp.zeros((prototypes,), jnp.float32))


def center_sums(teacher: jax.Array, is_frequent: jax.Array) -> CenterSums:
    """Sums of teacher logits [B, G, K] over the batch and over its frequent samples (bool [B])."""
    per_sample = jnp.sum(teacher.astype(jnp.float32), axis=1)
    weight = is_frequent.astype(jnp.float32)
    views = jnp.float32(teacher.shape[1])
    return CenterSums(
        overall=jnp.sum(per_sample, axis=0),
        count=views * teacher.shape[0],
        frequent=jnp.sum(per_sample * weight[:, None], axis=0),
        frequent_count=views * jnp.sum(weight),
    )


def move_centers(centers: Centers, sums: CenterSums, *, momentum: float) -> Centers:
    """EMA update of both centers with the means of ``sums``; an empty sum leaves its center as it was."""

    def move(center: jax.Array, total: jax.Array, count: jax.Array) -> jax.Array:
        moved = momentum * center + (1.0 - momentum) * (total / jnp.maximum(count, 1.0))
        return jnp.where(count > 0, moved, center)

    return Centers(
        move(centers.overall, sums.overall, sums.count), move(centers.frequent, sums.frequent, sums.frequent_count)
    )


class Targets(NamedTuple):
    """The teacher's distribution for each of its G views, centered and sharpened; [B, G, K] each, fp32, no gradient."""

    log_probs: jax.Array
    probs: jax.Array


def teacher_targets(teacher: jax.Array, centers: Centers, *, teacher_temp: jax.Array | float, alpha: float) -> Targets:
    """Targets from teacher logits [B, G, K] and the centers as they were before this batch."""
    center = alpha * centers.overall + (1.0 - alpha) * centers.frequent
    logits = (jax.lax.stop_gradient(teacher).astype(jnp.float32) - center[None, None]) / teacher_temp
    log_probs = jax.nn.log_softmax(logits, axis=-1)
    return Targets(log_probs, jnp.exp(log_probs))


def _pairs(views: int, targets: int) -> jax.Array:
    """float32 [V]: number of targets that each of the student's views is compared with: all but its own."""
    return jnp.where(jnp.arange(views) < targets, targets - 1.0, float(targets))


def _cross_entropy_terms(scaled: jax.Array, probs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Per-view sums over the targets i != j of the cross-entropy [B, V], and log-partition [B, V].

    ``-sum_i <P_i, log p_j>`` = ``n_j lse_j - <Q - P_j, s_j>`` with Q the sum of all targets: no [B, G, V, K]
    array is materialized, and arrays over V and K are only read, not written.
    """
    views, targets = scaled.shape[1], probs.shape[1]
    lse = jax.nn.logsumexp(scaled, axis=-1)
    total = jnp.sum(probs, axis=1)
    agreement = jnp.sum(scaled * total[:, None], axis=-1)
    own = jnp.sum(scaled[:, :targets] * probs, axis=-1)
    own = jnp.pad(own, ((0, 0), (0, views - targets)))
    return _pairs(views, targets)[None] * lse - (agreement - own), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def pair_cross_entropy(student: jax.Array, probs: jax.Array, student_temp: float) -> jax.Array:
    """Mean over samples and pairs (target i, view j != i) of the cross-entropy of the student.

    Args:
      student: logits [B, V, K], V >= 2, the G views that the targets come from first. Any float dtype.
      probs: targets [B, G, K], fp32; they get no gradient.
      student_temp: softmax temperature.

    The hand-written gradient ``(n_j softmax(s_j) - sum_{i != j} P_i) / (pairs B temperature)`` recomputes the
    student's probabilities from the logits: of size B V K, only the logits are saved for the backward pass.
    """
    return _pair_forward(student, probs, student_temp)[0]


def _pair_forward(student: jax.Array, probs: jax.Array, student_temp: float) -> tuple[jax.Array, tuple]:
    terms, lse = _cross_entropy_terms(student.astype(jnp.float32) / student_temp, probs)
    batch, views, targets = student.shape[0], student.shape[1], probs.shape[1]
    loss = jnp.sum(terms) / (batch * targets * (views - 1))
    return loss, (student, probs, lse)


def _pair_backward(student_temp: float, saved: tuple, cotangent: jax.Array) -> tuple[jax.Array, None]:
    student, probs, lse = saved
    batch, views, targets = student.shape[0], student.shape[1], probs.shape[1]
    predicted = jnp.exp(student.astype(jnp.float32) / student_temp - lse[..., None])
    total = jnp.broadcast_to(jnp.sum(probs, axis=1, keepdims=True), student.shape)
    own = jnp.pad(probs, ((0, 0), (0, views - targets), (0, 0)))
    gradient = _pairs(views, targets)[None, :, None] * predicted - (total - own)
    gradient = gradient * (cotangent / (batch * targets * (views - 1) * student_temp))
    return gradient.astype(student.dtype), None


pair_cross_entropy.defvjp(_pair_forward, _pair_backward)


def loss_metrics(loss: jax.Array, targets: Targets) -> dict[str, jax.Array]:
    """Monitors of a batch, from its ``loss`` (:func:`pair_cross_entropy`) and the teacher's ``targets``.

    Returns:
      ``teacher_entropy`` (mean over samples and views, nats), ``kl`` (mean over pairs of KL(teacher || student) =
      loss - entropy), ``marginal_entropy`` (entropy of the mean target: falls to zero when all samples share one
      prototype), ``sample_entropy`` [B] for per-class reports.
    """
    sample_entropy = -jnp.mean(jnp.sum(targets.probs * targets.log_probs, axis=-1), axis=-1)
    entropy = jnp.mean(sample_entropy)
    marginal = jnp.mean(targets.probs, axis=(0, 1))
    return {
        "teacher_entropy": entropy,
        "kl": loss - entropy,
        "marginal_entropy": -jnp.sum(marginal * jnp.log(jnp.maximum(marginal, 1e-30))),
        "sample_entropy": sample_entropy,
    }


def center_metrics(centers: Centers) -> dict[str, jax.Array]:
    """Root mean squares over the prototypes (norm / sqrt(K)) of the two centers and of their difference."""

    def rms(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.mean(jnp.square(x)))

    return {
        "center_norm": rms(centers.overall),
        "center_frequent_norm": rms(centers.frequent),
        "center_distance": rms(centers.overall - centers.frequent),
    }
