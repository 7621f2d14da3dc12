"""Sentinel-2 of one cell: bands checked, stacked per resolution group, origins snapped, offset decided."""

from __future__ import annotations

from functools import reduce

import numpy as np

from data_prep.delivered import SensorInput
from data_prep.doubts import check_cirrus, eight_bit, repeated_low
from data_prep.harmonize import decide_offset, measured, misplaced, pixel_offset, snap_origin
from data_prep.quality import is_constant
from data_prep.raster import BadInput, Grid, Raster
from data_prep.records import Group, Layer
from terrafm_jax.sensors import BASELINE_OFFSET, SENSORS, Sensor
from terrafm_jax.units import DN_PER_REFLECTANCE, MAX_DN, MAX_REFLECTANCE

ROUNDING = 0.02  # DN: what float32 loses of a quotient, while a resampled value lies anywhere between two DN


def optical(key: str, given: SensorInput, snap: str) -> Layer:
    """Delivered bands -> stored form of ``s2_l1c`` or ``s2_l2a``.

    Args:
      key: the sensor.
      given: all bands of the model, and B10 of L1C if there is one (only for the offset and nodata).
      snap: ``on``, ``off`` or ``auto``, see ``cell.Options``.

    Raises:
      BadInput: a band is missing, has another size, CRS or place than its group, no valid DN or reflectance, or
        is surely another band.
    """
    sensor = SENSORS[key]
    missing = [name for name in sensor.band_names if name not in given.bands]
    if missing:
        raise BadInput(f"{key}: missing band {', '.join(missing)}, found {sorted(given.bands)}")
    rasters = {name: given.bands[name] for name in (*sensor.band_names, *_dropped(sensor, given))}
    as_dn = _from_reflectance if given.unit == "reflectance" else _as_dn
    pixels = {name: as_dn(key, name, raster) for name, raster in rasters.items()}
    grids = _grids(key, sensor, rasters)
    if snap == "on" or (snap == "auto" and misplaced(grids)):
        grids = {name: snap_origin(grid) for name, grid in grids.items()}
    groups = {name: list(bands) for name, bands in sensor.groups.items()}
    for name in _dropped(sensor, given):  # B10 counts as a band of its own group
        if pixels[name].shape == pixels[groups["60m"][0]].shape:
            groups["60m"].append(name)
    empty = {name: _all_zero([pixels[b] for b in bands]) for name, bands in groups.items()}
    valid = measured(empty, grids)
    gone = {name: there for name, raster in rasters.items() if (there := _gone(raster)) is not None}
    for name, bands in sensor.groups.items():  # zero in one band is dark ground, another declared value is not
        for band in gone.keys() & set(bands):
            valid[name] = valid[name] & ~gone[band]
    by_band = {b: valid[g] for g, bands in sensor.groups.items() for b in bands}
    for name in _dropped(sensor, given):
        same = name not in gone and pixels[name].shape == valid["60m"].shape
        by_band[name] = valid["60m"] if same else pixels[name] > 0
    finest = sensor.groups["10m"]
    if all(is_constant(pixels[b], by_band[b]) for b in finest):
        raise BadInput(f"{key}: one value in all pixels of {', '.join(finest)}, not a measurement")
    if key == "s2_l1c":
        check_cirrus(pixels, by_band)
    verdict = pixel_offset(key, pixels, by_band) if given.offset is None else None
    # Whoever computed reflectance has subtracted the offset that the product id states.
    product = "" if given.unit == "reflectance" else given.product
    offset = given.offset or decide_offset(product, verdict)
    stored = {g: Group(tuple(pixels[b] for b in bands), valid[g], grids[g]) for g, bands in sensor.groups.items()}
    return Layer(given, stored, offset, verdict)


def _all_zero(bands: list[np.ndarray]) -> np.ndarray:
    """bool [H, W]: zero in every band [H, W]; a band without any zero spares looking at the others."""
    if bands[0].size and bands[0].min() > 0:
        return np.zeros(bands[0].shape, bool)
    return reduce(np.bitwise_or, bands) == 0


def _dropped(sensor: Sensor, given: SensorInput) -> list[str]:
    return [band.name for band in sensor.dropped if band.name in given.bands]


def _as_dn(key: str, name: str, raster: Raster) -> np.ndarray:
    """Delivered pixels as uint16, values unchanged, the file's nodata as 0. Raises BadInput."""
    pixels = _without_nodata(key, name, raster)
    if pixels.dtype == np.uint16:
        return pixels
    if pixels.dtype.kind == "f" and (pixels != np.rint(pixels)).any():
        raise BadInput(
            f"{key} {name}: fractional values, expected DN (reflectance x 10000); for 0..1 state the unit reflectance "
            "in the units column of a manifest or with --s2-unit"
        )
    if pixels.size and (pixels.min() < 0 or pixels.max() > MAX_DN):
        raise BadInput(
            f"{key} {name}: values {pixels.min()}..{pixels.max()} are no DN (0..{MAX_DN:.0f}){_undeclared(pixels)}"
        )
    return pixels.astype(np.uint16)


