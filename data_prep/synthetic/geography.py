"""Where and when a synthetic cell is seen: the 10 km grid of Major-TOM, UTM zones, dates, product names.

Grid, cell names and columns follow the Major-TOM Core conventions (arXiv 2402.12095); MGRS tile names
and product identifiers follow the Sentinel-1 and Sentinel-2 product format specifications.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math

import numpy as np
from rasterio.warp import transform as warp_points

_ROWS = math.ceil(math.pi * 6378.137 / 10)  # rows of 10 km between the poles
_ROW_HEIGHT = 180.0 / _ROWS
BLOCK = 3  # degrees; one WorldCover file, and the unit of geographic splits
WITH_OFFSET = ("N0400", "N0500", "N0509", "N0510")  # processing baselines that carry +1000 DN
WITHOUT_OFFSET = ("N0204", "N0206", "N0207", "N0208", "N0209", "N0214", "N0301")
UNDOCUMENTED = "N9999"  # carries no offset in the products at hand


@dataclasses.dataclass(frozen=True)
class Acquisition:
    """One product: identifier, UTC time, orbit direction (Sentinel-1), whether DN carry +1000, noise stream."""

    product: str
    time: dt.datetime
    orbit: str = ""
    offset: int = 0
    stream: int = 0


@dataclasses.dataclass(frozen=True)
class CellPlan:
    """Everything that is decided about a cell before its pixels are drawn.

    ``origin`` is the claimed upper left corner in the UTM zone ``epsg`` (metres, off the S2 grid);
    ``acquisitions`` maps a sensor key to its product (absent sensors are missing).
    """

    index: int
    seed: int
    name: str
    row: int
    col: int
    lat: float
    lon: float
    epsg: int
    origin: tuple[float, float]
    size: int
    landcover: str
    pure: bool
    split: str
    acquisitions: dict[str, Acquisition]
    defect: str = ""

    def rng(self, *stream: int) -> np.random.Generator:
        """A generator of its own per purpose, independent of workers and of other cells."""
        return np.random.default_rng([self.seed, self.index, *stream])


# --- the grid ---------------------------------------------------------------------------------


def columns(row: int) -> int:
    """Number of 10 km columns in a row of the grid."""
    lat = max(abs(row), abs(row + 1) - 1) * _ROW_HEIGHT
    return max(1, math.ceil(2 * math.pi * 6378.137 * math.cos(math.radians(lat)) / 10))


def cell_at(lat: float, lon: float) -> tuple[int, int]:
    """Row (counted from the equator, negative in the south) and column (from Greenwich) of a point."""
    row = math.floor(lat / _ROW_HEIGHT)
    return row, math.floor(lon / 360 * columns(row))


def cell_center(row: int, col: int) -> tuple[float, float]:
    """Latitude and longitude in degrees."""
    return (row + 0.5) * _ROW_HEIGHT, (col + 0.5) * 360 / columns(row)


def cell_name(row: int, col: int) -> str:
    """``199U_1099R``: up or down from the equator, right or left of Greenwich."""
    return f"{abs(row)}{'U' if row >= 0 else 'D'}_{abs(col)}{'R' if col >= 0 else 'L'}"


def utm_epsg(lat: float, lon: float) -> int:
    """EPSG code of the UTM zone (the exceptions around Norway and Svalbard are not used here)."""
    return (32600 if lat >= 0 else 32700) + int((lon + 180) // 6) % 60 + 1


def block_of(lat: float, lon: float) -> tuple[int, int]:
    """Lower left corner in degrees of the 3-degree block (and WorldCover file) of a point."""
    return math.floor(lat / BLOCK) * BLOCK, math.floor(lon / BLOCK) * BLOCK


def utm(epsg: int, lon: float, lat: float) -> tuple[float, float]:
    """Easting and northing in metres."""
    x, y = warp_points("EPSG:4326", f"EPSG:{epsg}", [lon], [lat])
    return x[0], y[0]


def mgrs_tile(epsg: int, lat: float, x: float, y: float) -> str:
    """Name of the 100 km square around a UTM point, like ``T48QUE``."""
    zone = epsg % 100
    band = "CDEFGHJKLMNPQRSTUVWX"[min(19, int((lat + 80) // 8))]
    column = ("STUVWXYZ", "ABCDEFGH", "JKLMNPQR")[zone % 3][int(np.clip(x // 1e5 - 1, 0, 7))]
    row = "ABCDEFGHJKLMNPQRSTUV"[(int(y // 1e5) + (5 if zone % 2 == 0 else 0)) % 20]
    return f"T{zone:02d}{band}{column}{row}"


# --- dates and products -----------------------------------------------------------------------


def sun_elevation(lat: float, day: int) -> float:
    """Degrees, at mid-morning of a day of the year (the overpass of Sentinel-2)."""
    declination = math.radians(-23.44 * math.cos(2 * math.pi * (day + 10) / 365))
    hour, phi = math.radians(22.5), math.radians(lat)
    height = math.sin(phi) * math.sin(declination) + math.cos(phi) * math.cos(declination) * math.cos(hour)
    return math.degrees(math.asin(height))


def _date(rng: np.random.Generator, lat: float, lon: float, daylight: bool) -> dt.datetime:
    """A time between 2017 and 2023; with ``daylight`` only when the sun stands above 25 degrees."""
    while True:
        day = dt.datetime(2017, 1, 1) + dt.timedelta(days=int(rng.integers(0, 7 * 365)))
        if not daylight or sun_elevation(lat, day.timetuple().tm_yday) > 25:
            break
    local = (10.5 if daylight else rng.choice([6.0, 18.0])) - lon / 15
    return day + dt.timedelta(seconds=int(local * 3600 + rng.integers(-900, 900)))


def _sentinel2(rng: np.random.Generator, level: str, time: dt.datetime, tile: str, stream: int) -> Acquisition:
    draw = rng.random()
    if draw < 0.35:
        baseline, offset = str(rng.choice(WITH_OFFSET)), 1000
    elif draw < 0.40:
        baseline, offset = UNDOCUMENTED, 0
    else:
        baseline, offset = str(rng.choice(WITHOUT_OFFSET)), 0
    made = time + dt.timedelta(days=int(rng.integers(0, 900)), seconds=int(rng.integers(3600, 80000)))
    orbit, satellite = rng.integers(1, 144), rng.choice(["S2A", "S2B"])
    product = f"{satellite}_MSI{level}_{time:%Y%m%dT%H%M%S}_{baseline}_R{orbit:03d}_{tile}_{made:%Y%m%dT%H%M%S}"
    return Acquisition(product, time, offset=offset, stream=stream)


def _sentinel1(rng: np.random.Generator, lat: float, lon: float, stream: int) -> Acquisition:
    time = _date(rng, lat, lon, daylight=False)
    stop = time + dt.timedelta(seconds=25)
    absolute, take = rng.integers(15000, 52000), rng.integers(0, 16**6)
    name = f"{rng.choice(['S1A', 'S1B'])}_IW_GRDH_1SDV_{time:%Y%m%dT%H%M%S}_{stop:%Y%m%dT%H%M%S}"
    orbit = "descending" if (time.hour + lon / 15) % 24 < 12 else "ascending"
    return Acquisition(f"{name}_{absolute:06d}_{take:06X}_rtc", time, orbit=orbit, stream=stream)


def acquisitions(rng: np.random.Generator, lat: float, lon: float, tile: str) -> dict[str, Acquisition]:
    """Products of the three sensors; half of the cells have Level-1C and Level-2A of one overpass.

    The offset is decided per product: levels of one overpass may differ (reprocessing).
    """
    time = _date(rng, lat, lon, daylight=True)
    shared = rng.random() < 0.5
    return {
        "s1": _sentinel1(rng, lat, lon, 1),
        "s2_l1c": _sentinel2(rng, "L1C", time, tile, 2),
        "s2_l2a": _sentinel2(rng, "L2A", time if shared else _date(rng, lat, lon, True), tile, 2 if shared else 3),
    }
