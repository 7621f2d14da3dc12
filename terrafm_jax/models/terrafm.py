"""TerraFM (arXiv 2506.06281) as pure functions of plain parameter dicts.

Flax NNX modules define parameters and computation; each function merges the caller's dict into a module that was built
abstractly, once per spec (``layers.with_parameters``). Nothing here keeps state, so every JAX transformation applies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from terrafm_jax.models import folding, position, stems
from terrafm_jax.models.heads import DinoHead
from terrafm_jax.models.layers import LayerNorm, trunc_normal, with_parameters
from terrafm_jax.models.patch_embed import PatchEmbed
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.vit import Block, drop_path_keep, run_blocks, run_blocks_together

Params = Mapping[str, Any]


class Features(NamedTuple):
    """Outputs after the final norm.

    cls: class tokens [B, d].
    patches: patch tokens [B, h, w, d].
    layers: for every requested layer its (cls, patches), the final norm applied to each.
    """

    cls: Array
    patches: Array
    layers: tuple[tuple[Array, Array], ...] = ()


class Backbone(nnx.Module):
    """Patch embedding, class token, positions, blocks, final norm."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.patch_embed = PatchEmbed(spec, rngs=rngs)
        self.cls_token = nnx.Param(trunc_normal(rngs.params(), (1, 1, spec.width)))
        self.pos_embed = nnx.Param(trunc_normal(rngs.params(), (1, 1 + spec.grid**2, spec.width)))
        self.blocks = nnx.List([Block(spec, rngs=rngs) for _ in range(spec.depth)])
        self.norm = LayerNorm(spec, spec.width)


def init_params(spec: ModelSpec, key: Array) -> dict[str, Any]:
    """Fresh float32 parameters ``{"backbone": {...}, "head": {...}}`` as plain nested dicts.

    Linear kernels are normal with ``spec.init_std``; class token, positions, queries and pooling vector normal with
    0.02; stems and prototypes uniform (PyTorch's default), and a stem's bias follows from its kernel; modality
    embeddings and all other biases zero. Traceable: ``jax.eval_shape`` and ``jax.jit`` with output shardings work.
    """
    backbone_key, head_key = jax.random.split(key)
    modules = {
        "backbone": Backbone(spec, rngs=nnx.Rngs(params=backbone_key)),
        "head": DinoHead(spec, rngs=nnx.Rngs(params=head_key)),
    }
    return {name: _named(nnx.to_pure_dict(nnx.state(module, nnx.Param))) for name, module in modules.items()}


def _named(tree: Any) -> Any:
    """The same nested dict with string keys, so that "/".join(path) names a parameter."""
    if not isinstance(tree, Mapping):
        return tree
    return {str(name): _named(value) for name, value in tree.items()}


def _numbered(tree: Params) -> dict[int, Any]:
    return {int(name): value for name, value in tree.items()}


