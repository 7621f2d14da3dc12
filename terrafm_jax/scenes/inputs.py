"""Which raster holds which band: files, folders of bands, SAFE products, STAC items; and whether they make sense.

Every acquisition is checked before anything is computed: readable to the end, georeferenced, north up,
bands named, values in the declared unit.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import RasterioError, RasterioIOError

from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.sensors import SENSORS, Sensor, SensorError, band_name
from terrafm_jax.sensors import sensor as find_sensor

UNITS = {"s1": ("db", "power"), "s2_l1c": ("dn", "reflectance"), "s2_l2a": ("dn", "reflectance")}
RASTERS = (".tif", ".tiff", ".jp2", ".vrt", ".img", ".nc")
_SAMPLE = 192  # pixels per side that are looked at before the work starts
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
      unit: ``dn`` or ``reflectance`` (Sentinel-2), ``db`` or ``power`` (Sentinel-1).
      offset: processing-baseline DN still inside (0 = harmonised).
      nodata: value that means "no measurement" beside what the files declare; None = only that.
      product, time: as far as known.
      classes: path of the scene classification (SCL), if there is one.
    """

    sensor: str
    layers: tuple[Layer, ...]
    unit: str
    offset: float = 0.0
    nodata: float | None = None
    product: str = ""
    time: str = ""
    classes: str = ""

    @property
    def bands(self) -> tuple[str, ...]:
        return tuple(layer.band for layer in self.layers)

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(layer.path for layer in self.layers))


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the command line says about each sensor: band names, unit, offset, nodata."""

    bands: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unit: Mapping[str, str] = dataclasses.field(default_factory=dict)
    offset: Mapping[str, float] = dataclasses.field(default_factory=dict)
    nodata: Mapping[str, float] = dataclasses.field(default_factory=dict)


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


def resolve(argument: str, declared: Declared) -> Acquisition:
    """The acquisition that ``--sensor NAME=SPEC`` names, checked.

    SPEC is a raster, several rasters by comma (bands or groups of bands of one date), a folder of band
    files, a SAFE folder or a STAC item (JSON). Give ``--sensor`` again with the same name for another date.
    """
    name, _, spec = argument.partition("=")
    if not spec:
        raise SceneError(f"--sensor {argument}: expected NAME=FILE, NAME one of {list(SENSORS)} or an alias")
    try:
        sensor = find_sensor(name)
    except SensorError as error:
        raise SceneError(f"--sensor {argument}: {error}") from None
    path = Path(spec)
    if path.suffix.lower() == ".json":
        from terrafm_jax.scenes.products import from_stac

        found = from_stac(path, sensor)
    elif path.is_dir():
        from terrafm_jax.scenes.products import from_folder

        found = from_folder(path, sensor)
    else:
        found = _from_files(spec.split(","), sensor, declared)
    found = dataclasses.replace(
        found,
        unit=_unit(sensor, declared.unit.get(sensor.key, "")),
        offset=declared.offset.get(sensor.key, found.offset),
        nodata=declared.nodata.get(sensor.key),
    )
    check(found, declared=sensor.key in declared.unit)
    return found


def _unit(sensor: Sensor, given: str) -> str:
    known = UNITS[sensor.key]
    if given and given.lower() not in known:
        raise SceneError(f"--unit {sensor.key}={given}: expected one of {list(known)}")
    return given.lower() or known[0]


def _from_files(paths: Sequence[str], sensor: Sensor, declared: Declared) -> Acquisition:
    layers: dict[str, Layer] = {}
    names = declared.bands.get(sensor.key, ())
    for path in paths:
        with open_raster(path) as source:
            given = names if len(paths) == 1 else ()
            for i, band in enumerate(bands_of(source, sensor, given), 1):
                if band:
                    layers.setdefault(band, Layer(band, path, i))
    return Acquisition(sensor.key, ordered(layers, sensor, ", ".join(paths)), "", product=Path(paths[0]).stem)


def bands_of(source: rasterio.DatasetReader, sensor: Sensor, names: Sequence[str] = ()) -> list[str | None]:
    """ESA name of every band of a raster; None for a band that is no band of the sensor.

    ``names`` (from --bands) win, then band descriptions, then, for one band, the file name.
    """
    if names:
        if len(names) != source.count:
            raise SceneError(
                f"{source.name}: holds {source.count} bands, --bands {sensor.key} names {len(names)}; name every one"
            )
        found = [band_name(n, sensor) for n in names]
        if None in found:
            unknown = [n for n, b in zip(names, found, strict=True) if b is None]
            raise SceneError(f"--bands {sensor.key}: unknown bands {unknown}; expected {list(sensor.band_names)}")
        return found
    found = [band_name(d, sensor) if d else None for d in source.descriptions]
    if not any(found) and source.count == 1:
        found = [band_in_name(Path(source.name).stem, sensor)]
    if not any(found):
        raise SceneError(
            f"{source.name}: its {source.count} bands have no names of {sensor.title} bands "
            f"(descriptions {list(source.descriptions)[:3]}); pass --bands {sensor.key}=NAME,NAME,... in file order"
        )
    return found


def band_in_name(stem: str, sensor: Sensor) -> str | None:
    """The band that a file name ends in: ``B02``, ``T31TDG_..._B8A_20m``, ``x_vv``."""
    stem = re.sub(r"_(10|20|60)m$", "", stem)
    return band_name(stem, sensor) or band_name(re.split(r"[_\-.]", stem)[-1], sensor)


def ordered(layers: Mapping[str, Layer], sensor: Sensor, what: str) -> tuple[Layer, ...]:
    """Layers in canonical order without the bands that the model does not see. Raises SceneError if none is left."""
    kept = tuple(layers[b] for b in sensor.band_names if b in layers)
    if not kept:
        raise SceneError(f"{what}: no band of {sensor.title} found; expected some of {list(sensor.band_names)}")
    missing = [b for b in sensor.band_names if b not in layers]
    if missing:
        _log.info("%s: bands %s are missing, the stem is used without them", what, missing)
    return kept


# --- checks before the work ----------------------------------------------------------------------


def check(acquisition: Acquisition, *, declared: bool = False) -> None:
    """Opens every file, reads a sample of every band and compares it with the unit.

    Args:
      declared: the user named the unit: it wins over appearances, only values that it cannot hold are refused.

    Raises:
      SceneError: a file is unreadable or empty, or its values are in another unit.
    """
    samples = {layer.band: sample(layer, acquisition.nodata) for layer in acquisition.layers}
    values = np.concatenate(list(samples.values()))
    if not values.size:
        raise SceneError(f"{acquisition.paths[0]}: holds nothing but nodata; give another file or date")
    if acquisition.sensor == "s1":
        _check_radar(acquisition, values, declared)
    else:
        _check_optical(acquisition, samples, values, declared)


def _doubt(text: str, declared: bool) -> None:
    """What looks wrong stops the job, unless the user said that it is right."""
    if not declared:
        raise SceneError(text)
    _log.warning("%s; taken as declared", text)


def sample(layer: Layer, nodata: float | None = None) -> np.ndarray:
    """float64 [n]: valid pixels of a coarse sample of one band (decimated, but down to the last row)."""
    with open_raster(layer.path) as source:
        if layer.index > source.count:
            raise SceneError(f"{layer.path}: has {source.count} bands, band {layer.index} was asked for")
        rows, columns = min(source.height, _SAMPLE), min(source.width, _SAMPLE)
        try:
            data = source.read(layer.index, out_shape=(rows, columns)).astype(np.float64)
            source.read(layer.index, window=((source.height - 1, source.height), (0, source.width)))
        except RasterioIOError as error:
            raise SceneError(f"{layer.path}: {broken(error)}") from None
        declared = source.nodatavals[layer.index - 1]
    bad = ~np.isfinite(data)
    for value in (declared, nodata):
        if value is not None:
            bad |= data == value
    return data[~bad]


def broken(error: BaseException) -> str:
    """Remedy for a file that opens but does not read."""
    return f"cannot be read to the end ({first_line(error)}); it is truncated or damaged, fetch it again"


def _check_radar(acquisition: Acquisition, values: np.ndarray, declared: bool) -> None:
    path, median, low = acquisition.paths[0], float(np.median(values)), float(np.percentile(values, 1))
    if acquisition.unit == "power" and median < 0:
        raise SceneError(f"{path}: median {median:.4g} is below zero, so this is dB and not power; pass --unit s1=db")
    if acquisition.unit == "db" and low >= 0:
        text = f"{path}: values from {low:.4g} with median {median:.4g} look like linear power, not dB"
        _doubt(f"{text}; pass --unit s1=power (or --unit s1=db if they are dB)", declared)
    elif acquisition.unit == "db" and not -60 < median < 20:
        text = f"{path}: median {median:.4g} looks like no backscatter in dB"
        _doubt(f"{text}; pass --nodata s1=VALUE or the --unit", declared)


def _check_optical(
    acquisition: Acquisition, samples: Mapping[str, np.ndarray], values: np.ndarray, declared: bool
) -> None:
    path, key, unit = acquisition.paths[0], acquisition.sensor, acquisition.unit
    high, low = float(np.percentile(values, 99.5)), float(values.min())
    if unit == "reflectance" and high > 20:
        raise SceneError(f"{path}: values up to {high:.4g} are DN, not reflectance; pass --unit {key}=dn")
    if unit == "dn" and high < 5 and bool(np.any(values != np.round(values))):
        text = f"{path}: fractional values up to {high:.3g} look like reflectance, not DN"
        _doubt(f"{text}; pass --unit {key}=reflectance (or --unit {key}=dn if they are DN)", declared)
    if low < (-0.3 if unit == "reflectance" else -3000):
        _log.warning("%s: holds values down to %.4g; if that is nodata, pass --nodata %s=%g", path, low, key, low)
    darkest = min((np.percentile(v[v > 0], 1) for v in samples.values() if np.any(v > 0)), default=0.0)
    # Measured: at most 586 without the offset, 893 to 1123 with it, above 1300 nothing can be said.
    plain = key == "s2_l2a" and unit == "dn" and not acquisition.offset
    if plain and 750 < darkest <= 1300:
        _log.warning(
            "%s: the darkest pixels stand at %.0f DN, as if the baseline offset were still inside; "
            "if so, pass --offset s2_l2a=1000",
            path,
            darkest,
        )
