"""Linear layers, norms, activations and their initialisation: the leaves of the network.

Every matrix product with a weight goes through :func:`linear`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from terrafm_jax.models.spec import ModelSpec

# Names by which ``jax.checkpoint`` keeps things. Its policies for products do not look into a function with a
# backward pass of its own, such as ``linear``.
PRODUCT, MOMENTS = "product", "moments"
SUMS = "sums"  # scope of the products that add up, and are no FLOPs of the network

Module = TypeVar("Module", bound=nnx.Module)


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Full precision for float32 products (TPU and GPU default to bf16 and TF32), the default for bfloat16."""
    return None if dtype == jnp.bfloat16 else lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: Array, kernel: Array, bias: Array | None, spec: ModelSpec, out_dtype: jnp.dtype) -> Array:
    """:func:`linear` of ``x`` in the compute dtype, as it is: neither flattened nor kept by name."""
    dims, dtype = (((x.ndim - 1,), (0,)), ((), ())), spec.compute_dtype
    kernel = kernel.astype(dtype)
    y = lax.dot_general(x, kernel, dims, precision=precision(dtype), preferred_element_type=out_dtype)
    return y if bias is None else y + expand(bias.astype(y.dtype), y.ndim)


def _product_fwd(x: Array, kernel: Array, bias: Array | None, spec: ModelSpec, out_dtype: jnp.dtype) -> tuple:
    return product(x, kernel, bias, spec, out_dtype), (x, kernel, bias)


def _product_bwd(spec: ModelSpec, out_dtype: jnp.dtype, saved: tuple, g: Array) -> tuple[Array, Array, Array | None]:
    """Gradients as products in the compute dtype.

    Those of weights and biases are summed, over rows and then over devices, in the type the parameters came in:
    float32 parameters get float32 sums. JAX's own rule would round to bfloat16 before devices are summed. It
    would also make [out, in] and transpose it, for which XLA:CPU copies the cotangent into another layout, once
    a layer; contracting the rows of both gives [in, out] at once.
    """
    x, kernel, bias = saved
    dtype = spec.compute_dtype
    rows, exact = tuple(range(x.ndim - 1)), precision(dtype)
    dbias = None if bias is None else sum_rows(g, bias.dtype, spec)
    g = round_to(g, dtype)
    dx = lax.dot_general(g, kernel.astype(dtype), (((g.ndim - 1,), (1,)), ((), ())), precision=exact)
    dkernel = lax.dot_general(x, g, ((rows, rows), ((), ())), precision=exact, preferred_element_type=kernel.dtype)
    return dx, dkernel, dbias


product.defvjp(_product_fwd, _product_bwd)


def round_to(x: Array, dtype: jnp.dtype) -> Array:
    """``x.astype(dtype)``, and where devices sum ``x`` only after that.

    TPU's compiler would move a conversion before the sum. A rounding it leaves where it is (an optimization barrier
    does not help).
    """
    if x.dtype == dtype:
        return x
    kept = jnp.finfo(dtype)
    return lax.reduce_precision(x, kept.nexp, kept.nmant).astype(dtype)


def sum_rows(x: Array, dtype: jnp.dtype, spec: ModelSpec) -> Array:
    """[..., N] -> [N], summed in ``dtype``.

    A TPU adds rows up in its matrix unit, as a product with ones, in a tenth of the time its vector unit takes.
    The product is as exact: bfloat16 times one is itself. There eight rows of ones, because its compiler would turn a
    single one back into a sum. XLA:CPU sums over two axes as slowly, and multiplies as fast.
    """
    rows = tuple(range(x.ndim - 1))
    if spec.backend == "gpu" or x.dtype != spec.compute_dtype:
        return x.sum(rows, dtype=dtype)
    many = (8,) if spec.backend == "tpu" else ()
    ones = jnp.ones((*many, *x.shape[:-1]), x.dtype)
    dims = ((tuple(i + len(many) for i in rows), rows), ((), ()))
    with jax.named_scope(SUMS):
        total = lax.dot_general(ones, x, dims, precision=precision(x.dtype), preferred_element_type=dtype)
    return total[0] if many else total


def linear(x: Array, kernel: Array, bias: Array | None, spec: ModelSpec, out_dtype: jnp.dtype | None = None) -> Array:
    """``x [..., in] @ kernel [in, out] + bias [out]`` in the compute dtype of ``spec``.

    ``out_dtype`` (default: the compute dtype) asks for wider sums to be kept. The backward pass is ours; it
    equals JAX's by test.
    """
    dtype = spec.compute_dtype
    out_dtype = dtype if out_dtype is None else jnp.dtype(out_dtype)
    x = x.astype(dtype)
    if spec.backend == "cpu" and x.ndim > 2:  # XLA:CPU multiplies plain matrices fastest
        y = product(x.reshape(-1, x.shape[-1]), kernel, bias, spec, out_dtype)
        return checkpoint_name(y.reshape(*x.shape[:-1], kernel.shape[-1]), PRODUCT)
    return checkpoint_name(product(x, kernel, bias, spec, out_dtype), PRODUCT)


