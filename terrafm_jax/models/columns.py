"""Patches in the order in which a TPU makes them cheaply, and the stems' product over them.

``ssl.views`` can deliver views as [B, h, p, w, C * p]: the column inside the patch before the patch, the
last axis ordered (band, row in the patch). The values are those of [B, h, w, p * p * C]; instead of the
activations it is the kernel, a thousand times smaller, that is brought into order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from terrafm_jax.models.layers import expand, linear, precision, sum_rows
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
    dtype = spec.compute_dtype
    y = _product(x.astype(dtype), _ordered(kernel, x), dtype, dtype if out_dtype is None else jnp.dtype(out_dtype))
    return y if bias is None else y + expand(bias.astype(y.dtype), y.ndim)


def stem_products(
    x: Array, layers: Sequence[tuple[Array, Array]], out_dtypes: Sequence[jnp.dtype], spec: ModelSpec
) -> list[Array]:
    """:func:`stem_product` with several kernels and biases, whose gradients are one product.

    A gradient brings the patches into another order, which costs as much as a narrow kernel's product itself.
    """
    if x.ndim == 4:
        return [stem_product(x, *layer, spec, dtype) for layer, dtype in zip(layers, out_dtypes, strict=True)]
    layers = [(_ordered(kernel, x), bias) for kernel, bias in layers]
    return _products(x.astype(spec.compute_dtype), layers, tuple(map(jnp.dtype, out_dtypes)), spec)


def _ordered(kernel: Array, x: Array) -> Array:
    """[p * p * C, N] -> [p, C * p, N], the order of ``x`` [B, h, p, w, C * p]."""
    p = x.shape[2]
    kernel = kernel.reshape(p, p, -1, kernel.shape[-1]).transpose(1, 2, 0, 3)
    return kernel.reshape(p, x.shape[-1], -1)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _products(
    x: Array, layers: list[tuple[Array, Array]], out_dtypes: tuple[jnp.dtype, ...], spec: ModelSpec
) -> list[Array]:
    found = []
    for (kernel, bias), out_dtype in zip(layers, out_dtypes, strict=True):
        y = _product(x, kernel, spec.compute_dtype, out_dtype)
        found.append(y + expand(bias.astype(y.dtype), y.ndim))
    return found


def _products_fwd(x: Array, layers: list, out_dtypes: tuple[jnp.dtype, ...], spec: ModelSpec) -> tuple:
    return _products(x, layers, out_dtypes, spec), (x, layers)


def _products_bwd(out_dtypes: tuple, spec: ModelSpec, saved: tuple, gs: list[Array]) -> tuple[Array, list]:
    x, layers = saved
    g = jnp.concatenate([part.astype(spec.compute_dtype) for part in gs], axis=-1)
    joint = jnp.concatenate([kernel for kernel, _ in layers], axis=-1)
    dx, dkernel = _product_bwd(spec.compute_dtype, out_dtypes[0], (x, joint), g)
    dbias, ends = sum_rows(g, layers[0][1].dtype, spec), []
    for kernel, _ in layers:
        ends.append((ends[-1] if ends else 0) + kernel.shape[-1])
    return dx, list(zip(jnp.split(dkernel, ends[:-1], -1), jnp.split(dbias, ends[:-1], -1), strict=True))


_products.defvjp(_products_fwd, _products_bwd)
