"""One date of one sensor as bands of rasters: how files are opened and which band is which."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rasterio
from rasterio.errors import RasterioError

from terrafm_jax import checks
from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.sensors import Sensor, band_name

RASTERS = (".tif", ".tiff", ".jp2", ".vrt", ".img", ".nc")
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Layer:
    """One band: band ``index`` (from 1) of the raster at ``path``."""

    band: str
    path: str
    index: int = 1


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """One date of one sensor.

    Attributes:
      sensor: key of the table of sensors.
      layers: one per band, in canonical order; bands of the sensor may be missing.
      unit: one of ``units.WORDS``.
      offset: processing-baseline DN still inside (0 = harmonized).
      nodata: value that means "no measurement" beside what the files declare; None = only that.
      product, time: as far as known.
      classes: path of the scene classification (SCL), if there is one.
      cirrus: B10 of Level-1C, if there is one: no band of the model, but the best evidence of the offset.
      doubts: sentences on what looks wrong.
    """

    sensor: str
    layers: tuple[Layer, ...]
    unit: str
    offset: float = 0.0
    nodata: float | None = None
    product: str = ""
    time: str = ""
    classes: str = ""
    cirrus: Layer | None = None
    doubts: tuple[str, ...] = ()

    @property
    def bands(self) -> tuple[str, ...]:
        return tuple(layer.band for layer in self.layers)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.path for layer in self.layers))


def open_raster(path: Any) -> rasterio.DatasetReader:
    """Opens a raster. Raises SceneError if GDAL cannot, or if it is not a north-up grid with a CRS."""
    name = str(path)
    try:
        source = rasterio.open(name)
    except (RasterioError, OSError) as error:
        what = "no such file" if "://" not in name and not Path(name).exists() else first_line(error)
        raise SceneError(
            f"{name}: not a raster that can be opened ({what}); give a GeoTIFF, JPEG 2000 or VRT"
        ) from None
    if source.crs is None and source.gcps[0]:
        source.close()
        raise SceneError(
            f"{name}: is in radar geometry (ground control points only); give a terrain-corrected (RTC) product"
        )
    if source.crs is None:
        source.close()
        raise SceneError(f"{name}: has no coordinate reference system; assign one with gdal_edit.py -a_srs EPSG:...")
    t = source.transform
    if t.b or t.d or t.a <= 0 or t.e >= 0:
        source.close()
        raise SceneError(f"{name}: its grid is rotated or not north-up {tuple(t)[:6]}; run gdalwarp on it first")
    return source


def broken(error: BaseException) -> str:
    """Remedy for a file that opens but does not read."""
    return f"cannot be read to the end ({first_line(error)}); it is truncated or damaged, fetch it again"


def bands_of(source: rasterio.DatasetReader, sensor: Sensor, names: Sequence[str] = ()) -> list[str | None]:
    """ESA name of every band of a raster; None for a band that the sensor does not have.

    ``names`` (from --bands), then band descriptions, then, for one band, the file name.

    Raises:
      SceneError: no names, unknown names, a band named twice, B10 in Level-2A, names that contradict the descriptions.
    """
    for finding in checks.level(sensor.key, [*source.descriptions, *names, last_part(source.name)]):
        raise SceneError(f"{source.name}: {finding.text}")
    described = [band_name(d, sensor) if d else None for d in source.descriptions]
    override = names[:1] == ("override",)
    names = names[1:] if override else names
    if names:
        if len(names) != source.count:
            raise SceneError(
                f"{source.name}: holds {source.count} bands, --bands {sensor.key} names {len(names)}; name every one"
            )
        found = [band_name(n, sensor) for n in names]
        if None in found:
            unknown = [n for n, b in zip(names, found, strict=True) if b is None]
            raise SceneError(f"--bands {sensor.key}: unknown bands {unknown}; expected {list(sensor.band_names)}")
        _once(f"--bands {sensor.key}", found)
        wrong = [f"{n} for {d}" for n, d in zip(found, described, strict=True) if d and n != d]
        if wrong and not override:
            raise SceneError(
                f"{source.name}: --bands {sensor.key} contradicts the names in the file ({', '.join(wrong)}); leave "
                f"--bands out, or if the file is wrong, pass --bands {sensor.key}=override,{','.join(names)}"
            )
        return found
    found = described
    if not any(found) and source.count == 1:
        found = [band_in_name(Path(source.name).stem, sensor)]
    if not any(found):
        hint = ""
        if source.count == 13 and sensor.unit == "DN":
            hint = "; 13 is the count of Level-1C (with B10)" + ("" if sensor.dropped else ": use s2_l1c")
        if source.count == 12 and sensor.dropped:
            hint = f"; {checks.TWELVE}"
        raise SceneError(
            f"{source.name}: its {source.count} bands have no names of {sensor.title} bands "
            f"(descriptions {list(source.descriptions)[:3]}{hint}); "
            f"pass --bands {sensor.key}=NAME,NAME,... in file order"
        )
    _once(str(source.name), found)
    return found


def _once(what: str, names: Sequence[str | None]) -> None:
    twice = sorted({n for n in names if n and list(names).count(n) > 1})
    if twice:
        raise SceneError(f"{what}: names {', '.join(twice)} twice; name each band once")


def last_part(path: str) -> str:
    """The end of a file's name without suffix and sampling, where its band stands."""
    return re.split(r"[_\-.]", re.sub(r"_(10|20|60)m$", "", Path(path).stem))[-1]


def band_in_name(stem: str, sensor: Sensor) -> str | None:
    """The band that a file name ends in: ``B02``, ``T31TDG_..._B8A_20m``, ``x_vv``."""
    stem = re.sub(r"_(10|20|60)m$", "", stem)
    return band_name(stem, sensor) or band_name(re.split(r"[_\-.]", stem)[-1], sensor)


def unique(found: Sequence[Layer], what: str) -> dict[str, Layer]:
    """Layers by band. Raises SceneError, with the candidates, where a band is found twice: which one is not guessed."""
    by_band: dict[str, list[Layer]] = {}
    for layer in found:
        by_band.setdefault(layer.band, []).append(layer)
    twice = {band: layers for band, layers in by_band.items() if len(layers) > 1}
    if twice:
        band, layers = next(iter(twice.items()))
        shown = ", ".join(layer.path for layer in layers[:4]) + (" ..." if len(layers) > 4 else "")
        raise SceneError(
            f"{what}: {', '.join(twice)} found more than once ({band} in {shown}); "
            "give one product or date at a time, each with its own --sensor"
        )
    return {band: layers[0] for band, layers in by_band.items()}


def ordered(layers: Mapping[str, Layer], sensor: Sensor, what: str) -> tuple[Layer, ...]:
    """Layers in canonical order without the bands that the model does not see. Raises SceneError if none is left."""
    kept = tuple(layers[b] for b in sensor.band_names if b in layers)
    if not kept:
        raise SceneError(f"{what}: no band of {sensor.title} found; expected some of {list(sensor.band_names)}")
    missing = [b for b in sensor.band_names if b not in layers]
    if missing:
        _log.info("%s: bands %s are missing, the stem is used without them", what, missing)
    return kept
