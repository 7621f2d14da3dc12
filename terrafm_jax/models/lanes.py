"""Attention for TPU: whole vector registers are cut out, logits stay on the chip, the backward pass is ours.

A TPU keeps [rows, columns] in registers of 8 x 128. Heads are 64 wide: an axis of heads costs copies into a
layout that leaves half of every register empty. So as many heads as fill the columns are cut out together,
which moves nothing, and told apart by zeros in the queries and values of the others; contracting over them is
free, because the matrix unit is as deep as the registers are wide. Heads go one by one, so that their logits
stay in on-chip memory.

The backward pass keeps the output and one number a query (the log of the softmax's denominator), both named
``SAVED`` for ``jax.checkpoint``, and forms the weights again from them. Each of its passes over the logits is
the end of a matrix product, where the compiler estimates half of what a pass of its own costs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from terrafm_jax.models.layers import precision
from terrafm_jax.models.spec import ModelSpec

LANES = 128  # of a vector register; the matrix units are as deep (v6e: 256)
SAVED = "attention"

_ROWS_BY_ROWS = (((2,), (2,)), ((0,), (0,)))  # [B, m, c] x [B, n, c] -> [B, m, n]
_PLAIN = (((2,), (1,)), ((0,), (0,)))  # [B, m, n] x [B, n, c] -> [B, m, c]
_TRANSPOSED = (((1,), (1,)), ((0,), (0,)))  # [B, m, n] x [B, m, c] -> [B, n, c]


def cut(width: int) -> int:
    """Columns that are cut out together."""
    return math.gcd(width, LANES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend(qkv: Array, spec: ModelSpec) -> Array:
    """Softmax attention of packed ``[B, N, 3 * d]`` (3, heads, head_dim) -> ``[B, N, d]``."""
    return _forward(qkv, spec)[0]


def _forward(qkv: Array, spec: ModelSpec) -> tuple[Array, Array]:
    """The output, and [heads, B, N] logs of the softmax's denominators."""
    out, logs, masks = [], [], _masks(spec, qkv.dtype)
    # XLA makes product, softmax and its sum one kernel, but only as long as nobody else asks for the maxima: they
    # are found again, from products that it cannot recognize as the same. Unused logs (no gradient) vanish.
    again = lax.optimization_barrier(masks)
    for q, k, v in zip(*_thirds(qkv, spec), strict=True):
        mixed = []
        for own, same in zip(masks, again, strict=True):
            logits = _logits(q * own, k, spec)
            powers = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
            total = powers.sum(-1, keepdims=True)
            mixed.append(_dot((powers / total).astype(spec.compute_dtype), v * own, _PLAIN, spec))
            logs.append(_logits(q * same, k, spec).max(-1) + jnp.log(total[..., 0]))
        out.append(sum(mixed[1:], mixed[0]).astype(spec.compute_dtype))
    return jnp.concatenate(out, axis=-1), jnp.stack(logs)


def _attend_fwd(qkv: Array, spec: ModelSpec) -> tuple[Array, tuple]:
    out, logs = (checkpoint_name(x, SAVED) for x in _forward(qkv, spec))
    return out, (qkv, out, logs)


def _attend_bwd(spec: ModelSpec, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array]:
    """Logits lie transposed here, [keys, queries]: what belongs to a query is then one row for all of them."""
    qkv, out, logs = saved
    dtype, masks = spec.compute_dtype, _masks(spec, qkv.dtype)
    dqs, dks, dvs = [], [], []
    rows = iter(zip(logs[:, :, None], _head_sums(out * g, spec)[:, :, None], strict=True))
    for q, k, v, do in zip(*_thirds(qkv, spec), _cuts(g, spec), strict=True):
        dq, dk, dv = [], [], []
        for own in masks:
            log, shift = next(rows)
            weights = jnp.exp(_logits(k, q * own, spec) - log)
            dlogits = (weights * (_dot(v, do * own, _ROWS_BY_ROWS, spec) - shift) * _scale(spec)).astype(dtype)
            dq.append(_dot(dlogits, k * own, _TRANSPOSED, spec))
            dk.append(_dot(dlogits, q * own, _PLAIN, spec))
            dv.append(_dot(weights.astype(dtype), do * own, _PLAIN, spec))
        for grads, parts in ((dqs, dq), (dks, dk), (dvs, dv)):
            grads.append(sum(parts[1:], parts[0]).astype(dtype))
    return (jnp.concatenate([*dqs, *dks, *dvs], axis=-1),)


attend.defvjp(_attend_fwd, _attend_bwd)


def _scale(spec: ModelSpec) -> float:
    return (spec.width // spec.heads) ** -0.5


def _dot(a: Array, b: Array, dims: tuple, spec: ModelSpec) -> Array:
    exact = precision(spec.compute_dtype)
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=spec.stat_dtype)


def _logits(a: Array, b: Array, spec: ModelSpec) -> Array:
    """[B, m, cut] and [B, n, cut] -> [B, m, n]."""
    return _dot(a, b, _ROWS_BY_ROWS, spec) * _scale(spec)


def _head_sums(x: Array, spec: ModelSpec) -> Array:
    """[B, N, d] -> [heads, B, N], sums over each head's columns.

    Of ``out * gradient`` they are what a softmax's backward pass subtracts. Taken as a product with ones, which
    TPUs do faster than sums over columns, and which puts queries into the last axis.
    """
    ones = jnp.asarray(np.repeat(np.eye(spec.heads), x.shape[-1] // spec.heads, axis=1), x.dtype)
    exact = precision(x.dtype)
    return lax.dot_general(ones, x, (((1,), (2,)), ((), ())), precision=exact, preferred_element_type=spec.stat_dtype)


def _cuts(x: Array, spec: ModelSpec) -> Sequence[Array]:
    """[B, N, d] or [B, N, 3 * d] as a list of [B, N, cut]."""
    size = cut(spec.width)
    return lax.split(x, [size] * (x.shape[-1] // size), axis=2)


def _thirds(qkv: Array, spec: ModelSpec) -> list[Sequence[Array]]:
    """Queries, keys and values, each as a list of cuts."""
    parts, count = _cuts(qkv, spec), spec.width // cut(spec.width)
    return [parts[i * count : (i + 1) * count] for i in range(3)]


def _masks(spec: ModelSpec, dtype: jnp.dtype) -> list[Array]:
    """For each head of a cut [1, 1, cut]: 1 in its own columns."""
    size, head = cut(spec.width), spec.width // spec.heads
    return [jnp.asarray(own, dtype)[None, None] for own in np.repeat(np.eye(size // head), head, axis=1)]
