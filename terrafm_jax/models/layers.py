"""Linear layers, norms, activations and their initialization: the leaves of the network.

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

# Names by which ``jax.checkpoint`` saves values. Its own policies for dot products do not see those inside a
# ``custom_vjp`` function such as ``product``.
PRODUCT, MOMENTS = "product", "moments"
SUMS = "sums"  # named scope of products that only sum up, which the network's FLOPs do not count

Module = TypeVar("Module", bound=nnx.Module)


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Full precision for float32 products (TPU and GPU default to bf16 and TF32), the default for bfloat16."""
    return None if dtype == jnp.bfloat16 else lax.Precision.HIGHEST


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def product(x: Array, kernel: Array, bias: Array | None, spec: ModelSpec, out_dtype: jnp.dtype) -> Array:
    """The bare product of :func:`linear`, for ``x`` in the compute dtype: not flattened, not saved by name."""
    dims, dtype = (((x.ndim - 1,), (0,)), ((), ())), spec.compute_dtype
    kernel = kernel.astype(dtype)
    y = lax.dot_general(x, kernel, dims, precision=precision(dtype), preferred_element_type=out_dtype)
    return y if bias is None else y + expand(bias.astype(y.dtype), y.ndim)


def _product_fwd(x: Array, kernel: Array, bias: Array | None, spec: ModelSpec, out_dtype: jnp.dtype) -> tuple:
    return product(x, kernel, bias, spec, out_dtype), (x, kernel, bias)


