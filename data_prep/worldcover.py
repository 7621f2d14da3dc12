"""Land cover of a tile from the 3 degree maps of ESA WorldCover, and whether the tile is open ocean."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import CRSError, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform as transform_points

from data_prep import tiling
from data_prep.harmonize import connected
from data_prep.raster import BadInput, Grid, PerThread, first_line
from terrafm_jax import landcover

STEP = 3  # degrees a map
SOUTH, NORTH = -60, 84  # WorldCover has no maps beyond
_OUTSIDE = 255  # no class code
_NAME = re.compile(r"ESA_WorldCover_10m_(\d{4})_(v\d{3})_([NS]\d{2}[EW]\d{3})_Map\.tif")
OCEAN_SHARE = 0.99


class MissingMaps(BadInput):
    """WorldCover maps that a footprint needs are not there."""


@dataclasses.dataclass(frozen=True)
class WorldCover:
    """A folder of WorldCover maps.

    Attributes:
      folder: where the maps are; None: land cover is unknown everywhere.
      maps: name of the 3 degree map (``N39W075``) -> path.
      absent: maps known not to exist (open sea); listed in ``absent.txt`` beside the maps.
      missing_is_sea: take every map that is not there for open sea.
    """

    folder: str | None
    maps: dict[str, str]
    absent: frozenset[str] = frozenset()
    missing_is_sea: bool = False

    @classmethod
    def open(cls, folder: str | Path | None, missing: str = "error") -> WorldCover:
        """Lists the maps of a folder. Raises ValueError where the folder has none."""
        if folder is None or str(folder) in ("", "none"):
            return cls(None, {})
        if "://" in str(folder):
            raise ValueError(f"--worldcover {folder}: expected a local or mounted folder of maps, not a URL")
        if not Path(folder).is_dir():
            raise ValueError(f"--worldcover {folder}: no such folder")
        maps: dict[str, tuple[str, str]] = {}
        for path in sorted(Path(folder).rglob("*.tif")):
            found = _NAME.fullmatch(path.name)
            if found:  # the newest version of a map wins
                year, version, name = found.groups()
                maps[name] = max(maps.get(name, ("", "")), (year + version, str(path)))
        if not maps:
            raise ValueError(f"--worldcover {folder}: no file named like ESA_WorldCover_10m_2021_v200_N39W075_Map.tif")
        listed = Path(folder) / "absent.txt"
        absent = frozenset(listed.read_text().split()) if listed.exists() else frozenset()
        return cls(str(folder), {n: p for n, (_, p) in maps.items()}, absent, missing == "sea")

    def missing(self, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that are neither there nor declared absent."""
        if self.folder is None or self.missing_is_sea:
            return []
        return sorted(n for n in set(names) if n not in self.maps and n not in self.absent)

    def overlay(self, grid: Grid) -> np.ndarray:
        """Category indices (``landcover.CATEGORIES``), uint8 [H, W], nearest neighbor on ``grid``.

        Raises MissingMaps where a map between 60 S and 84 N is neither there nor listed as absent.
        """
        result = np.full(grid.shape, landcover.UNKNOWN, np.uint8)
        if self.folder is None:
            return result
        needed = maps_under(grid)
        faults = self.missing(needed)
        if faults:
            raise MissingMaps(
                f"WorldCover maps {', '.join(faults)} are not in {self.folder}; add them, list them in absent.txt, "
                "or pass --worldcover-missing=sea"
            )
        table = landcover.code_to_index().tobytes()  # 255 is not a code: unknown
        todo: np.ndarray | None = None
        for name in needed:
            if name in self.maps:
                codes = codes_on(self.maps[name], grid)
                found = np.frombuffer(bytearray(codes).translate(table), np.uint8).reshape(codes.shape)
                result = found if todo is None else np.where(todo, found, result)
                todo = codes == _OUTSIDE if todo is None else todo & (codes == _OUTSIDE)
        absent = [name for name in needed if name not in self.maps]
        if absent:
            sea = _inside(grid, absent)
            result[sea if todo is None else sea & todo] = landcover.SEA
        return result


