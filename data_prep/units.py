"""The unit that a manifest, a flag or a raster states of delivered values; ``terrafm_jax.units`` has the words."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from data_prep.harmonize import Offset
from data_prep.raster import BadInput, Raster
from terrafm_jax.sensors import BASELINE_OFFSET, SENSORS
from terrafm_jax.units import AS_STORED, DN_PER_REFLECTANCE, SPELLINGS, UNITS, UnitError, makes_reflectance

_NODATA = re.compile(r"(?i)no-?data(?:\s*value)?\s*[:=]?\s*(nan\b|[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?)")


def delivered_units(key: str) -> tuple[str, ...]:
    """The units that a sensor may be delivered in."""
    return UNITS[SENSORS[key].unit]


def expected(key: str) -> str:
    """The words for people."""
    return "dB or power (= linear)" if key == "s1" else "DN (= reflectance x 10000) or reflectance (0..1)"


def stated_unit(key: str, text: str) -> str:
    """The unit that a text such as ``gamma0 in dB, nodata -99`` states for a sensor, "" where it states nothing.

    ``DN = reflectance*10000`` is DN. Raises ValueError on texts without a known word, with a word of the other
    sensor or with several units: a wrong unit is not seen again once tiles are cut.
    """
    rest = _NODATA.sub("", text)
    words = re.findall(r"[a-z]+", rest.lower())
    if not words:
        return ""
    found = {SPELLINGS[word] for word in words if word in SPELLINGS}
    if "DN" in found or re.search(r"(?i)reflectance\s*[*x×]\s*10", rest):
        found = (found | {"DN"}) - {"reflectance"}
    if len(found) != 1 or not found <= set(delivered_units(key)) or "amplitude" in words:
        raise ValueError(f"units {text!r}: expected {expected(key)} for {key}")
    return found.pop()


def stated_nodata(text: str) -> str:
    """The number (or ``nan``) of ``dB, nodata -99`` or ``dB; NoData = -3.4e38``, "" where the text names none."""
    found = _NODATA.search(text)
    return found.group(1) if found else ""


def unit_word(key: str, text: str) -> str:
    """The unit that one word of a flag names, ``auto`` as it is. Raises ArgumentTypeError."""
    word = text.strip().lower()
    try:
        return word if word == "auto" else stated_unit(key, word)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def radar_scaled(raster: Raster) -> Raster:
    """Pixels as the file says that they are to be scaled (``Raster.scaling``), float32, NaN for its nodata."""
    scale, shift = raster.scaling
    pixels = raster.pixels.astype(np.float32)
    if raster.nodata is not None:
        pixels[raster.pixels == raster.nodata] = np.nan
    return dataclasses.replace(
        raster, pixels=pixels * np.float32(scale) + np.float32(shift), nodata=np.nan, scaling=AS_STORED
    )


def stated_offset(
    key: str, rasters: Mapping[str, Raster], unit: str, offset: Offset | None
) -> tuple[str, Offset | None]:
    """Unit and offset of optical bands whose files state a scale and an offset (``Raster.scaling``).

    Stored is what is delivered, so such bands must be DN that scaling makes reflectance, or DN as they are: the
    offset then says what is still inside.

    Args:
      unit, offset: as manifest or flags have them.

    Raises:
      BadInput: bands scaled otherwise or each in its own way, or an offset that contradicts ``offset``.
    """
    sensor = SENSORS[key]
    stated: dict[tuple[float, float], list[str]] = {}
    for name, raster in rasters.items():
        stated.setdefault(raster.scaling, []).append(name)
    if not stated or set(stated) == {AS_STORED}:
        return unit, offset
    try:
        made = makes_reflectance(sensor, list(stated))
    except UnitError as error:
        raise BadInput(f"{key}: {error}") from error
    factor = DN_PER_REFLECTANCE if made else 1.0
    inside = sorted({round(-shift * factor, 3) for _, shift in stated})
    said = ", ".join(f"scale {a:g} and offset {b:g} in {', '.join(names)}" for (a, b), names in stated.items())
    if any(abs(scale * factor - 1.0) > 1e-6 for scale, _ in stated) or len(inside) > 1:
        raise BadInput(
            f"{key}: the files state {said} (gdalinfo), expected a scale of {1 / DN_PER_REFLECTANCE:g} or 1, the same "
            f"in all bands: what is stored is no DN (reflectance x {DN_PER_REFLECTANCE:.0f})"
        )
    if not 0 <= inside[0] <= BASELINE_OFFSET:
        raise BadInput(f"{key}: the files state {said}: {inside[0]:g} DN inside, expected 0..{BASELINE_OFFSET:.0f}")
    if inside[0] and offset is not None and offset.value != inside[0]:
        raise BadInput(f"{key}: the files state {said}: {inside[0]:g} DN inside, the manifest {offset.value:g}")
    return "DN" if made else unit, Offset(inside[0], "file") if inside[0] else offset
