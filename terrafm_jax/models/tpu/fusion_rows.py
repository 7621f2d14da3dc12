"""The part of the TPU fusion kernels that needs only sums over columns, not the values: forward and backward.

The derivation is that of ``folding``. Here a patch is a row of ``J = queries * heads`` lanes, query-major; no axis of
queries or heads exists. Numbers of a query are repeated over the lanes of its heads, and sums over heads are products
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
    """How a block's values are mixed, [R, J] each (numbers of a query repeat over its heads).

    weights: per sensor, the softmax over sensors. mean, inverse: mean and inverse standard deviation of each query's
    vector. share: its weight in the pooling. varies: whether its variance is above zero. ask: its product with the
    pooling vector, the pooling's logit before normalization.
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
    inverse_total = 1.0 / sum(powers)
    weights = [power * inverse_total for power in powers]

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


class MixtureGradient(NamedTuple):
    """Gradients of the scores and of the :class:`Sums`, per sensor or pair of sensors, [R, J] each.

    asked: [R, heads] each, summed over queries. total_pool: of the pooling vector's sum, still to be summed over rows
    and queries (each of which repeats over its heads).
    """

    scores: list[Array]
    first: list[Array]
    asked: list[Array]
    gram: dict[tuple[int, int], Array]
    total_pool: Array


def _over_heads(x: Array, group: Array) -> Array:
    """[R, J] -> [R, J]: the sum over a query's heads, repeated over them."""
    dims = (((1,), (0,)), ((), ()))
    return lax.dot_general(x, group, dims, precision=lax.Precision.HIGHEST, preferred_element_type=x.dtype)


def _over_queries(x: Array, spec: ModelSpec) -> Array:
    """[R, J] -> [R, heads]: the sum over queries, whose gradients of the pool nearly cancel, so before rounding."""
    return sum(jnp.split(x, spec.queries, axis=1))


def mixture_gradient(
    found: Mixture,
    sums: Sums,
    products: Sequence[Array],
    total_gradient: Array,
    group: Array,
    total_pool: Array,
    spec: ModelSpec,
) -> MixtureGradient:
    """The backward pass of :func:`mixture`, of which ``found`` is the result.

    Args:
      products: per sensor [R, J], sums over the columns of each head of values times the result's gradient.
      total_gradient: [R, 1], sum of the result's gradient over all columns.
    """
    weights, mean, inverse, share, varies, ask = found
    count, width = len(weights), spec.stem_width
    part = share * inverse

    dpart = _over_heads(sum(w * x for w, x in zip(weights, products, strict=True)), group) - total_gradient * mean
    dshare = dpart * inverse
    dlogits = share * (dshare - (share * dshare).sum(-1, keepdims=True) / spec.fusion_heads)
    centered = ask - mean * total_pool
    dvariance = jnp.where(varies, -0.5 * inverse * inverse * inverse * (dpart * share + centered * dlogits), 0.0)
    dask = dlogits * inverse
    dmean = -total_gradient * part - total_pool * dask - 2.0 * mean * dvariance
    dfirst, dsecond = dmean / width, dvariance / width
    dweights = []
    for m in range(count):
        square = sum(weights[n] * entry(sums.gram, m, n) for n in range(count))
        dweights.append(part * products[m] + dfirst * sums.first[m] + dask * sums.asked[m] + 2.0 * dsecond * square)
    mean_dweight = sum(w * d for w, d in zip(weights, dweights, strict=True))
    return MixtureGradient(
        scores=[w * (d - mean_dweight) for w, d in zip(weights, dweights, strict=True)],
        first=[dfirst * w for w in weights],
        asked=[_over_queries(dask * w, spec) for w in weights],
        gram={(m, n): 2.0 * dsecond * weights[m] * weights[n] for m, n in pairs(count)},
        total_pool=-mean * dask,
    )