def map_name(west: int, south: int) -> str:
    """``N39W075`` for the map whose lower left corner lies at 39 N, 75 W."""
    return f"{'N' if south >= 0 else 'S'}{abs(south):02d}{'E' if west >= 0 else 'W'}{abs(west):03d}"


def maps_of(lon: np.ndarray, lat: np.ndarray) -> list[str]:
    """Names of the maps under an area given by points on its outline; longitudes may exceed +-180."""
    if float(lat.min()) >= NORTH or float(lat.max()) < SOUTH:
        return []
    rows = range(_floor(max(float(lat.min()), SOUTH)), _floor(min(float(lat.max()), NORTH - 1e-9)) + 1, STEP)
    cols = range(_floor(float(lon.min())), _floor(float(lon.max())) + 1, STEP)
    return sorted({map_name((west + 180) % 360 - 180, south) for south in rows for west in cols})


def maps_under(grid: Grid) -> list[str]:
    """Names of the maps that a grid needs. Pixel centers decide, so one that only touches a map does not need it."""
    a, b, c, d, e, f = grid.transform
    return maps_of(*lonlat_outline(Grid(grid.crs, (a, b, c + a / 2, d, e, f + e / 2), grid.height - 1, grid.width - 1)))


def maps_at(lon: np.ndarray, lat: np.ndarray) -> set[str]:
    """Names of the maps in which any of many single points lies."""
    points = np.stack([np.floor(lon / STEP), np.floor(lat / STEP)], axis=1) * STEP + STEP / 2
    return {name for x, y in np.unique(points, axis=0) for name in maps_of(np.array([x]), np.array([y]))}


def _floor(degrees: float) -> int:
    return math.floor(degrees / STEP) * STEP


def lonlat_outline(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes of nine points on each side of a grid, without a jump at the antimeridian.

    Sides come in the order bottom, top, left, right, each from left to right or from bottom to top.
    """
    left, bottom, right, top = grid.bounds()
    along = np.linspace(0.0, 1.0, 9)
    x, y = left + along * (right - left), bottom + along * (top - bottom)
    xs = np.concatenate([x, x, np.full_like(y, left), np.full_like(y, right)])
    ys = np.concatenate([np.full_like(x, bottom), np.full_like(x, top), y, y])
    lon, lat = lonlat(grid.crs, xs, ys)
    lon = lon[0] + (lon - lon[0] + 180.0) % 360.0 - 180.0
    return lon, lat


def lonlat(crs: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates -> longitudes, latitudes in degrees, float64. Raises BadInput on a CRS nobody knows."""
    if crs == "EPSG:4326":
        return np.asarray(x, np.float64), np.asarray(y, np.float64)
    lon, lat = _transformed(crs, crs, "EPSG:4326", x, y)
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()):
        raise BadInput(
            f"coordinates lie outside of CRS {crs!r}: x {min(x):.0f}..{max(x):.0f}, y {min(y):.0f}..{max(y):.0f}"
        )
    return lon, lat


