"""Where synthetic cells lie: the 10 km grid of Major-TOM, UTM zones, product names, dates, splits.

Grid, cell names and columns follow the Major-TOM Core conventions (arXiv 2402.12095); MGRS tile names
and product identifiers follow the Sentinel-1 and Sentinel-2 product format specifications.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import math

import numpy as np
from rasterio.warp import transform as warp_points

from data_prep.synthetic_landscape import CLASSES

_ROWS = math.ceil(math.pi * 6378.137 / 10)  # rows of 10 km between the poles
_ROW_HEIGHT = 180.0 / _ROWS
BLOCK = 3  # degrees; one WorldCover file, and the unit of geographic splits

# Where a class is at home: (lat, lon) of a few regions; cells lie within three degrees of one.
HOMES: dict[str, tuple[tuple[float, float], ...]] = {
    "tree": ((-4, -62), (0, 22), (61, 98), (58, -75), (47, 12), (1, 113), (-17, -55), (36, -82)),
    "shrub": ((-27, 128), (-23, 18), (33, -108), (15, 5), (-32, 142), (37, 3), (-45, -69), (24, -101)),
    "grass": ((47, 104), (42, -100), (-36, -61), (50, 70), (8, 28), (-23, 145), (53, -8), (-29, 27)),
    "crop": ((42, -91), (49, 3), (28, 79), (35, 116), (-33, -62), (49, 33), (12, -5), (-34, 148)),
    "built": ((40, -75), (51, 7), (35, 138), (31, 121), (-23, -46), (19, 73), (30, 31), (-34, 151)),
    "bare": ((24, 10), (22, 50), (40, 84), (-24, -69), (43, 103), (27, 62), (-22, 14), (36, -116)),
    "snow": ((72, -40), (66, -44), (79, -75), (75, 57), (35, 77), (61, -139), (-49, -73), (80, -50)),
    "water": ((61, 31), (46, -82), (-1, 33), (54, 108), (62, -114), (-9, 34), (60, 25), (13, 14)),
    "wetland": ((61, 73), (-18, -57), (53, -84), (-19, 23), (8, 30), (62, -155), (26, -81), (55, 25)),
    "mangrove": ((22, 89), (4, 6), (-1, -48), (1, 104), (-13, 131), (11, -15), (-18, 47), (21, -105)),
    "moss": ((70, 88), (71, -156), (68, -110), (73, 110), (69, 178.5), (64, -20), (66, -64), (-54, -68)),
    "sea": ((35, -45), (-20, -20), (-30, 80), (15, 160), (55, -20), (-10, -179), (40, 165), (5, 75)),
}
LONGTAIL: dict[str, float] = {
    "tree": 0.28, "grass": 0.21, "crop": 0.14, "sea": 0.11, "bare": 0.09, "shrub": 0.06, "water": 0.035,
    "snow": 0.025, "built": 0.02, "wetland": 0.014, "moss": 0.01, "mangrove": 0.006,
}  # fmt: skip
# Planted faults of a cell; what they do is in synthetic_writer.
DEFECTS = ("truncated tif", "not a tif", "missing band", "all nodata", "wrong size", "wrong crs", "nan", "duplicate")
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


def acquisitions(
    rng: np.random.Generator, lat: float, lon: float, tile: str, drop: tuple[str, ...]
) -> dict[str, Acquisition]:
    """Products of the three sensors; half of the cells have Level-1C and Level-2A of one overpass.

    The offset is decided per product: levels of one overpass may differ (reprocessing).
    """
    time = _date(rng, lat, lon, daylight=True)
    shared = rng.random() < 0.5
    found = {
        "s1": _sentinel1(rng, lat, lon, 1),
        "s2_l1c": _sentinel2(rng, "L1C", time, tile, 2),
        "s2_l2a": _sentinel2(rng, "L2A", time if shared else _date(rng, lat, lon, True), tile, 2 if shared else 3),
    }
    return {key: a for key, a in found.items() if key not in drop}


# --- the plan of a whole run ------------------------------------------------------------------


def _counts(shares: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers that add up to ``total``; every class occurs when there is room for twice as many."""
    exact = {n: s * total / sum(shares.values()) for n, s in shares.items()}
    counts = {n: max(int(e), 1 if total >= 2 * len(shares) else 0) for n, e in exact.items()}
    order = sorted(shares, key=lambda n: exact[n] - counts[n], reverse=True)
    while (missing := total - sum(counts.values())) > 0:
        for n in order[:missing]:
            counts[n] += 1
    while sum(counts.values()) > total:
        counts[max(counts, key=counts.__getitem__)] -= 1
    return counts


