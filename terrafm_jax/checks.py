"""Are these values what they are called? One set of checks for whatever users hand in: arrays, rasters, data sets.

Every check returns findings: what surely is wrong (the caller refuses it) and what only looks wrong (the caller warns
and records it). Thresholds were measured on real tiles; those of the baseline offset are data_prep's.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terrafm_jax.sensors import (
    BASELINE_OFFSET,
    L1C_CIRRUS_THRESHOLD,
    L2A_ABSTAIN,
    L2A_THRESHOLD,
    S2_L1C,
    SENSORS,
    band_name,
)
from terrafm_jax.units import DN_PER_REFLECTANCE, MAX_REFLECTANCE, NOISE_FLOOR

TWICE = 500.0  # DN: where the darkest p1 is below, subtracting the offset leaves a reflectance under -5 %
EIGHT_BIT = 255
_PERCENT = 150.0
_FILL_DN = -3000.0  # below: no reflectance, but -9999 or -32768
_BRIGHT_DN = 20_000.0
_POWER, _AMPLITUDE = 0.05, 5.0  # median below: power (-13 dB); above: amplitude in DN or dB without its sign
_BACKSCATTER = (NOISE_FLOOR, 20.0)  # dB, of a median
# Share of the pixels that hold one value which may be nodata that nobody declared (0 dB in all polarizations at once,
# something below the noise floor): a thin edge of a swath has more. Decibels to a tenth are 0 in half a percent of one
# polarization over the brightest ground, but hardly ever in both.
UNDECLARED = 1e-3
B10_DARK = 100.0  # DN: the median of B10 wherever there is no thick cirrus (real tiles: 8..52)
_FAR = 300.0  # DN between the band that is B10 and one that is called so
TWELVE = "12 bands without B10, as Level-2A has them (Level-1C has 13): is the sensor s2_l2a?"
_SAMPLE = 200_000  # values of a band that are looked at


@dataclasses.dataclass(frozen=True)
class Finding:
    """A sentence on what was found and what to do; ``sure``: the values cannot be used as they are."""

    text: str
    sure: bool


@dataclasses.dataclass(frozen=True)
class Spelling:
    """How users say things to the caller, to be put into the remedy; {key} is the sensor, {value} what to give."""

    unit: str
    offset: str
    nodata: str
    sensor: str


FLAGS = Spelling("--unit {key}={value}", "--offset {key}={value:g}", "--nodata {key}={value:g}", "--sensor {key}=FILE")
KEYWORDS = Spelling(
    "units={{'{key}': '{value}'}}", "offset={{'{key}': {value:g}}}", "mask= (it holds {value:g})", "{key}="
)


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the user, or a product's metadata, says of values.

    Attributes:
      unit: one of ``units.WORDS``. unit_said: named by the user, so that it wins over appearances.
      offset: DN to subtract. offset_said: named by the user.
    """

    unit: str
    unit_said: bool = False
    offset: float = 0.0
    offset_said: bool = False


def offset(key: str, value: float, spell: Spelling = FLAGS) -> list[Finding]:
    """The number itself: what is to be subtracted, so 1000 and not ESA's -1000."""
    given, right = spell.offset.format(key=key, value=value), spell.offset.format(key=key, value=BASELINE_OFFSET)
    if not np.isfinite(value):
        return [Finding(f"{given}: expected a number of DN; give {right} or 0", True)]
    if value and SENSORS[key].unit != "DN":
        return [Finding(f"{given}: only Sentinel-2 has a baseline offset, {key} has none; leave it out", True)]
    if value < 0:
        positive = spell.offset.format(key=key, value=-value)
        return [Finding(f"{given}: is the number to subtract (ESA's ADD_OFFSET is what to add); give {positive}", True)]
    if 0 < value < 1:
        return [Finding(f"{given}: is a reflectance, expected DN; give {right}", True)]
    if value not in (0, BASELINE_OFFSET):
        return [Finding(f"{given}: processing baselines add 1000 DN, never {value:g}", False)]
    return []


def level(key: str, names: Sequence[str | None]) -> list[Finding]:
    """B10 (cirrus) is delivered with Level-1C alone. ``names``: whatever the bands are called."""
    if key != "s2_l2a" or not any(is_b10(name) for name in names if name):
        return []
    return [Finding("B10 means Level-1C: use s2_l1c (Level-2A holds no B10)", True)]


def without_b10(key: str, names: Sequence[str | None], product: str = "") -> str:
    """What looks wrong with a Level-1C input of the model's twelve bands and no B10; "" if nothing does.

    Args:
      names: whatever its bands are called.
      product: an id of ESA's that says L1C is proof enough.
    """
    given = {band_name(name, S2_L1C) for name in names if name}
    if (
        key != S2_L1C.key
        or not given >= set(S2_L1C.band_names)
        or "B10" in given
        or re.search(r"S2[A-D]_\w*L1C", product)
    ):
        return ""
    return f"{key} of {TWELVE}"


