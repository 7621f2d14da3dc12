"""Where weights lie while they are used, on the mesh in context (``jax.sharding.use_abstract_mesh``) if there is one.

Most weights are gathered over the fsdp axis before use (``training.sharding.gather_params``). Some are better worked
on where they lie, each device on its part, and only the result is gathered.
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

ROWS, COLUMNS, WHOLE = P("fsdp"), P(None, "fsdp"), P()


def gather_rows(x: Array, spec: ModelSpec) -> Array:
    """[N, ...] whose rows may be split over the fsdp axis, whole on every device. It travels in the compute dtype.

    The gradient goes the other way, in the type of ``x``: summed over the batch's parts, and left where ``x`` lies.
    """
    return _gather(x, spec, ROWS, WHOLE, summed=ROWS)


def gather_columns(x: Array, spec: ModelSpec) -> Array:
    """As :func:`gather_rows`, for [N, K] whose columns are split over tensor and fsdp and stay split over tensor.

    ``spec.sum_whole`` says in which order the gradient is summed. Rows know no such choice: they are gathered for
    products of weights, whose gradients have been summed before.
    """
    split, used = P(None, ("tensor", "fsdp")), P(None, "tensor")
    return _gather(x, spec, split, used, summed=used if spec.sum_whole else split)


def whole(x: Array) -> Array:
    """Says that ``x`` is whole on every device, which the compiler might not see. So is its gradient."""
    return _placed(x, WHOLE)


def _placed(x: Array, at: P) -> Array:
    return jax.lax.with_sharding_constraint(x, at) if _weights_are_split() else x


def _weights_are_split() -> bool:
    """Whether there is a mesh in context whose fsdp axis splits weights."""
    shape = dict(get_abstract_mesh().shape)
    return shape.get("fsdp", 1) > 1 and "tensor" in shape


def _gather(x: Array, spec: ModelSpec, stored: P, used: P, summed: P) -> Array:
    return moved(x, stored, used, summed, spec.compute_dtype) if _weights_are_split() else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def moved(x: Array, stored: P, used: P, summed: P, dtype: jnp.dtype | None) -> Array:
    """A weight that lies as ``stored``, brought to where it is ``used``, if given in ``dtype``.

    The gradient goes the other way, in the type of ``x``: summed over the batch's parts so as to lie as ``summed``, and
    then as ``stored``.
    """
    constrain = jax.lax.with_sharding_constraint
    if dtype is None:
        return constrain(x, used)
    gathered = constrain(constrain(x.astype(dtype), stored), used)
    # Said again behind a barrier, or the compiler splits it once more, gathers a second time for the backward pass, and
    # on TPU lets the sums of gradients wait for that.
    return constrain(jax.lax.optimization_barrier(gathered), used).astype(x.dtype)


def _moved_fwd(x: Array, stored: P, used: P, summed: P, dtype: jnp.dtype | None) -> tuple[Array, None]:
    return moved(x, stored, used, summed, dtype), None


def _moved_bwd(stored: P, used: P, summed: P, _dtype: jnp.dtype | None, _: None, g: Array) -> tuple[Array]:
    constrain = jax.lax.with_sharding_constraint
    return (constrain(constrain(g, summed), stored),)


moved.defvjp(_moved_fwd, _moved_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def weight_product(a: Array, b: Array, spec: ModelSpec) -> Array:
    """Product of two weights, [K, N] whose rows may be split over the fsdp axis and [N, M] whole on every device.

    Each device multiplies its rows; the product [K, M], float32 and whole, travels in the compute dtype. Its gradient
    is summed over the batch's parts once, and nothing after that: for the gradient of ``b`` the devices hold columns
    of ``a`` as well. JAX's own rule would multiply rows and sum over the devices, with no work left to hide that.
    """
    return gather_rows(_dot(a, _cast_whole(b, spec), (1, 0), spec), spec)


def _weight_product_fwd(a: Array, b: Array, spec: ModelSpec) -> tuple:
    rows = _placed(a.astype(spec.compute_dtype), ROWS)
    columns = lax.optimization_barrier(_placed(rows, COLUMNS)) if _weights_are_split() else rows
    return weight_product(rows, b, spec), (columns, b, a)


def _weight_product_bwd(spec: ModelSpec, saved: tuple, g: Array) -> tuple[Array, Array]:
    columns, b, a = saved
    g = _cast_whole(round_to(whole(g), spec.compute_dtype), spec)
    da = _placed(_dot(_placed(g, ROWS), _cast_whole(b, spec), (1, 1), spec), ROWS)
    db = _placed(_dot(columns, g, (0, 0), spec), ROWS)
    return da.astype(a.dtype), db.astype(b.dtype)


weight_product.defvjp(_weight_product_fwd, _weight_product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def row_product(row: Array, b: Array, spec: ModelSpec) -> Array:
    """One row [N] times a weight [N, M], both whole on every device -> [M], float32 and whole, as its gradient.

    Too small to be worth splitting, which the compiler would do for the sake of the gradient of ``b``.
    """
    return whole(_dot(_cast_whole(row, spec)[None], _cast_whole(b, spec), (1, 0), spec))[0]


def _row_product_fwd(row: Array, b: Array, spec: ModelSpec) -> tuple:
    return row_product(row, b, spec), (row, b)


def _row_product_bwd(spec: ModelSpec, saved: tuple, g: Array) -> tuple[Array, Array]:
    row, b = saved
    g = _cast_whole(round_to(whole(g), spec.compute_dtype), spec)[None]
    drow = whole(_dot(g, _cast_whole(b, spec), (1, 1), spec))[0]
    db = _placed(_dot(_placed(_cast_whole(row, spec)[None], COLUMNS), g, (0, 0), spec), ROWS)
    return drow.astype(row.dtype), db.astype(b.dtype)


row_product.defvjp(_row_product_fwd, _row_product_bwd)


def _cast_whole(x: Array, spec: ModelSpec) -> Array:
    """In the compute dtype, and whole on every device."""
    return whole(x.astype(spec.compute_dtype))


def _dot(a: Array, b: Array, over: tuple[int, int], spec: ModelSpec) -> Array:
    """Product of matrices over one axis of each, in the compute dtype with float32 sums."""
    dtype, dims = spec.compute_dtype, (((over[0],), (over[1],)), ((), ()))
    a, b = a.astype(dtype), b.astype(dtype)
    return lax.dot_general(a, b, dims, precision=precision(dtype), preferred_element_type=spec.stat_dtype)
