"""Self-attention over one view's tokens, in four implementations of one function; TPU's is in ``lanes``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from terrafm_jax.models import lanes
from terrafm_jax.models.layers import precision
from terrafm_jax.models.spec import ModelSpec


def resolve(spec: ModelSpec) -> str:
    """The implementation "auto" stands for: head-major on CPU, lanes on TPU where heads fill them, XLA elsewhere.

    cuDNN must be asked for.
    """
    if spec.attention != "auto":
        return spec.attention
    if spec.backend == "gpu":
        return "xla"
    fits = lanes.cut(spec.width) % (spec.width // spec.heads) == 0
    return "lanes" if spec.backend == "tpu" and fits else "head_major"


def attend(qkv: Array, spec: ModelSpec) -> Array:
    """Softmax attention of packed ``[B, N, 3 * d]`` (3, heads, head_dim) -> ``[B, N, d]``.

    Softmax is computed in float32. Raises ValueError where "cudnn" meets a type it does not support, or "lanes"
    heads that do not fill vector lanes.
    """
    batch, tokens, packed = qkv.shape
    head_dim = packed // (3 * spec.heads)
    implementation = resolve(spec)
    if implementation == "lanes":
        if lanes.cut(spec.width) % head_dim:
            raise ValueError(
                f"model: attention 'lanes' needs whole heads in {lanes.cut(spec.width)} columns; found heads of "
                f"{head_dim}. Use attention='xla'"
            )
        return lanes.attend(qkv, spec)
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
