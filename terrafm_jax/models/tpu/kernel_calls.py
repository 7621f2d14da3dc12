"""How Pallas kernels for TPU are called: on every device's part of the batch, compiled there and interpreted elsewhere.

Where arrays are spread over devices, the mesh must be in context (``jax.sharding.use_abstract_mesh``), as in the train
step: the partitioner cannot look into a kernel.
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
    """Whether "auto" may take kernels: on TPU, with the mesh in context."""
    return spec.backend == "tpu" and not get_abstract_mesh().empty


def over_batch(call: Callable[..., Any], arrays: Sequence[Array], everywhere: Sequence[Array] = ()) -> Any:
    """``call(*arrays, *everywhere)`` on every device: of ``arrays`` it sees its part of the leading axis.

    Results are put together along their leading axis.
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
    """``build(interpret=False)(*arrays)`` on TPU, ``build(interpret=True)(*arrays)`` elsewhere: the same, slowly."""
    there, elsewhere = (functools.partial(_built, build, interpret) for interpret in (False, True))
    return lax.platform_dependent(*arrays, tpu=there, default=elsewhere)


def _built(build: Callable[..., Callable[..., Any]], interpret: bool, *arrays: Array) -> Any:
    return build(interpret=interpret)(*arrays)
