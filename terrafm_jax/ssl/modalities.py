"""Which sensors a network sees of a view: random draws among the sensors a record has.

A draw is one categorical sample over the non-empty subsets of the sensors, with exactly the
probabilities of the rule given the sensors present; nothing is redrawn in a loop.

Draws may be stratified: the views of a few samples take evenly spaced quantiles of the distribution, in random order.
Each view by itself still follows the rule, and how many of them see a sensor varies by about one (``models.drawn``
relies on it), but the views are no longer independent of each other. Student and teacher draw independently.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

RULES = ("bernoulli", "fuse_or_one", "one", "all")


def subsets(count: int) -> np.ndarray:
    """All non-empty subsets of ``count`` sensors, bool [2**count - 1, count]."""
    codes = np.arange(1, 2**count)
    return (codes[:, None] >> np.arange(count)[None, :]) % 2 == 1


def _gray_order(count: int) -> np.ndarray:
    """Indices of the subsets in the order of the Gray code.

    In this order the subsets with a given sensor are adjacent (for the first of three sensors, in two runs). The fewer
    runs, the less the number of evenly spaced points that fall into them varies.
    """
    index = np.arange(1, 2**count)
    return (index ^ (index >> 1)) - 1


def subset_probabilities(rule: str, threshold: float, available: Array) -> Array:
    """Probability of every subset given the sensors available.

    Args:
      rule: ``bernoulli``: every sensor independently with probability ``threshold``, redrawn when
        none was taken (0.5 and three sensors: 3/7, 3/7 and 1/7 for one, two and three of them).
        ``fuse_or_one``: all with probability ``threshold``, else one of them.
        ``one``: one of them. ``all``: all of them. The paper says "with a threshold of 0.5" only.
      threshold: 0 < threshold <= 1 for ``bernoulli``, 0..1 for ``fuse_or_one``, else unused.
      available: bool [..., S]; nothing available counts as everything available.

    Returns:
      float32 [..., 2**S - 1] in the order of :func:`subsets`, summing to 1.

    Raises:
      ValueError: unknown rule.
    """
    if rule not in RULES:
        raise ValueError(f"modality_rule: found {rule!r}, expected one of {list(RULES)}")
    count = available.shape[-1]
    table = subsets(count).reshape((1,) * (available.ndim - 1) + (-1, count))
    sizes = table.sum(-1)
    available = available | ~jnp.any(available, axis=-1, keepdims=True)
    possible = ~jnp.any(table & ~available[..., None, :], axis=-1)
    total = jnp.sum(available, axis=-1, keepdims=True)
    everything, single = sizes == total, sizes == 1
    if rule == "bernoulli" and threshold == 1:
        rule = "all"  # of the sensors available; as odds, the certain coins of absent ones would leave no subset at all
    if rule == "bernoulli":
        odds = threshold ** sizes.astype(np.float64) * (1.0 - threshold) ** (count - sizes).astype(np.float64)
        weights = jnp.asarray(odds, jnp.float32)
    elif rule == "fuse_or_one":
        weights = threshold * everything + (1.0 - threshold) * single / total
    else:
        weights = (everything if rule == "all" else single).astype(jnp.float32)
    weights = jnp.where(possible, weights, 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def draw_modalities(key: Array, rule: str, threshold: float, available: Array, group: int = 0) -> Array:
    """Draws a non-empty subset of the available sensors for every view.

    Args:
      available: bool [B, V, S].
      group: number of samples whose V * group views are stratified together, a divisor of B; 0 draws every view
        independently.

    Returns:
      bool [B, V, S].
    """
    odds = subset_probabilities(rule, threshold, available)
    if group:
        order = _gray_order(available.shape[-1])
        points = _evenly_spaced(key, *available.shape[:2], group)
        cumulative = jnp.cumsum(odds[..., order], axis=-1)
        chosen = jnp.asarray(order)[jnp.sum(cumulative[..., :-1] <= points[..., None], axis=-1)]
    else:
        chosen = jax.random.categorical(key, jnp.log(odds), axis=-1)
    codes = chosen + 1  # bit i: the subset holds sensor i, see subsets()
    shifts = jnp.arange(available.shape[-1], dtype=codes.dtype).reshape(1, 1, -1)
    return (codes[..., None] >> shifts) % 2 == 1


def _evenly_spaced(key: Array, batch: int, views: int, group: int) -> Array:
    """float32 [B, V]: per group of samples, V * group points evenly spaced in [0, 1), with random offset and order.

    Every sample repeats the draws of its whole group and keeps its own, so that devices need not communicate.
    """
    count = views * group
    samples = jnp.arange(batch)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.fold_in(key, i)))(samples // group)
    lots = jax.vmap(lambda k: jax.random.bits(k, (count,)))(keys[:, 0])
    mine = (samples % group * views)[:, None] + jnp.arange(views)[None]
    lot, lots = jnp.take_along_axis(lots, mine, axis=1)[..., None], lots[:, None]
    earlier = jnp.arange(count)[None, None] < mine[..., None]
    place = jnp.sum((lots < lot) | ((lots == lot) & earlier), axis=-1)
    start = jax.vmap(lambda k: jax.random.uniform(k, (1,), jnp.float32))(keys[:, 1])
    # Below 1 by more than the rounding errors of the cumulative probabilities that the points are compared with.
    return jnp.minimum((place.astype(jnp.float32) + start) / count, 1.0 - 1e-6)


def most_drawn(rule: str, threshold: float, sensors: int, views: int) -> np.ndarray:
    """int [S]: the most of ``views`` stratified views that may see each sensor, if their records have all sensors."""
    with jax.ensure_compile_time_eval():
        odds = np.asarray(subset_probabilities(rule, threshold, jnp.ones(sensors, bool)), np.float64)
    order = _gray_order(sensors)
    shares = np.cumsum(odds[order])
    # Counts change only at offsets for which a point crosses a border between subsets: try one on either side of each.
    offsets = np.concatenate([shares * views % 1.0 + side for side in (-1e-5, 1e-5)]) % 1.0
    points = (np.arange(views) + offsets[:, None]) / views
    chosen = (shares[:-1] <= points[..., None]).sum(-1)
    return subsets(sensors)[order[chosen]].sum(1).max(0)