def _from_reflectance(key: str, name: str, raster: Raster) -> np.ndarray:
    """Reflectance 0..1 as the DN (uint16) that it was computed from. Raises BadInput where that is not exact."""
    what, pixels = f"{key} {name}", _without_nodata(key, name, raster)
    if pixels.dtype.kind != "f":
        raise BadInput(f"{what}: whole numbers of type {pixels.dtype} are no reflectance (0..1); DN?")
    if pixels.size and (pixels.min() < 0 or pixels.max() > MAX_REFLECTANCE):
        raise BadInput(
            f"{what}: values {pixels.min():.6g}..{pixels.max():.6g} are no reflectance that DN can hold "
            f"(0..{MAX_REFLECTANCE}){_undeclared(pixels)}; give the DN"
        )
    scaled = pixels.astype(np.float64) * DN_PER_REFLECTANCE
    whole = np.rint(scaled)
    rest = float(np.abs(scaled - whole).max(initial=0.0))
    if rest > ROUNDING:
        raise BadInput(
            f"{what}: reflectance is no multiple of 1/{DN_PER_REFLECTANCE:.0f} (up to {rest:.2f} DN beside it), so it "
            "cannot be stored as DN without loss: resampled or compressed? Give the DN"
        )
    return whole.astype(np.uint16)


def _without_nodata(key: str, name: str, raster: Raster) -> np.ndarray:
    """Delivered pixels, the file's nodata as 0. Raises BadInput on NaN and on previews."""
    pixels = raster.pixels
    eight_bit(f"{key} {name}", pixels)
    gone = _gone(raster)
    if gone is not None:
        pixels = np.where(gone, pixels.dtype.type(0), pixels)
    if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
        raise BadInput(
            f"{key} {name}: NaN or infinite values; if they mean nodata, the file must say so (gdal_edit.py -a_nodata "
            "nan FILE), or the nodata column of a manifest (nan)"
        )
    return pixels


def _gone(raster: Raster) -> np.ndarray | None:
    """bool [H, W]: pixels that hold the declared nodata; None where there are none, or where zero stands for it."""
    if not raster.nodata:
        return None
    gone = np.isnan(raster.pixels) if np.isnan(raster.nodata) else raster.pixels == raster.nodata
    return gone if gone.any() else None


def _undeclared(pixels: np.ndarray) -> str:
    """The remedy where one value below zero stands for nodata, or dark pixels lost an offset."""
    low = repeated_low(pixels, 0)
    if low is not None:
        return f"; if {low:g} means nodata, name it in the nodata column of a manifest"
    if pixels.dtype.kind == "i" and -BASELINE_OFFSET <= pixels.min() < 0:
        return "; was the baseline offset subtracted? Give the DN as delivered (+1000) and offset 1000 in a manifest"
    return ""


def _grids(key: str, sensor: Sensor, rasters: dict[str, Raster]) -> dict[str, Grid]:
    """The common grid of each resolution group. Raises BadInput where bands contradict each other."""
    grids = {}
    for name, bands in sensor.groups.items():
        found = {b: rasters[b].grid for b in bands}
        first = found[bands[0]]
        odd = {b: (g.crs, g.shape, g.transform[:3]) for b, g in found.items() if not _equal(g, first)}
        if odd:
            what = "wrong size" if any(g.shape != first.shape for g in found.values()) else "wrong CRS or place"
            raise BadInput(
                f"{key}: {what}, {bands[0]} is {first.crs} {first.shape} at {first.transform[:3]}, but {odd}"
            )
        grids[name] = first
    finest = grids[next(iter(grids))]
    for name, grid in grids.items():
        if grid.crs != finest.crs:
            raise BadInput(f"{key}: {name} bands are in {grid.crs}, the finest in {finest.crs}")
        slack = 1.01 * grid.transform[0]
        off = [abs(a - b) for a, b in zip(grid.bounds(), finest.bounds(), strict=True)]
        if max(off) > slack:
            raise BadInput(
                f"{key}: wrong size, {name} bands {grid.shape} end {max(off):.6g} units of the CRS off {finest.shape}"
            )
    return grids


def _equal(grid: Grid, other: Grid) -> bool:
    step = abs(other.transform[0])
    same_step = abs(grid.transform[0] - step) <= 1e-6 * step
    close = all(abs(a - b) <= 1e-3 * step for a, b in zip(grid.bounds(), other.bounds(), strict=True))
    return grid.crs == other.crs and grid.shape == other.shape and same_step and close
