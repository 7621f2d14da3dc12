"""What fusion computes for each patch, and the way back, as TPU's kernels do it.

The derivation is that of ``folding``. Here a patch is a row of ``J = queries * heads`` lanes, query-major; no axis of
queries or heads exists. What belongs to a query repeats over the lanes of its heads, and sums over heads are products
with a 0/1 matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from terrafm_jax.models.fusion import NORM_EPS
from terrafm_jax.models.spec import ModelSpec


class Sums(NamedTuple):
    """Sums over the columns of each head, [R, J] each: of values, of values times pool, of products of values."""

    first: list[Array]
    asked: list[Array]
    gram: dict[tuple[int, int], Array]


class Mixture(NamedTuple):
    """How a block's values are mixed; lists over sensors, [R, J] each (what belongs to a query repeats over heads).

    weights: softmax over sensors. mean, inverse, share: of each query's vector its mean, inverse deviation, share in
    the result. varies: whether the variance is above zero. ask: the logit of the share before mean and deviation.
    """

    weights: list[Array]
    mean: Array
    inverse: Array
    share: Array
    varies: Array
    ask: Array


def pairs(count: int) -> list[tuple[int, int]]:
    """Pairs of sensors, each with itself included."""
    return [(m, n) for m in range(count) for n in range(m, count)]


def entry(gram: Mapping[tuple[int, int], Array], m: int, n: int) -> Array:
    """The entry of a pair in either order."""
    return gram[min(m, n), max(m, n)]


def mixture(scores: Sequence[Array], sums: Sums, group: Array, total_pool: Array, spec: ModelSpec) -> Mixture:
    """How to mix values with these scores and sums.

    Args:
      scores: per sensor [R, J].
      group: [J, J], 1 where two lanes belong to the same query.
      total_pool: scalar, the sum of the pooling vector.
    """
    top = functools.reduce(jnp.maximum, scores)
    powers = [jnp.exp(score - top) for score in scores]
    whole = 1.0 / sum(powers)
    weights = [power * whole for power in powers]

    def square(m: int) -> Array:
        return weights[m] * sum(weights[n] * entry(sums.gram, m, n) for n in range(len(weights)))

    mean = _over_heads(sum(w * x for w, x in zip(weights, sums.first, strict=True)), group) / spec.stem_width
    ask = _over_heads(sum(w * x for w, x in zip(weights, sums.asked, strict=True)), group)
    second = _over_heads(sum(square(m) for m in range(len(weights))), group) / spec.stem_width
    variance = second - mean * mean  # may round below zero where a patch is constant
    inverse = lax.rsqrt(jnp.maximum(variance, 0.0) + NORM_EPS)
    logits = (ask - mean * total_pool) * inverse
    share = jnp.exp(logits - logits.max(-1, keepdims=True))
    share = share * (spec.fusion_heads / share.sum(-1, keepdims=True))
    return Mixture(weights, mean, inverse, share, variance > 0.0, ask)


class Pulled(NamedTuple):
    """Gradients of what belongs to a patch, [R, J]: of the scores and of the sums, per sensor or pair of sensors.

    asked: [R, heads] each, summed over queries. total_pool: of the pooling vector's sum, to be summed over rows and
    queries (which repeat over heads).
    """

    scores: list[Array]
    first: list[Array]
    asked: list[Array]
    gram: dict[tuple[int, int], Array]
    total_pool: Array


def _over_heads(x: Array, group: Array) -> Array:
    """[R, J] -> [R, J]: the sum over heads, in the lanes of every head."""
    dims = (((1,), (0,)), ((), ()))
    return lax.dot_general(x, group, dims, precision=lax.Precision.HIGHEST, preferred_element_type=x.dtype)


def _over_queries(x: Array, spec: ModelSpec) -> Array:
    """[R, J] -> [R, heads]. What queries pull the pool with nearly cancels, so they are added before it is rounded."""
    return sum(jnp.split(x, spec.queries, axis=1))


def pull(
    found: Mixture,
    sums: Sums,
    products: Sequence[Array],
    whole: Array,
    group: Array,
    total_pool: Array,
    spec: ModelSpec,
) -> Pulled:
    """The way back through :func:`mixture`.

    Args:
      products: per sensor [R, J], sums over the columns of each head of values times the result's gradient.
      whole: [R, 1], sum of the result's gradient.
    """
    weights, mean, inverse, share, varies, ask = found
    count, width = len(weights), spec.stem_width
    part = share * inverse

    dpart = _over_heads(sum(w * x for w, x in zip(weights, products, strict=True)), group) - whole * mean
    dshare = dpart * inverse
    dlogits = share * (dshare - (share * dshare).sum(-1, keepdims=True) / spec.fusion_heads)
    centered = ask - mean * total_pool
    dvariance = jnp.where(varies, -0.5 * inverse * inverse * inverse * (dpart * share + centered * dlogits), 0.0)
    dask = dlogits * inverse
    dmean = -whole * part - total_pool * dask - 2.0 * mean * dvariance
    dfirst, dsecond = dmean / width, dvariance / width
    dweights = []
    for m in range(count):
        square = sum(weights[n] * entry(sums.gram, m, n) for n in range(count))
        dweights.append(part * products[m] + dfirst * sums.first[m] + dask * sums.asked[m] + 2.0 * dsecond * square)
    mean_dweight = sum(w * d for w, d in zip(weights, dweights, strict=True))
    return Pulled(
        scores=[w * (d - mean_dweight) for w, d in zip(weights, dweights, strict=True)],
        first=[dfirst * w for w in weights],
        asked=[_over_queries(dask * w, spec) for w in weights],
        gram={(m, n): 2.0 * dsecond * weights[m] * weights[n] for m, n in pairs(count)},
        total_pool=-mean * dask,
    )
