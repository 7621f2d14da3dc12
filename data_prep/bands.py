"""Names of the bands in a file that holds several, and what to say of files that name none."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import rasterio
from rasterio.errors import RasterioError

from data_prep.raster import BadInput
from terrafm_jax.checks import TWELVE
from terrafm_jax.sensors import SENSORS, band_name

_STATE = ": state their order in the bands column of a manifest or with --bands"


class Unnamed(BadInput):
    """A file whose bands nobody names; ``fits`` says which flag may."""

    def __init__(self, what: str, found: str, fits: str):
        super().__init__(f"{what}: bands without names{found}{_STATE}; {fits}")
        self.fits = fits


def named(key: str, descriptions: Sequence[str | None]) -> tuple[str, ...]:
    """Band names from the descriptions, () unless all are known (junk counts as none). Their number says nothing.

    Files without names hold bands in ESA's order, with B8A at the end (EuroSAT) or in the order of a script. Beside
    all bands of the sensor others may stand, whose name is then "": scene classes, quality, the angle of incidence.
    """
    sensor = SENSORS[key]
    known = [(band_name(text, sensor) if text else None) or "" for text in descriptions]
    bands = [name for name in known if name]
    other_level = key == "s2_l2a" and "B10" in [band_name(text) for text in descriptions if text]
    if len(set(bands)) < len(bands) or other_level or ("" in known and not set(sensor.band_names) <= set(bands)):
        return ()
    return tuple(known)


def unnamed(key: str, source: rasterio.DatasetReader, what: str) -> Unnamed:
    """Why a file is refused whose bands nobody names, with the flag that names them."""
    cirrus = key == "s2_l1c" and source.count != 12
    usual = "VV,VH" if key == "s1" else f"B01..B08,B8A,B09{'..B12' if cirrus else ',B11,B12'}"
    fits = f"in ESA's order --bands {key}={usual}"
    if key == "s2_l2a" and (source.count == 13 or "B10" in [band_name(d) for d in source.descriptions if d]):
        fits = "a 13th band is B10, and B10 means Level-1C: is the sensor s2_l1c?"
    elif key == "s2_l1c" and source.count == 12:
        fits += f", but {TWELVE}"
    elif key == "s2_l1c" and source.count == 13:
        dark = _cirrus_band(source)
        order = {10: usual, 9: "B01..B12,B8A"}.get(dark)
        fits = f"band {dark + 1} is dark as B10 is, so --bands {key}={order} may fit" if order else fits
    found = [text for text in source.descriptions if text]
    described = f", described as {found[:13]}" if found else ""
    return Unnamed(what, f" ({source.count}{described})", fits)


def together(nameless: Sequence[tuple[str, Unnamed]]) -> BadInput:
    """One error of all sensors of a scene whose bands nobody names, short enough for rejected.csv."""
    if len(nameless) == 1:
        return BadInput(str(nameless[0][1]))  # a plain BadInput, which can be sent between processes
    sensors, fits = ", ".join(key for key, _ in nameless), "; ".join(error.fits for _, error in nameless)
    return BadInput(f"{sensors}: bands without names{_STATE}; {fits}")


def _cirrus_band(source: rasterio.DatasetReader) -> int:
    """Number (from 0) of the band that is darkest by far, -1 if none is."""
    try:
        pixels = source.read(out_shape=(source.count, min(64, source.height), min(64, source.width)))
    except RasterioError:
        return -1
    middle = np.median(pixels.reshape(source.count, -1).astype(np.float64), axis=1)
    darkest, next_one = np.sort(middle)[:2] if source.count > 1 else (0, 0)
    return int(middle.argmin()) if next_one - darkest > 200 else -1
