"""Device mesh, and how every array is sharded over it.

The mesh has three axes. ``data`` and ``fsdp`` shard the batch; ``fsdp`` also shards parameters, teacher
and optimizer state; ``tensor`` shards the MLPs and the prototypes. On several TPU slices there is a fourth
before them, ``slice``, the outer part of ``data``. Axes are Auto: the program is written for global arrays and
the compiler inserts the communication, so the same code runs on any mesh.

Rules are ordered (regular expression, PartitionSpec) pairs; the first full match of a parameter's path decides,
and a parameter without a rule is an error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, get_abstract_mesh
from jax.sharding import PartitionSpec as P

from terrafm_jax.models.placement import resharded
from terrafm_jax.models.spec import BATCH_AXES
from terrafm_jax.training.optim import Optimizer, match, paths

AXES = ("data", "fsdp", "tensor")
SPLIT = 16  # most chips that share one state by default: over 16 of them, the update takes a hundredth of a step

# Kernels are [in, out] and sharded over fsdp by rows, as gathered columns would have to be reordered. Vectors and small
# embeddings are replicated: sharding costs a collective for each and saves less than a thousandth of the memory.
RULES: tuple[tuple[str, P], ...] = (
    (r".*/mlp/fc1/kernel", P("fsdp", "tensor")),
    (r".*/mlp/fc2/kernel", P(("tensor", "fsdp"))),
    (r"head/mlp/0/kernel", P("fsdp", "tensor")),
    (r"head/mlp/1/kernel", P(("tensor", "fsdp"))),
    (r"head/last_layer/kernel", P(None, ("tensor", "fsdp"))),
    (r".*/mlp/fc1/bias|head/mlp/0/bias", P("tensor")),
    (r".*/kernel", P("fsdp", None)),
    (r".*/(bias|scale|pool|queries|cls_token|pos_embed|[a-z0-9_]+_embed)", P()),
)


class ShardingError(ValueError):
    """The mesh does not fit the devices, the parameters or the batch."""


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
    slices: int | None = None,
) -> Mesh:
    """Mesh ("data", "fsdp", "tensor") over all devices; one size may be -1 and takes what is left.

    ``fsdp = 0`` is a default: on TPU up to SPLIT chips of a slice share the state, so that each updates its shard;
    elsewhere the state is replicated.

    On several TPU slices the data axis is hybrid: its outer part, an axis of its own named "slice", runs over the
    slices (slow network), its inner part and the other axes stay within one. ``slices`` divides devices without a
    ``slice_index`` into this many slices, in the order given; by default the devices' own index counts.

    Raises:
      ShardingError: the sizes do not multiply to the number of devices, or the slices do not divide ``data``.
    """
    devices = list(jax.devices() if devices is None else devices)
    slices = slices or len({getattr(d, "slice_index", 0) for d in devices})
    if fsdp == 0:
        share = len(devices) // (max(tensor, 1) * (slices if data == -1 else max(data, 1)))
        fsdp = math.gcd(share, SPLIT) if devices[0].platform == "tpu" else 1
    shape = _fill([data, fsdp, tensor], len(devices))
    if shape[0] % slices:
        raise ShardingError(
            f"mesh: data = {shape[0]} must be a multiple of the {slices} slices; fsdp and tensor "
            f"({shape[1]}, {shape[2]}) stay within one"
        )
    from jax.experimental import mesh_utils

    # In many slices (v6e:8x8, v5p:8x8x8) no physical axes have 16 chips together, so two mesh axes share one of them.
    inside, split = (shape[0] // slices, *shape[1:]), {"allow_split_physical_axes": True}
    if slices == 1:
        grid, names = mesh_utils.create_device_mesh(inside, devices, **split), AXES
    else:
        known = len({getattr(d, "slice_index", 0) for d in devices}) > 1
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, **split) if known else devices
        grid, names = np.reshape(grid, (slices, *inside)), ("slice", *AXES)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _fill(sizes: list[int], devices: int) -> tuple[int, int, int]:
    """Replaces a -1 by the size that makes the product the number of devices. Raises ShardingError."""
    named = dict(zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(s < 1 and s != -1 for s in sizes):
        raise ShardingError(f"mesh: found {named}, expected sizes >= 1 and at most one -1")
    known = math.prod(s for s in sizes if s != -1)
    full = tuple(devices // known if s == -1 else s for s in sizes)
    if math.prod(full) != devices:
        product = " x ".join(f"{k}={v}" for k, v in named.items())
        raise ShardingError(f"mesh: {product} does not fit {devices} devices")
    return full


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of everything with a leading batch axis."""
    return NamedSharding(mesh, P(tuple(name for name in BATCH_AXES if name in mesh.axis_names)))


