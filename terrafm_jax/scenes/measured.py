"""Which pixels of a date were measured, and as what: stored numbers -> harmonized DN or linear power with NaN."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import rasterio
from rasterio.enums import Resampling
from rasterio.warp import reproject

from terrafm_jax.scenes.layers import Acquisition, Layer
from terrafm_jax.units import AS_STORED, DN_PER_REFLECTANCE, MAX_DN, MAX_POWER, stated_scaling

_LARGEST = {"s1": (MAX_POWER, "power"), "s2_l1c": (MAX_DN, "DN"), "s2_l2a": (MAX_DN, "DN")}


@dataclasses.dataclass(frozen=True)
class Part:
    """Bands of one resolution under a part of the scene's grid: float32 [layers, rows, columns] as stored."""

    layers: tuple[Layer, ...]
    data: np.ndarray
    crs: Any
    transform: Any


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a file says of one band: its nodata (as stored), and how stored numbers become values."""

    nodata: float | None
    scale: float = 1.0
    shift: float = 0.0

    @classmethod
    def of(cls, source: rasterio.DatasetReader, index: int) -> Stored:
        return cls(source.nodatavals[index - 1], *stated_scaling(source, index))


def nothing(parts: Sequence[Part]) -> list[np.ndarray]:
    """bool [rows, columns] for each resolution of a date: pixels without a value in any band, whatever its resolution.

    Zero in all bands of one resolution alone is dark ground, such as water in those of 20 m. The edge of a swath runs
    through coarse pixels that still hold values, so an empty pixel beside them is enough.
    """
    empty = [~part.data.any(0) for part in parts]
    result = [own.copy() for own in empty]
    for i, part in enumerate(parts):
        for j, other in enumerate(parts):
            if i != j and result[i].any():
                result[i] &= _near(empty[j], other, part) if empty[j].any() else False
    return result


def _near(empty: np.ndarray, other: Part, part: Part) -> np.ndarray:
    """bool [rows, columns] of ``part``: an empty pixel of ``other`` lies there or beside it, or none at all."""
    holds = np.zeros(part.data.shape[1:], np.uint8)
    reproject(
        (~_grown(empty)).astype(np.uint8),
        holds,
        src_transform=other.transform,
        src_crs=other.crs,
        dst_transform=part.transform,
        dst_crs=part.crs,
        resampling=Resampling.min,
        tolerance=0.0,
    )
    return holds == 0


def _grown(mask: np.ndarray) -> np.ndarray:
    """bool [rows, columns] with the eight neighbors of every pixel."""
    wide = np.pad(mask, 1)
    tall = wide[:-2] | wide[1:-1] | wide[2:]
    return tall[:, :-2] | tall[:, 1:-1] | tall[:, 2:]


def measured(
    data: np.ndarray, date: Acquisition, stored: Sequence[Stored], empty: np.ndarray, note: Callable[[str], None]
) -> np.ndarray:
    """Harmonized DN or linear power, NaN where nothing was measured; ``data`` float32 [bands, H, W] may be changed.

    A pixel of Sentinel-2 is nodata where any band holds a declared value other than zero, or where ``empty`` bool
    [H, W] is set (zero, see :func:`nothing`); of Sentinel-1 where any band lacks a finite, positive power. Values
    that the unit cannot hold count as nodata too: one of them should not end a job of hours.
    """
    bad = np.zeros(data.shape[1:], bool)
    if not np.isfinite(data.sum(dtype=np.float64)):  # NaN and infinity survive every sum
        bad |= ~np.isfinite(data).all(0)
    for band, file in zip(data, stored, strict=True):
        for v in (file.nodata, date.nodata):
            if v is not None and not np.isnan(v) and (v != 0 or date.sensor == "s1"):
                bad |= band == np.float32(v)
    if date.sensor != "s1":
        bad |= empty
    for band, file in zip(data, stored, strict=True):
        if (file.scale, file.shift) != AS_STORED:
            band *= np.float32(file.scale)
            band += np.float32(file.shift)
    if date.sensor == "s1":
        with np.errstate(over="ignore", invalid="ignore"):
            data = 10.0 ** (data / 10.0) if date.unit == "db" else data
        bad |= ~(data > 0).all(0)
    else:
        if date.unit == "reflectance":
            data *= DN_PER_REFLECTANCE
        if date.offset:
            data -= date.offset
    limit, unit = _LARGEST[date.sensor]
    if not (-limit <= data.min() and data.max() <= limit):  # NaN, too, makes us look closer
        impossible = ~bad & (np.abs(data) > limit).any(0)
        if impossible.any():
            note(f"{date.paths[0]}: holds values beyond {limit:g}, which cannot be {unit}; they count as nodata")
        bad |= impossible
    if bad.any():
        data[:, bad] = np.nan
    return data