def block_of(lat: float, lon: float) -> tuple[int, int]:
    """Lower left corner in degrees of the 3-degree block (and WorldCover file) of a point."""
    return math.floor(lat / BLOCK) * BLOCK, math.floor(lon / BLOCK) * BLOCK


def _block_splits(seed: int, sizes: dict[str, int]) -> dict[tuple[int, int], str]:
    """Every 3-degree block of the globe to one split, in proportion to the square root of the split sizes."""
    names = [n for n, s in sizes.items() if s]
    weights = np.sqrt([sizes[n] for n in names])
    blocks = [(lat, lon) for lat in range(-60, 84, BLOCK) for lon in range(-180, 180, BLOCK)]
    drawn = np.random.default_rng([seed, 7]).choice(len(names), len(blocks), p=weights / weights.sum())
    return {block: names[i] for block, i in zip(blocks, drawn, strict=True)}


def _place(
    rng: np.random.Generator, name: str, split: str, blocks: dict[tuple[int, int], str], used: set[tuple[int, int]]
) -> tuple[int, int]:
    """A free grid cell for a class: near one of its homes, inside a block of the split, no neighbor of another."""
    reach = 3.0
    for attempt in range(4000):
        home = HOMES[name][rng.integers(len(HOMES[name]))]
        lat = float(np.clip(home[0] + rng.uniform(-reach, reach), -59, 82.5))
        lon = (home[1] + rng.uniform(-reach, reach) / math.cos(math.radians(lat)) + 180) % 360 - 180
        row, col = (2 * (i // 2) for i in cell_at(lat, lon))
        lat, lon = cell_center(row, col)
        east = (lon % BLOCK) * math.cos(math.radians(lat))
        width = BLOCK * math.cos(math.radians(lat))
        inside = 0.12 < lat % BLOCK < BLOCK - 0.12 and 0.12 < east < width - 0.12
        if inside and (row, col) not in used and blocks[block_of(lat, lon)] == split:
            return row, col
        reach += 0.02 * (attempt > 200)
    raise ValueError(f"no room left for another {name} cell in split {split}: ask for fewer cells")


def plan_cells(
    *, seed: int, size: int, cells: int, validation: int = 0, heldout: int = 0, classes: str = "longtail",
    missing: float = 0.08, defects: float = 0.0,
) -> list[CellPlan]:  # fmt: skip
    """Plans a run: ``cells`` for training, plus class-balanced ``validation`` and ``heldout`` cells elsewhere.

    Splits own whole 3-degree blocks. ``missing`` is the share of training cells that lack a sensor,
    ``defects`` the share of training cells with a planted defect. Sorted by block, so that files
    of neighbors lie together. Raises ValueError where the globe is full.
    """
    sizes = {"train": cells, "validation": validation, "holdout": heldout}
    blocks = _block_splits(seed, sizes)
    rng = np.random.default_rng([seed, 8])
    used: set[tuple[int, int]] = set()
    placed = []
    for split, total in sizes.items():
        tail = split == "train" and classes == "longtail"
        for name, count in _counts(LONGTAIL if tail else dict.fromkeys(CLASSES, 1.0), total).items():
            for _ in range(count):
                row, col = _place(rng, name, split, blocks, used)
                used.add((row, col))
                placed.append((block_of(*cell_center(row, col)), row, col, name, split))
    plans = []
    for index, (_, row, col, name, split) in enumerate(sorted(placed)):
        own = np.random.default_rng([seed, index, 0])
        lat, lon = cell_center(row, col)
        epsg = utm_epsg(lat, lon)
        x, y = utm(epsg, lon, lat)
        train = split == "train"
        drop = (str(own.choice(["s1", "s1", "s1", "s2_l1c", "s2_l2a"])),) if train and own.random() < missing else ()
        defect = str(own.choice(DEFECTS)) if train and own.random() < defects else ""
        made = acquisitions(own, lat, lon, mgrs_tile(epsg, lat, x, y), () if defect else drop)
        plans.append(
            CellPlan(
                index, seed, cell_name(row, col), row, col, lat, lon, epsg, (x - size * 5, y + size * 5), size, name,
                train and name == "sea" and own.random() < 0.6, split, made, defect,
            )
        )  # fmt: skip
    return plans