def expand(x: Array, ndim: int) -> Array:
    """Prepends axes of length one up to ``ndim`` (the tests forbid silent rank promotion)."""
    return lax.expand_dims(x, range(ndim - x.ndim))


def gelu(x: Array) -> Array:
    """Exact (erf) GELU, as the released weights expect; approximations shift features by 1e-3."""
    return (0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))).astype(x.dtype)


def written_down(x: Array, spec: ModelSpec) -> Array:
    """``x``, whose gradient is written to memory once before anything uses it.

    Along the residual stream every gradient is the last one and a little more. XLA:CPU, left alone, fuses that sum into
    each of its uses, and so computes it from the top again: work that grows with the square of the depth. It keeps to
    the barrier where ``training.compiler`` gives it its options.
    """
    return _written_down(x) if spec.backend == "cpu" else x


@jax.custom_vjp
def _written_down(x: Array) -> Array:
    return x


_written_down.defvjp(lambda x: (x, None), lambda _, g: (lax.optimization_barrier(g),))


def layer_norm(x: Array, scale: Array, bias: Array, eps: float, spec: ModelSpec) -> Array:
    """LayerNorm over the last axis with moments in ``stat_dtype``; returns the compute dtype."""
    x = x.astype(spec.stat_dtype)
    mean, inverse = _moments(x, eps, spec)
    y = (x - mean) * inverse * expand(scale, x.ndim) + expand(bias, x.ndim)
    return y.astype(spec.compute_dtype)


def _moments(x: Array, eps: float, spec: ModelSpec) -> tuple[Array, Array]:
    """Mean and inverse deviation over the last axis, kept for the backward pass of a rematerialized block.

    From a TPU's compiler every pass over the activations costs as much as the next, whatever it computes: there,
    both sums are taken in one. The residual stream's mean is small beside its deviation, so the difference of
    squares loses no digits that bfloat16 activations have.
    """
    mean = x.mean(-1)
    if spec.backend == "tpu" and spec.dtype == "bfloat16":
        variance = jnp.maximum(jnp.square(x).mean(-1) - jnp.square(mean), 0.0)
    else:
        variance = jnp.square(x - mean[..., None]).mean(-1)
    mean, inverse = (checkpoint_name(m, MOMENTS) for m in (mean, lax.rsqrt(variance + eps)))
    return mean[..., None], inverse[..., None]


def trunc_normal(key: Array, shape: tuple[int, ...], std: float = 0.02) -> Array:
    """Normal values cut at +-2 absolute, which is DINO's ``trunc_normal_`` (the cut is 100 sigma away)."""
    return jnp.clip(std * jax.random.normal(key, shape, jnp.float32), -2.0, 2.0)


def uniform_fan_in(key: Array, shape: tuple[int, ...], fan_in: int) -> Array:
    """PyTorch's default for convolutions and linear layers: uniform within 1 / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def with_parameters(module: type[Module], spec: ModelSpec, params: Mapping[str, Any], *arguments: Any) -> Module:
    """``module(spec, *arguments)`` with plain ``params`` in the place of its own."""
    return nnx.merge(_graph(module, spec, arguments), params)


@functools.lru_cache(maxsize=256)
def _graph(module: type[nnx.Module], spec: ModelSpec, arguments: tuple[Any, ...]) -> Any:
    """A module without its parameters; made abstractly, as nothing is computed to describe it."""
    return nnx.split(nnx.eval_shape(lambda: module(spec, *arguments, rngs=nnx.Rngs(0))))[0]


class Linear(nnx.Module):
    """``[..., features_in] -> [..., features_out]``; kernel [in, out]."""

    def __init__(self, spec: ModelSpec, features_in: int, features_out: int, *, bias: bool = True, rngs: nnx.Rngs):
        self.spec = spec
        self.kernel = nnx.Param(trunc_normal(rngs.params(), (features_in, features_out), spec.init_std))
        if bias:
            self.bias = nnx.Param(jnp.zeros((features_out,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        bias = self.bias[...] if hasattr(self, "bias") else None
        return linear(x, self.kernel[...], bias, self.spec)


class LayerNorm(nnx.Module):
    """Normalises the last axis; ``eps`` 1e-6 in the blocks and 1e-5 in the token projection."""

    def __init__(self, spec: ModelSpec, features: int, eps: float = 1e-6, *, rngs: nnx.Rngs | None = None):
        del rngs  # nothing is drawn; all modules are made alike
        self.spec, self.eps = spec, eps
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps, self.spec)
