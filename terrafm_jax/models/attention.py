"""Self-attention over one view's tokens, in four implementations of one function."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from terrafm_jax.models.layers import precision
from terrafm_jax.models.spec import ModelSpec

LANES = 128  # of a TPU's vector registers; its matrix units are as deep (v6e: 256)


def resolve(spec: ModelSpec) -> str:
    """The implementation "auto" stands for: head-major on CPU, lanes on TPU where heads fill them, XLA elsewhere.

    cuDNN must be asked for.
    """
    if spec.attention != "auto":
        return spec.attention
    if spec.backend == "gpu":
        return "xla"
    fits = _cut(spec.width) % (spec.width // spec.heads) == 0
    return "lanes" if spec.backend == "tpu" and fits else "head_major"


def _cut(width: int) -> int:
    """Columns that one cut of the "lanes" implementation takes."""
    return math.gcd(width, LANES)


def attend(qkv: Array, spec: ModelSpec) -> Array:
    """Softmax attention of packed ``[B, N, 3 * d]`` (3, heads, head_dim) -> ``[B, N, d]``.

    Softmax is computed in float32. Raises ValueError where "cudnn" meets a type it does not support, or "lanes"
    heads that do not fill vector lanes.
    """
    batch, tokens, packed = qkv.shape
    head_dim = packed // (3 * spec.heads)
    implementation = resolve(spec)
    if implementation == "lanes":
        return _lanes(qkv, head_dim, spec)
    qkv = qkv.reshape(batch, tokens, 3, spec.heads, head_dim)
    if implementation == "head_major":
        out = _head_major(qkv, spec)
    elif implementation == "cudnn":
        if spec.dtype != "bfloat16" or head_dim % 8:
            raise ValueError(
                f"model: attention 'cudnn' needs dtype bfloat16 and a head size divisible by 8; "
                f"found {spec.dtype} and {head_dim}. Use attention='xla'"
            )
        out = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], implementation="cudnn")
    else:
        out = _token_major(qkv, spec)
    return out.reshape(batch, tokens, packed // 3)


def _softmax(logits: Array, head_dim: int, spec: ModelSpec) -> Array:
    scaled = logits.astype(spec.stat_dtype) * head_dim**-0.5
    return jax.nn.softmax(scaled, axis=-1).astype(spec.compute_dtype)


def _token_major(qkv: Array, spec: ModelSpec) -> Array:
    """[B, N, 3, heads, head_dim] -> [B, N, heads, head_dim]; the compiler picks the layouts."""
    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
    exact = precision(spec.compute_dtype)
    logits = jnp.einsum("bnhc,bmhc->bhnm", q, k, precision=exact, preferred_element_type=spec.stat_dtype)
    weights = _softmax(logits, q.shape[-1], spec)
    return jnp.einsum("bhnm,bmhc->bnhc", weights, v, precision=exact)


def _head_major(qkv: Array, spec: ModelSpec) -> Array:
    """The same with [B, heads, N, head_dim] operands, which XLA:CPU multiplies without strided access."""
    q, k, v = qkv.transpose(2, 0, 3, 1, 4)
    exact = precision(spec.compute_dtype)
    logits = jnp.einsum("bhnc,bhmc->bhnm", q, k, precision=exact, preferred_element_type=spec.stat_dtype)
    weights = _softmax(logits, q.shape[-1], spec)
    return jnp.einsum("bhnm,bhmc->bhnc", weights, v, precision=exact).transpose(0, 2, 1, 3)


def _lanes(qkv: Array, head_dim: int, spec: ModelSpec) -> Array:
    """[B, N, 3 * d] -> [B, N, d] for TPU: as many heads as fill the vector lanes are cut out together.

    Such cuts move nothing, while an axis of 64-wide heads costs copies into a layout that leaves half the lanes
    empty. Heads of a cut are told apart by zeros in the queries and values of the others; contracting over them
    is free, because the matrix unit is as deep as the lanes are many. Heads go one by one, so that their
    logits stay in on-chip memory.
    """
    width = qkv.shape[-1] // 3
    cut = _cut(width)
    if cut % head_dim:
        raise ValueError(
            f"model: attention 'lanes' needs whole heads in {cut} columns; found heads of {head_dim}. "
            f"Use attention='xla'"
        )
    groups, exact = width // cut, precision(spec.compute_dtype)
    parts = lax.split(qkv, [cut] * (3 * groups), axis=2)
    out = []
    for q, k, v in zip(parts[:groups], parts[groups : 2 * groups], parts[2 * groups :], strict=True):
        heads = []
        for own in np.split(np.eye(cut, dtype=np.float32), cut // head_dim):
            mask = jnp.asarray(own.sum(0), qkv.dtype)[None, None]
            logits = jnp.einsum("bnc,bmc->bnm", q * mask, k, precision=exact, preferred_element_type=spec.stat_dtype)
            weights = _softmax(logits, head_dim, spec)
            heads.append(jnp.einsum("bnm,bmc->bnc", weights, v * mask, precision=exact))
        out.append(sum(heads[1:], heads[0]))
    return jnp.concatenate(out, axis=-1)
