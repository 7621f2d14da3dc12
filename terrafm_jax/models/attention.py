"""Self-attention within a view: four implementations of one function, two of them in ``tpu`` and ``cudnn``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from terrafm_jax.models import cudnn
from terrafm_jax.models.layers import precision
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.tpu import attention_kernels, kernel_calls


def resolve(spec: ModelSpec, tokens: int) -> str:
    """The implementation to use. "auto" is cuDNN on GPU, head-major on CPU, and on TPU the Pallas kernels.

    On GPU, XLA stands in where cuDNN does not support dtype or head size, or fails a test on the device at hand. On
    TPU, head-major does where the kernels do not support the shapes or no mesh is in context.
    """
    if spec.attention != "auto":
        return spec.attention
    if spec.backend == "gpu":
        return "cudnn" if cudnn.fits(spec) and cudnn.works() else "xla"
    supported = attention_kernels.fits(spec, tokens) and attention_kernels.cut(spec) == attention_kernels.LANES
    return "pallas" if supported and kernel_calls.wanted(spec) else "head_major"


def rows(spec: ModelSpec, tokens: int) -> int:
    """Number of rows to pad the ``tokens`` of a view to before the blocks."""
    padded = {"pallas": attention_kernels.padded, "cudnn": cudnn.padded}.get(resolve(spec, tokens))
    return padded(tokens) if padded else tokens


def attend(qkv: Array, spec: ModelSpec, tokens: int | None = None) -> Array:
    """Softmax attention of packed ``[B, N, 3 * d]`` (3, heads, head_dim) -> ``[B, N, d]``.

    Softmax is computed in float32.

    Args:
      tokens: rows from here on are padding, as :func:`rows` asks for; None: no row is.

    Raises:
      ValueError: "cudnn" does not support the dtype or head size, "pallas" not the head size or number of tokens.
    """
    batch, length, packed = qkv.shape
    head_dim = packed // (3 * spec.heads)
    tokens = length if tokens is None else tokens
    implementation = resolve(spec, tokens)
    if implementation == "pallas":
        if not attention_kernels.fits(spec, tokens):
            raise ValueError(
                f"model: attention 'pallas' needs whole heads in {attention_kernels.cut(spec)} columns and at most "
                f"{attention_kernels.LONGEST} tokens; found heads of {head_dim} and {tokens} tokens. "
                "Use attention='xla'"
            )
        return attention_kernels.attend(qkv, spec, tokens)
    qkv = qkv.reshape(batch, length, 3, spec.heads, head_dim)
    if implementation == "head_major":
        out = _head_major(qkv, spec)
    elif implementation == "cudnn":
        if not cudnn.fits(spec):
            raise ValueError(
                f"model: attention 'cudnn' needs dtype bfloat16 and a head size divisible by 8, at most "
                f"{cudnn.WIDEST}; found {spec.dtype} and {head_dim}. Use attention='xla'"
            )
        out = cudnn.attend(qkv, tokens)
    else:
        out = _token_major(qkv, spec)
    return out.reshape(batch, length, packed // 3)


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
