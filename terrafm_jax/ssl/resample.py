"""Resampling of stored resolution groups straight to patches, as two small matrix products per view.

The filter is the antialiased triangle of PIL and ``torch.nn.functional.interpolate(antialias=True)``:
half-pixel centers, support one source pixel when enlarging and the shrink factor when shrinking.
Unlike theirs it reads beyond the box, as far as the stored array is valid. Nodata is left out by
masked renormalization: numerator ``Wy (m x) Wx'`` over denominator ``Wy m Wx'``. Both share weights
and mask, so scale and rounding of these cancel. Flips are folded into the weights.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from terrafm_jax import sensors
from terrafm_jax.models.stems import together
from terrafm_jax.ssl.boxes import to_pixels

FILL = sensors.NORMALIZED_MEAN  # value of output pixels without any measurement
MIN_WEIGHT = 1e-3  # share of the filter's weight that must fall on valid pixels, else the output pixel is FILL
REACH = 1.0  # how far beyond the array, in stored pixels, its edge value is extended (grids may be shifted)


def triangle_weights(start: Array, stop: Array, flip: Array, order: np.ndarray, size: int, extent: Array) -> Array:
    """Weights of the triangle filter along one axis; every row sums to about 1, less at the array's edge.

    Args:
      start, stop: float32 [B, V], edges of the box in pixel-edge coordinates of the stored array.
      flip: bool [B, V], reverse the output.
      order: int [out], the output pixel that each row of the weights computes: a permutation of 0 .. out - 1.
      size: length of the stored axis.
      extent: int32 [B], stored pixels that exist; what lies beyond gets no weight.

    Returns:
      float32 [B, V, out, size].
    """
    out = len(order)
    position = jnp.asarray((order + 0.5) / out, jnp.float32)[None, None, :]
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


def masked_planes(
    entry: dict[str, Array], scale: float, mean: np.ndarray, std: np.ndarray, offset: Array, dtype: Any
) -> tuple[list[Array], Array]:
    """Normalized values minus FILL, zero where nodata, and the mask.

    Everything up to the cast happens in float32: DN minus offset needs more digits than bfloat16 has.
    From here on bands are separate planes: as an array axis, they would map to the eight rows of a TPU's
    vector register and leave two to six of them empty, and normalizing would cost as much as resampling.

    Args:
      entry: ``dn``, ``valid`` of one resolution group.
      scale: stored value times ``scale`` is the value in the sensor's unit.
      mean, std: float32 [bands] of the group.
      offset: float32 [B], in the sensor's unit.

    Returns:
      One [B, H, W] per band, and the mask [B, H, W], all of ``dtype``.
    """
    valid = unpack_bits(entry["valid"], entry["dn"].shape[2])
    planes = []
    for band in range(entry["dn"].shape[3]):
        values = entry["dn"][..., band].astype(jnp.float32) * scale
        values = sensors.normalize(values, mean[band], std[band], offset[:, None, None]) - FILL
        planes.append(jnp.where(valid, values, 0.0).astype(dtype))
    return planes, valid.astype(dtype)


def pad_to_eights(plane: Array) -> Array:
    """[B, H, W] with H and W padded to multiples of 8; zeros are nodata.

    cuBLAS wants such sizes. Here padding joins the pass that makes the plane; XLA would pad and cut at each product.
    """
    return jnp.pad(plane, ((0, 0), *((0, -n % 8) for n in plane.shape[1:])))


def resample_group(
    planes: list[Array],
    mask: Array,
    entry: dict[str, Array],
    boxes: Array,
    flips: Array,
    out: int,
    patch: int,
    layout: str = "patches",
) -> list[Array]:
    """Resamples one resolution group of a batch to every view's grid.

    Output columns are ordered (column in patch, patch), so that :func:`to_patches` moves whole vectors.

    Args:
      planes, mask: from :func:`masked_planes`; their dtype is that of the products.
      entry: ``geometry``, ``extent`` of the group.
      boxes: float32 [B, V, 4]; flips: bool [B, V, 2] (up-down, left-right).
      out: output pixels per side; patch: pixels per side of a patch.
      layout: what :func:`to_patches` will make of the result, here the order in which both products are computed.

    Returns:
      Per band, of the planes' dtype, [B, V, out (patch, row in patch), out (column in patch, patch)].
    """
    dtype = mask.dtype
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    rows = np.arange(out)
    columns = rows.reshape(out // patch, patch).T.reshape(-1)
    top, bottom, left, right = to_pixels(entry["geometry"], boxes)
    extent = entry["extent"]
    down = triangle_weights(top, bottom, flips[..., 0], rows, mask.shape[1], extent[:, 0]).astype(dtype)
    across = triangle_weights(left, right, flips[..., 1], columns, mask.shape[2], extent[:, 1]).astype(dtype)
    size, views = boxes.shape[:2]
    across = across.reshape(size, views * out, -1)  # one flat axis of output columns fills the vector lanes

    def both_ways(plane: Array) -> Array:
        if layout == "columns":
            lines = jnp.einsum("bqx,byx->byq", across, plane, precision=precision).reshape(size, -1, views, out)
            return jnp.einsum("bvry,byvq->bvrq", down, lines, precision=precision, preferred_element_type=jnp.float32)
        # On GPU, views must come before lines, or each view's lines are copied out before the second product.
        lines = jnp.einsum("bqx,byx->bqy", across, plane, precision=precision).reshape(size, views, out, -1)
        return jnp.einsum("bvry,bvqy->bvrq", down, lines, precision=precision, preferred_element_type=jnp.float32)

    weight = both_ways(mask)
    share = jnp.where(weight > MIN_WEIGHT, 1.0 / jnp.maximum(weight, MIN_WEIGHT), 0.0)
    return [(both_ways(plane) * share + FILL).astype(dtype) for plane in planes]


def resample_sensor(
    key: str,
    entry: dict[str, dict[str, Array]],
    stats: tuple[np.ndarray, np.ndarray],
    offset: Array,
    views: list[tuple[Array, Array, int]],
    patch: int,
    dtype: Any,
    layout: str = "patches",
) -> list[Array]:
    """Cuts all views of one sensor out of its stored groups.

    Args:
      key: sensor; entry: its groups in the batch; stats: mean and std [C] in the sensor's unit.
      offset: float32 [B], DN to subtract.
      views: per output size (boxes [B, V, 4], flips [B, V, 2], pixels per side).

    Returns:
      Per output size the patches of :func:`to_patches`, bands in canonical order.
    """
    sensor = sensors.SENSORS[key]
    mean, std = (np.asarray(a, np.float32) for a in stats)
    collected: list[list[Array]] = [[] for _ in views]  # per output size the planes of all groups
    for group, names in sensor.groups.items():
        bands = list(sensor.indices(names))
        planes, mask = masked_planes(entry[group], sensor.scale, mean[bands], std[bands], offset, dtype)
        if layout == "patches":
            planes, mask = [pad_to_eights(x) for x in planes], pad_to_eights(mask)
        for out, (boxes, flips, size) in zip(collected, views, strict=True):
            out += resample_group(planes, mask, entry[group], boxes, flips, size, patch, layout)
    return [to_patches([planes[i] for i in sensor.group_order], patch, layout) for planes in collected]


def to_patches(planes: list[Array], patch: int, layout: str = "patches") -> Array:
    """Turns planes into patches.

    Args:
      planes: per band [B, V, out, out], as :func:`resample_group` gives them.
      layout: ``patches`` or ``columns``, see ``views.make_views``.

    Returns:
      ``patches``: [B, V, h, w, patch * patch * C], last axis (row, column, band).
      ``columns``: [B, V, h, patch / m, w, m * C * patch], see ``models.stems``. On TPU this takes one transposition of
      matrices that fill the vector lanes, whereas moving 16-wide rows and 12 bands into place for ``patches`` takes
      longer than all of the resampling.
    """
    merged = jnp.stack(planes, axis=2)
    size, views, bands, out, _ = merged.shape
    side = out // patch
    if layout == "patches":
        merged = merged.reshape(size * views, bands, side, patch, patch, side).transpose(0, 2, 5, 3, 4, 1)
        return merged.reshape(size, views, side, side, patch * patch * bands)
    merged = merged.reshape(size * views, bands, side, patch, out).transpose(0, 2, 4, 1, 3)
    # Without the barrier, the TPU compiler merges this with the transpositions of whatever reads the patches, and
    # chooses a layout with the batch in the vector lanes.
    merged = jax.lax.optimization_barrier(merged.reshape(size * views, side, out, bands * patch))
    m = together(bands, patch)
    merged = merged.reshape(size * views, side, patch // m, m, side, bands * patch).transpose(0, 1, 2, 4, 3, 5)
    return merged.reshape(size, views, side, patch // m, side, m * bands * patch)
