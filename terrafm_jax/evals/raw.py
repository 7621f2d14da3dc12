"""Raw band statistics as features: mean and standard deviation per band, the baseline anybody would try first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terrafm_jax.sensors import SENSORS


def band_statistics(images: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """float32 [B, 2C]: means, then standard deviations of ``images [B, H, W, C]`` over the valid pixels [B, H, W].

    A sample without a valid pixel gets zeros.
    """
    images = np.asarray(images, np.float64)
    weight = np.ones(images.shape[:3]) if valid is None else np.asarray(valid, np.float64)
    weight = weight[..., None] * np.isfinite(images)
    images = np.where(np.isfinite(images), images, 0.0)
    total = np.maximum(weight.sum((1, 2)), 1.0)
    mean = (images * weight).sum((1, 2)) / total
    variance = (((images - mean[:, None, None]) ** 2) * weight).sum((1, 2)) / total
    return np.concatenate([mean, np.sqrt(variance)], axis=1).astype(np.float32)


def fused_statistics(images: Mapping[str, np.ndarray]) -> np.ndarray:
    """Band statistics of several sensors side by side, in the order of the table: float32 [B, 2 * all bands]."""
    return np.concatenate([band_statistics(images[k]) for k in SENSORS if k in images], axis=1)


def batch_statistics(batch: Mapping[str, Any], sensors: Sequence[str]) -> np.ndarray:
    """Band statistics of prepared tiles at native sampling, offset removed: float32 [B, sum of 2C].

    ``batch`` as data/tiles.py lays it out; sensors in the order given, bands in canonical order; an absent sensor
    leaves zeros.
    """
    keys = list(SENSORS)
    present, offset = np.asarray(batch["present"]), np.asarray(batch["offset"])
    columns = keys if present.shape[1] == len(keys) else [k for k in keys if k in sensors]
    parts = []
    for key in sensors:
        sensor, s = SENSORS[key], columns.index(key)
        found = []
        for group in sensor.groups:
            dn = np.asarray(batch[key][group]["dn"])
            valid = np.unpackbits(np.asarray(batch[key][group]["valid"]), axis=2, count=dn.shape[2]).astype(bool)
            rows, cols = np.asarray(batch[key][group]["extent"]).T
            valid &= np.arange(dn.shape[1])[None, :, None] < rows[:, None, None]
            valid &= np.arange(dn.shape[2])[None, None, :] < cols[:, None, None]
            found.append(band_statistics(dn, valid).reshape(len(dn), 2, -1))
        both = np.concatenate(found, axis=2)[:, :, list(sensor.group_order)] * np.float32(sensor.scale)
        both[:, 0] -= offset[:, s, None]
        parts.append((both * present[:, s, None, None]).reshape(len(both), -1))
    return np.concatenate(parts, axis=1).astype(np.float32)


def standardize(train: np.ndarray, *others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Scales the columns of all arrays [n, d] by mean and deviation of ``train``; constant columns become 0."""
    mean, std = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64)
    scale = np.where(std > 1e-12, 1.0 / np.maximum(std, 1e-12), 0.0)
    return tuple(((a - mean) * scale).astype(np.float32) for a in (train, *others))