def batch_shards(mesh: Mesh) -> int:
    """Number of shards of the batch."""
    return math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int = 1) -> None:
    """Raises ShardingError unless the global batch divides over the mesh, the microbatches and the processes."""
    shards = batch_shards(mesh)
    if microbatches < 1 or batch_size % (shards * microbatches):
        raise ShardingError(
            f"batch_size = {batch_size} is not a multiple of data x fsdp x microbatches = "
            f"{shards // mesh.shape['fsdp']} x {mesh.shape['fsdp']} x {microbatches} = {shards * microbatches}"
        )
    held = [tuple(local_rows(mesh, batch_size, p)) for p in sorted({d.process_index for d in mesh.devices.flat})]
    rows = [row for mine in set(held) for row in mine]
    if len(rows) != len(set(rows)):
        raise ShardingError(
            f"mesh {dict(mesh.shape)}: processes share some rows of the batch and not others; "
            "choose mesh.tensor so that it stays within a process, or takes whole ones"
        )


def local_rows(mesh: Mesh, batch_size: int, process: int) -> np.ndarray:
    """The rows of the global batch that the devices of a process hold, ascending.

    They need not be contiguous: on a TPU pod the mesh follows the torus, not the hosts. Processes among which
    ``tensor`` splits the parameters hold the same rows.
    """
    shards = batch_shards(mesh)
    owners = np.vectorize(lambda d: d.process_index)(mesh.devices).reshape(shards, -1)
    mine = np.flatnonzero((owners == process).any(axis=1))
    size = batch_size // shards
    return (mine[:, None] * size + np.arange(size)).reshape(-1)


def param_specs(params: Any, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """Tree of PartitionSpecs. Raises RuleError naming every parameter that no rule covers."""
    return match(rules, params, kind="sharding")


def param_shardings(mesh: Mesh, params: Any, rules: Sequence[tuple[str, P]] = RULES) -> Any:
    """Tree of NamedShardings for parameters (arrays or ShapeDtypeStructs).

    Raises:
      RuleError: a parameter without a rule.
      ShardingError: dimensions that their axes do not divide, all named with the numbers.
    """
    specs = param_specs(params, rules)
    faults = []
    for path, leaf, spec in zip(paths(params), jax.tree.leaves(params), _leaves(specs), strict=True):
        faults += _indivisible(mesh, path, leaf.shape, spec)
    if faults:
        raise ShardingError("mesh does not divide the parameters: " + "; ".join(faults))
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs, is_leaf=lambda x: isinstance(x, P))


def leaf_specs(params: Any) -> list[P]:
    """The PartitionSpecs of the leaves of ``params``, in their order."""
    return _leaves(param_specs(params))


def _leaves(specs: Any) -> list[P]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))