def parameter_count(tree: Params) -> int:
    """Number of values in a parameter tree, of arrays or of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def patchify(images: Array, p: int) -> Array:
    """[B, H, W, C] -> [B, H/p, W/p, p*p*C], last axis ordered (row, column, band). Raises ValueError."""
    batch, height, width, bands = images.shape
    if height % p or width % p:
        raise ValueError(f"patchify: image is {height}x{width}; both sides must be divisible by {p}")
    blocks = images.reshape(batch, height // p, p, width // p, p, bands).transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // p, width // p, p * p * bands)


def encode(
    spec: ModelSpec,
    backbone: Params,
    patches: Mapping[str, Array],
    present: Array | None = None,
    *,
    drop_key: Array | None = None,
    layers: Sequence[int] = (),
) -> Features:
    """Encodes views.

    Args:
      spec: the network; execution options (dtype, attention, ...) may differ from those used at init.
      backbone: ``params["backbone"]``.
      patches: sensor -> normalized patches [B, h, w, p*p*C] (see :func:`patchify`), or the other layout of
        ``models.stems``. With one sensor this is the released path; with several they are fused.
      present: bool [B, S] over ``spec.sensors``: sensors each sample has. None: those in ``patches``. Without
        fusion weights, several sensors may be given only if exactly one of them is present in each sample.
      drop_key: PRNG key of the drop path; None turns it off (teacher, inference).
      layers: blocks (0-based, negative from the end) whose features are returned too.

    Raises:
      ValueError: unknown sensors, wrong shapes, several sensors without fusion weights, layer out of range.
    """
    taps = _check(spec, backbone["patch_embed"], patches, present, layers)
    tokens = _embedding(spec, backbone)(patches, present)
    rows, columns = tokens.shape[1:3]
    x = _with_positions(spec, backbone, tokens)
    keep = None if drop_key is None or not spec.drop_path else drop_path_keep(spec, x.shape[0], drop_key)
    x, tapped = run_blocks(spec, backbone["blocks"], x, keep, taps)
    norm = with_parameters(LayerNorm, spec, backbone["norm"], spec.width)

    def split(tokens: Array) -> tuple[Array, Array]:
        tokens = norm(tokens)
        return tokens[:, 0], tokens[:, 1:].reshape(-1, rows, columns, spec.width)

    return Features(*split(x), layers=tuple(split(tapped[i]) for i in taps))


def encode_cls(
    spec: ModelSpec,
    backbone: Params,
    sets: Sequence[tuple[Mapping[str, Array], Array | None]],
    *,
    keep: Sequence[Array | None],
    places: Sequence[Sequence[int] | None] | None = None,
) -> list[Array]:
    """Class tokens [B_i, d] of several sets of views, whose sizes may differ, in one pass over the layers.

    Equals :func:`encode` of each set, but folds weights only once and reads each layer's weights once
    (``vit.run_blocks_together``).

    Args:
      sets: (patches, present) as for :func:`encode`.
      keep: per set the result of ``vit.drop_path_keep``, [depth, 2, B_i], or None.
      places: per set, for each sensor, the number of views that its stem computes on a device (``models.drawn``);
        None: all.

    Raises:
      ValueError: as :func:`encode`.
    """
    for patches, present in sets:
        _check(spec, backbone["patch_embed"], patches, present, ())
    by_columns = all(x.ndim == 5 for patches, _ in sets for x in patches.values())
    embed = _embedding(spec, backbone, by_columns=by_columns)
    places = [None] * len(sets) if places is None else places
    embedded = (embed(*each, room) for each, room in zip(sets, places, strict=True))
    tokens = [_with_positions(spec, backbone, x) for x in embedded]
    last, _ = run_blocks_together(spec, backbone["blocks"], tokens, keep)
    norm = with_parameters(LayerNorm, spec, backbone["norm"], spec.width)
    return [norm(x[:, 0]) for x in last]


def _embedding(spec: ModelSpec, backbone: Params, *, by_columns: bool = False) -> Callable[..., Array]:
    """Returns ``embed(patches, present, places)`` -> tokens [B, h, w, d]; arguments as for :func:`encode_cls`.

    Weights are folded here, not in ``embed``, so that several calls and their backward passes share the products.

    Args:
      by_columns: whether all patches will come in the column layout of ``models.stems``.
    """
    unfolded = with_parameters(PatchEmbed, spec, backbone["patch_embed"])
    folded = unfolded.fold(by_columns=by_columns) if spec.folded else None

    def embed(patches: Mapping[str, Array], present: Array | None, places: Sequence[int] | None = None) -> Array:
        patches = {sensor: patches[sensor] for sensor in spec.sensors if sensor in patches}
        if present is not None:
            present = jnp.stack([present[:, spec.sensors.index(sensor)] for sensor in patches], axis=1)
        if folded is None:
            return unfolded(patches, present)
        return folding.embed(spec, folded, patches, present, places)

    return embed


def _with_positions(spec: ModelSpec, backbone: Params, tokens: Array) -> Array:
    """[B, h, w, d] -> [B, 1 + h * w, d] with the class token in front and positions added."""
    batch, rows, columns, width = tokens.shape
    dtype = spec.compute_dtype
    pos = backbone["pos_embed"]
    grid = position.interpolate(pos[0, 1:], rows, columns, spec.grid)
    # Added in float32, so that the embeddings' gradients are summed over samples and devices in float32, too.
    tokens = (tokens + grid[None]).astype(dtype)
    first = jnp.broadcast_to(backbone["cls_token"] + pos[:, :1], (batch, 1, width)).astype(dtype)
    return jnp.concatenate([first, tokens.reshape(batch, rows * columns, width)], axis=1)


def _check(
    spec: ModelSpec, embed: Params, patches: Mapping[str, Array], present: Array | None, layers: Sequence[int]
) -> tuple[int, ...]:
    """Raises ValueError naming all faults of the arguments; returns the layers as positive numbers."""
    faults = [f"unknown sensor {s!r}; configured are {spec.sensors}" for s in patches if s not in spec.sensors]
    if not patches:
        faults.append(f"no sensor given; configured are {spec.sensors}")
    if len(patches) > 1 and not spec.fusion and present is None:
        faults.append(f"sensors {tuple(patches)} together, but these weights have no fusion; give one sensor")
    shapes = {s: x.shape for s, x in patches.items()}
    if any(x.ndim not in (4, 5) for x in patches.values()) or len({stems.grid(x) for x in patches.values()}) > 1:
        faults.append(f"patches must be [B, h, w, p*p*C] (or [B, h, p/m, w, m*C*p]) with equal B, h, w; found {shapes}")
    for s, x in patches.items():
        # Expected by the weights, not by the sensor table: a caller may have sliced the stem to fewer bands.
        if s not in spec.sensors:
            continue
        expected = embed[f"conv2d_{s}"]["kernel"].shape[0]
        columns = stems.column_shape(expected, spec.patch)
        if stems.values(x) != expected:
            faults.append(f"{s}: patches have {stems.values(x)} values; expected {expected}")
        elif x.ndim == 5 and (x.shape[2], x.shape[4]) != columns:
            faults.append(
                f"{s}: {x.shape[2]} times {x.shape[4]} values in a patch; expected {columns[0]} times {columns[1]}"
            )
    batch = next(iter(shapes.values()), (0,))[0]
    if present is not None and present.shape != (batch, len(spec.sensors)):
        faults.append(f"present has shape {present.shape}; expected {(batch, len(spec.sensors))}")
    wrong = [i for i in layers if not -spec.depth <= i < spec.depth]
    if wrong:
        faults.append(f"layers {wrong} do not exist; depth is {spec.depth}")
    if faults:
        raise ValueError("encode: " + "; ".join(faults))
    return tuple(i % spec.depth for i in layers)


def project(spec: ModelSpec, head: Params, cls: Array) -> Array:
    """DINO head: class tokens [B, d] -> logits [B, K] in float32."""
    return with_parameters(DinoHead, spec, {**head, "mlp": _numbered(head["mlp"])})(cls)
