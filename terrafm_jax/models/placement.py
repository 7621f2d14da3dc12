"""Sharding of weights while they are used, on the mesh in context (``jax.sharding.use_abstract_mesh``) if there is one.

Most weights are all-gathered over the fsdp axis before use (``training.sharding.gather_params``). For some it is
cheaper that each device computes on its shard and only the result is gathered: those are handled here.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh

from terrafm_jax.models.layers import precision, round_to
from terrafm_jax.models.spec import ModelSpec

ROWS, COLUMNS, REPLICATED = P("fsdp"), P(None, "fsdp"), P()


def gather_rows(x: Array, spec: ModelSpec) -> Array:
    """All-gathers [N, ...], whose rows may be sharded over fsdp, onto every device, in the compute dtype.

    The gradient, in the dtype of ``x``, is summed over the batch shards and left sharded as ``x`` is.
    """
    return _gather(x, spec, ROWS, REPLICATED, summed=ROWS)


def gather_columns(x: Array, spec: ModelSpec) -> Array:
    """As :func:`gather_rows`, for [N, K] whose columns are sharded over tensor and fsdp and stay sharded over tensor.

    ``spec.sum_whole`` says how the gradient is reduced. :func:`gather_rows` needs no such choice: its results enter
    products of weights, whose gradients arrive already summed.
    """
    split, used = P(None, ("tensor", "fsdp")), P(None, "tensor")
    return _gather(x, spec, split, used, summed=used if spec.sum_whole else split)


def replicated(x: Array) -> Array:
    """Constrains ``x`` and its gradient to be replicated, which the compiler might not choose by itself."""
    return _constrained(x, REPLICATED)


def _constrained(x: Array, to: P) -> Array:
    return jax.lax.with_sharding_constraint(x, to) if _weights_are_sharded() else x


def _weights_are_sharded() -> bool:
    """Whether there is a mesh in context whose fsdp axis shards weights."""
    shape = dict(get_abstract_mesh().shape)
    return shape.get("fsdp", 1) > 1 and "tensor" in shape


def _gather(x: Array, spec: ModelSpec, stored: P, used: P, summed: P) -> Array:
    return resharded(x, stored, used, summed, spec.compute_dtype) if _weights_are_sharded() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def resharded(x: Array, stored: P, used: P, summed: P, dtype: jnp.dtype | None) -> Array:
    """A weight resharded from how it is ``stored`` to how it is ``used``; it travels in ``dtype`` if one is given.

    The gradient, in the dtype of ``x``, is summed over the batch shards into the sharding ``summed``, then resharded to
    ``stored``.
    """
    constrain = jax.lax.with_sharding_constraint
    if dtype is None:
        return constrain(x, used)
    gathered = constrain(constrain(x.astype(dtype), stored), used)
    # Constrained again behind a barrier: else the compiler shards the result once more and gathers it a second time for
    # the backward pass, for which the all-reduces of gradients then wait on TPU.
    return constrain(jax.lax.optimization_barrier(gathered), used).astype(x.dtype)


def _resharded_fwd(x: Array, stored: P, used: P, summed: P, dtype: jnp.dtype | None) -> tuple[Array, None]:
    return resharded(x, stored, used, summed, dtype), None


def _resharded_bwd(stored: P, used: P, summed: P, _dtype: jnp.dtype | None, _: None, g: Array) -> tuple[Array]:
    constrain = jax.lax.with_sharding_constraint
    return (constrain(constrain(g, summed), stored),)


resharded.defvjp(_resharded_fwd, _resharded_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def weight_product(a: Array, b: Array, spec: ModelSpec) -> Array:
    """Product of two weights: [K, N], its rows possibly sharded over fsdp, and [N, M] replicated -> [K, M] replicated.

    Each device multiplies its rows; the float32 product is gathered in the compute dtype. In the backward pass only the
    product's gradient is summed over the batch shards: devices save columns of ``a`` as well, so each computes its rows
    of the gradient of ``b`` alone. JAX's own rule would contract over the rows of ``a`` and all-reduce the result over
    the devices, at the end of the backward pass, where no compute is left to hide that.
    """
    return gather_rows(_dot(a, _cast_replicated(b, spec), (1, 0), spec), spec)


def _weight_product_fwd(a: Array, b: Array, spec: ModelSpec) -> tuple:
    rows = _constrained(a.astype(spec.compute_dtype), ROWS)
    columns = lax.optimization_barrier(_constrained(rows, COLUMNS)) if _weights_are_sharded() else rows
    return weight_product(rows, b, spec), (columns, b, a)


def _weight_product_bwd(spec: ModelSpec, saved: tuple, g: Array) -> tuple[Array, Array]:
    columns, b, a = saved
    g = _cast_replicated(round_to(replicated(g), spec.compute_dtype), spec)
    da = _constrained(_dot(_constrained(g, ROWS), _cast_replicated(b, spec), (1, 1), spec), ROWS)
    db = _constrained(_dot(columns, g, (0, 0), spec), ROWS)
    return da.astype(a.dtype), db.astype(b.dtype)


weight_product.defvjp(_weight_product_fwd, _weight_product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def row_product(row: Array, b: Array, spec: ModelSpec) -> Array:
    """A row [N] times a weight [N, M], both replicated -> [M] in float32; the result and its gradient are replicated.

    Too small to be worth sharding, which the compiler would do for the sake of the gradient of ``b``.
    """
    return replicated(_dot(_cast_replicated(row, spec)[None], _cast_replicated(b, spec), (1, 0), spec))[0]


def _row_product_fwd(row: Array, b: Array, spec: ModelSpec) -> tuple:
    return row_product(row, b, spec), (row, b)


def _row_product_bwd(spec: ModelSpec, saved: tuple, g: Array) -> tuple[Array, Array]:
    row, b = saved
    g = _cast_replicated(round_to(replicated(g), spec.compute_dtype), spec)[None]
    drow = replicated(_dot(g, _cast_replicated(b, spec), (1, 1), spec))[0]
    db = _constrained(_dot(_constrained(_cast_replicated(row, spec)[None], COLUMNS), g, (0, 0), spec), ROWS)
    return drow.astype(row.dtype), db.astype(b.dtype)


row_product.defvjp(_row_product_fwd, _row_product_bwd)


def _cast_replicated(x: Array, spec: ModelSpec) -> Array:
    return replicated(x.astype(spec.compute_dtype))


def _dot(a: Array, b: Array, over: tuple[int, int], spec: ModelSpec) -> Array:
    """Product of two matrices, contracting axis ``over[0]`` of ``a`` with ``over[1]`` of ``b``; float32 sums."""
    dtype, dims = spec.compute_dtype, (((over[0],), (over[1],)), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, dims, precision=precision(dtype), preferred_element_type=spec.stat_dtype)
