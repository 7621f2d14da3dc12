"""The gradient of a mean over the batch, on one TPU slice or several.

The compiler all-reduces gradients over the devices that share a batch, in an order of its own. On several slices it
reduces group by group, which is slow (docs/scaling.md). Here each slice first reduces its own gradients over all its
chips at once, and only then shards of the sums cross the slow network between slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jax.sharding import get_abstract_mesh

from terrafm_jax.training.sharding import axes_of, leaf_specs


def value_and_grad(
    loss: Callable[..., jax.Array], params: Any, arguments: Sequence[Any], batch_axes: Sequence[int]
) -> tuple[jax.Array, Any]:
    """``loss(params, *arguments)``, a mean over the batch, and its gradient with respect to ``params``.

    Args:
      arguments: trees of arrays; axis ``batch_axes[i]`` of each leaf of ``arguments[i]`` is the batch.
    """
    mesh = get_abstract_mesh()
    if "slice" not in mesh.axis_names:
        return jax.value_and_grad(loss)(params, *arguments)

    def of_slice(params: Any, *arguments: Any) -> tuple[jax.Array, Any]:
        value, grads = jax.value_and_grad(loss)(params, *arguments)
        leaves, tree = jax.tree.flatten(grads)
        summed = [_mean_over_slices(g, spec) for g, spec in zip(leaves, leaf_specs(params), strict=True)]
        return jax.lax.pmean(value, "slice"), tree.unflatten(summed)

    batch = tuple(P(*(None,) * axis, "slice") for axis in batch_axes)
    mapped = jax.shard_map(
        of_slice, mesh=mesh, in_specs=(P(), *batch), out_specs=P(), axis_names={"slice"}, check_vma=False
    )
    return mapped(params, *arguments)


def _mean_over_slices(grad: jax.Array, spec: P) -> jax.Array:
    """The mean of a gradient over the slices; a sharded one is spread over all chips of a slice for the exchange."""
    finest = _spread(grad.shape, spec)
    if finest is None:
        return jax.lax.pmean(grad, "slice")
    constrain = jax.lax.with_sharding_constraint
    return constrain(jax.lax.pmean(constrain(constrain(grad, spec), finest), "slice"), spec)


def _spread(shape: Sequence[int], spec: P) -> P | None:
    """``spec`` with the axis ``data`` added to the first dimension it divides, if any; None for what is replicated."""
    sizes = get_abstract_mesh().shape
    names = [axes_of(spec[i]) if i < len(spec) else () for i in range(len(shape))]
    if not any(names):
        return None
    for i, (size, held) in enumerate(zip(shape, names, strict=True)):
        if size % math.prod(sizes[name] for name in (*held, "data")) == 0:
            return P(*(*names[:i], (*held, "data"), *names[i + 1 :]))
    return spec
