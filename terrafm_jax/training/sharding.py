"""Device mesh and sharding: which part of every array lives where.

The mesh has three axes. ``data`` and ``fsdp`` split the batch; ``fsdp`` also splits parameters, teacher
and optimizer state; ``tensor`` splits the MLPs and the prototypes. On several TPU slices there is a fourth
before them, ``slice``, the outer part of ``data``. Axes are Auto: the program is written for global arrays and
the compiler inserts the communication, so the same code runs on any mesh.

Rules are ordered (regular expression, PartitionSpec); the first full match of a parameter's path decides,
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

from terrafm_jax.models.placement import moved
from terrafm_jax.models.spec import BATCH_AXES
from terrafm_jax.training.optim import Optimizer, match, paths

AXES = ("data", "fsdp", "tensor")
SPLIT = 16  # chips that share one state by default: an update over 16 of them is a hundredth of a step

# Kernels are [in, out] and gathered over fsdp by rows, as gathered columns would have to be put in order. Vectors and
# small embeddings are replicated: splitting costs a collective each and saves less than a thousandth of the memory.
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

    ``fsdp = 0`` leaves it to us: on TPU up to SPLIT chips of a slice share the state, so that each updates its part;
    elsewhere it is whole on every device.

    On several TPU slices the data axis is hybrid: its outer part, an axis of its own named "slice", runs over the
    slices (slow network), its inner part and the other axes stay within one. ``slices`` treats devices that know
    nothing of slices as so many of them, in the order given; by default they say themselves.

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

    # Many slices (v6e:8x8, v5p:8x8x8) have no axes of 16 chips together: two of ours share one of theirs there.
    inside, split = (shape[0] // slices, *shape[1:]), {"allow_split_physical_axes": True}
    if slices == 1:
        grid, names = mesh_utils.create_device_mesh(inside, devices, **split), AXES
    else:
        known = len({getattr(d, "slice_index", 0) for d in devices}) > 1
        grid = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, **split) if known else devices
        grid, names = np.reshape(grid, (slices, *inside)), ("slice", *AXES)
    return Mesh(grid, names, axis_types=(AxisType.Auto,) * len(names))


def _fill(sizes: list[int], devices: int) -> tuple[int, int, int]:
    """Replaces one -1 by what is left of ``devices`` and checks the product."""
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
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int = 1) -> None:
    """Raises ShardingError unless the global batch divides over the mesh, the microbatches and the processes."""
    shards = batch_shards(mesh)
    if batch_size % (shards * microbatches):
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


def whole_over_fsdp(spec: P) -> P:
    """The spec with the fsdp axis taken out: how a parameter lies while the networks use it."""

    def strip(names: Any) -> Any:
        kept = tuple(n for n in axes_of(names) if n != "fsdp")
        return kept[0] if len(kept) == 1 else kept or None

    return P(*(strip(names) for names in spec))


# Worked on where they lie by the networks, which gather the results (``models.placement``). The second if folded.
PROTOTYPES = r"head/last_layer/kernel"
EMBEDDING = r"backbone/patch_embed/(conv2d_.*|fusion/key|projection/.*)/kernel"


def sums_whole(mesh: Mesh) -> bool:
    """Whether gradients are summed over all devices and then split (``ModelSpec.sum_whole``), where both are possible.

    On a TPU slice the sum runs over both axes of the torus at once, beside computing; the compiler makes a sum
    within a group of chips a synchronous one. Between hosts with GPUs the network is slow, and only parts of a gradient
    should cross it; between slices ``gradients.value_and_grad`` sees to that.
    """
    return mesh.shape["data"] > 1 and mesh.devices.flat[0].platform == "tpu"


def gather_params(params: Any, kernel_dtype: Any = None, *, in_place: str = PROTOTYPES, sum_whole: bool = False) -> Any:
    """Parameters as the networks use them on the mesh in context: whole over the fsdp axis, still split over tensor.

    The gradients go the other way: summed over the batch's shards and left where the parameter lives. Without
    this the compiler is free to move activations instead of weights, and does. Kernels travel in ``kernel_dtype``
    if it is given, and so do their gradients; by default in their own, float32. Parameters whose path matches the
    regular expression ``in_place`` stay where they are. ``sum_whole``: see :func:`sums_whole`.
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
        used = whole_over_fsdp(spec)
        # The embedding multiplies its kernels with other weights: gradients come summed and split, or are small.
        whole = sum_whole and not path.startswith("backbone/patch_embed/")
        return x if spec == used else moved(x, spec, used, used if whole else spec, None)

    leaves, tree = jax.tree.flatten(params)
    return tree.unflatten(map(gather, paths(params), leaves, leaf_specs(params)))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Shardings for a TrainState (arrays or ShapeDtypeStructs): teacher and moments lie like the parameters."""
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

    ``batch_size`` is that of the global batch; None where this process holds all of it.
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
