"""Schedules of pretraining as pure functions of the step, so that resuming needs no state but the step.

All of them take an int32 step (traced or not), count from 0 and return fp32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def _fraction(step: jax.Array | int, start: int, end: int) -> jax.Array:
    """Progress from ``start`` to ``end``, clipped to [0, 1]; 1 where the span is empty."""
    if end <= start:
        return jnp.ones((), jnp.float32)
    return jnp.clip((jnp.asarray(step, jnp.float32) - start) / (end - start), 0.0, 1.0)


def linear(step: jax.Array | int, begin: float, end: float, steps: int) -> jax.Array:
    """From ``begin`` at step 0 to ``end`` at ``steps`` and beyond."""
    return begin + (end - begin) * _fraction(step, 0, steps)


def cosine(step: jax.Array | int, begin: float, end: float, total: int, start: int = 0) -> jax.Array:
    """Half a cosine from ``begin`` at step ``start`` to ``end`` at step ``total`` and beyond (DINO)."""
    left = 1.0 - _fraction(step, start, total)
    # sin^2 instead of (1 + cos) / 2, which loses the last values' digits to cancellation.
    return end + (begin - end) * jnp.square(jnp.sin(0.5 * jnp.pi * left))


def warmup_cosine(step: jax.Array | int, peak: float, end: float, warmup: int, total: int) -> jax.Array:
    """Linear warm-up that reaches ``peak`` in the last warm-up step, then half a cosine to ``end``.

    The first step's rate is ``peak / warmup``, not zero as in DINO's own code.
    """
    ramp = peak * (jnp.asarray(step, jnp.float32) + 1.0) / max(warmup, 1)
    return jnp.where(step < warmup, ramp, cosine(step, peak, end, total, start=warmup))


def learning_rate(
    step: jax.Array | int, *, base_lr: float, batch_size: int, warmup_steps: int, min_lr: float, total_steps: int
) -> jax.Array:
    """Learning rate with the linear scaling rule: ``base_lr`` is per 256 samples."""
    return warmup_cosine(step, base_lr * batch_size / 256.0, min_lr, warmup_steps, total_steps)


def ema_rate(step: jax.Array | int, *, start: float, end: float, total_steps: int) -> jax.Array:
    """``1 - momentum`` of the teacher, momentum rising by a cosine from ``start`` to ``end``.

    The complement is scheduled because near the end the momentum itself rounds to 1 in fp32.
    """
    return cosine(step, 1.0 - start, 1.0 - end, total_steps)


def teacher_temperature(step: jax.Array | int, *, start: float, end: float, warmup_steps: int) -> jax.Array:
    """Linear warm-up of the teacher's temperature, constant afterwards."""
    return linear(step, start, end, warmup_steps)
