"""Sentinel-2 of a synthetic cell: materials, phenology, sun, atmosphere, clouds, both product levels.

Surface reflectance is a mixture of two (sometimes three) materials per class, in proportions that the
structure of the class decides. Members of a confusable group draw materials and proportions from the
same distribution. What changes between products (sun, aerosol, gain, contrast, season) is drawn per
product, never per cell: a nuisance common to all views of a tile would become the feature that a
self-supervised model learns.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from data_prep.synthetic import landscape as ground
from data_prep.synthetic.geography import Acquisition, CellPlan, sun_elevation
from terrafm_jax import landcover
from terrafm_jax.sensors import SENSORS

BANDS: tuple[str, ...] = SENSORS["s2_l2a"].band_names  # 12 bands, B10 has no surface signal
SATURATION = 1.55  # reflectance
_WAVELENGTH = np.array([443, 492, 560, 665, 704, 740, 783, 833, 865, 945, 1610, 2190], np.float32) / 1000

# Reflectance in the 12 bands, typical values of published spectral libraries, rounded.
MATERIALS: dict[str, np.ndarray] = {
    name: np.array(values, np.float32)
    for name, values in {
        "leaf": (0.020, 0.025, 0.055, 0.030, 0.085, 0.26, 0.33, 0.35, 0.37, 0.37, 0.17, 0.075),
        "straw": (0.055, 0.070, 0.110, 0.150, 0.190, 0.23, 0.26, 0.28, 0.30, 0.31, 0.34, 0.230),
        "soil": (0.060, 0.075, 0.105, 0.145, 0.170, 0.19, 0.21, 0.23, 0.25, 0.26, 0.33, 0.290),
        "humus": (0.030, 0.038, 0.052, 0.068, 0.082, 0.10, 0.11, 0.13, 0.14, 0.14, 0.18, 0.140),
        "sand": (0.090, 0.120, 0.190, 0.260, 0.290, 0.31, 0.33, 0.35, 0.36, 0.37, 0.44, 0.400),
        "concrete": (0.110, 0.135, 0.165, 0.190, 0.205, 0.22, 0.23, 0.24, 0.25, 0.25, 0.28, 0.250),
        "asphalt": (0.055, 0.065, 0.075, 0.085, 0.090, 0.10, 0.10, 0.11, 0.11, 0.12, 0.14, 0.130),
        "rock": (0.080, 0.095, 0.120, 0.145, 0.155, 0.17, 0.18, 0.19, 0.20, 0.20, 0.25, 0.220),
        "lichen": (0.055, 0.075, 0.115, 0.135, 0.165, 0.21, 0.24, 0.26, 0.28, 0.29, 0.29, 0.200),
        "clear": (0.035, 0.033, 0.028, 0.015, 0.012, 0.010, 0.009, 0.008, 0.007, 0.006, 0.004, 0.003),
        "turbid": (0.060, 0.070, 0.090, 0.075, 0.065, 0.040, 0.038, 0.032, 0.028, 0.022, 0.008, 0.005),
        "glint": (0.105, 0.105, 0.105, 0.095, 0.090, 0.085, 0.080, 0.078, 0.075, 0.060, 0.050, 0.040),
        "foam": (0.200, 0.210, 0.210, 0.200, 0.190, 0.180, 0.170, 0.160, 0.150, 0.120, 0.050, 0.030),
        "snow": (0.740, 0.760, 0.770, 0.760, 0.750, 0.730, 0.710, 0.690, 0.660, 0.560, 0.100, 0.070),
        "firn": (0.450, 0.490, 0.490, 0.470, 0.450, 0.410, 0.380, 0.340, 0.310, 0.250, 0.060, 0.045),
        "cloud": (0.570, 0.560, 0.550, 0.550, 0.560, 0.570, 0.580, 0.580, 0.580, 0.490, 0.420, 0.340),
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Group:
    """How a confusable group of classes reflects.

    ``first`` and ``second`` are concentrations of a Dirichlet draw of materials per cell and class;
    ``green`` materials turn to straw out of season. ``cover`` is the range of the mean share of
    ``first``, ``swing`` its standard deviation in space, ``shade`` that of the brightness (roughness,
    shadows), ``third`` the third material.
    """

    first: dict[str, float]
    second: dict[str, float]
    cover: tuple[float, float]
    swing: float
    shade: float
    third: str
    evergreen: tuple[float, float] = (0.0, 0.4)


_WOODY = dict(
    first={"leaf": 12.0, "humus": 1.0},
    second={"soil": 4.0, "straw": 3.0, "humus": 2.0},
    cover=(0.58, 0.70), swing=0.30, shade=0.16, evergreen=(0.5, 0.95),
)  # fmt: skip
_HERB = dict(
    first={"leaf": 9.0, "straw": 2.0},
    second={"soil": 4.0, "straw": 2.0, "humus": 3.0},
    cover=(0.53, 0.67), swing=0.30, shade=0.12,
)  # fmt: skip
_MINERAL = dict(
    first={"sand": 3.0, "concrete": 2.5, "soil": 2.0, "lichen": 2.0},
    second={"rock": 3.0, "humus": 3.0, "asphalt": 2.0, "leaf": 1.0},
    cover=(0.50, 0.62), swing=0.30, shade=0.16,
)  # fmt: skip
_WATER = dict(
    first={"turbid": 4.0, "glint": 3.0},
    second={"clear": 5.0, "turbid": 0.7},
    cover=(0.35, 0.55), swing=0.32, shade=0.20,
)  # fmt: skip
GROUPS: dict[str, Group] = {
    "tree": Group(**_WOODY, third="humus"),
    "shrub": Group(**_WOODY, third="soil"),
    "mangrove": Group(**_WOODY, third="turbid"),
    "grass": Group(**_HERB, third="soil"),
    "crop": Group(**_HERB, third="soil"),
    "wetland": Group(**_HERB, third="turbid"),
    "built": Group(**_MINERAL, third="asphalt"),
    "bare": Group(**_MINERAL, third="rock"),
    "moss": Group(**_MINERAL, third="humus"),
    "snow": Group({"snow": 1.0}, {"firn": 3.0, "snow": 2.0}, (0.50, 0.70), 0.25, 0.06, "firn"),
    "water": Group(**_WATER, third="turbid"),
    "sea": Group(**_WATER, third="foam"),
}


@dataclasses.dataclass(frozen=True)
class Sky:
    """Cloud opacity 0..1, transmission of the shadows, mask uint8 (0 clear, 1 thick, 2 thin, 3 shadow), each [n, n]."""

    opacity: np.ndarray
    shadow: np.ndarray
    mask: np.ndarray
    cover: float


def greenness(lat: float, day: float) -> float:
    """0..1: season of the green leaf; summer in the mid-latitudes, weak swings in the tropics."""
    season = 0.5 + 0.5 * math.cos(2 * math.pi * (day - (200 if lat >= 0 else 18)) / 365)
    strength = min(1.0, abs(lat) / 45)
    return (1 - strength) * 0.75 + strength * season


def _mix(rng: np.random.Generator, weights: dict[str, float], green: float) -> np.ndarray:
    """Reflectance [12] of a random mixture; leaves are replaced by straw where they are not green."""
    shares = rng.dirichlet(list(weights.values()))
    spectra = []
    for name in weights:
        leaf = green * MATERIALS["leaf"] + (1 - green) * MATERIALS["straw"]
        spectra.append(leaf if name == "leaf" else MATERIALS[name])
    return (shares @ np.stack(spectra)) * np.float32(math.exp(rng.normal(0, 0.06)))


def class_reflectance(
    plan: CellPlan, name: str, shape: ground.Structure, variety: np.ndarray, acquired: Acquisition, contrast: float
) -> np.ndarray:
    """Surface reflectance [k, 12] of the k pixels of one class, on the date of a product; fields of ``shape`` are [k].

    Materials are drawn per cell and class (the same for every product), the season per product.
    """
    group, rng = GROUPS[name], plan.rng(20, landcover.category(name))
    mean = rng.uniform(*group.cover)
    swing = group.swing * math.exp(rng.normal(0, 0.2)) * contrast
    evergreen = rng.uniform(*group.evergreen)
    season = greenness(plan.lat, acquired.time.timetuple().tm_yday)
    green = evergreen + (1 - evergreen) * season
    firsts = [_mix(rng, group.first, green) for _ in range(2)]
    seconds = [_mix(rng, group.second, 0.3 + 0.7 * green) for _ in range(2)]
    # Parcels follow calendars of their own, so their order of brightness changes with the date.
    turn = float(np.sin(plan.rng(21, acquired.stream).uniform(0, 2 * np.pi)))
    wanted = shape.cover + 0.5 * turn * shape.parcel
    cover = np.clip(mean + swing * wanted, 0.0, 1.0)
    shade = 1 + group.shade * contrast * np.clip(wanted, -2.5, 2.5)
    # Two draws of each material alternate within the cell: were there one, crops of a tile would
    # share its color, and color rather than structure would be what distillation learns.
    other = 1 / (1 + np.exp(-2.0 * variety - 2.0 * np.sin(9 * shape.parcel)))
    third = shape.third
    shares = np.stack([cover * (1 - other), cover * other, (1 - cover) * (1 - other), (1 - cover) * other], -1)
    surface = (shares * (shade * (1 - third))[:, None]) @ np.stack([*firsts, *seconds]).astype(np.float32)
    return surface + third[:, None] * MATERIALS[group.third]


def surface(plan: CellPlan, land: ground.Landscape, acquired: Acquisition) -> np.ndarray:
    """Surface reflectance [n, n, 12] under the sun of a product, before clouds and atmosphere."""
    rng = plan.rng(22, acquired.stream)
    contrast = math.exp(rng.normal(0, 0.50))
    out = np.empty((*land.classes.shape, len(BANDS)), np.float32)
    for name in land.present:
        inside = land.classes == landcover.category(name)
        shape = _only(land.structures[name], inside)
        out[inside] = class_reflectance(plan, name, shape, land.variety[inside], acquired, contrast)
    # Slopes facing the sun are brighter; the azimuth follows the hour and the hemisphere.
    azimuth = math.radians((145 if plan.lat > 0 else 40) + rng.normal(0, 15))
    elevation = math.radians(max(15.0, sun_elevation(plan.lat, acquired.time.timetuple().tm_yday)))
    facing = math.cos(azimuth) * land.slope[0] - math.sin(azimuth) * land.slope[1]
    steep = plan.rng(23).uniform(0.0, 0.05) / math.tan(elevation)
    flat = np.isin(land.classes, [landcover.WATER, landcover.SEA])
    return out * np.where(flat, 1, 1 + steep * facing).astype(np.float32)[..., None]


def _only(shape: ground.Structure, inside: np.ndarray) -> ground.Structure:
    """The structure at the pixels [k] of its class: mixing runs on those alone."""
    return ground.Structure(*(getattr(shape, f.name)[inside] for f in dataclasses.fields(shape)))


def sky(plan: CellPlan, size: int, acquired: Acquisition, cloudy: float) -> Sky:
    """Clouds and their shadows; a share ``cloudy`` of the overpasses has any."""
    rng = plan.rng(24, acquired.stream)
    clear = np.ones((size, size), np.float32)
    if rng.random() >= cloudy:
        return Sky(0 * clear, clear, np.zeros((size, size), np.uint8), 0.0)
    cover = rng.beta(1.0, 4.0)
    field = ground.fractal(rng, size, 3.2, max(60.0, size / 3))
    opacity = np.clip((field - np.quantile(field, 1 - cover)) * rng.uniform(1.0, 2.5), 0, 1).astype(np.float32) * 0.95
    away = (4, -5) if plan.lat > 0 else (-4, -5)
    shadow = 1 - 0.5 * np.roll(opacity, away, (0, 1))
    mask = np.select([opacity > 0.5, opacity > 0.1, shadow < 0.75], [1, 2, 3], 0).astype(np.uint8)
    return Sky(opacity, shadow.astype(np.float32), mask, float((opacity > 0.1).mean()))


def under_clouds(reflectance: np.ndarray, clouds: Sky) -> np.ndarray:
    """Surface reflectance [n, n, 12] seen through clouds and darkened by their shadows."""
    if clouds.cover == 0:
        return reflectance
    veil = clouds.opacity[..., None]
    return reflectance * clouds.shadow[..., None] * (1 - veil) + veil * MATERIALS["cloud"]


def level_2a(reflectance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Bottom-of-atmosphere reflectance [n, n, 12] with the residual errors of the correction of one product."""
    gain = np.exp(rng.normal(0, 0.18) + rng.normal(0, 0.08) * np.log(_WAVELENGTH / 0.86) + rng.normal(0, 0.03, 12))
    haze = rng.normal(0.0, 0.008) * (_WAVELENGTH / 0.49) ** -1.5
    return reflectance * gain.astype(np.float32) + haze.astype(np.float32)


