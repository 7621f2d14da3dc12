"""Where an intermediate value lies on the mesh in context (``jax.sharding.use_abstract_mesh``); nothing without one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh


def everywhere(x: Array, dtype: jnp.dtype) -> Array:
    """``x``, whose rows may be split over the fsdp axis, whole on every device. It travels in ``dtype``.

    The gradient goes the other way, in the type of ``x``: summed over the batch's parts, rows left where they belong.
    """
    mesh = get_abstract_mesh()
    split = not mesh.empty and mesh.shape.get("fsdp", 1) > 1 and x.shape[0] % mesh.shape["fsdp"] == 0
    return _gathered(x, dtype) if split else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gathered(x: Array, dtype: jnp.dtype) -> Array:
    rows = jax.lax.with_sharding_constraint(x.astype(dtype), P("fsdp"))
    return jax.lax.with_sharding_constraint(rows, P()).astype(x.dtype)


def _gathered_fwd(x: Array, dtype: jnp.dtype) -> tuple[Array, None]:
    return _gathered(x, dtype), None


def _gathered_bwd(dtype: jnp.dtype, _: None, g: Array) -> tuple[Array]:
    return (jax.lax.with_sharding_constraint(g, P("fsdp")),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)
