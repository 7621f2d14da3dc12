"""What ``--sensor`` names (files, folders of bands, SAFE products, STAC items), and whether it makes sense.

Every acquisition is checked before anything is computed: readable to the end, georeferenced, north up,
bands named, values in the declared unit.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from rasterio.errors import RasterioIOError

from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.layers import Acquisition, Layer, bands_of, broken, open_raster, ordered
from terrafm_jax.scenes.products import from_folder, from_stac
from terrafm_jax.sensors import BASELINE_OFFSET, L2A_ABSTAIN, L2A_THRESHOLD, SENSORS, Sensor, SensorError
from terrafm_jax.sensors import sensor as find_sensor
from terrafm_jax.units import unit_word

UNITS = {"s1": ("db", "power"), "s2_l1c": ("dn", "reflectance"), "s2_l2a": ("dn", "reflectance")}
_SAMPLE = 192  # pixels per side that are looked at before the work starts
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Declared:
    """What the command line says about each sensor: band names, unit, offset, nodata."""

    bands: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    unit: Mapping[str, str] = dataclasses.field(default_factory=dict)
    offset: Mapping[str, float] = dataclasses.field(default_factory=dict)
    nodata: Mapping[str, float] = dataclasses.field(default_factory=dict)


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
        found = from_stac(path, sensor)
    elif path.is_dir():
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
    given = unit_word(given).lower()
    if given and given not in known:
        raise SceneError(f"--unit {sensor.key}={given}: expected one of {list(known)}")
    return given or known[0]


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
    plain = key == "s2_l2a" and unit == "dn" and not acquisition.offset
    if plain and L2A_THRESHOLD < darkest <= L2A_ABSTAIN:
        _log.warning(
            "%s: the darkest pixels stand at %.0f DN, as if the baseline offset were still inside; "
            "if so, pass --offset s2_l2a=%.0f",
            path,
            darkest,
            BASELINE_OFFSET,
        )
