"""Schedules against NumPy lists built as DINO builds them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from terrafm_jax.ssl import schedules


def dino_cosine(base: float, final: float, steps: int) -> np.ndarray:
    """Values per step of DINO's cosine schedule without warm-up."""
    return final + 0.5 * (base - final) * (1 + np.cos(np.pi * np.arange(steps) / steps))


def every_step(function, steps: int) -> np.ndarray:
    return np.asarray(jax.jit(jax.vmap(function))(np.arange(steps)))


def test_learning_rate() -> None:
    spec = dict(base_lr=5e-4, batch_size=1024, warmup_steps=10, min_lr=1e-6, total_steps=110)
    values = every_step(lambda s: schedules.learning_rate(s, **spec), 110)
    peak = 5e-4 * 1024 / 256
    np.testing.assert_allclose(values[:10], peak * np.arange(1, 11) / 10, rtol=1e-6)
    np.testing.assert_allclose(values[10:], dino_cosine(peak, 1e-6, 100), rtol=1e-5)
    np.testing.assert_allclose(schedules.learning_rate(110, **spec), 1e-6, rtol=1e-5)
    np.testing.assert_allclose(schedules.learning_rate(1000, **spec), 1e-6, rtol=1e-5)


def test_learning_rate_without_warmup_starts_at_the_peak() -> None:
    spec = dict(base_lr=1e-3, batch_size=256, warmup_steps=0, min_lr=0.0, total_steps=10)
    np.testing.assert_allclose(schedules.learning_rate(0, **spec), 1e-3, rtol=1e-6)


def test_weight_decay_rises() -> None:
    values = every_step(lambda s: schedules.cosine(s, 0.04, 0.4, 50), 50)
    np.testing.assert_allclose(values, dino_cosine(0.04, 0.4, 50), rtol=1e-6)
    assert np.all(np.diff(values) > 0)


def test_teacher_momentum_reaches_one() -> None:
    rate = every_step(lambda s: schedules.ema_rate(s, start=0.996, end=1.0, total_steps=200), 200)
    np.testing.assert_allclose(1.0 - rate.astype(np.float64), dino_cosine(0.996, 1.0, 200), rtol=1e-7)
    assert np.all(np.diff(rate) < 0)
    assert schedules.ema_rate(200, start=0.996, end=1.0, total_steps=200) == 0.0


def test_momentum_still_moves_late_in_a_long_run() -> None:
    """Near the end 1 - momentum is below the resolution of fp32 around one; the complement is not."""
    late = schedules.ema_rate(223_900, start=0.996, end=1.0, total_steps=224_000)
    assert 0 < late < 1e-8


def test_teacher_temperature() -> None:
    values = every_step(lambda s: schedules.teacher_temperature(s, start=0.04, end=0.06, warmup_steps=20), 30)
    np.testing.assert_allclose(values[:21], np.linspace(0.04, 0.06, 21), rtol=1e-6)
    np.testing.assert_allclose(values[20:], 0.06, rtol=1e-6)


@pytest.mark.parametrize("step", [0, 7])
def test_no_warmup_is_the_final_temperature(step: int) -> None:
    np.testing.assert_allclose(schedules.teacher_temperature(step, start=0.04, end=0.06, warmup_steps=0), 0.06)
