"""The ground of a synthetic cell: a land-cover map and, per class, the structure that gives it away.

Spectra of a confusable group are drawn from one distribution (``reflectance``); what tells
its members apart is here: correlation length, orientation, parcels, streets, creeks, polygons. A
structure belongs to the ground, so every sensor and date sees the same one. Lengths are pixels of 10 m.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np
from scipy import fft

from terrafm_jax import landcover

CLASSES: tuple[str, ...] = tuple(n for n in landcover.NAMES if n != "unknown")  # 11 classes + sea

# What is found next to a class, with weights. Chosen so that companions come from other groups and
# from the class's own group alike: a tile's mean spectrum then says little about its majority.
COMPANIONS: dict[str, dict[str, float]] = {
    "tree": {"grass": 3, "shrub": 2, "crop": 2, "water": 1, "built": 0.5, "wetland": 0.5},
    "shrub": {"grass": 3, "bare": 2, "tree": 2, "crop": 1},
    "grass": {"tree": 3, "crop": 2, "shrub": 2, "bare": 1, "wetland": 0.7, "built": 0.5},
    "crop": {"grass": 3, "tree": 2, "built": 1.5, "water": 0.5, "wetland": 0.5},
    "built": {"grass": 2, "tree": 2, "crop": 2, "bare": 1.5, "water": 0.5},
    "bare": {"shrub": 2, "grass": 2, "built": 1, "water": 0.5, "moss": 0.5},
    "snow": {"bare": 3, "moss": 2, "water": 0.7, "grass": 0.5},
    "water": {"tree": 2, "grass": 2, "wetland": 1.5, "crop": 1, "built": 0.7, "sea": 0.5},
    "wetland": {"grass": 3, "water": 2, "tree": 2, "crop": 1, "mangrove": 0.3},
    "mangrove": {"tree": 2, "shrub": 1.5, "water": 1.5, "wetland": 1.5, "sea": 1},
    "moss": {"grass": 2, "bare": 2, "snow": 1, "shrub": 1, "water": 0.7},
    "sea": {"water": 3, "bare": 1, "mangrove": 0.7, "grass": 1, "tree": 1, "built": 0.5},
}
SHARE_LIMITS = (0.38, 0.92)  # of the main class per quadrant; resampling of the map moves it by a few percent


@dataclasses.dataclass(frozen=True)
class Structure:
    """Spatial signature of one class on the canvas [n, n].

    Attributes:
      cover: zero mean, unit variance; where the first of the two end members of the class prevails.
      third: 0..1, share of a third material (creek water, asphalt, pools, shadow).
      radar: zero mean, unit variance; modulation of the backscatter in dB.
      parcel: zero mean; parcels that change with the date of each sensor (0 where there are none).
    """

    cover: np.ndarray
    third: np.ndarray
    radar: np.ndarray
    parcel: np.ndarray


@dataclasses.dataclass(frozen=True)
class Landscape:
    """Ground of one cell: category map uint8 [n, n], the classes in it, their structures, the relief."""

    classes: np.ndarray
    present: tuple[str, ...]
    structures: dict[str, Structure]
    slope: np.ndarray  # float32 [2, n, n], unit variance: down and right gradient of the terrain
    variety: np.ndarray  # float32 [n, n], unit variance: which of the two soils, leaves, ... of the cell prevails


# --- noise ------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _frequencies(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cycles per pixel along rows [m, 1] and columns [1, m // 2 + 1]."""
    return fft.fftfreq(size).astype(np.float32)[:, None], fft.rfftfreq(size).astype(np.float32)[None]


def _noise(rng: np.random.Generator, size: int, response: np.ndarray, full: int) -> np.ndarray:
    white = rng.standard_normal((2, *response.shape), np.float32)
    return standardize(fft.irfft2((white[0] + 1j * white[1]) * response, s=(full, full))[:size, :size])


def standardize(values: np.ndarray) -> np.ndarray:
    """float32 of zero mean and unit variance (a constant stays zero)."""
    values = values - values.mean()
    return (values / max(float(values.std()), 1e-6)).astype(np.float32)


def smooth(rng: np.random.Generator, size: int, sigma: float, aspect: float = 1.0, angle: float = 0.0) -> np.ndarray:
    """Gaussian noise [size, size] smoothed over ``sigma`` px, ``aspect`` times longer along ``angle``."""
    full = fft.next_fast_len(size, real=True)
    rows, cols = _frequencies(full)
    along, across = cols * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - cols * np.sin(angle)
    power = (sigma * aspect * along) ** 2 + (sigma * across) ** 2
    return _noise(rng, size, np.exp(np.float32(-2 * np.pi**2) * power), full)


