"""Values against what they are said to be: what is surely wrong is refused, what looks wrong is told.

The limits lie far outside of what real products hold, because a cell that is refused wrongly is lost. What a
single cell cannot show (a median below zero, bands in the wrong places over water) is looked for in the
statistics of the whole data set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.radar import NOTHING
from data_prep.raster import BadInput, Grid, Raster, in_degrees
from terrafm_jax.checks import B10_DARK, EIGHT_BIT, UNDECLARED, exchanged, misplaced_b10, zero_share
from terrafm_jax.sensors import S1, SENSORS
from terrafm_jax.units import NOISE_FLOOR

SAMPLING = (4.0, 41.0)  # meters: S1 of 40 m (medium resolution) to pixels resampled to half of 10 m
RADAR = (-35.0, 5.0)  # dB: medians of land and sea, VV and VH, gamma0 and sigma0
_DEGREE = 111_320.0  # meters of latitude
_FEW = 16  # pixels that say nothing
_DEVIATIONS = 6.0  # published standard deviations between a median and the published mean


def check_sampling(key: str, grid: Grid) -> str:
    """What looks wrong with the size of the finest pixels of a sensor, "" if nothing does."""
    degrees = in_degrees(grid.crs)
    across, down = (abs(grid.transform[i]) * (_DEGREE if degrees else 1.0) for i in (0, 4))
    low, high = SAMPLING
    if low <= down <= high and (degrees or max(across, down) <= 1.5 * min(across, down)):  # degrees of longitude shrink
        return ""
    return (
        f"the finest pixels of {key} are {across:.3g} x {down:.3g} m, expected 10 x 10: is the georeference wrong, or "
        "is it another sensor?"
    )


def eight_bit(what: str, pixels: np.ndarray) -> None:
    """Raises BadInput on pixels of one byte: previews."""
    if pixels.dtype.itemsize == 1:
        raise BadInput(f"{what}: 8-bit values are a preview and no measurement; give the delivered product")


def thin(pixels: np.ndarray) -> np.ndarray:
    """Some five thousand pixels of a large band [H, W], all of a small one: plenty for a median."""
    step = max(1, max(pixels.shape) // 64)
    return pixels[::step, ::step]


def repeated_low(pixels: np.ndarray, below: float) -> float | None:
    """The lowest value of ``pixels`` [...] if it lies below a limit in many of them: nodata that nobody declared."""
    low = pixels.min() if pixels.size else below
    return float(low) if low < below and (pixels == low).mean() > UNDECLARED else None


def check_radar(name: str, raster: Raster, unit: str) -> None:
    """Raises BadInput where a polarization cannot be what ``unit`` (``dB``, ``power``) says."""
    what = f"s1 {name}"
    eight_bit(what, raster.pixels)
    if raster.pixels.dtype.kind == "c":
        raise BadInput(f"{what}: complex values (SLC) are no backscatter: detect, calibrate and terrain-correct them")
    values = thin(raster.pixels)
    values = values[np.isfinite(values) & (values != S1.nodata)].astype(np.float64)
    values = values if raster.nodata is None else values[values != raster.nodata]
    if unit == "power":  # which is nodata below zero, whatever the number
        low = repeated_low(values, 0)
        values = values if low is None else values[values != low]
    if values.size < _FEW:
        return
    if unit == "power":
        if np.median(values) < 0:
            raise BadInput(f"{what}: taken as power, but the median {np.median(values):.4g} is below zero: is it dB?")
        values = 10.0 * np.log10(values[values > 0])
    else:
        values = _decibels(what, values)
    if values.size < _FEW:
        return
    middle = float(np.median(values))
    if middle > RADAR[1]:
        raise BadInput(
            f"{what}: implausible backscatter, median {middle:+.1f} dB if read as {unit}, expected "
            f"{RADAR[0]:.0f}..+{RADAR[1]:.0f}: amplitude, DN or |dB|? Give calibrated power (linear) or dB"
        )
    if middle < NOISE_FLOOR:
        raise BadInput(
            f"{what}: implausible backscatter, median {middle:.1f} dB if read as {unit}, expected "
            f"{RADAR[0]:.0f}..+{RADAR[1]:.0f}: scaled dB? Give calibrated power (linear) or dB"
        )


def check_zeros(rasters: Sequence[Raster], unit: str) -> None:
    """Raises BadInput where decibels are exactly zero in all polarizations at once: SNAP's nodata, not declared."""
    if unit != "dB" or any(raster.nodata == 0 for raster in rasters):
        return
    share = zero_share([thin(raster.pixels) for raster in rasters])
    if share > UNDECLARED:
        raise BadInput(
            f"s1: nodata not declared? {100 * share:.1f} % of the pixels are exactly 0 dB in all polarizations; name 0 "
            "in the manifest's nodata column or in the files (gdal_edit.py -a_nodata 0 FILE)"
        )