def _product_bwd(spec: ModelSpec, out_dtype: jnp.dtype, saved: tuple, g: Array) -> tuple[Array, Array, Array | None]:
    """Gradients as products in the compute dtype.

    Gradients of weights and biases are summed, over rows and then over devices, in the parameters' own dtype: float32
    parameters get float32 sums. JAX's own rule would round to bfloat16 before the all-reduce over devices. It would
    also compute the kernel's gradient as [out, in] and transpose it, for which XLA:CPU copies the cotangent into
    another layout in every layer; contracting the rows of both operands gives [in, out] directly.
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
    """``x.astype(dtype)`` that stays behind an all-reduce of ``x`` over devices.

    The TPU compiler moves a plain conversion before the all-reduce, which then sums in the lower precision. It does
    not move ``reduce_precision`` (an optimization barrier does not stop it).
    """
    if x.dtype == dtype:
        return x
    kept = jnp.finfo(dtype)
    return lax.reduce_precision(x, kept.nexp, kept.nmant).astype(dtype)


def sum_rows(x: Array, dtype: jnp.dtype, spec: ModelSpec) -> Array:
    """[..., N] -> [N], summed in ``dtype``.

    Computed as a product with ones: on TPU the matrix unit takes a tenth of the time that the vector unit takes to add
    rows, and XLA:CPU, too, multiplies faster than it sums over two axes. The product is as exact, as bfloat16 times
    one is itself. On TPU it takes eight rows of ones, because the compiler would turn a single row back into a sum.
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

    ``out_dtype`` is the dtype of the result (default: the compute dtype); a wider one keeps the precision of the sums.
    The backward pass is ours (:func:`_product_bwd`); it equals JAX's by test.
    """
    dtype = spec.compute_dtype
    out_dtype = dtype if out_dtype is None else jnp.dtype(out_dtype)
    x = x.astype(dtype)
    if spec.backend != "tpu" and x.ndim > 2:  # XLA:CPU multiplies plain matrices fastest; XLA:GPU copies others
        y = product(x.reshape(-1, x.shape[-1]), kernel, bias, spec, out_dtype)
        return checkpoint_name(y.reshape(*x.shape[:-1], kernel.shape[-1]), PRODUCT)
    return checkpoint_name(product(x, kernel, bias, spec, out_dtype), PRODUCT)


def expand(x: Array, ndim: int) -> Array:
    """Prepends axes of length one up to ``ndim`` (the tests forbid implicit rank promotion)."""
    return lax.expand_dims(x, range(ndim - x.ndim))


def gelu(x: Array) -> Array:
    """Exact (erf) GELU, as the released weights expect; approximations shift features by 1e-3."""
    return (0.5 * x * (1.0 + lax.erf(x * math.sqrt(0.5)))).astype(x.dtype)


def materialize_gradient(x: Array, spec: ModelSpec) -> Array:
    """``x``; on CPU, its gradient is materialized once before anything uses it.

    Along the residual stream, each gradient is the previous one plus one term. Left alone, XLA:CPU fuses that sum into
    each of its uses and so recomputes it from the last layer on: work that grows with the square of the depth. The
    barrier prevents this only under the options of ``training.compiler``, which let it survive until fusion.
    """
    return _with_gradient_barrier(x) if spec.backend == "cpu" else x


@jax.custom_vjp
def _with_gradient_barrier(x: Array) -> Array:
    return x


_with_gradient_barrier.defvjp(lambda x: (x, None), lambda _, g: (lax.optimization_barrier(g),))


def layer_norm(x: Array, scale: Array, bias: Array, eps: float, spec: ModelSpec) -> Array:
    """LayerNorm over the last axis with moments in ``stat_dtype``; returns the compute dtype."""
    if spec.backend == "gpu":
        return _norm_in_passes(x, scale, bias, eps, spec)
    x = x.astype(spec.stat_dtype)
    return _affine(x, scale, bias, *_moments(x, eps, spec), spec)


def _affine(x: Array, scale: Array, bias: Array, mean: Array, inverse: Array, spec: ModelSpec) -> Array:
    y = (x - mean) * inverse * expand(scale, x.ndim) + expand(bias, x.ndim)
    return y.astype(spec.compute_dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _norm_in_passes(x: Array, scale: Array, bias: Array, eps: float, spec: ModelSpec) -> Array:
    """:func:`layer_norm` such that XLA:GPU passes over the activations as rarely as it can.

    Left alone, it computes the mean again wherever it is used. The gradients of scale and bias then need an array of
    products in float32, as large as the activations, to be written and read again.
    """
    return _norm_in_passes_fwd(x, scale, bias, eps, spec)[0]


def _norm_in_passes_fwd(x: Array, scale: Array, bias: Array, eps: float, spec: ModelSpec) -> tuple:
    wide = x.astype(spec.stat_dtype)
    moments = lax.optimization_barrier(_moments(wide, eps, spec))
    return _affine(wide, scale, bias, *moments, spec), (x, scale, bias, *moments)


def _norm_in_passes_bwd(eps: float, spec: ModelSpec, saved: tuple, g: Array) -> tuple[Array, Array, Array]:
    x, scale, bias, mean, inverse = saved
    rows, g = tuple(range(x.ndim - 1)), g.astype(spec.stat_dtype)
    normed = (x.astype(spec.stat_dtype) - mean) * inverse
    dscale, dbias = (g * normed).sum(rows), g.sum(rows)
    g = g * expand(scale, x.ndim)
    dx = inverse * (g - g.mean(-1, keepdims=True) - normed * (g * normed).mean(-1, keepdims=True))
    return dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)


_norm_in_passes.defvjp(_norm_in_passes_fwd, _norm_in_passes_bwd)


def _moments(x: Array, eps: float, spec: ModelSpec) -> tuple[Array, Array]:
    """Mean and inverse standard deviation over the last axis, named so that a rematerialized block can save them.

    On TPU and GPU a pass over the activations costs the same whatever it computes, so both sums are taken in one
    pass. The mean of the residual stream is small beside its deviation, so E[x^2] - E[x]^2 loses no digits that
    bfloat16 activations have.
    """
    mean = x.mean(-1)
    if spec.backend != "cpu" and spec.dtype == "bfloat16":
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
    """``module(spec, *arguments)`` with the nested dict ``params`` as its parameters."""
    return nnx.merge(_graph(module, spec, arguments), params)


@functools.lru_cache(maxsize=256)
def _graph(module: type[nnx.Module], spec: ModelSpec, arguments: tuple[Any, ...]) -> Any:
    """The graph definition of a module, without its parameters; built abstractly, so nothing is computed."""
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
    """Normalizes the last axis; ``eps`` 1e-6 in the blocks and 1e-5 in the token projection."""

    def __init__(self, spec: ModelSpec, features: int, eps: float = 1e-6, *, rngs: nnx.Rngs | None = None):
        del rngs  # unused, but ``_graph`` passes it to every module
        self.spec, self.eps = spec, eps
        self.scale = nnx.Param(jnp.ones((features,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((features,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps, self.spec)
