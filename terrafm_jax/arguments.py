"""Checks of what users hand to ``Model.encode``: shapes, names of bands, pixels that were not measured, values."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terrafm_jax import checks
from terrafm_jax import units as units_lib
from terrafm_jax.sensors import SENSORS, Sensor, SensorError

MIN_SIDE = 16
LOOKED_AT = 1024  # pixels of an image, at least, that are looked at: a millisecond, less than encoding takes
_TOGETHER = 50_000  # of all images of a call: plenty for the first percentile
_NAMED = 10  # images that an error lists


class InputError(ValueError):
    """Arguments of ``Model.encode`` do not fit together or do not fit the weights."""


def image_of(key: str, given: Any) -> tuple[np.ndarray, np.ndarray | None]:
    """The images [B, H, W, bands], and [B, H, W] of what a masked array (rasterio's ``masked=True``) hides, or None.

    Raises:
      InputError: images of several sizes, another layout, too small, or no numbers.
    """
    masked = np.ma.isMaskedArray(given)
    if isinstance(given, list | tuple):
        shapes = list(dict.fromkeys(np.shape(image) for image in given))
        if len(shapes) > 1:
            raise InputError(f"{key}: images of {len(shapes)} shapes ({shapes[0]}, {shapes[1]} ...); encode each apart")
        masked = any(np.ma.isMaskedArray(image) for image in given)
    image = np.ma.stack(given) if masked and isinstance(given, list | tuple) else given
    hidden = np.ma.getmaskarray(image).any(-1) if masked and image.ndim else None
    image = np.asarray(image)
    shape = image.shape
    if image.ndim == 3:
        image, hidden = image[None], None if hidden is None else hidden[None]
    if image.ndim != 4 or min(image.shape[1:3], default=0) < MIN_SIDE or not len(image):
        counts = {len(SENSORS[key].bands), len(SENSORS[key].delivered)}
        first = image.ndim == 4 and shape[-3] in counts and shape[-1] not in counts
        hint = "; bands come last: np.moveaxis(images, -3, -1)" if first else ""
        raise InputError(f"{key}: shape {shape}; expected [B, H, W, bands] of at least {MIN_SIDE} pixels{hint}")
    if image.dtype.kind not in "iuf":
        raise InputError(f"{key}: type {image.dtype}; expected integers or floats")
    return image, hidden


@dataclasses.dataclass(frozen=True)
class Asked:
    """Images of one sensor whose values are questioned.

    Attributes:
      names: of the bands. image: [B, H, W, bands]. cirrus: B10, [B, H, W, 0 or 1]. ignore: bool [B, H, W].
      offset: DN to subtract, [B]. said: what the user says of the values.
    """

    key: str
    names: Sequence[str]
    image: np.ndarray
    cirrus: np.ndarray
    ignore: np.ndarray
    offset: np.ndarray
    said: checks.Declared

    def findings(self) -> list[checks.Finding]:
        """On all images together, those of one offset at a time."""
        found, measured = [], ~self.ignore.all((1, 2))
        for value in np.unique(self.offset):
            rows = np.flatnonzero((self.offset == value) & measured)
            if len(rows):
                some = [self._pixels(i, max(LOOKED_AT, _TOGETHER // len(rows))) for i in rows]
                bands = {name: np.concatenate([p[:, j] for p, _ in some]) for j, name in enumerate(self.names)}
                b10 = np.concatenate([c for _, c in some]) if self.cirrus.shape[-1] else None
                said = dataclasses.replace(self.said, offset=float(value))
                found += checks.values(self.key, bands, said, cirrus=b10, spell=checks.KEYWORDS)
        if any(finding.sure for finding in found):
            return found
        return found + [checks.Finding(text, True) for text in list(self.fills().values())[:1]]

    def fills(self) -> dict[int, str]:
        """Images with nodata that nobody masked: few pixels spoil a patch, and no sample shows them."""
        if not checks.fill(self.key, checks.lowest(self.image), self.said, checks.KEYWORDS):
            return {}
        found = {}
        for i in range(len(self.image)):
            measured = self.image[i][~self.ignore[i]]
            low = checks.lowest(measured) if measured.size else np.inf
            for finding in checks.fill(self.key, low, self.said, checks.KEYWORDS):
                found[i] = finding.text
        return found

    def faults(self, most: int | None = LOOKED_AT) -> dict[int, str]:
        """What is surely wrong with single images: among many right ones it would not show. All pixels, or ``most``."""
        found = self.fills()
        for i in range(len(self.image)):
            pixels, _ = self._pixels(i, most)
            said = dataclasses.replace(self.said, offset=float(self.offset[i]))
            bands = {name: pixels[:, j] for j, name in enumerate(self.names)}
            findings = checks.values(self.key, bands, said, spell=checks.KEYWORDS, among=True) if len(pixels) else []
            for finding in findings:
                if finding.sure:
                    found[i] = finding.text
        return found

    def _pixels(self, i: int, most: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Measured pixels of an image, [N, bands] and [N, 0 or 1] of B10; at most about ``most`` (None: all)."""
        step = max(1, self.ignore[i].size // most) if most else 1
        kept = ~self.ignore[i].reshape(-1)[::step]
        return tuple(a[i].reshape(self.ignore[i].size, a.shape[-1])[::step][kept] for a in (self.image, self.cirrus))

    def converted(self) -> np.ndarray:
        """float32 [B, H, W, bands] in DN or dB. Raises UnitError that names the images whose values no unit holds."""
        sensor, unit = SENSORS[self.key], self.said.unit
        try:
            return units_lib.to_sensor_unit(self.image, sensor, unit, self.ignore)
        except units_lib.UnitError as error:
            faults = {}
            for i in range(len(self.image)):
                try:
                    units_lib.to_sensor_unit(self.image[i : i + 1], sensor, unit, self.ignore[i : i + 1])
                except units_lib.UnitError as one:
                    faults[i] = str(one).removeprefix(f"{self.key}: ")
            if len(faults) == len(self.image):
                raise
            raise units_lib.UnitError(f"{self.key}: {named(faults, len(self.image))}") from error


def named(faults: Mapping[int, str], count: int) -> str:
    """Which of ``count`` images are wrong and why; those with the same fault together, in the words of the first."""
    alike: dict[str, list[int]] = {}
    for i, text in sorted(faults.items()):
        alike.setdefault(re.sub(r"-?\d[\d.]*(e[+-]?\d+)?", "#", text), []).append(i)
    parts = []
    for rows in alike.values():
        more = f" and {len(rows) - _NAMED} more" if len(rows) > _NAMED else ""
        shown = ", ".join(map(str, rows[:_NAMED])) + more
        parts.append(f"image{'s' * (len(rows) > 1)} {shown} of {count}: {faults[rows[0]]}")
    return "; ".join(parts)


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
    mask = given[None] if given.ndim == 2 else given
    if mask.shape != shape or mask.dtype != bool:
        raise InputError(f"mask of {key}: {given.dtype} {given.shape}; expected bool {shape}, True where not measured")
    return mask


def check_by_sensor(**arguments: Any) -> None:
    """Raises InputError unless arguments are dicts by sensor, and bands lists of names."""
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
