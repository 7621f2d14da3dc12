"""Units of what users hand in: the words for them, conversion, and refusal of values that a unit cannot hold.

:mod:`terrafm_jax.checks` asks whether values that a unit could hold really are in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from terrafm_jax.sensors import Sensor

# The sensor's unit -> units that its values may be given in; the first is the default.
UNITS = {"DN": ("DN", "reflectance"), "dB": ("dB", "power")}
SYNONYMS = {"linear": "power"}
# What people write, in lower case, and the unit that is meant.
SPELLINGS = {unit.lower(): unit for units in UNITS.values() for unit in units} | SYNONYMS
# As commands and arguments spell them.
WORDS = {own: tuple(unit.lower() for unit in units) for own, units in UNITS.items()}
DN_PER_REFLECTANCE = 10_000.0
MAX_DN = 65_535.0  # uint16
MAX_REFLECTANCE = MAX_DN / DN_PER_REFLECTANCE
_DB_RANGE = (-150.0, 100.0)  # below any noise floor, above any corner reflector
MAX_POWER = 1e7
NOISE_FLOOR = -60.0  # dB: thirty below the noise of the instrument, so what lies there was never measured
_FLOOR = 1e-10  # power below it has no logarithm worth keeping
_OF_DN = 0.01  # a raster that states a scale below it makes reflectance of DN; one above it keeps the unit
AS_STORED = (1.0, 0.0)


class UnitError(ValueError):
    """Values cannot be in the unit they were given in; says what they look like and how to say so."""


def stated_scaling(source: Any, index: int) -> tuple[float, float]:
    """Scale and offset that an open raster itself states for band ``index`` (from 1): its values are
    ``stored * scale + offset`` (GDAL's tags). :data:`AS_STORED` where it states none.
    """
    return float(source.scales[index - 1]), float(source.offsets[index - 1])


def makes_reflectance(sensor: Sensor, stated: Sequence[tuple[float, float]]) -> bool:
    """Whether the bands of an optical raster say themselves (:func:`stated_scaling`) that scaling makes reflectance.

    Raises:
      UnitError: some bands do and others do not.
    """
    scales = sorted({scale for scale, _ in stated})
    if sensor.unit != "DN" or not scales or scales[0] >= _OF_DN:
        return False
    if scales[-1] >= _OF_DN:
        raise UnitError(f"its bands state the scales {scales}; rewrite them with one scale")
    return True


def unit_word(text: str) -> str:
    """A unit as ``UNITS`` spells it: case does not count, ``linear`` is power. Unknown words stay."""
    return SPELLINGS.get(text.strip().lower(), text)


def word(given: str | None, sensor: Sensor) -> str:
    """The word for a unit in any spelling, the default for None or nothing.

    Raises:
      UnitError: it is none of the sensor's.
    """
    allowed = WORDS[sensor.unit]
    if given is not None and not isinstance(given, str):
        raise UnitError(f"{sensor.key}: unit {given!r}; expected one of {list(allowed)}")
    if not given:
        return allowed[0]
    found = SYNONYMS.get(given.strip().lower(), given.strip().lower())
    if found not in allowed:
        same = [f"{k} = {v}" for k, v in SYNONYMS.items() if v in allowed]
        raise UnitError(
            f"{sensor.key}: unit {given!r}; expected one of {list(allowed)}{''.join(f' ({s})' for s in same)}"
        )
    return found


def to_sensor_unit(values: np.ndarray, sensor: Sensor, unit: str | None, ignore: np.ndarray) -> np.ndarray:
    """Checks and converts ``values [B, H, W, C]`` to float32 DN or dB.

    Args:
      unit: see :func:`word`; None = the sensor's own.
      ignore: bool [B, H, W], pixels that are not measurements.

    Raises:
      UnitError: the unit is not one of the sensor's, or the values cannot be in it.
    """
    used = word(unit, sensor)
    seen = values[~ignore]
    if seen.size:
        _refuse_impossible(seen, sensor, used)
    if used == "reflectance":
        return values.astype(np.float32) * np.float32(DN_PER_REFLECTANCE)
    if used == "power":
        return (10.0 * np.log10(np.maximum(values.astype(np.float32), _FLOOR))).astype(np.float32)
    return values.astype(np.float32)


def _refuse_impossible(seen: np.ndarray, sensor: Sensor, unit: str) -> None:
    low, high = float(seen.min()), float(seen.max())
    shown = {"dn": "DN", "db": "dB"}.get(unit, unit)
    found = f"{sensor.key}: values from {low:g} to {high:g} cannot be {shown}"
    if unit == "dn" and (high > MAX_DN or low < -MAX_DN):
        raise UnitError(f"{found} (16 bits hold at most {MAX_DN:g}); mask nodata with mask=")
    if unit == "reflectance" and (high > MAX_REFLECTANCE or low < -1.0):
        raise UnitError(
            f"{found} (16 bits / 10000 is {MAX_REFLECTANCE:g}); they look like DN: units={{'{sensor.key}': 'dn'}}"
        )
    if unit == "power" and low < 0.0:
        raise UnitError(f"{found} (power is not negative); they look like dB: units={{'{sensor.key}': 'db'}}")
    if unit == "power" and high > MAX_POWER:
        raise UnitError(f"{found}; calibrate to gamma0 or sigma0 first")
    if unit == "db" and not (_DB_RANGE[0] <= low and high <= _DB_RANGE[1]):
        raise UnitError(f"{found} (expected {_DB_RANGE[0]:g} to {_DB_RANGE[1]:g}); mask nodata with mask=")