def hides(source: Any) -> bool:
    """Whether an open raster carries a mask (inside, or beside it as .msk), which hides pixels whatever they hold.

    Alpha is none: files of four bands call near infrared so.
    """
    flags = {flag.name for flag in source.mask_flag_enums[0]}
    return "per_dataset" in flags and "alpha" not in flags


def is_b10(name: str) -> bool:
    """Whether a band's name says B10; "cirrus" alone may also be a mask."""
    return band_name(name, S2_L1C) == "B10" and "10" in name


def misplaced_b10(middle: Mapping[str, float]) -> str:
    """What is wrong where another band of Level-1C is B10 and what is called B10 is not; "" if nothing is.

    Nothing on the ground shows in B10, and clouds that do are bright in all other bands.

    Args:
      middle: band -> median in DN as delivered, with the baseline offset or without; B10 among them.
    """
    if not middle.get("B10", 0) > _FAR:
        return ""  # the usual case
    name = min(middle, key=middle.__getitem__)
    level = middle[name] - (BASELINE_OFFSET if middle[name] >= BASELINE_OFFSET else 0.0)
    if level >= B10_DARK or middle["B10"] - middle[name] <= _FAR:
        return ""
    return (
        f"wrong band order, the median of B10 (cirrus, nearly black) is {middle['B10']:.0f} DN, that of {name} "
        f"{middle[name]:.0f}: {name} is B10"
    )


def exchanged(vv: float, vh: float) -> str:
    """What looks wrong with the medians (dB) of the two polarizations; "" if nothing does."""
    return f"median of VH {vh:.1f} dB is above that of VV {vv:.1f}: are they exchanged?" if vh > vv else ""


def values(
    key: str,
    bands: Mapping[str, np.ndarray],
    said: Declared,
    *,
    cirrus: np.ndarray | None = None,
    spell: Spelling = FLAGS,
    among: bool = False,
) -> list[Finding]:
    """Findings on measurements of one sensor.

    Args:
      bands: per band the pixels [N] (any N) that are not nodata, as delivered, in the unit that ``said`` declares.
      cirrus: those of B10, where a Level-1C input holds it; the best evidence of the offset.
      among: this is one image of many that were looked at together. A lake alone proves little: only what no ground,
        however dark or bright, can look like is found.
    """
    sample = {name: _thinned(pixels) for name, pixels in bands.items()}
    seen = np.concatenate(list(sample.values()) or [np.empty(0)])
    if not seen.size or not seen.any():
        what = "zeros" if seen.size else "nodata"
        return [Finding(f"holds nothing but {what}; give another file or date", True)]
    if SENSORS[key].unit == "dB":
        found = _radar(key, seen, said, spell, among)
        return found if among or found else _zeros(key, sample, said, spell) or _polarizations(sample, said)
    small = all(pixels.dtype in (np.uint8, np.int8, np.bool_) for pixels in bands.values())
    found = _optical(key, seen, said, small, spell, among) + _shifted(key, sample, said, spell)
    if not among and not any(f.sure for f in found):
        b10 = None if cirrus is None else _thinned(cirrus)
        found += _order(sample, said, b10) or _baseline(key, sample, said, b10, spell)
    return found


