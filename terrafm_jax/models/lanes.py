"""Attention for TPU: whole vector registers are cut out, logits stay on the chip, the backward pass is ours.

A TPU keeps [rows, columns] in registers of 8 x 128. Heads are 64 wide: an axis of heads costs copies into a
layout that leaves half of every register empty. So a *pair* of heads (128 columns) is cut out together, which
moves nothing, and the two are told apart by zeros: of the queries one copy has the columns of the other head
zeroed, a second copy those of the first, and the copies are stacked as rows. Contracting over zeros is free,
because the matrix unit is as deep as the registers are wide. Pairs go one by one, so that their logits fit
into on-chip memory; a product over all pairs at once would write them out.

Logits lie transposed, [keys, queries]: a softmax then adds up registers instead of the columns inside each.

The backward pass keeps the output and one number a query (the log of the softmax's denominator), both named
``SAVED`` for ``jax.checkpoint``, and forms the weights again from them.
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
ROWS = 8  # of a vector register
SAVED = "attention"
ABSENT = -1e30  # logit of a key that is padding; finite, so that differences of logits are numbers

_ROWS_BY_ROWS = (((2,), (2,)), ((0,), (0,)))  # [B, m, c] x [B, n, c] -> [B, m, n]
_PLAIN = (((2,), (1,)), ((0,), (0,)))  # [B, m, n] x [B, n, c] -> [B, m, c]
_TRANSPOSED = (((1,), (1,)), ((0,), (0,)))  # [B, m, n] x [B, m, c] -> [B, n, c]


def cut(width: int) -> int:
    """Columns that are cut out together."""
    return math.gcd(width, LANES)


def padded(tokens: int) -> int:
    """``tokens`` rounded up to whole registers."""
    return -(-tokens // ROWS) * ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attend(qkv: Array, spec: ModelSpec, keys: int) -> Array:
    """Softmax attention of packed ``[B, N, 3 * d]`` (3, heads, head_dim) -> ``[B, N, d]``.

    Args:
      keys: the first so many rows are tokens; the others are padding, which no token attends to.
    """
    return _forward(qkv, spec, keys)[0]


def _forward(qkv: Array, spec: ModelSpec, keys: int) -> tuple[Array, Array]:
    """The output, and [cuts, B, 1, heads in a cut * N] logs of the softmax's denominators."""
    own, out, logs = _own_columns(spec), [], []
    for q, k, v in zip(*_thirds(qkv, spec), strict=True):
        logits = _logits(_stack(q, own), k, spec, keys)
        top = logits.max(1, keepdims=True)
        powers = jnp.exp(logits - top)
        total = powers.sum(1, keepdims=True)
        weights = (powers / total).astype(spec.compute_dtype)
        out.append(_unstack(_dot(weights, v, _TRANSPOSED, spec), own, spec))
        logs.append(top + jnp.log(total))
    return jnp.concatenate(out, axis=-1), jnp.stack(logs)


def _attend_fwd(qkv: Array, spec: ModelSpec, keys: int) -> tuple[Array, tuple]:
    out, logs = (checkpoint_name(x, SAVED) for x in _forward(qkv, spec, keys))
    return out, (qkv, out, logs)


def _attend_bwd(spec: ModelSpec, keys: int, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array]:
    qkv, out, logs = saved
    own, dtype = _own_columns(spec), spec.compute_dtype
    dqs, dks, dvs = [], [], []
    shifts = _shifts(out, g, spec)
    for q, k, v, do, log, shift in zip(*_thirds(qkv, spec), _cuts(g, spec), logs, shifts, strict=True):
        q, do = _stack(q, own), _stack(do, own)
        weights = jnp.exp(_logits(q, k, spec, keys) - log)
        dlogits = (weights * (_dot(v, do, _ROWS_BY_ROWS, spec) - shift) * _scale(spec)).astype(dtype)
        dqs.append(_unstack(_dot(dlogits, k, _TRANSPOSED, spec), own, spec))
        dks.append(_dot(dlogits, q, _PLAIN, spec).astype(dtype))
        dvs.append(_dot(weights.astype(dtype), do, _PLAIN, spec).astype(dtype))
    return (jnp.concatenate([*dqs, *dks, *dvs], axis=-1),)


attend.defvjp(_attend_fwd, _attend_bwd)


def _scale(spec: ModelSpec) -> float:
    return (spec.width // spec.heads) ** -0.5


def _dot(a: Array, b: Array, dims: tuple, spec: ModelSpec) -> Array:
    exact = precision(spec.compute_dtype)
    return lax.dot_general(a, b, dims, precision=exact, preferred_element_type=spec.stat_dtype)


def _shifts(out: Array, g: Array, spec: ModelSpec) -> Array:
    """What the softmax's backward pass subtracts: sums of ``out * g`` over each head, [cuts, B, 1, heads in a cut * N].

    Taken as a product with ones, which TPUs do faster than sums over columns, and in this order of axes.
    """
    batch, rows, width = out.shape
    heads = jnp.asarray(np.repeat(np.eye(spec.heads, dtype=np.float32), width // spec.heads, axis=1), out.dtype)
    sums = lax.dot_general(
        heads, out * g, (((1,), (2,)), ((), ())), precision=precision(out.dtype), preferred_element_type=spec.stat_dtype
    )
    sums = sums.reshape(width // cut(width), -1, batch, rows).transpose(0, 2, 1, 3)
    return sums.reshape(width // cut(width), batch, 1, -1)


def _cuts(x: Array, spec: ModelSpec) -> Sequence[Array]:
    """[B, N, d] or [B, N, 3 * d] as a list of [B, N, cut]."""
    size = cut(spec.width)
    return lax.split(x, [size] * (x.shape[-1] // size), axis=2)


def _thirds(qkv: Array, spec: ModelSpec) -> list[Sequence[Array]]:
    """Queries, keys and values, each as a list of cuts."""
    parts, count = _cuts(qkv, spec), spec.width // cut(spec.width)
    return [parts[i * count : (i + 1) * count] for i in range(3)]


def _own_columns(spec: ModelSpec) -> np.ndarray:
    """float32 [heads in a cut, cut]: 1 in the columns of each head."""
    size, head = cut(spec.width), spec.width // spec.heads
    return np.repeat(np.eye(size // head, dtype=np.float32), head, axis=1)


def _masks(own: np.ndarray, dtype: jnp.dtype) -> list[Array]:
    return [jnp.asarray(row, dtype)[None, None] for row in own]


def _stack(x: Array, own: np.ndarray) -> Array:
    """[B, N, cut] -> [B, heads * N, cut]: a copy for each head in which only its columns are left."""
    return jnp.concatenate([x * mask for mask in _masks(own, x.dtype)], axis=1)


def _unstack(x: Array, own: np.ndarray, spec: ModelSpec) -> Array:
    """[B, heads * N, cut] -> [B, N, cut]: of every copy the columns of its head."""
    parts = jnp.split(x, len(own), axis=1)
    return sum(part * mask for part, mask in zip(parts, _masks(own, x.dtype), strict=True)).astype(spec.compute_dtype)


def _logits(q: Array, k: Array, spec: ModelSpec, keys: int) -> Array:
    """[B, heads * N, cut] and [B, N, cut] -> [B, N (keys), heads * N]."""
    logits = _dot(k, q, _ROWS_BY_ROWS, spec) * _scale(spec)
    if keys == k.shape[1]:
        return logits
    return jnp.where((jnp.arange(k.shape[1]) < keys)[None, :, None], logits, ABSENT)
