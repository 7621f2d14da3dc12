"""Embedding and fusion (``patch_embed``, ``fusion``) with fewer operations: same function, weights multiplied first.

There is no non-linearity between a stem and ``proj1``, nor between ``proj2`` and ``proj3``, and the
queries are parameters. So once per step the weights are multiplied with each other: scores come from
``W_stem W_k^T q`` (queries x heads columns), values from ``W_stem W_proj1``, and ``proj3 . proj2`` with
the affine part of the LayerNorm before it is one matrix.

Nor need the queries' vectors z_q = concat_h sum_m a[q, h, m] v[m, h] be materialized. LayerNorm takes
their mean (per-head sums of the values) and mean square (per-head M x M Gram matrix of the values), the
pooling takes their product with one vector (a per-head product of the values). After that, the weighted
mean over queries is one weighted sum of the values per head.

The derivation is ours; values and gradients equal the unfolded form by test, to 2e-15 in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from terrafm_jax.models import drawn
from terrafm_jax.models.fusion import NORM_EPS, head_columns, masked
from terrafm_jax.models.layers import SUMS, expand, linear, product
from terrafm_jax.models.placement import gather_rows, replicated, row_product, weight_product
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.stems import ordered, stem_product, stem_products
from terrafm_jax.models.tpu import fusion_kernels


class Folded(NamedTuple):
    """Products of weights; D = 3d, Q queries, H fusion heads.

    stems: sensor -> kernel [p*p*C, D + Q*H] (or as ``stems.ordered`` left it) and bias [D + Q*H]. The first D
      columns give a sensor's value (stem, modality embedding, proj1), the others its scores (stem, keys, queries,
      scale); without fusion there are only the first. One array, so that its gradient is one all-reduce. Where fusion
      runs as kernels, the order of the D columns is theirs, here and in ``pool`` and ``out``.
    pool: [D], the pooling vector times the LayerNorm's scale. (Its bias adds the same to every query's logit.) None
      without fusion.
    out: kernel [D, d] and bias [d] (LayerNorm's affine part, proj2, proj3).
    """

    stems: dict[str, tuple[Array, Array]]
    pool: Array | None
    out: tuple[Array, Array]


def fold(
    spec: ModelSpec,
    *,
    stems: Mapping[str, tuple[Array, Array]],
    proj1: Array,
    norm: tuple[Array, Array],
    proj2: tuple[Array, Array],
    proj3: tuple[Array, Array],
    fusion: tuple[Array, Array, Array] | None,
    by_columns: bool = False,
) -> Folded:
    """Multiplies the weights. The products stay in float32 and are rounded once, to the compute dtype, at use.

    Kernels may be sharded over fsdp. Of the stems, each device multiplies its rows and the products are gathered, as
    they are hardly larger than the kernels; the other kernels are gathered before they are multiplied (``placement``).
    """
    scale, shift = norm
    second, last = gather_rows(proj2[0], spec), gather_rows(proj3[0], spec)
    out_kernel = replicated(linear(scale[:, None] * second, last, None, spec, out_dtype=spec.stat_dtype))
    out_bias = row_product(row_product(shift, second, spec) + proj2[1], last, spec) + proj3[1]
    kernel, pool = proj1, None
    if fusion is not None:
        queries, key, pool = fusion
        pool = pool * scale
        if fusion_kernels.resolve(spec):  # before kernels are gathered: a device permutes its rows only
            proj1, pool = (fusion_kernels.interleaved(x, spec, -1) for x in (proj1, pool))
            out_kernel = fusion_kernels.interleaved(out_kernel, spec, 0)
        kernel = jnp.concatenate([proj1, _score_kernel(queries, key, spec)], axis=1)
    kernel = gather_rows(kernel, spec)

    def joint(stem: Array, bias: Array) -> tuple[Array, Array]:
        merged = weight_product(stem, kernel, spec)
        return ordered(merged, spec) if by_columns else merged, row_product(bias, kernel, spec)

    return Folded({sensor: joint(*stem) for sensor, stem in stems.items()}, pool, (out_kernel, out_bias))


def _score_kernel(queries: Array, key: Array, spec: ModelSpec) -> Array:
    """[D, Q*H]: from a token to its attention scores; the key projection times the queries, times head_size ** -0.5."""
    size = spec.stem_width // spec.fusion_heads
    heads = key.reshape(spec.stem_width, spec.fusion_heads, size)
    kernel = jnp.einsum(
        "dhc,qhc->dqh", heads, queries.reshape(spec.queries, spec.fusion_heads, size), precision=lax.Precision.HIGHEST
    )
    return (kernel * size**-0.5).reshape(spec.stem_width, spec.queries * spec.fusion_heads)


def embed(
    spec: ModelSpec,
    folded: Folded,
    patches: Mapping[str, Array],
    present: Array | None,
    places: Sequence[int] | None = None,
) -> Array:
    """Patches per sensor (either layout of ``stems``) -> tokens [B, h, w, d].

    Args:
      present: bool [B, M], or None where every sample has all of ``patches``.
      places: per sensor, the number of samples that its stem computes on a device (``models.drawn``); None: all.
    """
    if len(patches) == 1:
        ((sensor, x),) = patches.items()
        core = _normalize(_value(spec, folded, sensor, x), spec)
    elif not spec.fusion:
        values = [value for (value,) in _values_and_scores(spec, folded, patches, present, places)]
        core = _normalize(select(values, present), spec)
    else:
        core = _fuse(spec, folded, patches, present, places)
    return linear(core, *folded.out, spec)


def _value(spec: ModelSpec, folded: Folded, sensor: str, x: Array) -> Array:
    """A sensor's value [B, h, w, D] without its scores, which a single sensor does not need."""
    kernel, bias = folded.stems[sensor]
    return stem_product(x, kernel[..., : spec.stem_width], bias[: spec.stem_width], spec)


def _values_and_scores(
    spec: ModelSpec, folded: Folded, patches: Mapping[str, Array], present: Array | None, places: Sequence[int] | None
) -> list[list[Array]]:
    """Per sensor its value [B, h, w, D] and, with fusion, its scores [B, h, w, Q * H]."""
    parts = [(spec.stem_width, spec.compute_dtype), (spec.queries * spec.fusion_heads, spec.stat_dtype)]
    widths, dtypes = zip(*parts[: 1 + spec.fusion], strict=True)
    if places is None or present is None:
        return [stem_products(x, *folded.stems[sensor], widths, dtypes, spec) for sensor, x in patches.items()]
    views = drawn.rows(present, places)
    return [
        drawn.products(x, *folded.stems[sensor], which, widths, dtypes, spec)
        for (sensor, x), which in zip(patches.items(), views, strict=True)
    ]


def select(values: Sequence[Array], present: Array) -> Array:
    """Per sample the values of the one sensor it sees: M arrays and ``present`` bool [B, M], one True a row."""
    chosen = (present[:, i, None, None, None] for i in range(len(values)))
    return sum(jnp.where(c, x, jnp.zeros((), x.dtype)) for c, x in zip(chosen, values, strict=True))


def _normalize(x: Array, spec: ModelSpec) -> Array:
    """LayerNorm without its affine part, which is folded into ``Folded.out``."""
    x = x.astype(spec.stat_dtype)
    centered = x - x.mean(-1, keepdims=True)
    variance = jnp.square(centered).mean(-1, keepdims=True)
    return (centered * lax.rsqrt(variance + NORM_EPS)).astype(spec.compute_dtype)


def _fuse(
    spec: ModelSpec, folded: Folded, patches: Mapping[str, Array], present: Array | None, places: Sequence[int] | None
) -> Array:
    """Weighted mean over queries of their normalized vectors, [B, h, w, D]; the vectors are never materialized."""
    values, scores = map(list, zip(*_values_and_scores(spec, folded, patches, present, places), strict=True))
    if fusion_kernels.resolve(spec):  # the same on TPU, in one pass over the values
        return fusion_kernels.mix(values, scores, present, folded.pool, spec)
    scores = [score.reshape(*score.shape[:-1], spec.queries, spec.fusion_heads) for score in scores]
    weights = _sensor_weights(scores, present)
    mean, inverse, logits = _moments(values, weights, folded, spec)
    share = jax.nn.softmax(logits, axis=-1) * inverse  # [B, h, w, Q]
    mixed = [_over_columns((share[..., None] * weight).sum(-2), spec) for weight in weights]
    total = sum(mix * value.astype(spec.stat_dtype) for mix, value in zip(mixed, values, strict=True))
    return (total - (share * mean).sum(-1)[..., None]).astype(spec.compute_dtype)


def _times(x: Array, columns: Array | np.ndarray, spec: ModelSpec) -> Array:
    """[..., D] times ``columns`` [D, N] -> [..., N]; the sums and the gradient of ``columns`` are in ``stat_dtype``."""
    with jax.named_scope(SUMS):
        return product(x.astype(spec.compute_dtype), jnp.asarray(columns, spec.stat_dtype), None, spec, spec.stat_dtype)


def _per_head(x: Array, spec: ModelSpec) -> Array:
    """[..., D] -> [..., H] in ``stat_dtype``: the sum of each head's columns.

    A product with a 0/1 matrix, but a plain sum on GPU: there it is computed in the pass that computes ``x``, which
    then never exists in memory.
    """
    if spec.backend == "gpu":
        return x.astype(spec.stat_dtype).reshape(*x.shape[:-1], spec.fusion_heads, -1).sum(-1)
    return _times(x, head_columns(spec), spec)


def _over_columns(x: Array, spec: ModelSpec) -> Array:
    """[..., H] -> [..., D]: repeats every head's number over its columns."""
    if spec.backend == "gpu":
        return jnp.repeat(x, spec.stem_width // spec.fusion_heads, axis=-1)
    return _times(x, head_columns(spec).T, spec)


def _sums_of_values(value: Array, pool: Array, spec: ModelSpec) -> tuple[Array, Array]:
    """Of [..., D], per head the sum of the columns and of the columns times ``pool``: two of [..., H]."""
    if spec.backend == "gpu":
        wide = value.astype(spec.stat_dtype)
        return _per_head(wide, spec), _per_head(wide * expand(pool, wide.ndim), spec)
    columns = jnp.asarray(head_columns(spec), spec.stat_dtype)
    both = _times(value, jnp.concatenate([columns, columns * pool[:, None]], axis=1), spec)
    return tuple(jnp.split(both, 2, axis=-1))


def _sensor_weights(scores: Sequence[Array], present: Array | None) -> list[Array]:
    """Softmax over the sensors present: M arrays [B, h, w, Q, H]."""
    scores = masked(scores, present)
    top = lax.stop_gradient(functools.reduce(jnp.maximum, scores))
    powers = [jnp.exp(score - top) for score in scores]
    total = sum(powers)
    return [power / total for power in powers]


def _moments(
    values: Sequence[Array], weights: Sequence[Array], folded: Folded, spec: ModelSpec
) -> tuple[Array, Array, Array]:
    """Mean, inverse deviation and pooling logit of every query's vector, each [B, h, w, Q]; values [B, h, w, D]."""
    width = spec.stem_width
    first = asked = second = 0.0
    for weight, value in zip(weights, values, strict=True):
        sums, pooled = (x[..., None, :] for x in _sums_of_values(value, folded.pool, spec))
        first, asked = first + (weight * sums).sum(-1), asked + (weight * pooled).sum(-1)
    wide = [value.astype(spec.stat_dtype) for value in values]
    for m in range(len(wide)):
        for n in range(m, len(wide)):
            gram = _per_head(wide[m] * wide[n], spec)[..., None, :]
            second = second + (1.0 if m == n else 2.0) * (weights[m] * weights[n] * gram).sum(-1)
    mean = first / width
    # A difference of two sums may round below zero where a patch is constant.
    variance = jnp.maximum(second / width - jnp.square(mean), 0.0)
    inverse = lax.rsqrt(variance + NORM_EPS)
    logits = (asked - mean * folded.pool.sum()) * inverse
    return mean, inverse, logits
