"""What users hand to ``Model.encode``: shapes of the arguments, names of bands, pixels without a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terrafm_jax import checks
from terrafm_jax.sensors import Sensor, SensorError


class InputError(ValueError):
    """Arguments of ``Model.encode`` do not fit together or do not fit the weights."""


def kept_bands(sensor: Sensor, count: int, names: Sequence[str] | None) -> tuple[list[int], tuple[str, ...], list[int]]:
    """Positions in the given array of the bands the model sees, their canonical names, and where B10 is."""
    if names is None:
        if count == len(sensor.band_names):
            return list(range(count)), sensor.band_names, []
        raise InputError(f"{sensor.key}: {count} bands without names; {_expected(sensor, count)}")
    if len(names) != count:
        raise InputError(f"{sensor.key}: {count} bands but {len(names)} names: {', '.join(names)}")
    for finding in checks.level(sensor.key, names):
        raise SensorError(f"{sensor.key}: {finding.text}")
    dropped = {alias.lower() for band in sensor.dropped for alias in (band.name, *band.aliases)}
    cirrus = [i for i, name in enumerate(names) if name.strip().lower() in dropped]
    kept = [i for i in range(count) if i not in cirrus]
    found = sensor.canonical(names[i] for i in kept)
    twice = sorted({name for name in found if found.count(name) > 1})
    if twice or len(cirrus) > 1:
        raise SensorError(f"{sensor.key}: bands {twice or ['B10']} given twice; name each band once")
    if not found:
        raise SensorError(f"{sensor.key}: {list(names)} holds none of the model's bands {list(sensor.band_names)}")
    return kept, found, cirrus


def mask_of(key: str, given: Any, shape: tuple[int, ...]) -> np.ndarray:
    given = np.asarray(given)
    given = given[None] if given.ndim == 2 else given
    if given.shape != shape or given.dtype != bool:
        raise InputError(f"mask of {key}: {given.dtype} {given.shape}; expected bool {shape}, True where not measured")
    return given


def check_by_sensor(**arguments: Any) -> None:
    """Raises InputError for what is no dict by sensor, or names none."""
    examples = {"units": "{'s2_l2a': 'reflectance'}", "bands": "{'s2_l2a': ['B02', 'B03']}"}
    for name, value in arguments.items():
        if value is not None and not isinstance(value, Mapping):
            raise InputError(f"{name}={value!r}; expected a dict by sensor, such as {name}={examples[name]}")
        for key, entry in (value or {}).items():
            if name == "bands" and (isinstance(entry, str) or not all(isinstance(b, str) for b in entry)):
                raise InputError(f"bands of {key}: {entry!r}; expected a list of names, such as {examples[name]}")


def says(offset: Any, key: str) -> bool:
    """Whether the caller said which offset a sensor has."""
    return key in offset if isinstance(offset, Mapping) else offset is not None


def _expected(sensor: Sensor, count: int) -> str:
    """What to do about a number of bands that is not the sensor's."""
    if count == len(sensor.band_names) + 1 and sensor.unit == "DN":
        usual = [*sensor.band_names[:10], "B10", *sensor.band_names[10:]]
        if sensor.dropped:
            return f"with B10 name them, it is dropped then: bands={{'{sensor.key}': {usual}}} (or their order)"
        return "13 is the count of Level-1C (with B10): use s2_l1c"
    names = ", ".join(sensor.band_names)
    return f"expected {len(sensor.band_names)} ({names}), or name them: bands={{'{sensor.key}': [...]}}"


def unmeasured(image: np.ndarray, unit: str) -> np.ndarray:
    """bool [B, H, W]: pixels that are not finite, or hold what stands for nodata in their unit."""
    ignore = ~np.isfinite(image).all(-1)
    if unit == "power":
        return ignore | (image == 0).any(-1)
    return ignore if unit == "db" else ignore | (image == 0).all(-1)
