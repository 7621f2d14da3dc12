"""Self-attention by cuDNN, on NVIDIA GPUs: logits never leave on-chip memory.

Not measured on a GPU yet. By the compiled program, XLA's own attention is a quarter of what the train step of B reads
and writes (docs/performance.md).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from terrafm_jax.models.spec import ModelSpec

_log = logging.getLogger(__name__)
WIDEST = 128  # columns of a head, on every GPU that has flash attention
_TOLERANCE = 0.05  # of a test whose exact values are about 1; bfloat16 alone misses them by 0.01


def fits(spec: ModelSpec) -> bool:
    """Whether cuDNN supports the dtype and head size."""
    head = spec.width // spec.heads
    return spec.dtype == "bfloat16" and head % 8 == 0 and head <= WIDEST


def padded(tokens: int) -> int:
    """Rows of a view: JAX refuses an odd number of them in training, cuDNN does not."""
    return tokens + tokens % 2


def attend(qkv: Array, tokens: int) -> Array:
    """Softmax attention of [B, N, 3, heads, head] -> [B, N, heads, head]; rows from ``tokens`` on are padding."""
    batch, rows = qkv.shape[:2]
    lengths = {}
    if rows != tokens:  # padding takes part as queries, whose results nobody reads, but never as keys
        qkv = _gradient_of_first(qkv, tokens)
        lengths["query_seq_lengths"] = jnp.full((batch,), rows, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full((batch,), tokens, jnp.int32)
    q, k, v = (qkv[:, :, i] for i in range(3))
    return jax.nn.dot_product_attention(q, k, v, implementation="cudnn", **lengths)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gradient_of_first(x: Array, tokens: int) -> Array:
    """``x`` [B, N, ...]; its gradient is zero from row ``tokens`` on, where cuDNN does not promise to write any."""
    return x


def _gradient_of_first_bwd(tokens: int, _: None, g: Array) -> tuple[Array]:
    row = jax.lax.broadcasted_iota(jnp.int32, g.shape, 1)
    return (jnp.where(row < tokens, g, jnp.zeros((), g.dtype)),)


_gradient_of_first.defvjp(lambda x, tokens: (x, None), _gradient_of_first_bwd)


@functools.cache
def works() -> bool:
    """Whether this process' GPU attends by cuDNN as it should, values and gradients. Tried once, with few tokens.

    True where there is no GPU: then the step is compiled for an absent one.
    """
    if jax.default_backend() != "gpu":
        return True
    try:
        with ThreadPoolExecutor(1) as thread:  # a new thread: the caller may be tracing, under a mesh
            error = thread.submit(_largest_error, attend).result()
    except Exception as e:  # from JAX, XLA or cuDNN; whatever it is, XLA's attention is there
        _log.warning("cuDNN's attention does not run on this GPU, so XLA's is used: %s", e)
        return False
    if not error < _TOLERANCE:
        _log.warning("cuDNN's attention is off by %.3g on this GPU, so XLA's is used", error)
        return False
    return True


def _largest_error(implementation: Callable[[Array, int], Array]) -> float:
    """Largest error of values and gradients of 37 tokens, the 38th row being padding full of large numbers."""
    rows, tokens = 38, 37
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((2, rows, 3, 2, 64)).astype(np.float32)
    qkv[:, tokens:] = 100.0
    weight = rng.standard_normal((2, tokens, 2, 64)).astype(np.float32)

    def loss(x: Array, how: Callable[[Array, int], Array]) -> tuple[Array, Array]:
        out = how(x, tokens)[:, :tokens].astype(jnp.float32)
        return (out * weight).sum(), out

    def run(how: Callable[[Array, int], Array], dtype: str) -> list[np.ndarray]:
        function = jax.jit(jax.value_and_grad(functools.partial(loss, how=how), has_aux=True))
        (_, out), gradient = function(jnp.asarray(qkv, dtype))
        return [np.asarray(out, np.float32), np.asarray(gradient, np.float32)]

    return max(
        float(np.abs(found - exact).max())
        for found, exact in zip(run(implementation, "bfloat16"), run(_exact, "float32"), strict=True)
    )


def _exact(qkv: Array, tokens: int) -> Array:
    q, k, v = (qkv[:, :, i] for i in range(3))
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("bnhc,bmhc->bhnm", q, k[:, :tokens], precision=exact) * q.shape[-1] ** -0.5
    return jnp.einsum("bhnm,bmhc->bnhc", jax.nn.softmax(logits, axis=-1), v[:, :tokens], precision=exact)