def level_1c(
    reflectance: np.ndarray, clouds: Sky, elevation: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Top-of-atmosphere reflectance [n, n, 12] and of B10 [n, n]: single scattering over a dark sky.

    Rayleigh optical depth falls with the fourth power of the wavelength, aerosol with the Angstrom
    exponent 1.3; B09 and B10 lie in absorption bands of water vapour.
    """
    aerosol, vapor = rng.gamma(2.5, 0.06), rng.uniform(0.25, 0.75)
    rayleigh, haze = 0.0088 * _WAVELENGTH**-4.05, aerosol * (_WAVELENGTH / 0.55) ** -1.3
    sun = 1 / math.sin(math.radians(max(15.0, elevation)))
    path = (0.9 * rayleigh + 0.22 * haze) * sun / 4
    through = np.exp(-(0.5 * rayleigh + 0.17 * haze) * (sun + 1))
    through[BANDS.index("B09")] *= 1 - vapor
    gain = np.exp(rng.normal(0, 0.18) + rng.normal(0, 0.03, 12))
    toa = (path + reflectance * (gain * through).astype(np.float32)).astype(np.float32)
    cirrus = 0.0010 + 0.0015 * rng.random() + 0.03 * clouds.opacity**2
    return toa, cirrus.astype(np.float32)


def to_dn(reflectance: np.ndarray, offset: int, rng: np.random.Generator) -> np.ndarray:
    """uint16 DN: reflectance x 10000 with detector noise, plus the baseline offset.

    Dark values clip to zero, and bright snow or cloud saturates the detector.
    """
    reflectance = np.minimum(reflectance, SATURATION)
    noise = rng.standard_normal(reflectance.shape, np.float32) * (6 + 0.004e4 * np.sqrt(np.maximum(reflectance, 0)))
    return np.clip(np.round(reflectance * 1e4 + noise + offset), 0, 65535).astype(np.uint16)
