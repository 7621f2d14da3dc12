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

from terrafm_jax.palette import colors

NODATA = 255  # in class maps and masks


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
