"""Colors and names of class maps, so that they open in a GIS as classes: palette in the TIFF, names in a sidecar.

rasterio writes color tables, but neither category names nor raster attribute tables, and GDAL keeps both in
``FILE.tif.aux.xml`` (its PAM format) whichever way they are written. QGIS takes colors and names from the table there
(3.30 and later), before that from palette and category names; it needs a file of one band for either.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def as_tag(names: Sequence[str]) -> str:
    """``0=water;1=crop``: for readers without the sidecar."""
    return ";".join(f"{i}={n}" for i, n in enumerate(names))


def write_palette(dst: Any, names: Sequence[str]) -> None:
    """Gives band 1 of a uint8 GeoTIFF of one band its color table; before pixels are written, while it is cheap."""
    dst.write_colormap(1, {i: (*c, 255) for i, c in enumerate(colors(names))})


def write_names(path: Path, names: Sequence[str]) -> None:
    """Writes ``path``.aux.xml: category names and a thematic attribute table (value, class, red, green, blue).

    To be called when the file is closed: GDAL may write the same sidecar then.
    """
    root = ET.Element("PAMDataset")
    band = ET.SubElement(root, "PAMRasterBand", band="1")
    categories = ET.SubElement(band, "CategoryNames")
    for name in names:
        ET.SubElement(categories, "Category").text = name
    table = ET.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    # Types: 0 integer, 2 text. Usages: 5 minimum and maximum of the value, 2 name, 6 to 8 red, green, blue.
    fields = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))
    for i, (name, kind, usage) in enumerate(fields):
        field = ET.SubElement(table, "FieldDefn", index=str(i))
        for tag, value in (("Name", name), ("Type", kind), ("Usage", usage)):
            ET.SubElement(field, tag).text = str(value)
    for i, (name, color) in enumerate(zip(names, colors(names), strict=True)):
        row = ET.SubElement(table, "Row", index=str(i))
        for value in (i, name, *color):
            ET.SubElement(row, "F").text = str(value)
    ET.indent(root)
    path.with_name(path.name + ".aux.xml").write_text(ET.tostring(root, encoding="unicode") + "\n", encoding="utf-8")