def _thinned(pixels: np.ndarray) -> np.ndarray:
    flat = np.ravel(pixels)
    flat = flat[:: max(1, flat.size // _SAMPLE)].astype(np.float64)
    return flat[np.isfinite(flat)]


def _range(seen: np.ndarray) -> str:
    return f"values from {seen.min():.4g} to {seen.max():.4g}, median {np.median(seen):.4g}"


def _optical(key: str, seen: np.ndarray, said: Declared, small: bool, spell: Spelling, among: bool) -> list[Finding]:
    low, high = float(np.percentile(seen, 0.5)), float(np.percentile(seen, 99.5))
    whole, found = bool(np.all(seen == np.round(seen))), _range(seen)
    dn, share = (spell.unit.format(key=key, value=unit) for unit in ("dn", "reflectance"))
    for nodata in fill(key, float(seen.min()), said, spell):
        return [Finding(f"{found}: {nodata.text}", True)]
    if not whole and -20 < low < -0.3 and high < 20 and np.mean(seen < 0) > 0.05:
        text = f"{found} look standardized (mean {seen.mean():.2g}, deviation {seen.std():.2g})"
        return [Finding(f"{text}; give DN (reflectance x 10000), normalizing is done here", True)]
    if said.unit == "reflectance":
        return _reflectance(found, high, dn)
    if not whole and high <= MAX_REFLECTANCE:
        return [_doubt(f"{found} look like reflectance, not DN; pass {share} (or {dn} if they are DN)", said)]
    if not whole and high <= _PERCENT and not among:
        text = f"{found} look like percent, not DN; divide by 100 and pass {share}"
        return [_doubt(f"{text} (or {dn} if they are DN)", said)]
    if whole and seen.max() <= EIGHT_BIT:
        text = f"{found} look like an 8-bit preview (or percent), which carries no reflectance; give DN"
        return [Finding(f"{text} (pass {dn} if they are DN)", small and not said.unit_said)]
    if np.median(seen) > _BRIGHT_DN:
        return [Finding(f"{found} are very bright for DN (reflectance x 10000)", False)]
    return []


def lowest(image: np.ndarray) -> float:
    """The smallest of all numbers in it; infinity where it holds none."""
    return float(np.fmin.reduce(image, axis=None, initial=np.inf)) if image.dtype.kind == "f" else float(image.min())


def fill(key: str, low: float, said: Declared, spell: Spelling) -> list[Finding]:
    """Nodata that is called a measurement of Sentinel-2. ``low``: the smallest value."""
    if SENSORS[key].unit != "DN" or not low < (_FILL_DN if said.unit == "dn" else _FILL_DN / 1e3):
        return []
    nodata = spell.nodata.format(key=key, value=low)
    return [Finding(f"{low:g} is no reflectance but nodata; pass {nodata}", True)]


def _shifted(key: str, bands: Mapping[str, np.ndarray], said: Declared, spell: Spelling) -> list[Finding]:
    """Nodata of zero from which the baseline offset was subtracted as if it were a measurement."""
    scale = DN_PER_REFLECTANCE if said.unit == "reflectance" else 1.0
    below = [np.round(pixels * scale) == -BASELINE_OFFSET for pixels in bands.values() if pixels.size]
    if len(below) < 2 or len({len(b) for b in below}) > 1:
        return []
    share = float(np.logical_and.reduce(below).mean())
    if share <= UNDECLARED:
        return []
    value = -BASELINE_OFFSET / scale
    nodata = spell.nodata.format(key=key, value=value)
    text = f"{share:.1%} of the pixels are {value:g} in all bands, which is nodata (0) less the baseline offset"
    return [Finding(f"{text}; pass {nodata}", True)]


def _reflectance(found: str, high: float, dn: str) -> list[Finding]:
    if high > _PERCENT:
        return [Finding(f"{found} cannot be reflectance, they look like DN; pass {dn}", True)]
    if high > MAX_REFLECTANCE:
        return [Finding(f"{found} cannot be reflectance, they look like percent; divide by 100", True)]
    if high < 0.002:
        return [Finding(f"{found} are very dark for reflectance; were they divided by 10000 twice?", False)]
    return []


def _doubt(text: str, said: Declared) -> Finding:
    """What looks like another unit is refused, unless the user said that it is right."""
    return Finding(f"{text}; taken as declared", False) if said.unit_said else Finding(text, True)


def _order(bands: Mapping[str, np.ndarray], said: Declared, cirrus: np.ndarray | None) -> list[Finding]:
    if cirrus is None or not cirrus.size:
        return []
    scale = DN_PER_REFLECTANCE if said.unit == "reflectance" else 1.0
    lit = {name: pixels[pixels > 0] for name, pixels in {**bands, "B10": cirrus}.items()}
    text = misplaced_b10({name: float(np.median(pixels)) * scale for name, pixels in lit.items() if pixels.size})
    return [Finding(f"{text}; give the bands in the file's order (EuroSAT has B8A last)", True)] if text else []


def _polarizations(bands: Mapping[str, np.ndarray], said: Declared) -> list[Finding]:
    middle = [float(np.median(bands[name])) for name in ("VV", "VH") if name in bands and bands[name].size]
    if said.unit == "power":
        middle = [10.0 * float(np.log10(value)) for value in middle if value > 0]
    text = exchanged(*middle) if len(middle) == 2 else ""
    return [Finding(text, False)] if text else []


def _baseline(
    key: str, bands: Mapping[str, np.ndarray], said: Declared, cirrus: np.ndarray | None, spell: Spelling
) -> list[Finding]:
    """The offset left inside, or subtracted from values that never had it."""
    scale = DN_PER_REFLECTANCE if said.unit == "reflectance" else 1.0
    levels = {name: _dark(pixels) * scale for name, pixels in bands.items()}
    name = min(levels, key=levels.__getitem__)
    dark, sure = levels[name], False
    inside, twice = L2A_THRESHOLD < dark <= L2A_ABSTAIN, dark <= L2A_THRESHOLD
    if key == "s2_l1c" and cirrus is not None and cirrus.size:
        name, dark, sure = "B10", _dark(cirrus) * scale, True
        inside, twice = dark > L1C_CIRRUS_THRESHOLD, dark <= L1C_CIRRUS_THRESHOLD
    where = f"the darkest pixels of {name} stand at {dark:.0f} DN"
    thousand, none = (spell.offset.format(key=key, value=v) for v in (BASELINE_OFFSET, 0.0))
    if said.offset == 0 and inside:
        text = f"{where}, as if the baseline offset of 1000 were still inside; if so, pass {thousand}"
        if said.unit == "reflectance":
            text = f"{where} in reflectance x 10000, as if the baseline offset (0.1) were still inside; subtract it"
        darkest = min(levels, key=levels.__getitem__)
        if name == "B10" and levels[darkest] < L1C_CIRRUS_THRESHOLD:  # with the offset inside no band is so dark
            text = f"{where}, those of {darkest} at {levels[darkest]:.0f}: the bands are in another order than stated"
        if said.offset_said:  # the user has looked: only B10 is worth a contradiction
            return [Finding(f"{text}; taken as declared", False)] if sure else []
        return [Finding(f"{text} (else {none})", sure)]
    if said.offset >= BASELINE_OFFSET and twice:
        text = f"{where}, so the offset of {said.offset:g} was removed before or never inside; pass {none}"
        return [Finding(text, sure or dark <= TWICE)]
    return []


def _dark(pixels: np.ndarray) -> float:
    """First percentile of what is above zero."""
    lit = pixels[pixels > 0]
    return float(np.percentile(lit, 1)) if lit.size else 0.0


def _radar(key: str, seen: np.ndarray, said: Declared, spell: Spelling, among: bool) -> list[Finding]:
    low, middle, found = float(np.percentile(seen, 1)), float(np.median(seen)), _range(seen)
    db = spell.unit.format(key=key, value="db")
    if said.unit == "power":
        if middle < 0:
            return [Finding(f"{found} cannot be power, they are below zero and look like dB; pass {db}", True)]
        if middle >= _AMPLITUDE:
            return [Finding(f"{found} cannot be power; {_positive(seen, key, spell)}", True)]
        if middle > 0.3:
            return [Finding(f"{found} are high for power; if they are amplitude, square them first", False)]
        return []
    if low >= 0:
        # Nobody's decibels are all above zero with such a median: no declaration helps.
        text = f"{found} are no dB; {_positive(seen, key, spell)}"
        return [Finding(text, True) if middle >= _AMPLITUDE else _doubt(f"{text} (or {db} if they are dB)", said)]
    if abs(middle) < 2 and low > -6 and not among:
        text = f"{found} look standardized, not like dB; give dB, normalizing is done here"
        return [_doubt(f"{text} (or pass {db} if they are dB)", said)]
    nodata = spell.nodata.format(key=key, value=seen.min())
    if not _BACKSCATTER[0] < middle < _BACKSCATTER[1]:
        return [_doubt(f"{found} are no backscatter in dB; is nodata masked? pass {nodata}, or the unit", said)]
    if seen.min() < -80:
        return [Finding(f"{found} are unusual for dB; is nodata masked? pass {nodata}", False)]
    return []


def zero_share(bands: Sequence[np.ndarray]) -> float:
    """Share of the pixels that are exactly 0 in all of ``bands`` (any shape); at most, where bands differ in it."""
    if len({band.shape for band in bands}) > 1:  # nodata was taken out of each by itself
        return float(min(np.mean(band == 0) for band in bands))
    return float(np.logical_and.reduce([band == 0 for band in bands]).mean())


def _zeros(key: str, bands: Mapping[str, np.ndarray], said: Declared, spell: Spelling) -> list[Finding]:
    share = zero_share([pixels for pixels in bands.values() if pixels.size]) if said.unit == "db" else 0.0
    if share <= UNDECLARED:
        return []
    nodata = spell.nodata.format(key=key, value=0.0)
    return [Finding(f"{share:.1%} of the pixels are exactly 0 dB: if that is nodata, pass {nodata}", False)]


def _positive(seen: np.ndarray, key: str, spell: Spelling) -> str:
    """What values of Sentinel-1 without a sign may be."""
    middle, power = float(np.median(seen)), spell.unit.format(key=key, value="power")
    if middle < _POWER:
        return f"they look like power; pass {power}"
    if middle < _AMPLITUDE:
        return f"they are power (pass {power}) or amplitude (square them first, then pass {power})"
    if np.percentile(seen, 99.5) < 60 and not np.all(seen == np.round(seen)):
        return "they look like dB that lost their sign (negate them), or amplitude; give dB"
    return "they look like amplitude in DN: calibrate and terrain-correct the product, then give power or dB"