def project(crs: str, lon: np.ndarray, lat: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Degrees -> coordinates of ``crs``, float64. Raises BadInput where that has no place for them."""
    if crs == "EPSG:4326":
        return lon, lat
    x, y = _transformed(crs, "EPSG:4326", crs, (lon + 180.0) % 360.0 - 180.0, lat)
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise BadInput(f"{lon.mean():.2f} E {lat.mean():.2f} N lies outside of CRS {crs!r}")
    return x, y


def _transformed(crs: str, source: str, target: str, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates in another system, infinite where PROJ finds none. Raises BadInput where ``crs`` is to blame."""
    try:
        a, b = transform_points(_crs(source), _crs(target), list(x), list(y))
    except (RasterioError, CRSError) as error:
        raise BadInput(f"CRS {crs!r} cannot be used ({first_line(error)})") from error
    except Exception:  # PROJ has exceptions of its own, and elsewhere returns infinity without any
        a = b = [np.inf]
    return np.asarray(a), np.asarray(b)


@lru_cache(maxsize=256)
def _crs(text: str) -> CRS:
    return CRS.from_user_input(text)


_open: PerThread[rasterio.DatasetReader] = PerThread(rasterio.open, keep=16)


def codes_on(path: str, grid: Grid) -> np.ndarray:
    """Class codes of one map on ``grid``, uint8 [H, W], 255 where the map does not reach. Raises BadInput."""
    try:
        source = _open(path)
        if grid.crs == "EPSG:4326":  # the map and the grid may name the same meridian 360 degrees apart
            left, _, right, _ = grid.bounds()
            turns = round(((left + right) / 2 - (source.bounds.left + source.bounds.right) / 2) / 360)
            a, b, c, d, e, f = grid.transform
            grid = Grid(grid.crs, (a, b, c - 360 * turns, d, e, f), grid.height, grid.width)
        with WarpedVRT(
            source,
            crs=_crs(grid.crs),
            transform=grid.affine,
            height=grid.height,
            width=grid.width,
            resampling=Resampling.nearest,
            src_nodata=None,  # 0 is open sea, not nodata
            nodata=None,  # with nodata GDAL looks at every pixel twice; INIT_DEST fills what the map does not reach
            dtype="uint8",
            init_dest_nodata=False,
            INIT_DEST=str(_OUTSIDE),
        ) as warped:
            return warped.read(1)
    except RasterioError as error:
        raise BadInput(f"WorldCover map {path} cannot be read ({first_line(error)})") from error


def _inside(grid: Grid, names: list[str]) -> np.ndarray:
    """bool [H, W]: pixel centers that lie in one of the maps ``names``."""
    a, _, c, _, e, f = grid.transform
    x, y = np.meshgrid(c + (np.arange(grid.width) + 0.5) * a, f + (np.arange(grid.height) + 0.5) * e)
    lon, lat = lonlat(grid.crs, x.ravel(), y.ravel())
    west = (np.floor(lon / STEP).astype(int) * STEP + 180) % 360 - 180
    south = np.floor(lat / STEP).astype(int) * STEP
    hit = np.zeros(lon.shape, bool)
    for w, s in {tuple(pair) for pair in np.unique(np.stack([west, south], 1), axis=0).tolist()}:
        if SOUTH <= s < NORTH and map_name(w, s) in names:
            hit |= (west == w) & (south == s)
    return hit.reshape(grid.shape)


def fractions(categories: np.ndarray) -> np.ndarray:
    """Share of each category, float32 [NUM_CATEGORIES], of category indices of any shape."""
    counts = np.bincount(categories.ravel(), minlength=landcover.NUM_CATEGORIES)
    return (counts / max(1, categories.size)).astype(np.float32)


def majority(shares: np.ndarray) -> int:
    """Index of the largest category; ``unknown`` only where nothing else is known. Ties: the lower index."""
    known = np.array(shares, np.float64)
    known[landcover.UNKNOWN] = 0.0
    return int(known.argmax()) if known.any() else landcover.UNKNOWN


def ocean(categories: np.ndarray) -> np.ndarray:
    """bool [H, W]: open sea, and water that is connected to it (8 neighbors) within the array.

    WorldCover marks open sea as nodata and coastal sea as water; lakes and rivers inland are water
    too, so only what touches the sea counts.
    """
    sea = categories == landcover.SEA
    water = categories == landcover.WATER
    if not sea.any() or not water.any():
        return sea
    return connected(sea | water, sea)


def oceans(categories: np.ndarray, windows: Sequence[tiling.Window]) -> list[bool]:
    """Whether each window of category indices [H, W] is open ocean, see :func:`ocean`.

    Tracing what is connected is needed only where sea alone is too little and sea with all water enough.
    """
    sea = categories == landcover.SEA
    if not sea.any():
        return [False] * len(windows)
    wet = sea | (categories == landcover.WATER)
    least, most = ([is_ocean(tiling.cut(mask, w, False)) for w in windows] for mask in (sea, wet))
    if least == most:
        return least
    connected_water = ocean(categories)
    return [is_ocean(tiling.cut(connected_water, w, False)) for w in windows]


def is_ocean(ocean_mask: np.ndarray) -> bool:
    """At least 99 % ocean. A majority rule would delete mangrove coasts."""
    return np.count_nonzero(ocean_mask) / ocean_mask.size >= OCEAN_SHARE
