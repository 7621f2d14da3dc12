"""How Pallas kernels for TPU are called: per device on its shard of the batch; compiled on TPU, interpreted elsewhere.

The partitioner cannot see inside a kernel, so kernels are mapped over the devices by hand. Where arrays are sharded,
this needs the mesh in context (``jax.sharding.use_abstract_mesh``), as the train step sets it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh

from terrafm_jax.models.spec import BATCH_AXES, ModelSpec


def wanted(spec: ModelSpec) -> bool:
    """Whether "auto" may choose kernels: on TPU, with a mesh in context."""
    return spec.backend == "tpu" and not get_abstract_mesh().empty


def over_batch(call: Callable[..., Any], arrays: Sequence[Array], everywhere: Sequence[Array] = ()) -> Any:
    """``call(*arrays, *everywhere)`` on every device, with its shard of ``arrays`` and all of ``everywhere``.

    Arrays and results are sharded along the leading axis.
    """
    mesh = get_abstract_mesh()
    free = set(mesh.axis_names) - set(mesh.manual_axes)  # the step may already be mapped over slices
    axes = tuple(name for name in BATCH_AXES if name in free)
    if mesh.size == 1 or not axes:
        return call(*arrays, *everywhere)
    specs = (P(axes),) * len(arrays) + (P(),) * len(everywhere)
    mapped = jax.shard_map(call, mesh=mesh, in_specs=specs, out_specs=P(axes), axis_names=free, check_vma=False)
    return mapped(*arrays, *everywhere)


def run(build: Callable[..., Callable[..., Any]], *arrays: Array) -> Any:
    """``build(interpret=False)(*arrays)`` on TPU; elsewhere the kernel interpreted: the same result, slowly."""
    there, elsewhere = (functools.partial(_built, build, interpret) for interpret in (False, True))
    return lax.platform_dependent(*arrays, tpu=there, default=elsewhere)


def _built(build: Callable[..., Callable[..., Any]], interpret: bool, *arrays: Array) -> Any:
    return build(interpret=interpret)(*arrays)
