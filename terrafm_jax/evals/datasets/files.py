"""Reading the file formats that labelled data sets come in; every fault is one line that names the file."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax import checks, tables, units
from terrafm_jax.evals.datasets.base import DatasetError, Input
from terrafm_jax.sensors import SENSORS


def need(path: Path, what: str, hint: str = "") -> Path:
    """The path, or a DatasetError that says what was expected there."""
    if not path.exists():
        raise DatasetError(f"{path}: not found; expected {what}{'; ' + hint if hint else ''}")
    return path


def read_json(path: Path, parse: Callable[[Any], Any]) -> Any:
    """What ``parse`` makes of a JSON file; DatasetError where it is damaged or lacks what ``parse`` looks for."""
    try:
        return parse(json.loads(path.read_text()))
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise DatasetError(f"{path}: unexpected content ({type(e).__name__}: {e}); get the file again") from e


def _pixels(source: Any) -> np.ndarray:
    return np.ascontiguousarray(source.read().transpose(1, 2, 0))


def read_tiff(
    path: Path | str, at: tuple[int, int] | None = None, take: Callable[[Any], np.ndarray] = _pixels
) -> np.ndarray:
    """Pixels [H, W, channels] of a raster. ``at`` (byte offset, length) reads a raster inside a larger file."""
    import rasterio
    from rasterio.io import MemoryFile

    try:
        if at is None:
            with rasterio.open(path) as src:
                return take(src)
        with open(path, "rb") as f:
            f.seek(at[0])
            blob = f.read(at[1])
        with MemoryFile(blob) as memory, memory.open() as src:
            return take(src)
    except (rasterio.errors.RasterioError, IndexError, OSError) as e:
        raise DatasetError(f"{path}: cannot be read as a raster ({str(e).splitlines()[0]})") from e


def read_image(
    path: Path, source: Input, at: tuple[int, int] | None = None, look: Callable[[Any], None] = lambda raster: None
) -> np.ndarray:
    """Pixels [H, W, channels] of a raster, float32 with NaN where a band holds its nodata or its own mask hides them.

    A scale and an offset that the file states (GDAL) are applied, and what comes is in the unit of ``source``: a scale
    below 0.01 makes reflectance of Sentinel-2, whose DN these are if DN were declared. Channels that
    the model has no use for are not asked. Declared zeros of Sentinel-2 stay: in some bands zero is dark ground, and in
    all of them it is nodata anyway. ``at`` as for :func:`read_tiff`. ``look`` sees the open raster first.
    Raises DatasetError.
    """
    return _read_image(path, source, [i for i, _ in source.channels], at, look)


def read_images(paths: Mapping[str, Path], inputs: Mapping[str, Input]) -> dict[str, np.ndarray]:
    """:func:`read_image` of every sensor. Raises DatasetError, also for a file that is not there."""
    return {k: read_image(need(path, f"the {k} image"), inputs[k]) for k, path in paths.items()}


def _read_image(
    path: Path, declared: Input, used: Sequence[int], at: tuple[int, int] | None = None,
    look: Callable[[Any], None] = lambda raster: None,
) -> np.ndarray:  # fmt: skip
    def measured(source: Any) -> np.ndarray:
        look(source)
        image, gone = _pixels(source), np.zeros(source.shape, bool)
        if image.dtype.kind == "c":
            raise DatasetError(f"{path}: complex values (SLC); detect, calibrate and terrain-correct them first")
        if checks.hides(source):
            gone |= source.read_masks(1) == 0
        for band, value in enumerate(source.nodatavals):
            if band in used and value is not None and (value != 0 or declared.sensor == "s1"):
                gone |= image[..., band] == value
        used_here = [i for i in used if i < source.count]  # a wrong count is told by whoever knows the declaration
        stated = [units.stated_scaling(source, i + 1) for i in used_here]
        if any(pair != units.AS_STORED for pair in stated):
            image, gone = _scaled(path, declared, image, used_here, stated), gone | _nothing(declared, image, used_here)
        return np.where(gone[..., None], np.float32(np.nan), image.astype(np.float32)) if gone.any() else image

    return read_tiff(path, at, measured)


def _nothing(declared: Input, image: np.ndarray, used: Sequence[int]) -> np.ndarray:
    """bool [H, W]: zero in all bands of Sentinel-2 as stored, which an offset would make a value."""
    if declared.sensor == "s1" or len(used) < len(declared.channels):  # one band of several says nothing
        return np.zeros(image.shape[:2], bool)
    return (image[..., used] == 0).all(-1)


def _scaled(
    path: Path, declared: Input, image: np.ndarray, used: Sequence[int], stated: Sequence[tuple[float, float]]
) -> np.ndarray:
    """float32 [H, W, channels]: the used channels scaled as the file states, in the declared unit."""
    try:
        reflectance = units.makes_reflectance(SENSORS[declared.sensor], stated)
    except units.UnitError as e:
        raise DatasetError(f"{path}: {e}") from e
    shifts = sorted({shift for _, shift in stated if shift})
    if shifts and declared.offset:
        raise DatasetError(
            f"{path}: states the offset {shifts[0]:g} itself (gdalinfo), and the data set declares offset "
            f"{declared.offset:g}: it would be taken off twice; declare offset 0"
        )
    factor = units.DN_PER_REFLECTANCE if reflectance and declared.unit == "DN" else 1.0
    out = image.astype(np.float32)
    for i, (scale, shift) in zip(used, stated, strict=True):
        out[..., i] = out[..., i] * np.float32(scale * factor) + np.float32(shift * factor)
    return out


def ground_height(path: Path | str) -> float:
    """Meters on the ground from the upper to the lower edge of a raster, whatever its CRS; 0.0 where it says nothing.

    Of the sphere, so off by up to half a percent.
    """
    import rasterio
    from rasterio.warp import transform

    if not str(path).lower().endswith((".tif", ".tiff")) or not Path(path).exists():
        return 0.0
    try:
        with rasterio.open(path) as src:
            if src.crs is None or src.transform.is_identity:
                return 0.0
            t, column, rows = src.transform, src.width / 2, np.array([0, src.height])
            x, y = t.c + t.a * column + t.b * rows, t.f + t.d * column + t.e * rows
            lon, lat = np.radians(transform(src.crs, "EPSG:4326", x, y))
    except rasterio.errors.RasterioError:
        return 0.0
    return float(6_371_000 * np.hypot(lat[1] - lat[0], (lon[1] - lon[0]) * np.cos(lat.mean())))


def refuse_other_places(paths: Sequence[Path]) -> None:
    """Raises DatasetError where rasters of one sample share no ground at all, as far as they say where they lie.

    Masks shifted by some pixels are not told from those whose georeference is only rough.
    """
    import rasterio
    from rasterio.warp import transform_bounds

    first: Any = None
    for path in paths if len(paths) > 1 else ():
        try:
            with rasterio.open(path) as src:
                if src.crs is None or src.transform.is_identity:
                    continue
                found = (path, src.crs, src.bounds)
                first = first or found
                box = found[2] if src.crs == first[1] else transform_bounds(src.crs, first[1], *src.bounds)
        except (rasterio.errors.RasterioError, rasterio.errors.CRSError):
            continue  # told when its pixels are read
        left, bottom, right, top = first[2]
        if box[0] >= right or box[2] <= left or box[1] >= top or box[3] <= bottom:
            shown = " and ".join(f"{str(crs)[:20]} {tuple(round(v, 4) for v in b)}" for _, crs, b in (found, first))
            raise DatasetError(
                f"{path}: shares no ground with {first[0]} ({shown}); files of one sample are of one place"
            )


def tiff_header(path: Path) -> dict[str, Any]:
    """Shape, count and descriptions of the bands, and tags of a raster without its pixels."""
    import rasterio

    try:
        with rasterio.open(path) as src:
            return {"shape": src.shape, "count": src.count, "descriptions": src.descriptions, "tags": src.tags()}
    except rasterio.errors.RasterioError as e:
        raise DatasetError(f"{path}: cannot be read as a raster ({str(e).splitlines()[0]})") from e


def read_band_files(folder: Path, source: Input, pattern: str) -> np.ndarray:
    """One raster per band (``pattern`` with {band}) -> [H, W, bands]; coarser bands are repeated to the finest grid.

    NaN as in :func:`read_image`. Raises DatasetError naming all missing files, and for sizes that do not divide evenly.
    """
    paths = [folder / pattern.format(band=b) for b in source.bands]
    missing = [p.name for p in paths if not p.exists()]
    if missing:
        raise DatasetError(f"{folder}: missing {missing}")
    planes = [_read_image(p, source, [0])[..., 0] for p in paths]
    rows, cols = max(p.shape[0] for p in planes), max(p.shape[1] for p in planes)
    out = np.empty((rows, cols, len(planes)), np.result_type(*planes))
    for i, (plane, path) in enumerate(zip(planes, paths, strict=True)):
        if rows % plane.shape[0] or cols % plane.shape[1]:
            raise DatasetError(f"{path}: {plane.shape} px is no whole fraction of {(rows, cols)}")
        repeated = np.repeat(plane, rows // plane.shape[0], axis=0)
        out[..., i] = np.repeat(repeated, cols // plane.shape[1], axis=1)
    return out


def read_lines(path: Path) -> list[str]:
    """Non-empty lines of a text file."""
    return [line.strip() for line in need(path, "a list of names").read_text().splitlines() if line.strip()]


def read_csv(path: Path, columns: Sequence[str] = ()) -> list[dict[str, str]]:
    """Rows of a CSV file. Raises DatasetError when it cannot be read or required columns are missing."""
    try:
        return tables.read_csv(need(path, "a CSV file"), columns)
    except tables.TableError as e:
        raise DatasetError(str(e)) from e


def open_h5(path: Path) -> Any:
    """An h5py file, read-only. Raises DatasetError for anything that is not HDF5."""
    import h5py

    try:
        return h5py.File(need(path, "an HDF5 file"), "r")
    except OSError as e:
        raise DatasetError(f"{path}: cannot be read as HDF5 ({str(e).splitlines()[0]})") from e
