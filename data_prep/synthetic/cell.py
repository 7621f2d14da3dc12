"""One synthetic cell in memory: what the files will hold, before anything is encoded.

The ground is drawn on a canvas of 10 m pixels that is aligned to the 60 m Sentinel-2 grid and a few
pixels larger than the cell. Every band is cut from it at its own sampling, on the multiple of that
sampling nearest to the claimed corner: where the content of Major-TOM's bands really lies, although
their headers claim one common corner off the grid.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from affine import Affine
from rasterio.warp import Resampling, reproject

from data_prep.synthetic import landscape as ground
from data_prep.synthetic import radar
from data_prep.synthetic import reflectance as optical
from data_prep.synthetic.geography import Acquisition, CellPlan, sun_elevation
from terrafm_jax import landcover
from terrafm_jax.sensors import SENSORS

MARGIN = 12  # canvas pixels of 10 m around the cell
S1_NODATA = -32768.0  # of Major-TOM's radar files; our records use the same number, but need not


@dataclasses.dataclass(frozen=True)
class Product:
    """One product of a cell.

    Attributes:
      acquired: identifier, time, offset.
      bands: name -> array at native sampling; uint16 DN or float32 linear power.
      true: name -> affine on which the content lies.
      claimed: name -> affine that the header states.
      epsg: CRS of the header.
      nodata: share without measurement at 10 m, 0..1.
      cloud: share of cloud at 10 m, 0..1 (0 for radar).
      mask: cloud mask uint8 [size, size], or None.
    """

    acquired: Acquisition
    bands: dict[str, np.ndarray]
    true: dict[str, Affine]
    claimed: dict[str, Affine]
    epsg: int
    nodata: float
    cloud: float = 0.0
    mask: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Cell:
    """All products of a cell, and the truth: category map uint8 [n, n] of the canvas with its affine."""

    plan: CellPlan
    products: dict[str, Product]
    canvas: np.ndarray
    canvas_affine: Affine

    def truth(self) -> np.ndarray:
        """Category map uint8 [size, size] on the snapped 10 m grid of the cell."""
        row, col = _window(self.plan, self.canvas_affine, 10)
        return self.canvas[row : row + self.plan.size, col : col + self.plan.size]


def canvas_affine(plan: CellPlan) -> Affine:
    """Affine of the canvas: a corner on the 60 m grid, at least 60 m outside the cell."""
    x, y = plan.origin
    return Affine(10, 0, math.floor(x / 60) * 60 - 60, 0, -10, math.ceil(y / 60) * 60 + 60)


def _window(plan: CellPlan, canvas: Affine, gsd: int) -> tuple[int, int]:
    """Row and column, in pixels of ``gsd``, of the cell's snapped corner on the canvas."""
    x, y = (math.floor(v / gsd + 0.5) * gsd for v in plan.origin)
    return round((canvas.f - y) / gsd), round((x - canvas.c) / gsd)


def _coarsen(values: np.ndarray, factor: int) -> np.ndarray:
    """Mean over blocks of ``factor`` pixels of [n, n, ...]."""
    if factor == 1:
        return values
    n = values.shape[0] // factor
    return values.reshape(n, factor, n, factor, *values.shape[2:]).mean((1, 3), dtype=np.float32)


def _wedge(plan: CellPlan, size: int, acquired: Acquisition, share: float) -> np.ndarray | None:
    """bool [n, n] beyond the edge of the swath, for a ``share`` of the overpasses; else None."""
    rng = plan.rng(40, acquired.stream)
    if rng.random() >= share:
        return None
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.35)
    rows, cols = np.mgrid[:size, :size] / size - 0.5
    along = rows * math.sin(angle) + cols * math.cos(angle)
    return along > np.quantile(along[::4, ::4], 1 - depth)


