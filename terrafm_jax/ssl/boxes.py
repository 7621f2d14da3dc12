"""Crop boxes as fractions of a tile's ground extent, and the share of valid pixels inside them.

A box is drawn once per sample and view and serves every sensor and resolution group, whatever their
sampling and sub-pixel shifts: it is mapped into each stored array through that group's geometry.
All draws have the batch as leading axis and come from one threefry key, so they do not depend on how
the batch is sharded.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from terrafm_jax.data.tiles import EXTENT_ORDER
from terrafm_jax.sensors import SENSORS

CELL = 8  # pixels per side of the coarse grid of valid counts: one byte of the packed bits


def finest_group(key: str) -> str:
    """Name of the resolution group with the finest ground sampling of a sensor."""
    return next(iter(SENSORS[key].groups))


def to_pixels(geometry: Array, boxes: Array) -> tuple[Array, Array, Array, Array]:
    """Maps boxes [B, N, 4] (u0, v0, u1, v1) through geometry [B, 4] to pixel edges.

    Returns (top, bottom, left, right), each [B, N], in pixel-edge coordinates of the stored array.
    """
    y0, sy, x0, sx = (geometry[:, i, None] for i in range(4))
    return y0 + sy * boxes[..., 0], y0 + sy * boxes[..., 2], x0 + sx * boxes[..., 1], x0 + sx * boxes[..., 3]


def covered_range(batch: dict[str, Any], sensors: tuple[str, ...], present: Array) -> tuple[Array, Array]:
    """The part of the ground extent that the stored arrays cover, and the extent's aspect on the ground.

    Both come from the sensor that defines the ground extent: the first present one of ``EXTENT_ORDER``.
    For a whole tile the range is (0, 0, 1, 1); for a window of a tile that keeps the tile's geometry it
    is the window.

    Returns:
      float32 [B, 4] range (u0, v0, u1, v1), and float32 [B] width / height of the unit square in pixels.
    """
    size = present.shape[0]
    covered = jnp.tile(jnp.asarray([[0.0, 0.0, 1.0, 1.0]], jnp.float32), (size, 1))
    ratio = jnp.ones((size,), jnp.float32)
    for key in [k for k in reversed(EXTENT_ORDER) if k in sensors]:  # later sensors override earlier ones
        entry = batch[key][finest_group(key)]
        y0, sy, x0, sx = (entry["geometry"][:, i] for i in range(4))
        usable = present[:, sensors.index(key)] & (sy > 0) & (sx > 0)
        sy, sx = jnp.where(usable, sy, 1.0), jnp.where(usable, sx, 1.0)
        rows, cols = (entry["extent"][:, i].astype(jnp.float32) for i in range(2))
        own = jnp.stack([-y0 / sy, -x0 / sx, (rows - y0) / sy, (cols - x0) / sx], axis=-1).clip(0.0, 1.0)
        usable &= (own[:, 2] > own[:, 0]) & (own[:, 3] > own[:, 1])
        covered = jnp.where(usable[:, None], own, covered)
        ratio = jnp.where(usable, sx / sy, ratio)
    return covered, ratio


def propose_boxes(
    key: Array, covered: Array, ratio: Array, count: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> Array:
    """Random boxes inside the covered range.

    The area is uniform in ``scale`` (a share of the tile's ground extent), the ground aspect (width /
    height) log-uniform in ``aspect`` as far as the box fits, the position uniform. Limiting the aspect
    to what fits keeps the area exactly uniform where torchvision's RandomResizedCrop redraws.

    Args:
      covered, ratio: from :func:`covered_range`, [B, 4] and [B].
      count: boxes per sample, N.
      scale: smallest and largest share of the area, 0 < lo <= hi <= 1.
      aspect: smallest and largest width / height.

    Returns:
      float32 [B, N, 4] (u0, v0, u1, v1).
    """
    draws = jax.random.uniform(key, (covered.shape[0], count, 4), jnp.float32)
    low, high = covered[:, None, :2], covered[:, None, 2:]
    height, width = (high - low)[..., 0], (high - low)[..., 1]
    area = jnp.minimum(scale[0] + (scale[1] - scale[0]) * draws[..., 0], height * width)
    # Aspects a = width / height, in fractions of the extent, that fit: height = sqrt(area / a), width = sqrt(area a).
    fits_low, fits_high = jnp.log(area / height**2), jnp.log(width**2 / area)
    wanted = jnp.log(jnp.asarray(aspect, jnp.float32))[None, :] - jnp.log(ratio)[:, None]
    bottom = jnp.clip(wanted[:, :1], fits_low, fits_high)
    top = jnp.clip(wanted[:, 1:], fits_low, fits_high)
    fraction = jnp.exp(bottom + (top - bottom) * draws[..., 1])
    box = jnp.minimum(jnp.stack([jnp.sqrt(area / fraction), jnp.sqrt(area * fraction)], axis=-1), high - low)
    start = low + (high - low - box) * draws[..., 2:]
    return jnp.concatenate([start, start + box], axis=-1)


def _overlap(start: Array, stop: Array, cells: int, extent: Array) -> Array:
    """Share of each coarse cell that the intervals cover, [B, N, cells]; cells end at the extent [B]."""
    low = jnp.arange(cells, dtype=jnp.float32)[None, None, :] * CELL
    high = jnp.minimum(low + CELL, extent[:, None, None].astype(jnp.float32))
    shared = jnp.minimum(stop[..., None], high) - jnp.maximum(start[..., None], low)
    return jnp.clip(shared, 0.0) / jnp.maximum(high - low, 1.0)


def valid_share(batch: dict[str, Any], sensors: tuple[str, ...], boxes: Array) -> Array:
    """Share of the area of each box that holds valid pixels, per sensor; outside the array is invalid.

    Counts the valid bits per 8x8 cell of each sensor's finest group and assumes that valid pixels are
    spread evenly inside a cell, which costs two small products instead of a resampling.

    Args:
      boxes: float32 [B, N, 4].

    Returns:
      float32 [B, N, S] in 0..1, sensors in the order given.
    """
    shares = []
    for key in sensors:
        entry = batch[key][finest_group(key)]
        packed, extent = entry["valid"], entry["extent"]
        size, rows, bytes_ = packed.shape
        counts = jax.lax.population_count(packed).astype(jnp.float32)
        counts = jnp.pad(counts, ((0, 0), (0, -rows % CELL), (0, 0))).reshape(size, -1, CELL, bytes_).sum(2)
        top, bottom, left, right = to_pixels(entry["geometry"], boxes)
        in_rows = _overlap(top, bottom, counts.shape[1], extent[:, 0])
        in_cols = _overlap(left, right, bytes_, extent[:, 1])
        inside = jnp.einsum("bnr,brc->bnc", in_rows, counts, precision=jax.lax.Precision.HIGHEST)
        valid = jnp.sum(inside * in_cols, axis=-1)
        shares.append(valid / jnp.maximum((bottom - top) * (right - left), 1e-6))
    return jnp.clip(jnp.stack(shares, axis=-1), 0.0, 1.0)


def draw_boxes(
    key: Array,
    batch: dict[str, Any],
    sensors: tuple[str, ...],
    present: Array,
    *,
    views: int,
    tries: int,
    scale: tuple[float, float],
    aspect: tuple[float, float],
    min_valid: float,
) -> tuple[Array, Array]:
    """Draws one box per sample and view: the first of ``tries`` candidates that is valid enough, else the best one.

    A candidate is judged by the least valid of the sensors present, because the view may show any of them.

    Args:
      present: bool [B, S].
      min_valid: valid share, 0..1, at which a candidate is valid enough.

    Returns:
      boxes float32 [B, V, 4], and per sensor the valid share inside them, float32 [B, V, S].
    """
    covered, ratio = covered_range(batch, sensors, present)
    proposed = propose_boxes(key, covered, ratio, views * tries, scale, aspect)
    shares = valid_share(batch, sensors, proposed).reshape(-1, views, tries, len(sensors))
    least = jnp.min(jnp.where(present[:, None, None, :], shares, 1.0), axis=-1)
    first = 2.0 + jnp.arange(tries, 0, -1, dtype=jnp.float32)[None, None, :]  # beats every share, earliest highest
    best = jnp.argmax(jnp.where(least >= min_valid, first, least), axis=-1)
    chosen = jax.nn.one_hot(best, tries, dtype=bool)[..., None]  # a select: a gather might cross shards
    proposed = proposed.reshape(-1, views, tries, 4)
    return jnp.sum(jnp.where(chosen, proposed, 0.0), axis=2), jnp.sum(jnp.where(chosen, shares, 0.0), axis=2)
