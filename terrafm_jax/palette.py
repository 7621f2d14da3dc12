"""Colors of classes, the same in maps for a GIS and in pictures of results."""

from __future__ import annotations

from collections.abc import Sequence

from terrafm_jax.landcover import CATEGORIES

Color = tuple[int, int, int]

# Okabe and Ito, "Color Universal Design" (2008), without black, which reads as "no data", and with gray: told apart
# with any of the common color deficiencies.
QUALITATIVE = ("#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#999999")
_TONES = ((0.0, 1.0), (0.0, 0.6), (140.25, 0.45))  # offset and gain: as they are, darker, lighter


def _rgb(text: str) -> Color:
    return int(text[1:3], 16), int(text[3:5], 16), int(text[5:7], 16)


def colors(names: Sequence[str]) -> list[Color]:
    """One color (red, green, blue, 0..255) per class.

    WorldCover's own when every class is one of ours (``landcover``: name or title, whatever the case); else eight
    that color-blind people tell apart, then the same darker and lighter; from the 25th class on they repeat.
    """
    known = {key.casefold(): _rgb(c.color) for c in CATEGORIES for key in (c.name, c.title)}
    if names and all(n.casefold() in known for n in names):
        return [known[n.casefold()] for n in names]
    tones = [tuple(round(offset + gain * v) for v in _rgb(text)) for offset, gain in _TONES for text in QUALITATIVE]
    return [tones[i % len(tones)] for i in range(len(names))]
