"""One decoded raster and where it lies, and the one exception that sends a cell to quarantine."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import rasterio
from rasterio.errors import CRSError, RasterioError
from rasterio.io import MemoryFile

from terrafm_jax.units import AS_STORED

T = TypeVar("T")
Affine6 = tuple[float, float, float, float, float, float]


class BadInput(ValueError):
    """The input of one cell cannot be used; the message is the reason that ``rejected.csv`` shows."""


class NotThere(BadInput):
    """The input of one sensor does not reach the ground of the cell; the others may do without it."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """A north-up pixel grid: ``crs`` text, affine (a, b, c, d, e, f), rows and columns."""

    crs: str
    transform: Affine6
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def affine(self) -> rasterio.Affine:
        return rasterio.Affine(*self.transform)

    def window(self, row: int, col: int, height: int, width: int) -> Grid:
        """The grid of a rectangle of pixels; it may reach over the edge."""
        a, b, c, d, e, f = self.transform
        return Grid(self.crs, (a, b, c + col * a, d, e, f + row * e), height, width)

    def bounds(self) -> tuple[float, float, float, float]:
        """(left, bottom, right, top) in the units of ``crs``."""
        a, _, c, _, e, f = self.transform
        return c, f + self.height * e, c + self.width * a, f


@dataclasses.dataclass(frozen=True)
class Raster:
    """Pixels [H, W] of one band on ``grid`` as stored; ``nodata`` and ``scaling`` as the file declares them.

    ``scaling``: scale and offset that make values of what is stored (``units.stated_scaling``).
    """

    pixels: np.ndarray
    grid: Grid
    nodata: float | None = None
    scaling: tuple[float, float] = AS_STORED


def normalize_crs(text: str) -> str:
    """``EPSG:EPSG:32648`` (in some Major-TOM rows), ``epsg:32648`` and ``32648`` -> ``EPSG:32648``; WKT as it is."""
    found = re.fullmatch(r"(?i)\s*(?:EPSG:)*(\d{4,6})(?:\.0)?\s*", text)
    return f"EPSG:{found.group(1)}" if found else text.strip()


def decode(data: bytes | memoryview, what: str) -> Raster:
    """Decodes the first band of a complete GeoTIFF. Raises BadInput (not an image, truncated, no georeference)."""
    if not data:
        raise BadInput(f"{what}: empty")
    try:
        with MemoryFile(data) as memory, memory.open() as source:
            grid = grid_of(source, what)
            try:
                pixels = source.read(1)
            except RasterioError as error:
                raise BadInput(f"{what}: band 1 cannot be read, truncated? ({first_line(error)})") from error
            return Raster(pixels, grid, source.nodata)
    except RasterioError as error:
        raise BadInput(f"{what}: cannot be read as an image ({first_line(error)})") from error


def open_raster(path: Any) -> rasterio.DatasetReader:
    """``rasterio.open`` that raises BadInput."""
    try:
        return rasterio.open(path)
    except RasterioError as error:
        raise BadInput(f"{path}: cannot be read as an image ({first_line(error)})") from error


def grid_of(source: rasterio.DatasetReader, what: str) -> Grid:
    """Grid of an open file. Raises BadInput where it has no CRS or is not north-up."""
    transform = source.transform
    six = (transform.a, transform.b, transform.c, transform.d, transform.e, transform.f)
    if source.crs is None and source.gcps[0]:
        raise BadInput(
            f"{what}: radar geometry (ground control points only, as in GRD products): terrain-correct it first"
        )
    if source.crs is None or transform.is_identity:
        raise BadInput(f"{what}: no georeference (CRS {source.crs}, transform {six})")
    if transform.b or transform.d or transform.a <= 0 or transform.e >= 0:
        raise BadInput(f"{what}: not a north-up grid, transform {six}")
    return Grid(_crs_text(source.crs.wkt), six, source.height, source.width)


@lru_cache(maxsize=256)
def in_degrees(crs: str) -> bool:
    """Whether a CRS is geographic; False for one that nobody knows."""
    try:
        return rasterio.CRS.from_user_input(crs).is_geographic
    except CRSError:
        return False


@lru_cache(maxsize=256)
def resampled(crs: str) -> bool:
    """Whether a CRS is a projection that no Sentinel tile comes in: not UTM (of any datum), not UPS, not degrees.

    A pixel of 10 m in Web Mercator is 6 m of ground at 52 degrees, in LAEA up is not north; both look like any grid.
    """
    try:
        system = rasterio.CRS.from_user_input(crs)
    except CRSError:  # a CRS nobody knows: told where its coordinates are asked for
        return False
    said = system.to_dict()
    ups = (said.get("proj"), said.get("k")) == ("stere", 0.994)
    return not (system.is_geographic or ups or said.get("proj") == "utm")


def check_projection(systems: Mapping[str, str]) -> None:
    """Raises BadInput where what defines the grid of the tiles lies in a CRS that Sentinel tiles do not come in.

    ``systems``: file (or sensor) -> CRS; all that are wrong are named. Warping it here would not bring back the
    measured pixels, which were resampled before.
    """
    wrong = {what: crs for what, crs in systems.items() if resampled(crs)}
    if not wrong:
        return
    found = []
    for crs in sorted(set(wrong.values())):
        files = sorted(what for what in wrong if wrong[what] == crs)
        folder = os.path.commonpath([os.path.dirname(f) for f in files])  # once: rejected.csv shows 400 letters
        names = ", ".join(os.path.relpath(f, folder) if folder else f for f in files)
        found.append(f"{crs} ({folder + ': ' if folder else ''}{names})")
    raise BadInput(
        f"projection is no UTM, found {'; '.join(found)}: Sentinel tiles come in UTM, give them as delivered or warp "
        "them (gdalwarp -t_srs)"
    )


@lru_cache(maxsize=256)
def _crs_text(wkt: str) -> str:
    return normalize_crs(rasterio.CRS.from_wkt(wkt).to_string())


class PerThread(Generic[T]):
    """``open_file`` with a cache of the last ``keep`` files for each thread.

    Neither GDAL's data sets nor Arrow's Parquet files may be read by two threads at once, and Beam's workers have many.
    """

    def __init__(self, open_file: Callable[[str], T], keep: int):
        self._open_file, self._keep, self._local = open_file, keep, threading.local()

    def __call__(self, path: str) -> T:
        if not hasattr(self._local, "opened"):
            self._local.opened = lru_cache(self._keep)(self._open_file)
        return self._local.opened(path)

    def cache_clear(self) -> None:
        """Lets go of the files of this thread."""
        self._local.__dict__.clear()


def first_line(error: BaseException) -> str:
    """The first line of an error's message, for one cell of a CSV file."""
    return (str(error) or type(error).__name__).splitlines()[0][:400]
