"""Batches of fake tiles for the tests of views, and a slow resampler written independently of the package."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import numpy as np

from terrafm_jax.sensors import SENSOR_KEYS, SENSORS, Statistics
from terrafm_jax.ssl.views import ViewSet, ViewSpec, make_views

CASES = {  # arguments of fake_batch with sides of 60
    "plain": {},
    "small extent on a canvas": {"canvas": 72},
    "shifted coarse grids": {"shift": 0.58},
    "nodata": {"hole": 0.3},
    "all of it": {"canvas": 72, "shift": 0.58, "hole": 0.2},
}
STATS = {k: Statistics.published().arrays(k) for k in SENSOR_KEYS}


@functools.partial(jax.jit, static_argnums=0)
def jitted_views(spec: ViewSpec, batch: dict[str, Any], key: jax.Array) -> tuple[ViewSet, ViewSet]:
    """make_views with the published statistics, compiled once per spec and shapes."""
    return make_views(spec, STATS, batch, key)


def views_of(spec: ViewSpec, batch: dict[str, Any], seed: int = 0) -> tuple[ViewSet, ViewSet]:
    """The view sets of a batch as NumPy arrays."""
    return jax.device_get(jitted_views(spec, batch, jax.random.key(seed)))


def as_columns(x: Any, patch: int) -> np.ndarray:
    """Patches in the plain layout [..., h, w, p * p * C] -> the column layout [..., h, p / m, w, m * C * p]."""
    *outer, h, w, values = x.shape
    bands = values // patch**2
    m = 128 // math.gcd(128, bands * patch)  # 128 lanes are full with so many columns
    m = m if patch % m == 0 else 1
    x = np.asarray(x).reshape(-1, h, w, patch, patch // m, m, bands)
    return x.transpose(0, 1, 4, 2, 5, 6, 3).reshape(*outer, h, patch // m, w, m * bands * patch)


def fake_batch(
    size: int,
    side: int = 60,
    *,
    sensors: tuple[str, ...] = SENSOR_KEYS,
    canvas: int | None = None,
    shift: float = 0.0,
    hole: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Random tiles of side x side 10 m pixels (a multiple of 6), as described in data/tiles.py.

    Args:
      canvas: side of the zero-padded 10 m canvas.
      shift: coarse groups are shifted by up to this many of their own pixels, differently per sample.
      hole: share of the pixels that are nodata, in one block per sample.
    """
    rng = np.random.default_rng(seed)
    batch: dict[str, Any] = {
        "index": np.arange(size, dtype=np.int32),
        "landcover": np.zeros(size, np.int32),
        "present": np.ones((size, len(sensors)), bool),
        "offset": np.zeros((size, len(sensors)), np.float32),
    }
    for column, key in enumerate(sensors):
        batch["offset"][:, column] = 0 if key == "s1" else rng.choice([0, 1000], size)
        batch[key] = {}
        for group, names in SENSORS[key].groups.items():
            factor = int(group[:-1]) // 10
            inner, outer = side // factor, (canvas or side) // factor
            low, high = (-3000, 500) if key == "s1" else (1, 9000)
            dn = np.zeros((size, outer, outer, len(names)), SENSORS[key].dtype)
            dn[:, :inner, :inner] = rng.integers(low, high, (size, inner, inner, len(names)))
            valid = np.zeros((size, outer, outer), bool)
            valid[:, :inner, :inner] = True
            for i in range(size):
                cut = round(inner * hole**0.5)
                top, left = rng.integers(0, inner - cut + 1, 2)
                valid[i, top : top + cut, left : left + cut] = False
            moved = rng.uniform(-shift, shift, (size, 2)) if factor > 1 else np.zeros((size, 2))
            geometry = np.stack([moved[:, 0], np.full(size, inner), moved[:, 1], np.full(size, inner)], axis=1)
            batch[key][group] = {
                "dn": dn,
                "valid": np.packbits(valid, axis=2),
                "geometry": geometry.astype(np.float32),
                "extent": np.full((size, 2), inner, np.int32),
            }
    return batch


def _taps(first: float, last: float, flip: bool, out: int, extent: int) -> list[list[tuple[int, float]]]:
    """(index, weight) of the stored pixels that every output pixel reads along one axis."""
    step = (last - first) / out
    radius = max(step, 1.0)
    taps = []
    for i in range(out):
        at = first + step * (i + 0.5)
        if -1.0 <= at < 0.0 or extent < at <= extent + 1.0:  # a shifted grid: its edge value goes on for a pixel
            at = min(max(at, 0.0), float(extent))
        middles = [(k, abs(k + 0.5 - at) / radius) for k in range(extent)]
        taps.append([(k, 1.0 - d) for k, d in middles if d < 1.0])
    return taps[::-1] if flip else taps


def slow_view(
    entry: dict[str, np.ndarray], i: int, box: np.ndarray, flip: np.ndarray, out: int
) -> tuple[np.ndarray, np.ndarray]:
    """One group of sample i cut pixel by pixel in float64: DN [out, out, bands] and share of weight on valid pixels."""
    y0, sy, x0, sx = (float(v) for v in entry["geometry"][i])
    rows, cols = (int(v) for v in entry["extent"][i])
    valid = np.unpackbits(entry["valid"][i], axis=1)
    dn = entry["dn"][i].astype(np.float64)
    down = _taps(y0 + sy * box[0], y0 + sy * box[2], bool(flip[0]), out, rows)
    across = _taps(x0 + sx * box[1], x0 + sx * box[3], bool(flip[1]), out, cols)
    values, share = np.zeros((out, out, dn.shape[-1])), np.zeros((out, out))
    for r, row_taps in enumerate(down):
        for c, col_taps in enumerate(across):
            total, kept, summed = 0.0, 0.0, np.zeros(dn.shape[-1])
            for y, wy in row_taps:
                for x, wx in col_taps:
                    total += wy * wx
                    if valid[y, x]:
                        kept += wy * wx
                        summed += wy * wx * dn[y, x]
            if kept > 0:
                values[r, c] = summed / kept
                share[r, c] = kept / total
    return values, share


def unpatch(patches: np.ndarray, patch: int) -> np.ndarray:
    """[..., h, w, p * p * C] -> [..., H, W, C], in plain NumPy."""
    *lead, h, w, width = patches.shape
    x = np.asarray(patches, np.float32).reshape(*lead, h, w, patch, patch, width // patch**2)
    x = np.moveaxis(x, -3, -4)
    return x.reshape(*lead, h * patch, w * patch, -1)