def waves(rng: np.random.Generator, size: int, wavelength: float, angle: float, spread: float = 0.18) -> np.ndarray:
    """Wave trains [size, size] (dunes, swell): narrow-band noise whose crests lie across ``angle``."""
    full = fft.next_fast_len(size, real=True)
    rows, cols = _frequencies(full)
    along, across = cols * np.cos(angle) + rows * np.sin(angle), rows * np.cos(angle) - cols * np.sin(angle)
    offset = (np.abs(along) - 1 / wavelength) ** 2 + across**2
    return _noise(rng, size, np.exp(-offset / np.float32(2 * (spread / wavelength) ** 2)), full)


def fractal(rng: np.random.Generator, size: int, power: float, longest: float) -> np.ndarray:
    """Noise [size, size] with spectral density |f|^-power, flat beyond ``longest`` px."""
    full = fft.next_fast_len(size, real=True)
    rows, cols = _frequencies(full)
    return _noise(rng, size, (rows**2 + cols**2 + longest**-2.0) ** np.float32(-power / 4), full)


def voronoi(
    rng: np.random.Generator, rows: np.ndarray, cols: np.ndarray, *, square: bool, jitter: float = 0.8
) -> tuple[np.ndarray, np.ndarray]:
    """Cells around a jittered unit lattice, seen at the points (rows, cols), each [n, n].

    Returns a random value per point's cell (zero mean, unit variance) and the distance to the cell
    border in lattice units. ``square`` measures by the larger coordinate: parcels rather than polygons.
    """
    row0, col0 = int(np.floor(rows.min())) - 2, int(np.floor(cols.min())) - 2
    shape = int(np.ceil(rows.max())) - row0 + 3, int(np.ceil(cols.max())) - col0 + 3
    seeds = (0.5 + jitter * (rng.random((2, *shape), np.float32) - 0.5)).astype(np.float32)
    values = rng.standard_normal(shape, np.float32)
    r, c = np.floor(rows).astype(np.int32), np.floor(cols).astype(np.int32)
    r_in, c_in = (rows - r).astype(np.float32), (cols - c).astype(np.float32)
    r -= row0
    c -= col0
    first = np.full(rows.shape, np.inf, np.float32)
    second, found = first.copy(), np.zeros(rows.shape, np.float32)
    for i in (-1, 0, 1):
        for j in (-1, 0, 1):
            down = seeds[0][r + i, c + j] + i - r_in
            right = seeds[1][r + i, c + j] + j - c_in
            distance = np.maximum(np.abs(down), np.abs(right)) if square else np.hypot(down, right)
            nearer = distance < first
            second = np.where(nearer, first, np.minimum(second, distance))
            first = np.where(nearer, distance, first)
            found = np.where(nearer, values[r + i, c + j], found)
    return found, second - first


