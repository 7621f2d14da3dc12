"""The unit that a manifest or a flag states of delivered values; ``terrafm_jax.units`` has the words."""

from __future__ import annotations

import argparse
import re

from terrafm_jax.sensors import SENSORS
from terrafm_jax.units import SPELLINGS, UNITS

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