def _decibels(what: str, values: np.ndarray) -> np.ndarray:
    """Values that are said to be dB, without those that become nodata. Raises BadInput."""
    if (values < 0).mean() <= 0.01:
        raise BadInput(
            f"{what}: taken as dB, but values {values.min():.4g}..{values.max():.4g} are hardly ever below zero: "
            "power (= linear) or |dB|?"
        )
    low = repeated_low(values[values > NOTHING], NOISE_FLOOR)
    if low is not None:
        raise BadInput(
            f"{what}: nodata not declared? {low:g} is no backscatter; name it in the manifest's nodata column"
        )
    return values


def check_cirrus(pixels: Mapping[str, np.ndarray], valid: Mapping[str, np.ndarray]) -> None:
    """Raises BadInput where another band of Level-1C (band -> DN [H, W]) is B10 and what is called B10 is not."""
    if "B10" not in pixels or not _median(pixels["B10"], valid["B10"]) > B10_DARK:
        return  # the usual case
    middle = {name: _median(band, valid[name]) for name, band in pixels.items()}
    if wrong := misplaced_b10({name: value for name, value in middle.items() if not np.isnan(value)}):
        raise BadInput(f"s2_l1c: {wrong}; state the order in a manifest's bands column or with --bands")


def _median(pixels: np.ndarray, valid: np.ndarray) -> float:
    """Median of the valid pixels of a band [H, W], NaN where there are too few."""
    values = thin(pixels)[thin(valid)]
    return float(np.median(values)) if values.size >= _FEW else np.nan


# --- a whole data set -------------------------------------------------------------------------


def looks_wrong(statistics: Mapping[str, Any]) -> list[str]:
    """Plain sentences on what the content of ``statistics.json`` cannot or should not hold; [] if nothing."""
    found = []
    for key, entry in statistics.get("sensors", {}).items():
        if key not in SENSORS:
            continue
        ranks = entry["percentile_ranks"]
        levels = {
            rank: {band: entry["percentiles"][i][ranks.index(rank)] for i, band in enumerate(entry["bands"])}
            for rank in (50, 99)
        }
        found += _radar_doubts(levels) if key == "s1" else _optical_doubts(key, levels)
        for i, band in enumerate(entry["bands"]):
            middle, mean, std = levels[50][band], SENSORS[key].mean[i], SENSORS[key].std[i]
            if abs(middle - mean) > _DEVIATIONS * std:
                found.append(
                    f"{key} {band}: median {middle:.0f} lies {abs(middle - mean) / std:.0f} standard deviations from "
                    f"the published mean {mean:.0f}; only snow or cloud everywhere explains that"
                )
    return found


def _radar_doubts(levels: Mapping[int, Mapping[str, float]]) -> list[str]:
    found = []
    for band, middle in levels[50].items():
        if not RADAR[0] <= middle <= RADAR[1]:
            found.append(
                f"s1 {band}: median {middle:.1f} dB, expected {RADAR[0]:.0f}..+{RADAR[1]:.0f}: amplitude, |dB| or "
                "another unit?"
            )
        elif levels[99][band] > 10:
            found.append(f"s1 {band}: p99 {levels[99][band]:.1f} dB is above +10: amplitude or |dB| in some cells?")
    vv, vh = (levels[50].get(band) for band in ("VV", "VH"))
    if vv is not None and vh is not None and (text := exchanged(vv, vh)):
        found.append(f"s1: {text}")
    return found


def _optical_doubts(key: str, levels: Mapping[int, Mapping[str, float]]) -> list[str]:
    middle, found = levels[50], []
    below = [f"{band} {value:.0f}" for band, value in middle.items() if value < 0]
    if below:
        found.append(f"{key}: medians below zero ({', '.join(below)}): wrong offset or wrong band order?")
    elif max(levels[99].values()) <= EIGHT_BIT:
        found.append(f"{key}: 99 % of the values are at most {EIGHT_BIT}: 8-bit previews and no DN?")
    elif key == "s2_l1c" and 0 <= middle["B09"] < B10_DARK / 2 and middle["B08"] > 10 * middle["B09"]:
        found.append(f"{key} B09: median {middle['B09']:.0f} is as dark as B10: wrong band order?")
    return found
