"""Batches without data: shapes for ahead-of-time compilation, random tiles for benchmarks and tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from terrafm_jax import landcover
from terrafm_jax.data import canvas
from terrafm_jax.sensors import BASELINE_OFFSET, SENSORS

TILE_METERS = 5340  # a quarter of a Major-TOM cell: 534 px at 10 m


def group_side(meters: int, group: str) -> int:
    """Pixels per side of a resolution group ("10m", "20m", "60m") of a square tile."""
    return -(-meters // int(group.removesuffix("m")))


def batch_shapes(
    sensors: Sequence[str], batch_size: int, meters: int = TILE_METERS, sharding: Sharding | None = None
) -> dict[str, Any]:
    """ShapeDtypeStructs of a batch of square tiles (see ``data/tiles.py``), all with the same sharding."""

    sides = {name: group_side(meters, name.split("/")[1]) for name in canvas.group_names(sensors)}
    square = canvas.Canvas({name: (side, side) for name, side in sides.items()})
    arrays = canvas.batch_spec(square, sensors, batch_size)
    return canvas.nested(
        {
            path: jax.ShapeDtypeStruct(shape, np.dtype(dtype), sharding=sharding)
            for path, (shape, dtype) in arrays.items()
        }
    )


def random_batch(
    sensors: Sequence[str], batch_size: int, meters: int = TILE_METERS, seed: int = 0, complete: bool = True
) -> dict[str, Any]:
    """NumPy batch of noise with the published mean and deviation per band; all pixels valid.

    With ``complete`` False about a third of the records lack one sensor (never their last one).
    """
    rng = np.random.default_rng(seed)
    shapes = batch_shapes(sensors, batch_size, meters)
    present = np.ones((batch_size, len(sensors)), bool)
    if not complete and len(sensors) > 1:
        for row in np.flatnonzero(rng.random(batch_size) < 1 / 3):
            present[row, rng.choice(len(sensors))] = False
    batch: dict[str, Any] = {
        "index": np.arange(batch_size, dtype=np.int32),
        "landcover": rng.integers(0, landcover.NUM_CLASSES, batch_size).astype(np.int32),
        "present": present,
        "offset": np.where(rng.random((batch_size, len(sensors))) < 0.5, BASELINE_OFFSET, 0.0).astype(np.float32),
    }
    batch["offset"][:, [SENSORS[key].unit != "DN" for key in sensors]] = 0.0  # dB have none
    for key in sensors:
        batch[key] = {group: _random_group(rng, key, group, entry) for group, entry in shapes[key].items()}
    return batch


def _random_group(rng: np.random.Generator, key: str, group: str, shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    s = SENSORS[key]
    columns = list(s.indices(s.groups[group]))
    mean, std = (np.asarray(v, np.float32)[columns] / s.scale for v in (s.mean, s.std))
    limits = np.iinfo(s.dtype)
    noise = mean + std * rng.standard_normal(shapes["dn"].shape, np.float32)
    side = shapes["dn"].shape[1]
    count = shapes["dn"].shape[0]
    low = 1 if s.nodata == 0 else limits.min + 1
    return {
        "dn": np.clip(noise, low, limits.max).astype(s.dtype),
        "valid": np.full(shapes["valid"].shape, 255, np.uint8),
        "geometry": np.tile(np.array([0, side, 0, side], np.float32), (count, 1)),
        "extent": np.full((count, 2), side, np.int32),
    }
