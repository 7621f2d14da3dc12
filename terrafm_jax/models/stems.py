"""Stems: a sensor's patches times its kernel, with the patches in either of two layouts.

The plain layout is [B, h, w, p * p * C]. On TPU, ``ssl.views`` delivers the column layout [B, h, p / m, w, m * C * p]:
the column inside the patch comes before the patch, m neighbors at a time (:func:`together`), and the last axis is
ordered (which of them, band, row in the patch). A TPU produces it at a fraction of the cost. The values are the same;
instead of the activations we permute the kernel, which is a thousand times smaller.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from terrafm_jax.models.layers import expand, linear, precision, sum_rows, uniform_fan_in
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import NORMALIZED_MEAN

LANES = 128  # of a TPU's vector register


class Stem(nnx.Module):
    """A convolution with kernel = stride = patch, as a matrix product: kernel [p*p*C, 3d].

    The bias starts at minus the kernel's response to the mean image. Normalized values are centered on 0.5, not 0; with
    a random bias this constant would outweigh the differences between patches, all tokens would start out nearly alike,
    and small models would spend hundreds of steps near collapse (docs/experiments.md).
    """

    def __init__(self, spec: ModelSpec, sensor: str, *, rngs: nnx.Rngs):
        fan_in = spec.patch_features(sensor)
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), (fan_in, spec.stem_width), fan_in))
        self.bias = nnx.Param(-NORMALIZED_MEAN * self.kernel[...].sum(0))


def together(bands: int, patch: int) -> int:
    """How many columns of a patch share the last axis in the column layout: the fewest that fill whole registers.

    Lanes that stay empty are stored, moved and multiplied like the others: of Sentinel-1's 32 values of a column they
    would be three quarters. 1 where no number of columns fills them.
    """
    return next((m for m in range(1, patch + 1) if patch % m == 0 and m * bands * patch % LANES == 0), 1)


def column_shape(values: int, patch: int) -> tuple[int, int]:
    """(p / m, m * C * p): how the column layout divides the p * p * C values of a patch."""
    m = together(values // patch**2, patch)
    return patch // m, values // (patch // m)


def grid(x: Array) -> tuple[int, int, int]:
    """(B, h, w) of patches in either layout."""
    return (x.shape[0], x.shape[1], x.shape[2 if x.ndim == 4 else 3])


def values(x: Array) -> int:
    """Number of values in one patch, in either layout."""
    return x.shape[-1] if x.ndim == 4 else x.shape[2] * x.shape[4]


def stem_product(
    x: Array, kernel: Array, bias: Array | None, spec: ModelSpec, out_dtype: jnp.dtype | None = None
) -> Array:
    """``layers.linear`` for patches in either layout.

    Args:
      x: [B, h, w, p * p * C] or [B, h, p / m, w, m * C * p].
      kernel: [p * p * C, N], rows ordered (row, column, band), or what :func:`ordered` made of it; bias: [N] or None.

    Returns:
      [B, h, w, N].
    """
    if x.ndim == 4:
        return linear(x, kernel, bias, spec, out_dtype)
    dtype = spec.compute_dtype
    kernel = kernel if kernel.ndim == 3 else ordered(kernel, spec)
    y = _column_product(x.astype(dtype), kernel, dtype, dtype if out_dtype is None else jnp.dtype(out_dtype))
    return y if bias is None else y + expand(bias.astype(y.dtype), y.ndim)


def stem_products(
    x: Array, kernel: Array, bias: Array, widths: Sequence[int], out_dtypes: Sequence[jnp.dtype], spec: ModelSpec
) -> list[Array]:
    """:func:`stem_product` split along its N columns, each part in a dtype of its own; one product for all gradients.

    A kernel's gradient first transposes the patches, which costs as much as the product of a narrow kernel.

    Args:
      kernel, bias: as for :func:`stem_product`; widths: columns of each part, N in sum.
    """
    out_dtypes = tuple(map(jnp.dtype, out_dtypes))
    if x.ndim == 4:
        layers = zip(_cut(kernel, widths), _cut(bias, widths), out_dtypes, strict=True)
        return [stem_product(x, part, offset, spec, dtype) for part, offset, dtype in layers]
    kernel = kernel if kernel.ndim == 3 else ordered(kernel, spec)
    return _column_products(x.astype(spec.compute_dtype), kernel, bias, tuple(widths), out_dtypes, spec)


def _cut(x: Array, widths: Sequence[int]) -> list[Array]:
    """Splits the last axis into parts of these widths."""
    return jnp.split(x, np.cumsum(widths)[:-1], axis=-1)


def ordered(kernel: Array, spec: ModelSpec) -> Array:
    """[p * p * C, N] -> [p / m, m * C * p, N]: permutes a kernel for patches in the column layout.

    Permute it once, before it is used for several sizes of views, so that their gradients are added locally before the
    all-reduce over devices.
    """
    p, (values, features) = spec.patch, kernel.shape
    kernel = kernel.reshape(p, p, -1, features).transpose(1, 2, 0, 3)
    return kernel.reshape(*column_shape(values, p), features)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _column_product(x: Array, kernel: Array, dtype: jnp.dtype, out_dtype: jnp.dtype) -> Array:
    """[B, h, j, w, k] times [j, k, N] -> [B, h, w, N]."""
    exact = precision(dtype)
    return jnp.einsum("bhjwk,jkn->bhwn", x, kernel.astype(dtype), precision=exact, preferred_element_type=out_dtype)


def _column_product_fwd(x: Array, kernel: Array, dtype: jnp.dtype, out_dtype: jnp.dtype) -> tuple:
    return _column_product(x, kernel, dtype, out_dtype), (x, kernel)


def _column_product_bwd(dtype: jnp.dtype, out_dtype: jnp.dtype, saved: tuple, g: Array) -> tuple[Array, Array]:
    """As ``layers.linear``: the kernel's gradient is summed over devices in the kernel's dtype, not in ``dtype``."""
    x, kernel = saved
    exact, g = precision(dtype), g.astype(dtype)
    dx = jnp.einsum("bhwn,jkn->bhjwk", g, kernel.astype(dtype), precision=exact)
    return dx, jnp.einsum("bhjwk,bhwn->jkn", x, g, precision=exact, preferred_element_type=kernel.dtype)


_column_product.defvjp(_column_product_fwd, _column_product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _column_products(
    x: Array, kernel: Array, bias: Array, widths: tuple[int, ...], out_dtypes: tuple[jnp.dtype, ...], spec: ModelSpec
) -> list[Array]:
    """:func:`stem_products` in the column layout: [B, h, j, w, k] and [j, k, N] -> parts of [B, h, w, N]."""
    found = []
    for part, offset, out_dtype in zip(_cut(kernel, widths), _cut(bias, widths), out_dtypes, strict=True):
        y = _column_product(x, part, spec.compute_dtype, out_dtype)
        found.append(y + expand(offset.astype(y.dtype), y.ndim))
    return found


def _column_products_fwd(
    x: Array, kernel: Array, bias: Array, widths: tuple, out_dtypes: tuple, spec: ModelSpec
) -> tuple:
    return _column_products(x, kernel, bias, widths, out_dtypes, spec), (x, kernel, bias)


def _column_products_bwd(widths: tuple, out_dtypes: tuple, spec: ModelSpec, saved: tuple, gs: list[Array]) -> tuple:
    x, kernel, bias = saved
    g = jnp.concatenate([part.astype(spec.compute_dtype) for part in gs], axis=-1)
    dx, dkernel = _column_product_bwd(spec.compute_dtype, out_dtypes[0], (x, kernel), g)
    return dx, dkernel, sum_rows(g, bias.dtype, spec)


_column_products.defvjp(_column_products_fwd, _column_products_bwd)