def axes_of(names: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that one entry of a PartitionSpec names."""
    return (names,) if isinstance(names, str) else tuple(names or ())


def _indivisible(mesh: Mesh, path: str, shape: tuple[int, ...], spec: P) -> list[str]:
    if len(spec) > len(shape):
        return [f"{path} has shape {shape}, its rule {spec} has more axes"]
    faults = []
    for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
        parts = math.prod(mesh.shape[n] for n in axes_of(names))
        if size % parts:
            faults.append(f"{path} axis {axis} is {size}, not a multiple of {names} = {parts}")
    return faults


def replicated_over_fsdp(spec: P) -> P:
    """The spec without the fsdp axis: how a parameter is sharded while the networks use it."""

    def strip(names: Any) -> Any:
        kept = tuple(n for n in axes_of(names) if n != "fsdp")
        return kept[0] if len(kept) == 1 else kept or None

    return P(*(strip(names) for names in spec))


# Not gathered before use: the networks compute on shards of these and gather the results (``models.placement``).
# EMBEDDING only if folded.
PROTOTYPES = r"head/last_layer/kernel"
EMBEDDING = r"backbone/patch_embed/(conv2d_.*|fusion/key|projection/.*)/kernel"


def sums_whole(mesh: Mesh) -> bool:
    """Whether gradients of fsdp-sharded weights are all-reduced over all devices first (``ModelSpec.sum_whole``).

    The alternative is to reduce-scatter within each fsdp group. On a TPU slice the all-reduce uses both axes of the
    torus at once and overlaps with compute, while the compiler makes reductions within a group synchronous. Between
    hosts with GPUs the network is slow, and only shards of a gradient should cross it; between slices
    ``gradients.value_and_grad`` takes care of that.
    """
    return mesh.shape["data"] > 1 and mesh.devices.flat[0].platform == "tpu"


def gather_params(params: Any, kernel_dtype: Any = None, *, in_place: str = PROTOTYPES, sum_whole: bool = False) -> Any:
    """Parameters as the networks use them on the mesh in context: gathered over fsdp, still sharded over tensor.

    Their gradients are summed over the batch shards and left sharded as the parameters are. Without this the
    compiler is free to move activations instead of weights, and does. Kernels and their gradients travel in
    ``kernel_dtype``, by default in their own dtype, float32. Parameters whose path matches the regular expression
    ``in_place`` stay sharded. ``sum_whole``: see :func:`sums_whole`.
    """
    if kernel_dtype is not None:
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(kernel_dtype) if path[-1].key == "kernel" else x, params
        )
    if get_abstract_mesh().shape.get("fsdp", 1) == 1:
        return params

    def gather(path: str, x: jax.Array, spec: P) -> jax.Array:
        if re.fullmatch(in_place, path):
            return x
        used = replicated_over_fsdp(spec)
        # Kernels of the embedding enter products of weights: their gradients arrive summed and sharded, or are small.
        whole = sum_whole and not path.startswith("backbone/patch_embed/")
        return x if spec == used else resharded(x, spec, used, used if whole else spec, None)

    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(map(gather, paths(params), leaves, leaf_specs(params)))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings for a TrainState (arrays or ShapeDtypeStructs): teacher and moments are sharded as the parameters."""
    params = param_shardings(mesh, state.params)
    everywhere = NamedSharding(mesh, P())
    prototypes = NamedSharding(mesh, P("tensor"))
    return state.replace(
        step=everywhere,
        params=params,
        teacher=params,
        opt_state=type(state.opt_state)(*(params for _ in state.opt_state)),
        centers=jax.tree.map(lambda _: prototypes, state.centers),
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays or ShapeDtypeStructs with shardings."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def make_batch(mesh: Mesh, local: Mapping[str, Any], batch_size: int | None = None) -> Any:
    """Global, sharded arrays from this process's rows of a batch (:func:`local_rows`; NumPy leaves, rows first).

    ``batch_size`` is the global one; None where this process holds the whole batch.
    """
    batch_size = batch_size or len(jax.tree.leaves(local)[0])
    sharding, rows = batch_sharding(mesh), local_rows(mesh, batch_size, jax.process_index())

    def place(x: np.ndarray) -> jax.Array:
        def of_device(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(batch_size)
            first = np.searchsorted(rows, start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((batch_size, *x.shape[1:]), sharding, of_device)

    return jax.tree.map(lambda x: place(np.asarray(x)), local)


def describe_parameters(mesh: Mesh, params: Any, optimizer: Optimizer) -> str:
    """Table of the parameters (arrays or ShapeDtypeStructs): path, shape, sharding, the optimizer's rule; totals."""
    rules = jax.tree.leaves(optimizer.rules)
    rows = [("parameter", "shape", "sharding", "decay", "lr", "frozen steps")]
    specs = leaf_specs(params)
    for path, leaf, spec, rule in zip(paths(params), jax.tree.leaves(params), specs, rules, strict=True):
        shape = " x ".join(map(str, leaf.shape))
        sharding = ", ".join(str(s) if s else "-" for s in spec) or "replicated"
        rows.append((path, shape, sharding, "yes" if rule.decay else "no", f"{rule.lr:g}", str(rule.frozen_steps)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    split = " x ".join(f"{k}={v}" for k, v in mesh.shape.items())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:], f"{total:,} parameters, mesh {split}"])
