"""Multi-crop views, made on the device inside the jitted step from raw tiles at native resolution.

Each view of a sample draws one box, one flip and, for either network, one subset of the sensors; every
resolution group is then resampled straight to the view's grid, in patch layout. Everything is a function
of (batch, key), has the batch as leading axis and needs no communication when the batch is sharded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import get_abstract_mesh

from terrafm_jax.sensors import SENSOR_KEYS
from terrafm_jax.ssl import resample, view_kernels
from terrafm_jax.ssl.boxes import draw_boxes
from terrafm_jax.ssl.modalities import RULES, draw_modalities, most_drawn

KERNELS = ("auto", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class ViewSpec:
    """Which views are made of a tile. Raises ValueError naming every field that is out of range.

    Attributes:
      sensors: configured sensors, in the order of ``SENSOR_KEYS``.
      globals, locals: views per sample of either kind; the teacher sees the global ones only.
      global_size, local_size: pixels per side, multiples of ``patch``.
      global_scale, local_scale: share of the tile's area, uniform between the two.
      aspect: width / height on the ground, log-uniform between the two.
      flips: flip up-down and left-right, each with probability one half.
      modality_rule, modality_threshold: see ``modalities.subset_probabilities``.
      modality_group: number of samples whose views are stratified together, rounded down to a divisor of the batch; 0
        draws every view independently.
      box_tries: candidates per box; the first with at least ``min_valid`` valid pixels is taken.
      dtype: of the matrix products and of the patches, ``float32`` or ``bfloat16``.
      kernel: ``xla``, ``pallas`` (TPU kernels, for the column layout) or ``auto``.
    """

    sensors: tuple[str, ...] = SENSOR_KEYS
    globals: int = 2
    locals: int = 8
    global_size: int = 224
    local_size: int = 96
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flips: bool = True
    patch: int = 16
    modality_rule: str = "bernoulli"
    modality_threshold: float = 0.5
    modality_group: int = 0
    box_tries: int = 4
    min_valid: float = 0.5
    dtype: str = "float32"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for field in ("sensors", "global_scale", "local_scale", "aspect"):
            object.__setattr__(self, field, tuple(getattr(self, field)))  # config files give lists
        faults = [text for wrong, text in _checks(self) if wrong]
        if faults:
            raise ValueError("views: " + "; ".join(faults))


def _checks(spec: ViewSpec) -> list[tuple[bool, str]]:
    ordered = tuple(k for k in SENSOR_KEYS if k in spec.sensors)
    threshold, rule = spec.modality_threshold, spec.modality_rule
    checks = [
        (ordered != spec.sensors or not ordered, f"sensors {spec.sensors}, expected some of {SENSOR_KEYS} in order"),
        (spec.globals < 1 or spec.locals < 0, f"globals {spec.globals}, locals {spec.locals}, expected >= 1 and >= 0"),
        (rule not in RULES, f"modality_rule {rule!r}, expected one of {list(RULES)}"),
        (not 0 <= threshold <= 1, f"modality_threshold {threshold}, expected 0..1"),
        (rule == "bernoulli" and threshold == 0, "modality_threshold 0 with rule bernoulli never draws a sensor"),
        (spec.modality_group < 0, f"modality_group {spec.modality_group}, expected >= 0"),
        (spec.box_tries < 1, f"box_tries {spec.box_tries}, expected >= 1"),
        (not 0 <= spec.min_valid <= 1, f"min_valid {spec.min_valid}, expected 0..1"),
        (spec.kernel not in KERNELS, f"kernel {spec.kernel!r}, expected one of {list(KERNELS)}"),
        (spec.dtype not in ("float32", "bfloat16"), f"dtype {spec.dtype!r}, expected float32 or bfloat16"),
        (not 0 < spec.aspect[0] <= spec.aspect[1], f"aspect {spec.aspect}, expected 0 < low <= high"),
    ]
    for kind in ("global", "local"):
        size, scale = getattr(spec, f"{kind}_size"), getattr(spec, f"{kind}_scale")
        checks.append((size <= 0 or size % spec.patch != 0, f"{kind}_size {size}, expected a multiple of {spec.patch}"))
        checks.append((not 0 < scale[0] <= scale[1] <= 1, f"{kind}_scale {scale}, expected 0 < low <= high <= 1"))
    return checks


class ViewSet(NamedTuple):
    """Views of one size. B samples, V views, S configured sensors; sample-major.

    Attributes:
      patches: per sensor [B, V, h, w, p * p * C], normalized, bands in canonical order.
      student, teacher: bool [B, V, S], the sensors either network sees of a view.
      boxes: float32 [B, V, 4] (u0, v0, u1, v1) as fractions of the tile's ground extent.
      flips: bool [B, V, 2] (up-down, left-right).
    """

    patches: dict[str, Array]
    student: Array
    teacher: Array
    boxes: Array
    flips: Array


def present_sensors(spec: ViewSpec, batch: Mapping[str, Any]) -> Array:
    """bool [B, S] of the configured sensors; a batch may carry columns for all of SENSOR_KEYS."""
    present = batch["present"].astype(bool)
    return _columns(spec, present, "present")


def _columns(spec: ViewSpec, table: Array, name: str) -> Array:
    """Columns of the configured sensors, from [B, S] or from [B, all of SENSOR_KEYS]. Raises ValueError."""
    if table.shape[1] == len(spec.sensors):
        return table
    if table.shape[1] == len(SENSOR_KEYS):
        return table[:, [SENSOR_KEYS.index(k) for k in spec.sensors]]
    raise ValueError(f"batch {name}: {table.shape[1]} columns, expected {len(spec.sensors)} for {spec.sensors}")


def draw_views(
    spec: ViewSpec, batch: Mapping[str, Any], key: Array, views: int, scale: tuple[float, float]
) -> tuple[Array, Array, Array, Array]:
    """Makes the random draws of ``views`` views of one kind.

    Args:
      scale: smallest and largest share of the tile's area.

    Returns:
      boxes float32 [B, V, 4], flips bool [B, V, 2], student and teacher subsets bool [B, V, S].
    """
    present = present_sensors(spec, batch)
    for_boxes, for_flips, for_student, for_teacher = jax.random.split(key, 4)
    boxes, shares = draw_boxes(
        for_boxes,
        batch,
        spec.sensors,
        present,
        views=views,
        tries=spec.box_tries,
        scale=scale,
        aspect=spec.aspect,
        min_valid=spec.min_valid,
    )
    # A sensor that is nodata in this box counts as absent from it, unless all of them are.
    seen = present[:, None, :] & (shares >= spec.min_valid)
    seen = jnp.where(jnp.any(seen, axis=-1, keepdims=True), seen, present[:, None, :])
    rule = (spec.modality_rule, spec.modality_threshold)
    group = modality_group(spec, seen.shape[0])
    student, teacher = (draw_modalities(k, *rule, seen, group) for k in (for_student, for_teacher))
    flips = jax.random.bernoulli(for_flips, 0.5 if spec.flips else 0.0, (*boxes.shape[:2], 2))
    return boxes, flips, student, teacher


def modality_group(spec: ViewSpec, batch: int) -> int:
    """``spec.modality_group`` rounded down to a divisor of the global batch; 0 where views are drawn independently."""
    return max((size for size in range(1, spec.modality_group + 1) if batch % size == 0), default=0)


def views_seen_at_most(spec: ViewSpec, batch: int, views: int, devices: int) -> tuple[int, ...] | None:
    """Per sensor, the most views of a device that may see it; None where all may. Assumes records with all sensors.

    Args:
      batch: samples in the global batch.
      views: views of each sample.
      devices: devices that share the batch.
    """
    group, each = modality_group(spec, batch), batch // devices
    if not group or each % group:
        return None
    most = most_drawn(spec.modality_rule, spec.modality_threshold, len(spec.sensors), group * views)
    return None if max(most) == group * views else tuple(int(count) * (each // group) for count in most)


def make_views(
    spec: ViewSpec,
    stats: Mapping[str, tuple[np.ndarray, np.ndarray]],
    batch: Mapping[str, Any],
    key: Array,
    *,
    layout: str = "patches",
) -> tuple[ViewSet, ViewSet]:
    """Draws and cuts the global and the local views of a batch.

    Several view sets of the same tiles are several calls with different keys inside one jit.

    Args:
      stats: per configured sensor mean and std [C] in the sensor's unit, of harmonized values.
      batch: as described in ``data/tiles.py``; tiles may be windows, with shifted geometry.
      key: threefry key, e.g. ``fold_in(seed, step)``.
      layout: ``patches``, or ``columns`` [B, V, h, patch / m, w, m * C * patch]: the same values in an order that is
        cheaper to produce on TPU. ``models.encode`` takes both (``models.stems``).

    Returns:
      (global, local) view sets; with ``locals = 0`` the local one has V = 0.
    """
    for_global, for_local = jax.random.split(key)
    kinds = [(for_global, spec.globals, spec.global_size, spec.global_scale)]
    if spec.locals:
        kinds.append((for_local, spec.locals, spec.local_size, spec.local_scale))
    draws = [draw_views(spec, batch, k, views, scale) for k, views, _, scale in kinds]
    grids = [(boxes, flips, size) for (boxes, flips, _, _), (_, _, size, _) in zip(draws, kinds, strict=True)]
    offsets = _columns(spec, batch["offset"], "offset")
    patches: list[dict[str, Array]] = [{} for _ in kinds]
    for i, name in enumerate(spec.sensors):
        arguments = (name, batch[name], stats[name], offsets[:, i], grids, spec.patch, jnp.dtype(spec.dtype))
        if _by_kernels(spec, name, batch[name], layout):
            cut = view_kernels.resample_sensor(*arguments)
        else:
            cut = resample.resample_sensor(*arguments, layout)
        for out, value in zip(patches, cut, strict=True):
            out[name] = value
    sets = [ViewSet(p, s, t, b, f) for p, (b, f, s, t) in zip(patches, draws, strict=True)]
    return sets[0], sets[1] if spec.locals else _empty(spec, sets[0])


def _by_kernels(spec: ViewSpec, sensor: str, entry: Mapping[str, Any], layout: str) -> bool:
    """Whether Pallas kernels cut a sensor's views. "auto": in the column layout and with a mesh, if they can."""
    if layout != "columns" or spec.kernel == "xla":
        return False
    kinds = [(spec.globals, spec.global_size), *([(spec.locals, spec.local_size)] if spec.locals else [])]
    can = not view_kernels.faults(sensor, entry, kinds, spec.patch, jnp.dtype(spec.dtype))
    return spec.kernel == "pallas" or (can and not get_abstract_mesh().empty)


def _empty(spec: ViewSpec, like: ViewSet) -> ViewSet:
    """A set of zero local views, so that callers need no special case."""
    side = spec.local_size // spec.patch
    none = jax.tree.map(lambda x: x[:, :0], like)

    def no_patches(x: Array) -> Array:
        middle = (side, side) if x.ndim == 5 else (side, x.shape[3], side)
        return jnp.zeros((x.shape[0], 0, *middle, x.shape[-1]), x.dtype)

    patches = {k: no_patches(x) for k, x in like.patches.items()}
    return none._replace(patches=patches)
