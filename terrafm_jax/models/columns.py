"""Patches in the order in which a TPU makes them cheaply, and the stems' product over them.

``ssl.views`` can deliver views as [B, h, p, w, C * p]: the column inside the patch before the patch, the
last axis ordered (band, row in the patch). The values are those of [B, h, w, p * p * C]; instead of the
activations it is the kernel, a thousand times smaller, that is brought into order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array

from terrafm_jax.models.layers import expand, linear, precision
from terrafm_jax.models.spec import ModelSpec


def grid(x: Array) -> tuple[int, int, int]:
    """(B, h, w) of patches in either layout."""
    return (x.shape[0], x.shape[1], x.shape[2 if x.ndim == 4 else 3])


def values(x: Array) -> int:
    """Values of one patch in either layout."""
    return x.shape[-1] if x.ndim == 4 else x.shape[2] * x.shape[4]


def stem_product(
    x: Array, kernel: Array, bias: Array | None, spec: ModelSpec, out_dtype: jnp.dtype | None = None
) -> Array:
    """``layers.linear`` for patches in either layout.

    Args:
      x: [B, h, w, p * p * C] or [B, h, p, w, C * p].
      kernel: [p * p * C, N], rows ordered (row, column, band); bias: [N] or None.

    Returns:
      [B, h, w, N].
    """
    if x.ndim == 4:
        return linear(x, kernel, bias, spec, out_dtype)
    dtype, p = spec.compute_dtype, x.shape[2]
    kernel = kernel.reshape(p, p, -1, kernel.shape[-1]).transpose(1, 2, 0, 3)
    kernel = kernel.reshape(p, x.shape[-1], -1)
    y = _product(x.astype(dtype), kernel, dtype, dtype if out_dtype is None else jnp.dtype(out_dtype))
    return y if bias is None else y + expand(bias.astype(y.dtype), y.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, kernel: Array, dtype: jnp.dtype, out_dtype: jnp.dtype) -> Array:
    """[B, h, p, w, C * p] times [p, C * p, N] -> [B, h, w, N]."""
    exact = precision(dtype)
    return jnp.einsum("bhjwk,jkn->bhwn", x, kernel.astype(dtype), precision=exact, preferred_element_type=out_dtype)


def _product_fwd(x: Array, kernel: Array, dtype: jnp.dtype, out_dtype: jnp.dtype) -> tuple:
    return _product(x, kernel, dtype, out_dtype), (x, kernel)


def _product_bwd(dtype: jnp.dtype, out_dtype: jnp.dtype, saved: tuple, g: Array) -> tuple[Array, Array]:
    """As ``layers.linear``: the kernel's gradient is summed over devices in the kernel's type, not in ``dtype``."""
    x, kernel = saved
    exact, g = precision(dtype), g.astype(dtype)
    dx = jnp.einsum("bhwn,jkn->bhjwk", g, kernel.astype(dtype), precision=exact)
    return dx, jnp.einsum("bhjwk,bhwn->jkn", x, g, precision=exact, preferred_element_type=kernel.dtype)


_product.defvjp(_product_fwd, _product_bwd)
