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

from terrafm_jax import checks, units
from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.layers import Acquisition, Layer, bands_of, broken, open_raster, ordered, unique
from terrafm_jax.scenes.products import from_folder, from_stac
from terrafm_jax.sensors import SENSORS, Sensor, SensorError
from terrafm_jax.sensors import sensor as find_sensor

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
    alone = sensor.key in declared.bands and (path.is_dir() or path.suffix.lower() == ".json")
    if alone:
        raise SceneError(f"--bands {sensor.key}: names the bands of one raster; {spec} names its bands itself")
    if path.suffix.lower() == ".json":
        found = from_stac(path, sensor)
    elif path.is_dir():
        found = from_folder(path, sensor)
    else:
        found = _from_files(spec.split(","), sensor, declared)
    found = _as_declared(found, sensor, declared)
    key = sensor.key
    return check(found, checks.Declared(found.unit, key in declared.unit, found.offset, key in declared.offset))


def _as_declared(found: Acquisition, sensor: Sensor, declared: Declared) -> Acquisition:
    """An acquisition with its unit, offset and nodata: what the user says, else what the files say."""
    key, path, stated = sensor.key, found.paths[0], [_scaling(layer) for layer in found.layers]
    unit = declared.unit.get(key, "")
    if _makes_reflectance(found, stated):
        if unit and _unit(sensor, unit) != "reflectance":
            scale = f"{stated[0][0]:g}"
            raise SceneError(f"{path}: states scale {scale} itself, so its values are reflectance; leave --unit out")
        unit = "reflectance"
    # A file that states an offset of its own is read harmonized: the product's must not be taken off again.
    own = 0.0 if any(shift for _, shift in stated) else found.offset
    offset = declared.offset.get(key, own)
    return dataclasses.replace(found, unit=_unit(sensor, unit), offset=offset, nodata=declared.nodata.get(key))


def resolve_all(arguments: Sequence[str], declared: Declared) -> list[Acquisition]:
    """:func:`resolve` of every ``--sensor``. Raises SceneError with the faults of all of them."""
    found, faults = [], []
    for argument in arguments:
        try:
            found.append(resolve(argument, declared))
        except SceneError as error:
            faults.append(str(error))
    if faults:
        raise SceneError("; ".join(dict.fromkeys(faults)))
    return found


def _unit(sensor: Sensor, given: str) -> str:
    try:
        return units.word(given, sensor)
    except units.UnitError as error:
        raise SceneError(f"--unit {sensor.key}={given}: {str(error).partition('; ')[2]}") from None


def _from_files(paths: Sequence[str], sensor: Sensor, declared: Declared) -> Acquisition:
    names = declared.bands.get(sensor.key, ())
    if names and len(paths) > 1:
        raise SceneError(f"--bands {sensor.key}: names the bands of one raster, but {len(paths)} are given")
    found: list[Layer] = []
    for path in paths:
        with open_raster(path) as source:
            found += [Layer(band, path, i) for i, band in enumerate(bands_of(source, sensor, names), 1) if band]
    what = ", ".join(paths)
    layers = unique(found, what)
    product = Path(paths[0]).stem
    return Acquisition(sensor.key, ordered(layers, sensor, what), "", product=product, cirrus=layers.get("B10"))


def _scaling(layer: Layer) -> tuple[float, float]:
    """Scale and offset that the file itself states (GDAL); 1 and 0 where it states none."""
    with open_raster(layer.path) as source:
        if layer.index > source.count:
            raise SceneError(f"{layer.path}: has {source.count} bands, band {layer.index} was asked for")
        return units.stated_scaling(source, layer.index)


def _makes_reflectance(found: Acquisition, stated: Sequence[tuple[float, float]]) -> bool:
    """Whether the files say themselves that scaling makes reflectance of their DN."""
    try:
        made = units.makes_reflectance(SENSORS[found.sensor], stated)
    except units.UnitError as error:
        raise SceneError(f"{found.paths[0]}: {error}") from None
    if made:
        _log.info("%s: states scale %g itself, so its values are reflectance", found.paths[0], stated[0][0])
    return made


# --- checks before the work ----------------------------------------------------------------------


def check(acquisition: Acquisition, said: checks.Declared) -> Acquisition:
    """Opens every file, reads a sample of every band and compares it with what was said of it.

    Returns:
      The acquisition with what looks wrong noted in ``doubts``, which is warned of.

    Raises:
      SceneError: a file is unreadable or empty, or its values surely are not what they are called.
    """
    key, path = acquisition.sensor, acquisition.paths[0]
    empty = () if key == "s1" else (0,)
    samples = {layer.band: sample(layer, acquisition.nodata, empty) for layer in acquisition.layers}
    cirrus = sample(acquisition.cirrus, acquisition.nodata, empty) if acquisition.cirrus else None
    findings = checks.offset(key, said.offset)
    findings = (
        findings if any(f.sure for f in findings) else findings + checks.values(key, samples, said, cirrus=cirrus)
    )
    names = [layer.band for layer in acquisition.layers] + (["B10"] if acquisition.cirrus else [])
    if text := checks.without_b10(key, names, acquisition.product):
        findings = [*findings, checks.Finding(text, False)]
    for finding in findings:
        if finding.sure:
            raise SceneError(f"{path}: {finding.text}")
        _log.warning("%s: %s", path, finding.text)
    return dataclasses.replace(acquisition, doubts=tuple(f"{Path(path).name}: {f.text}" for f in findings))


def sample(layer: Layer, nodata: float | None = None, empty: tuple[float, ...] = ()) -> np.ndarray:
    """[n]: valid pixels of a coarse sample of one band (but down to the last row), scaled as the file says.

    ``empty``: stored values left out where the file states an offset, after which they would no longer stand out.
    """
    scale, shift = _scaling(layer)
    with open_raster(layer.path) as source:
        rows, columns = min(source.height, _SAMPLE), min(source.width, _SAMPLE)
        try:
            data = source.read(layer.index, out_shape=(rows, columns))
            hidden = source.read_masks(layer.index, out_shape=(rows, columns)) == 0 if checks.hides(source) else False
            source.read(layer.index, window=((source.height - 1, source.height), (0, source.width)))
        except RasterioIOError as error:
            raise SceneError(f"{layer.path}: {broken(error)}") from None
        declared = source.nodatavals[layer.index - 1]
    if data.dtype.kind == "c":
        raise SceneError(f"{layer.path}: holds complex values (SLC); detect, calibrate and terrain-correct it first")
    bad = ~np.isfinite(data) | hidden
    for value in (declared, nodata, *(empty if shift else ())):
        if value is not None:
            bad |= data == value
    return data[~bad] if (scale, shift) == units.AS_STORED else data[~bad] * scale + shift