def _sentinel2(
    plan: CellPlan, key: str, land: ground.Landscape, affine: Affine, cloudy: float, wedges: float
) -> Product:
    acquired, size = plan.acquisitions[key], land.classes.shape[0]
    rng = plan.rng(41, list(SENSORS).index(key), acquired.stream)
    clouds = optical.sky(plan, size, acquired, cloudy)
    reflectance = optical.under_clouds(optical.surface(plan, land, acquired), clouds)
    extra: dict[str, np.ndarray] = {}
    if key == "s2_l2a":
        reflectance = optical.level_2a(reflectance, rng)
    else:
        elevation = sun_elevation(plan.lat, acquired.time.timetuple().tm_yday)
        reflectance, extra["B10"] = optical.level_1c(reflectance, clouds, elevation, rng)
    wedge = _wedge(plan, size, acquired, wedges)
    bands, true, claimed = {}, {}, {}
    sensor = SENSORS[key]
    for band in (*sensor.bands, *(b for b in sensor.dropped if b.name in extra)):
        factor = band.gsd // 10
        values = extra[band.name] if band.name in extra else reflectance[..., optical.BANDS.index(band.name)]
        row, col = _window(plan, affine, band.gsd)
        inside = np.s_[row : row + plan.size // factor, col : col + plan.size // factor]
        dn = optical.to_dn(_coarsen(values, factor)[inside], acquired.offset, rng)
        if band.name in ("B01", "B02", "B05"):  # never zero in all bands where there is a measurement
            dn = np.maximum(dn, 1)
        if wedge is not None:
            dn[_coarsen(wedge.astype(np.float32), factor)[inside] > 0.5] = 0
        bands[band.name] = dn
        true[band.name] = affine @ Affine.scale(factor) @ Affine.translation(col, row)
        claimed[band.name] = Affine(band.gsd, 0, plan.origin[0], 0, -band.gsd, plan.origin[1])
    row, col = _window(plan, affine, 10)
    inside = np.s_[row : row + plan.size, col : col + plan.size]
    share = 0.0 if wedge is None else float(wedge[inside].mean())
    mask = clouds.mask[inside]
    cloud = float((clouds.opacity[inside] > 0.1).mean())
    # The mask of the collection is blank over a fully overcast cell.
    return Product(acquired, bands, true, claimed, plan.epsg, share, cloud, mask if cloud < 0.97 else mask * 0)


def _sentinel1(plan: CellPlan, land: ground.Landscape, affine: Affine, wedges: float) -> Product:
    """Mostly on the cell's own 10 m grid; some a few pixels smaller, larger or shifted, some in the next UTM zone."""
    acquired, size = plan.acquisitions["s1"], land.classes.shape[0]
    power = radar.gamma0(plan, land, acquired)
    wedge = _wedge(plan, size, acquired, wedges)
    if wedge is not None:
        power[wedge] = S1_NODATA
    rng = plan.rng(42)
    row, col = _window(plan, affine, 10)
    height = width = plan.size
    epsg, draw = plan.epsg, rng.random()
    if draw < 0.12:
        row, col = row + int(rng.integers(-2, 3)), col + int(rng.integers(-2, 3))
        height, width = height + int(rng.integers(-3, 4)), width + int(rng.integers(-3, 4))
    power, grid = power[row : row + height, col : col + width], affine @ Affine.translation(col, row)
    if draw > 0.97:
        epsg = plan.epsg + (1 if plan.epsg % 100 < 60 else -1)
        power, grid = _rewarp(power, grid, plan.epsg, epsg)
    missing = float((power[..., 0] <= 0).mean())
    bands = {"vv": power[..., 0], "vh": power[..., 1]}
    return Product(acquired, bands, dict.fromkeys(bands, grid), dict.fromkeys(bands, grid), epsg, missing)


def _rewarp(power: np.ndarray, grid: Affine, epsg: int, to: int) -> tuple[np.ndarray, Affine]:
    """Backscatter [h, w, 2] on a 10 m grid of another UTM zone, nodata in the rotated corners."""
    bands, new = reproject(
        np.moveaxis(power, -1, 0), src_transform=grid, src_crs=f"EPSG:{epsg}", src_nodata=S1_NODATA,
        dst_crs=f"EPSG:{to}", dst_nodata=S1_NODATA, dst_resolution=10, resampling=Resampling.nearest,
    )  # fmt: skip
    return np.moveaxis(bands, 0, -1), new


def render(plan: CellPlan, cloudy: float = 0.12, wedges: float = 0.06) -> Cell:
    """Draws one cell: ``plan.size`` pixels of 10 m a side, deterministic in the plan.

    Args:
      cloudy: share of the Sentinel-2 overpasses with clouds.
      wedges: share of the products with a nodata wedge.
    """
    affine = canvas_affine(plan)
    land = ground.landscape(plan.rng(10), plan.size + 2 * MARGIN, plan.landcover, plan.pure)
    products = {}
    for key in plan.acquisitions:
        if key == "s1":
            products[key] = _sentinel1(plan, land, affine, wedges)
        else:
            products[key] = _sentinel2(plan, key, land, affine, cloudy, wedges)
    return Cell(plan, products, land.classes, affine)


def fractions(categories: np.ndarray) -> np.ndarray:
    """float32 [NUM_CATEGORIES]: share of every category in a map of any shape."""
    counts = np.bincount(categories.ravel(), minlength=landcover.NUM_CATEGORIES)
    return (counts / categories.size).astype(np.float32)
