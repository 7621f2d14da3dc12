"""Resampling of stored resolution groups straight to patches, as two small matrix products per view.

The filter is the antialiased triangle of PIL and ``torch.nn.functional.interpolate(antialias=True)``:
half-pixel centers, support one source pixel when enlarging and the shrink factor when shrinking.
Unlike theirs it reads beyond the box, as far as the stored array is valid. Nodata is left out by
masked renormalisation: numerator ``Wy (m x) Wx'`` over denominator ``Wy m Wx'``. Flips are folded
into the weights. Weights and mask being the same in both, their scale and rounding cancel.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from terrafm_jax import sensors
from terrafm_jax.ssl.boxes import to_pixels

FILL = 0.5  # the normalised value of the mean: what a pixel without any measurement gets
MIN_WEIGHT = 1e-3  # smallest share of the filter's weight on valid pixels that yields a value
REACH = 1.0  # stored pixels beyond the array's edge up to which the edge value is continued (shifted grids)


def triangle_weights(start: Array, stop: Array, flip: Array, out: int, size: int, extent: Array) -> Array:
    """Weights of the triangle filter along one axis; every row sums to about 1, less where cut off.

    Args:
      start, stop: float32 [B, V], edges of the box in pixel-edge coordinates of the stored array.
      flip: bool [B, V], reverse the output.
      out: output pixels; size: length of the stored axis.
      extent: int32 [B], stored pixels that exist; what lies beyond gets no weight.

    Returns:
      float32 [B, V, out, size].
    """
    position = (jnp.arange(out, dtype=jnp.float32)[None, None, :] + 0.5) / out
    position = jnp.where(flip[..., None], 1.0 - position, position)
    center = start[..., None] + (stop - start)[..., None] * position
    inside = jnp.clip(center, 0.0, extent[:, None, None].astype(jnp.float32))
    center = jnp.where(jnp.abs(inside - center) <= REACH, inside, center)
    support = jnp.maximum((stop - start) / out, 1.0)[..., None, None]
    pixel = jnp.arange(size, dtype=jnp.float32)[None, None, None, :]
    distance = jnp.abs(pixel + 0.5 - center[..., None]) / support
    used = (distance < 1.0) & (pixel < extent[:, None, None, None])
    return jnp.where(used, (1.0 - distance) / support, 0.0)


def unpack_bits(packed: Array, width: int) -> Array:
    """uint8 [B, H, ceil(W / 8)] (np.packbits along W) -> bool [B, H, W]."""
    shifts = jnp.arange(7, -1, -1, dtype=jnp.uint8)[None, None, None, :]
    bits = (packed[..., None] >> shifts) & jnp.uint8(1)
    return bits.reshape(*packed.shape[:2], -1)[..., :width] == 1


def masked_values(
    entry: dict[str, Array], scale: float, mean: np.ndarray, std: np.ndarray, offset: Array, dtype: Any
) -> Array:
    """Normalised values around their mean, zero where nodata, and the mask as one more band.

    Everything up to the cast happens in float32: DN minus offset needs more digits than bfloat16 has.

    Args:
      entry: ``dn``, ``valid`` of one resolution group.
      scale: stored value times ``scale`` is the value in the sensor's unit.
      mean, std: float32 [bands] of the group.
      offset: float32 [B], in the sensor's unit.

    Returns:
      dtype [B, H, bands + 1, W]: bands before columns, so that both products contract a plain axis.
    """
    valid = unpack_bits(entry["valid"], entry["dn"].shape[2])[..., None]
    values = entry["dn"].astype(jnp.float32) * scale
    mean, std = (jnp.asarray(a, jnp.float32)[None, None, None, :] for a in (mean, std))
    values = sensors.normalize(values, mean, std, offset[:, None, None, None]) - FILL
    values = jnp.concatenate([jnp.where(valid, values, 0.0), valid.astype(jnp.float32)], axis=-1)
    return values.astype(dtype).transpose(0, 1, 3, 2)


def resample_group(values: Array, entry: dict[str, Array], boxes: Array, flips: Array, out: int, patch: int) -> Array:
    """Resamples one resolution group of a batch to every view's grid, in patch layout.

    Args:
      values: [B, H, bands + 1, W] from :func:`masked_values`; its dtype is that of the products.
      entry: ``geometry``, ``extent`` of the group.
      boxes: float32 [B, V, 4]; flips: bool [B, V, 2] (up-down, left-right).
      out: output pixels per side; patch: pixels per side of a patch.

    Returns:
      float32 [B, V, h, w, patch, patch, bands].
    """
    dtype = values.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    top, bottom, left, right = to_pixels(entry["geometry"], boxes)
    rows, cols = entry["extent"][:, 0], entry["extent"][:, 1]
    down = triangle_weights(top, bottom, flips[..., 0], out, values.shape[1], rows).astype(dtype)
    across = triangle_weights(left, right, flips[..., 1], out, values.shape[3], cols).astype(dtype)
    grid = (*down.shape[:2], out // patch, patch)
    down, across = down.reshape(*grid, -1), across.reshape(*grid, -1)
    lines = jnp.einsum("bvhiy,bycx->bvhicx", down, values, precision=precision)
    both = jnp.einsum("bvhicx,bvwjx->bvhwijc", lines, across, precision=precision, preferred_element_type=jnp.float32)
    weight = both[..., -1:]
    enough = weight > MIN_WEIGHT
    return jnp.where(enough, both[..., :-1] / jnp.where(enough, weight, 1.0), 0.0) + FILL


def resample_sensor(
    key: str,
    entry: dict[str, dict[str, Array]],
    stats: tuple[np.ndarray, np.ndarray],
    offset: Array,
    views: list[tuple[Array, Array, int]],
    patch: int,
    dtype: Any,
) -> list[Array]:
    """Cuts all views of one sensor out of its stored groups.

    Args:
      key: sensor; entry: its groups in the batch; stats: mean and std [C] in the sensor's unit.
      offset: float32 [B], DN to subtract.
      views: per output size (boxes [B, V, 4], flips [B, V, 2], pixels per side).

    Returns:
      Per output size dtype [B, V, h, w, patch * patch * C], bands in canonical order.
    """
    sensor = sensors.SENSORS[key]
    mean, std = (np.asarray(a, np.float32) for a in stats)
    collected: list[list[Array]] = [[] for _ in views]
    for group, names in sensor.groups.items():
        bands = list(sensor.indices(names))
        values = masked_values(entry[group], sensor.scale, mean[bands], std[bands], offset, dtype)
        for out, (boxes, flips, size) in zip(collected, views, strict=True):
            out.append(resample_group(values, entry[group], boxes, flips, size, patch).astype(dtype))
    return [_interleave(groups, sensor.group_order) for groups in collected]


def _interleave(groups: list[Array], order: tuple[int, ...]) -> Array:
    """Groups [B, V, h, w, p, p, bands] -> [B, V, h, w, p * p * C] in canonical order of the bands."""
    planes = [group[..., i : i + 1] for group in groups for i in range(group.shape[-1])]
    merged = jnp.concatenate([planes[i] for i in order], axis=-1)
    return merged.reshape(*merged.shape[:4], -1)
