"""Where weights lie while they are used, on the mesh in context (``jax.sharding.use_abstract_mesh``) if there is one.

Most weights are gathered over the fsdp axis before use (``training.sharding.gather_params``). Some are better worked
on where they lie, each device on its part, and only the result is gathered.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh


def gather_rows(x: Array, dtype: jnp.dtype) -> Array:
    """[N, ...] whose rows may be split over the fsdp axis, whole on every device. It travels in ``dtype``.

    The gradient goes the other way, in the type of ``x``: summed over the batch's parts, and left where ``x`` lies.
    """
    return _gather(x, dtype, P("fsdp"), P())


def gather_columns(x: Array, dtype: jnp.dtype) -> Array:
    """As :func:`gather_rows`, for [N, K] whose columns are split over tensor and fsdp and stay split over tensor."""
    return _gather(x, dtype, P(None, ("tensor", "fsdp")), P(None, "tensor"))


def _gather(x: Array, dtype: jnp.dtype, split: P, whole: P) -> Array:
    shape = dict(get_abstract_mesh().shape)
    return _moved(x, jnp.dtype(dtype), split, whole) if shape.get("fsdp", 1) > 1 and "tensor" in shape else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _moved(x: Array, dtype: jnp.dtype, split: P, whole: P) -> Array:
    constrain = jax.lax.with_sharding_constraint
    gathered = constrain(constrain(x.astype(dtype), split), whole)
    # Said again behind a barrier, or the compiler splits it once more, gathers a second time for the backward pass, and
    # on TPU lets the sums of gradients wait for that.
    return constrain(jax.lax.optimization_barrier(gathered), whole).astype(x.dtype)


def _moved_fwd(x: Array, dtype: jnp.dtype, split: P, whole: P) -> tuple[Array, None]:
    return _moved(x, dtype, split, whole), None


def _moved_bwd(dtype: jnp.dtype, split: P, whole: P, _: None, g: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(g, split),)


_moved.defvjp(_moved_fwd, _moved_bwd)
