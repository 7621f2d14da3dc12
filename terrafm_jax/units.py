"""Units of what users hand to ``Model.encode``: conversion, and refusal of values that cannot be what they are called.

A declared unit wins over appearances: only impossible values are refused then. Undeclared values are
taken in the sensor's own unit (DN, dB) and refused when they clearly are something else.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from terrafm_jax.sensors import Sensor

log = logging.getLogger(__name__)

UNITS = {
    "DN": ("DN", "reflectance"),
    "dB": ("dB", "power"),
}  # sensor's unit -> accepted ones, the first is the default
_SPELLINGS = {word.lower(): word for words in UNITS.values() for word in words} | {"linear": "power"}
_DN_PER_REFLECTANCE = 10_000.0
_MAX_DN = 65_535.0  # uint16
_MAX_REFLECTANCE = _MAX_DN / _DN_PER_REFLECTANCE
_DB_RANGE = (-150.0, 100.0)  # below any noise floor, above any corner reflector
_MAX_POWER = 1e7
_SAMPLE = 1_000_000  # values looked at for doubts; impossible values are looked for in all
_FLOOR = 1e-10  # linear power below it has no logarithm worth keeping


class UnitError(ValueError):
    """Values cannot be in the unit they were given in; says what they look like and how to say so."""


def unit_word(text: str) -> str:
    """The word of ``UNITS`` for what people write: case does not count, ``linear`` is power. Unknown words stay."""
    return _SPELLINGS.get(text.strip().lower(), text)


def to_sensor_unit(values: np.ndarray, sensor: Sensor, unit: str | None, ignore: np.ndarray) -> np.ndarray:
    """Checks and converts ``values [B, H, W, C]`` to float32 DN or dB.

    Args:
      unit: one of ``UNITS[sensor.unit]`` in any spelling of :func:`unit_word`, or None (undeclared).
      ignore: bool [B, H, W], pixels that are not measurements.

    Raises:
      UnitError: the unit is not one of the sensor's, or the values cannot be in it.
    """
    allowed = UNITS[sensor.unit]
    unit = None if unit is None else unit_word(unit)
    if unit is not None and unit not in allowed:
        raise UnitError(f"{sensor.key}: unit {unit!r}; expected one of {list(allowed)}")
    used = unit or allowed[0]
    seen = values[~ignore]
    if seen.size:
        _refuse_impossible(seen, sensor, used)
        _question(seen, sensor, used, declared=unit is not None)
    if used == "reflectance":
        return values.astype(np.float32) * np.float32(_DN_PER_REFLECTANCE)
    if used == "power":
        return (10.0 * np.log10(np.maximum(values.astype(np.float32), _FLOOR))).astype(np.float32)
    return values.astype(np.float32)


def _refuse_impossible(seen: np.ndarray, sensor: Sensor, unit: str) -> None:
    low, high = float(seen.min()), float(seen.max())
    found = f"{sensor.key}: values from {low:g} to {high:g} cannot be {unit}"
    if unit == "DN" and (high > _MAX_DN or low < -_MAX_DN):
        raise UnitError(f"{found} (16 bits hold at most {_MAX_DN:g}); mask nodata with mask=")
    if unit == "reflectance" and (high > _MAX_REFLECTANCE or low < -1.0):
        raise UnitError(
            f"{found} (16 bits / 10000 is {_MAX_REFLECTANCE:g}); they look like DN: units={_fix(sensor, 'DN')}"
        )
    if unit == "power" and low < 0.0:
        raise UnitError(f"{found} (it is not negative); they look like dB: units={_fix(sensor, 'dB')}")
    if unit == "power" and high > _MAX_POWER:
        raise UnitError(f"{found}; calibrate to gamma0 or sigma0 first")
    if unit == "dB" and not (_DB_RANGE[0] <= low and high <= _DB_RANGE[1]):
        raise UnitError(f"{found} (expected {_DB_RANGE[0]:g} to {_DB_RANGE[1]:g}); mask nodata with mask=")


def _question(seen: np.ndarray, sensor: Sensor, unit: str, *, declared: bool) -> None:
    """Refuses undeclared values that look like another unit; warns about declared and odd ones."""
    sample = seen.reshape(-1)[:: max(1, seen.size // _SAMPLE)].astype(np.float64)
    looks = None
    if unit == "DN" and seen.max() <= _MAX_REFLECTANCE and (sample != np.round(sample)).any():
        looks = "reflectance"
    if unit == "dB" and sample.min() >= 0.0 and sample.max() > 0.0:
        looks = "power"
    found = f"{sensor.key}: values from {sample.min():g} to {sample.max():g}, median {np.median(sample):g}"
    if looks and not declared:
        raise UnitError(
            f"{found}, were taken as {unit} but look like {looks}; say units={_fix(sensor, looks)}, "
            f"or units={_fix(sensor, unit)} if they really are {unit}"
        )
    if looks:
        log.warning("%s, are declared %s but look like %s", found, unit, looks)
    elif unit == "DN" and np.median(sample) > 20_000:
        log.warning("%s, are very bright for %s", found, unit)
    elif unit == "dB" and (np.median(sample) > 10 or sample.min() < -80):
        log.warning("%s, are unusual for backscatter in dB; is nodata masked?", found)


def _fix(sensor: Sensor, unit: str) -> dict[str, Any]:
    return {sensor.key: unit}