def _grid(size: int, spacing: float, angle: float, aspect: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Rotated lattice coordinates of every pixel, in units of ``spacing`` (columns: ``spacing * aspect``)."""
    rows, cols = np.mgrid[:size, :size].astype(np.float32)
    down, right = rows * np.cos(angle) - cols * np.sin(angle), rows * np.sin(angle) + cols * np.cos(angle)
    return down / spacing, right / (spacing * aspect)


# --- structures, one function a class ---------------------------------------------------------


def _plain(
    cover: np.ndarray,
    radar: np.ndarray | None = None,
    third: np.ndarray | None = None,
    parcel: np.ndarray | None = None,
) -> Structure:
    zero = np.zeros(cover.shape, np.float32)
    cover = standardize(cover)
    return Structure(
        cover,
        zero if third is None else third.astype(np.float32),
        cover if radar is None else standardize(radar),
        zero if parcel is None else parcel.astype(np.float32),
    )


def _tree(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Crowns and gaps: short isotropic correlation."""
    crowns, stands = smooth(rng, n, 1.1 * scale), smooth(rng, n, 9 * scale)
    return _plain(crowns + 0.45 * stands)


def _shrub(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Single clumps on open ground, spaced by competition for water."""
    warp = smooth(rng, n, 6.0), smooth(rng, n, 6.0)
    rows, cols = _grid(n, 5.0 * scale, angle)
    rows, cols = rows + 0.3 * warp[0], cols + 0.3 * warp[1]
    size, border = voronoi(rng, rows, cols, square=False, jitter=0.75)
    clumps = np.clip(border * (1 + 0.25 * size), 0, 1.2) ** 1.5
    return _plain(standardize(clumps) + 0.15 * smooth(rng, n, 1.0))


def _mangrove(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Closed canopy cut by meandering tidal creeks of two orders."""
    canopy = smooth(rng, n, 1.5 * scale)
    large, small = smooth(rng, n, 9 * scale), smooth(rng, n, 4.5 * scale)
    slope = np.hypot(*np.gradient(large)) + 0.02
    slope_small = np.hypot(*np.gradient(small)) + 0.04
    creeks = np.exp(-((large / slope / 1.3) ** 2)) + 0.7 * np.exp(-((small / slope_small / 0.8) ** 2))
    creeks = np.minimum(creeks, 1)
    return _plain(0.6 * canopy - 2.2 * creeks, 0.4 * canopy - 2.0 * creeks, 0.4 * creeks)


def _grass(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Rolling, long correlation; nothing sharp."""
    rolling = smooth(rng, n, 9 * scale, 1.4, angle) + 0.5 * smooth(rng, n, 5 * scale)
    return _plain(rolling)


def _crop(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Rectangular parcels, each with its own crop, date and drilling lines."""
    rows, cols = _grid(n, 11 * scale, angle, aspect=1.6)
    parcel, border = voronoi(rng, rows, cols, square=True, jitter=0.55)
    lines = np.cos((2 * np.pi / (3.6 * scale)) * rows * 11 * scale) * np.where(parcel > -0.3, 1.0, 0.2)
    return _plain(parcel + 0.35 * lines - 1.2 * (border < 0.08), 0.9 * parcel + 0.3 * lines, parcel=parcel)


def _wetland(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Strings and pools: a two-valued, elongated mosaic."""
    mosaic = np.tanh(3.5 * (smooth(rng, n, 1.7 * scale, 2.6, angle) - 0.2))
    return _plain(mosaic + 0.2 * smooth(rng, n, 8.0), mosaic, 0.18 * np.clip(-mosaic, 0, 1))


def _built(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """A street grid around blocks of roofs; roofs and walls are strong scatterers."""
    warp = smooth(rng, n, 15.0)
    rows, cols = _grid(n, 8.0 * scale, angle, aspect=1.25)
    rows, cols = rows + 0.10 * warp, cols - 0.10 * warp
    street = np.minimum(np.abs(rows - np.round(rows)) * 8 * scale, np.abs(cols - np.round(cols)) * 10 * scale)
    street = np.exp(-((street / 0.9) ** 2))
    roofs, _ = voronoi(rng, rows * 3.0, cols * 3.4, square=True, jitter=0.5)
    points = np.exp(0.9 * roofs) * (1 - street)
    return _plain(0.8 * roofs - 2.0 * street, np.minimum(points, 6) - 1.2 * street, 0.5 * street)


def _bare(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Dune trains or eroded rock, in any proportion."""
    dunes = waves(rng, n, 11 * scale, angle)
    dunes = dunes + 0.25 * dunes**2
    rock = fractal(rng, n, 3.0, 60.0)
    share = rng.uniform(0.2, 0.9)
    return _plain(share * dunes + (1 - share) * rock)


def _moss(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Ice-wedge polygons of patterned ground."""
    warp = smooth(rng, n, 7.0), smooth(rng, n, 7.0)
    rows, cols = _grid(n, 8.0 * scale, angle)
    center, border = voronoi(rng, rows + 0.2 * warp[0], cols + 0.2 * warp[1], square=False, jitter=0.9)
    trough = np.exp(-((border / 0.16) ** 2))
    return _plain(0.35 * center - 1.6 * trough, 0.3 * center - 1.2 * trough, 0.25 * trough)


def _snow(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Wind-carved streaks on broad undulations."""
    return _plain(smooth(rng, n, 1.3 * scale, 7.0, angle) + 0.8 * smooth(rng, n, 14 * scale))


def _water(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Still: plumes of sediment and calm slicks, no waves."""
    plumes = smooth(rng, n, 7 * scale, 2.0, angle)
    return _plain(plumes + 0.3 * smooth(rng, n, 0.6), plumes)


def _sea(rng: np.random.Generator, n: int, scale: float, angle: float) -> Structure:
    """Swell with whitecaps on the crests."""
    swell = waves(rng, n, 8.5 * scale, angle, 0.22)
    caps = np.clip(swell - 1.6, 0, 1) * (rng.random((n, n), np.float32) < 0.3)
    return _plain(swell + 0.35 * smooth(rng, n, 0.6), swell, 0.12 * caps)


_STRUCTURES = {
    "tree": _tree, "shrub": _shrub, "mangrove": _mangrove, "grass": _grass, "crop": _crop, "wetland": _wetland,
    "built": _built, "bare": _bare, "moss": _moss, "snow": _snow, "water": _water, "sea": _sea,
}  # fmt: skip


def structure(rng: np.random.Generator, name: str, size: int) -> Structure:
    """The structure of one class on [size, size], at a random scale (about +-20 %) and orientation."""
    return _STRUCTURES[name](rng, size, float(np.exp(rng.normal(0, 0.13))), float(rng.uniform(0, np.pi)))


# --- the map ----------------------------------------------------------------------------------


def _companions(rng: np.random.Generator, main: str) -> list[str]:
    names, weights = zip(*COMPANIONS[main].items(), strict=True)
    count = int(min(len(names), rng.integers(3, 5)))
    return list(rng.choice(names, count, replace=False, p=np.array(weights) / sum(weights)))


def _quadrant_weights(size: int) -> np.ndarray:
    """float32 [4, size, size]: bilinear weights of the four quadrant centers."""
    at = np.clip((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 0.5, 0, 1)
    row, col = np.stack([1 - at, at]), np.stack([1 - at, at])
    return (row[:, None, :, None] * col[None, :, None, :]).reshape(4, size, size)


def _balance(lead: np.ndarray, rival: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Bias [4] per quadrant that gives the main class its target share and the largest share of all.

    ``lead`` [m, m] is the main field minus the best companion, ``rival`` [m, m] the best companion.
    """
    m = lead.shape[0]
    weights = _quadrant_weights(m)
    quadrant = (np.arange(m) * 2 // m)[:, None] * 2 + (np.arange(m) * 2 // m)[None]
    bias, targets = np.zeros(4, np.float32), targets.copy()
    for _ in range(14):
        wins = lead + np.tensordot(bias, weights, 1) > 0
        for q in range(4):
            inside = quadrant == q
            share = float(wins[inside].mean())
            others = np.bincount(rival[inside & ~wins], minlength=2) / inside.sum()
            if others.max() > share - 0.04 and targets[q] < SHARE_LIMITS[1]:
                targets[q] = min(SHARE_LIMITS[1], targets[q] + 0.05)
            bias[q] += 1.8 * (targets[q] - share)
    return bias


def class_map(rng: np.random.Generator, size: int, main: str, pure: bool = False) -> np.ndarray:
    """Category indices uint8 [size, size]: ``main`` holds the majority of every quadrant (all if ``pure``).

    The share is drawn per quadrant between 38 and 92 %; three or four companions hold the rest.
    """
    if pure:
        return np.full((size, size), landcover.category(main), np.uint8)
    names = [main, *_companions(rng, main)]
    sigma = max(3.5, 0.055 * size)
    fields = np.stack([smooth(rng, size, sigma * rng.uniform(0.7, 1.3)) for _ in names])
    fields += 0.12 * smooth(rng, size, 1.5)[None] * np.linspace(-1, 1, len(names), dtype=np.float32)[:, None, None]
    targets = SHARE_LIMITS[0] + (SHARE_LIMITS[1] - SHARE_LIMITS[0]) * rng.beta(2.4, 1.2, 4)
    step = max(1, size // 80)
    coarse = fields[:, ::step, ::step]
    bias = _balance(coarse[0] - coarse[1:].max(0), coarse[1:].argmax(0), targets.astype(np.float32))
    fields[0] += np.tensordot(bias, _quadrant_weights(size), 1)
    return np.array([landcover.category(n) for n in names], np.uint8)[fields.argmax(0)]


def landscape(rng: np.random.Generator, size: int, main: str, pure: bool = False) -> Landscape:
    """Draws the ground of one cell on [size, size] pixels of 10 m."""
    classes = class_map(rng, size, main, pure)
    present = tuple(landcover.NAMES[i] for i in np.unique(classes))
    structures = {name: structure(rng, name, size) for name in present}
    relief = fractal(rng, size, 4.0, 80.0)
    slope = np.stack([standardize(g) for g in np.gradient(relief)])
    return Landscape(classes, present, structures, slope, smooth(rng, size, 9.0))
