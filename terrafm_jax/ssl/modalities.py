"""Which sensors a network sees of a view: random draws among the sensors a record has.

A draw is one categorical sample over the non-empty subsets of the sensors, with exactly the
probabilities of the rule given the sensors present; nothing is redrawn in a loop.
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
    if rule == "bernoulli":
        odds = threshold ** sizes.astype(np.float64) * (1.0 - threshold) ** (count - sizes).astype(np.float64)
        weights = jnp.asarray(odds, jnp.float32)
    elif rule == "fuse_or_one":
        weights = threshold * everything + (1.0 - threshold) * single / total
    else:
        weights = (everything if rule == "all" else single).astype(jnp.float32)
    weights = jnp.where(possible, weights, 0.0)
    return weights / jnp.sum(weights, axis=-1, keepdims=True)


def draw_modalities(key: Array, rule: str, threshold: float, available: Array) -> Array:
    """Draws a non-empty subset of the available sensors, independently over the leading axes.

    Args:
      available: bool [..., S].

    Returns:
      bool [..., S].
    """
    table = subsets(available.shape[-1])
    chosen = jax.random.categorical(key, jnp.log(subset_probabilities(rule, threshold, available)), axis=-1)
    codes = chosen + 1  # subsets() counts in binary, so the index spells the members
    shifts = jnp.arange(table.shape[-1], dtype=codes.dtype).reshape((1,) * codes.ndim + (-1,))
    return (codes[..., None] >> shifts) % 2 == 1
