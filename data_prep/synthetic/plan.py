"""The plan of a synthetic run: which class lies where, in which split, with which products and faults."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from data_prep.synthetic import geography
from data_prep.synthetic.geography import BLOCK, Acquisition, CellPlan, block_of
from data_prep.synthetic.landscape import CLASSES

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
    "tree": 0.27, "grass": 0.21, "crop": 0.14, "sea": 0.11, "bare": 0.09, "shrub": 0.06, "water": 0.035,
    "snow": 0.025, "built": 0.022, "wetland": 0.016, "moss": 0.012, "mangrove": 0.01,
}  # fmt: skip
# Training cells on the seams of the map: corners and borders of WorldCover files, borders of UTM zones,
# the equator, the antimeridian.
SEAMS: tuple[tuple[str, float, float], ...] = (
    ("grass", 48.0, 105.0), ("sea", -9.0, 180.0), ("tree", -3.0, -61.3), ("crop", 42.6, -90.0),
    ("bare", 24.0, 12.0), ("tree", 0.0, 21.0), ("moss", 68.7, 180.0), ("water", -1.2, 33.0),
)  # fmt: skip
# Planted faults; what they do to the files is in writer. "offset conflict": the identifier
# names a baseline with the offset, the pixels are without.
DEFECTS = (
    "truncated tif", "not a tif", "missing band", "all nodata", "wrong size", "wrong crs", "nan", "duplicate",
    "offset conflict",
)  # fmt: skip
OPEN_OCEAN = 0.6  # share of the training cells at sea without any coast


def _counts(shares: dict[str, float], total: int) -> dict[str, int]:
    """Whole numbers that add up to ``total``; every class occurs once (twice) where there is room for that."""
    least = min(2, total // (2 * len(shares)))
    exact = {n: s * total / sum(shares.values()) for n, s in shares.items()}
    counts = {n: max(int(e), least) for n, e in exact.items()}
    order = sorted(shares, key=lambda n: exact[n] - counts[n], reverse=True)
    while (short := total - sum(counts.values())) > 0:
        for n in order[:short]:
            counts[n] += 1
    while sum(counts.values()) > total:
        counts[max(counts, key=counts.__getitem__)] -= 1
    return counts


def _block_splits(seed: int, sizes: dict[str, int]) -> dict[tuple[int, int], str]:
    """Every 3-degree block of the globe to one split, in proportion to the square root of the split sizes.

    Blocks that a seam touches go to training.
    """
    names = [n for n, s in sizes.items() if s]
    weights = np.sqrt([sizes[n] for n in names])
    blocks = [(lat, lon) for lat in range(-60, 84, BLOCK) for lon in range(-180, 180, BLOCK)]
    drawn = np.random.default_rng([seed, 7]).choice(len(names), len(blocks), p=weights / weights.sum())
    owner = {block: names[i] for block, i in zip(blocks, drawn, strict=True)}
    for _, lat, lon in SEAMS:
        for i, j in ((-0.1, -0.1), (-0.1, 0.1), (0.1, -0.1), (0.1, 0.1)):
            owner[block_of(lat + i, (lon + j + 180) % 360 - 180)] = "train"
    return owner


@dataclasses.dataclass(frozen=True, order=True)
class _Site:
    """A place taken by a class; ordered by block, so that files of neighbors lie together."""

    block: tuple[int, int]
    row: int
    col: int
    lat: float
    lon: float
    name: str
    split: str


def _seam(rng: np.random.Generator, name: str, lat: float, lon: float, size: int) -> _Site:
    """A site whose ground lies across the given point."""
    reach = 0.3 * size * 10 / 111000
    lat += rng.uniform(-reach, reach)
    lon = (lon + rng.uniform(-reach, reach) / math.cos(math.radians(lat)) + 180) % 360 - 180
    return _Site(block_of(lat, lon), *geography.cell_at(lat, lon), lat, lon, name, "train")


def _place(
    rng: np.random.Generator, name: str, split: str, blocks: dict[tuple[int, int], str], used: set[tuple[int, int]]
) -> _Site:
    """A free grid cell near a home of the class and inside a block of the split.

    Only even rows and columns are taken: neighbors of the 10 km grid overlap by 680 m, and ground
    that is drawn twice would differ. Blocks keep a rim of 13 km free, so that splits share no ground.
    """
    reach = 3.0
    for attempt in range(4000):
        home = HOMES[name][rng.integers(len(HOMES[name]))]
        lat = float(np.clip(home[0] + rng.uniform(-reach, reach), -59, 82.5))
        lon = (home[1] + rng.uniform(-reach, reach) / math.cos(math.radians(lat)) + 180) % 360 - 180
        row, col = (2 * (i // 2) for i in geography.cell_at(lat, lon))
        lat, lon = geography.cell_center(row, col)
        narrow = math.cos(math.radians(lat))
        inside = 0.12 < lat % BLOCK < BLOCK - 0.12 and 0.12 < lon % BLOCK * narrow < BLOCK * narrow - 0.12
        inside = inside and -180 <= lon < 180  # the last column of a row is cut off by the antimeridian
        if inside and (row, col) not in used and blocks[block_of(lat, lon)] == split:
            used.add((row, col))
            return _Site(block_of(lat, lon), row, col, lat, lon, name, split)
        reach += 0.02 * (attempt > 200)
    raise ValueError(f"no room left for another {name} cell in split {split}: ask for fewer cells")


def _sites(seed: int, size: int, sizes: dict[str, int], classes: str) -> list[_Site]:
    blocks, rng = _block_splits(seed, sizes), np.random.default_rng([seed, 8])
    used: set[tuple[int, int]] = set()
    found: list[_Site] = []
    for split, total in sizes.items():
        tail = split == "train" and classes == "longtail"
        counts = _counts(LONGTAIL if tail else dict.fromkeys(CLASSES, 1.0), total)
        for name, lat, lon in SEAMS[: total // 8] if split == "train" else ():
            if counts[name]:
                counts[name] -= 1
                site = _seam(rng, name, lat, lon, size)
                found.append(site)
                used |= {(site.row + i, site.col + j) for i in (-1, 0, 1) for j in range(-3, 4)}
        for name, count in counts.items():
            found += [_place(rng, name, split, blocks, used) for _ in range(count)]
    return sorted(found)


def _acquire(
    rng: np.random.Generator, site: _Site, tile: str, missing: float, defects: float
) -> tuple[dict[str, Acquisition], str]:
    """Products of a cell and its planted defect; only training cells lack a sensor or are defective."""
    drop = str(rng.choice(["s1", "s1", "s1", "s2_l1c", "s2_l2a"])) if rng.random() < missing else ""
    defect = str(rng.choice(DEFECTS)) if rng.random() < defects else ""
    made = geography.acquisitions(rng, site.lat, site.lon, tile)
    if site.split != "train":
        return made, ""
    if defect == "offset conflict":
        a = made["s2_l2a"]
        parts = a.product.split("_")
        made["s2_l2a"] = dataclasses.replace(a, product="_".join([*parts[:3], "N0500", *parts[4:]]), offset=0)
    elif not defect:
        made.pop(drop, None)
    return made, defect


def plan_cells(
    *, seed: int, size: int, cells: int, validation: int = 0, heldout: int = 0, classes: str = "longtail",
    missing: float = 0.08, defects: float = 0.0,
) -> list[CellPlan]:  # fmt: skip
    """Plans a run: ``cells`` for training, plus class-balanced ``validation`` and ``heldout`` cells elsewhere.

    Splits own whole 3-degree blocks. ``missing`` is the share of training cells that lack a sensor,
    ``defects`` the share of training cells with a planted defect. Raises ValueError where the globe is full.
    """
    sites = _sites(seed, size, {"train": cells, "validation": validation, "holdout": heldout}, classes)
    plans = []
    for index, site in enumerate(sites):
        rng = np.random.default_rng([seed, index, 0])
        epsg = geography.utm_epsg(site.lat, site.lon)
        x, y = geography.utm(epsg, site.lon, site.lat)
        made, defect = _acquire(rng, site, geography.mgrs_tile(epsg, site.lat, x, y), missing, defects)
        plans.append(
            CellPlan(
                index, seed, geography.cell_name(site.row, site.col), site.row, site.col, site.lat, site.lon, epsg,
                (x - size * 5, y + size * 5), size, site.name,
                site.split == "train" and site.name == "sea" and rng.random() < OPEN_OCEAN, site.split, made, defect,
            )
        )  # fmt: skip
    return plans
