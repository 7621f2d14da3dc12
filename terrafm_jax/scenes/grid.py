"""The pixel grid that a scene is embedded on, its windows, and the grid of tokens that comes out."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from affine import Affine
from rasterio.crs import CRS
from rasterio.warp import transform, transform_bounds

from terrafm_jax.data.tiles import EXTENT_ORDER
from terrafm_jax.scenes import area
from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.scenes.layers import Acquisition, open_raster

# Training crops span 12 to 28 m a pixel (5,340 m tiles, scales 0.05 to 1, 96 and 224 px); 20 m lies
# inside and is a multiple of what Sentinel-2 delivers.
PRETRAINING_GSD = 20.0
_STRETCHED = 0.05  # meters of UTM are off by up to 0.1 %, those of continental projections by a few percent


@dataclasses.dataclass(frozen=True)
class Grid:
    """A north-up pixel grid: CRS, upper left corner (x, y), size of a pixel in CRS units, rows and columns."""

    crs: CRS
    x: float
    y: float
    gsd: float
    height: int
    width: int

    @property
    def transform(self) -> Affine:
        return Affine(self.gsd, 0.0, self.x, 0.0, -self.gsd, self.y)

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """left, bottom, right, top"""
        return self.x, self.y - self.height * self.gsd, self.x + self.width * self.gsd, self.y

    def window(self, row: int, column: int, height: int, width: int) -> Grid:
        """The part (also beyond the edges) that starts at a pixel."""
        return dataclasses.replace(
            self, x=self.x + column * self.gsd, y=self.y - row * self.gsd, height=height, width=width
        )


def bounds_in(source: Any, grid: Grid) -> tuple[float, float, float, float]:
    """left, bottom, right, top of a grid in the CRS of an open raster; degrees are shifted to the raster's range."""
    bounds = grid.bounds
    if source.crs != grid.crs:
        bounds = transform_bounds(grid.crs, source.crs, *bounds, densify_pts=21)
    return _turned(bounds, source.bounds) if source.crs.is_geographic else bounds


def _turned(bounds: Sequence[float], source: Sequence[float]) -> tuple[float, float, float, float]:
    """Shifts bounds by whole turns to those of a raster, which run beyond 180 degrees across the antimeridian."""
    left, bottom, right, top = bounds
    right += 360.0 if right < left else 0.0
    turn = 360.0 * round((source[0] + source[2] - left - right) / 720.0)
    return left + turn, bottom, right + turn, top


def target_grid(
    acquisitions: Sequence[Acquisition], gsd: float | None = None, crs: str = "", aoi: dict[str, Any] | None = None
) -> Grid:
    """The common grid of all sensors: the intersection of their extents, cut to the area of interest.

    Origin and pixel borders are those of the reference raster (finest band of the first of s2_l2a, s2_l1c,
    s1), so that at native sampling nothing is resampled. Tokens need meters: geographic rasters, and those whose
    meters are not meters on the ground (Web Mercator), are warped to the UTM zone of the requested area's center.

    Raises:
      SceneError: sensors (or the area of interest) do not meet, CRS not metric, fewer than 16 pixels.
    """
    reference = min(acquisitions, key=lambda a: EXTENT_ORDER.index(a.sensor))
    path, native = _finest(reference)
    with open_raster(path) as source:
        own, origin, box = source.crs, source.transform, area.narrowed(source.bounds, source.crs, aoi)
    stretch = _stretch(own, box) if own.is_projected else 1.0
    true = own.is_projected and abs(stretch - 1) <= _STRETCHED
    target = _stated_crs(crs) if crs else own if true else _utm(own, box)
    _check_meters(target, crs, own, box)
    step = gsd or (native / (1.0 if true else stretch) if own.is_projected else _meters(native))
    if not 0.1 <= step <= 10_000:
        raise SceneError(f"--gsd {step:g}: expected meters per pixel between 0.1 and 10000")
    left, bottom, right, top = _common_extent(acquisitions, target, aoi)
    x0, y0 = (origin.c, origin.f) if own == target else (0.0, 0.0)
    column, row = math.floor((left - x0) / step + 1e-6), math.floor((y0 - top) / step + 1e-6)
    x, y = x0 + column * step, y0 - row * step
    width, height = (_pixels(d / step) for d in (right - x, y - bottom))
    if min(width, height) < 16:
        raise SceneError(
            f"{path}: the area to embed is {height} x {width} pixels of {step:g} m, at least 16 x 16 are needed; "
            "choose a smaller --gsd or a larger area"
        )
    return Grid(target, x, y, float(step), height, width)


def _pixels(length: float) -> int:
    """Whole pixels that cover a length in pixels. What sticks out by next to nothing gets no row of its own.

    Pixels of reprojected images (EuroSAT: 10.0092 by 10.0178 m) are not square, which adds up along a side.
    """
    whole = round(length)
    return whole if 0 <= length - whole <= min(0.1, 2e-3 * length) else math.ceil(length - 1e-6)


def _finest(acquisition: Acquisition) -> tuple[str, float]:
    sizes = {}
    for path in acquisition.paths:
        with open_raster(path) as source:
            # Degrees of latitude are the same length everywhere, those of longitude are not.
            sizes[path] = float(source.transform.a if source.crs.is_projected else -source.transform.e)
    path = min(sizes, key=sizes.__getitem__)
    return path, sizes[path]


def _stated_crs(text: str) -> CRS:
    try:
        return CRS.from_user_input(f"EPSG:{text}" if text.isdigit() else text)
    except ValueError as error:
        raise SceneError(f"--crs {text}: {first_line(error)}; expected something like EPSG:32631") from None


def _check_meters(target: CRS, stated: str, own: CRS, box: Sequence[float]) -> None:
    """Raises SceneError unless the meters of ``target`` are meters on the ground of ``box``, which is in ``own``."""
    if not target.is_projected or not math.isclose(target.linear_units_factor[1], 1.0):
        raise SceneError(f"--crs {stated or own}: is not metric; pass a projected CRS in meters such as EPSG:32631")
    if not stated or target == own:
        return
    stretch = _stretch(target, transform_bounds(own, target, *box))
    if abs(stretch - 1) > _STRETCHED:
        utm = _utm(own, box).to_string()
        raise SceneError(
            f"--crs {stated}: its meters are {1 / stretch:.2f} m on the ground here; pass {utm}, or leave it out"
        )


def _stretch(crs: CRS, box: Sequence[float]) -> float:
    """Meters of a projected CRS per meter on the ground, northwards from a box's center; Mercator: 1 / cos(lat)."""
    x, middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    factor = crs.linear_units_factor[1]
    lons, lats = transform(crs, "EPSG:4326", [x, x], [middle, middle + 1000 / factor])
    north, east = math.radians(lats[1] - lats[0]), math.radians(lons[1] - lons[0]) * math.cos(math.radians(lats[0]))
    # Radius of curvature along the meridian, of WGS 84: the sphere is off by up to 0.7 %.
    meridian = 6_335_439.0 / (1 - 0.00669438 * math.sin(math.radians(lats[0])) ** 2) ** 1.5
    across = 6_378_137.0 / math.sqrt(1 - 0.00669438 * math.sin(math.radians(lats[0])) ** 2)
    return 1000 / max(math.hypot(north * meridian, east * across), 1e-9)


def _utm(crs: CRS, bounds: Any) -> CRS:
    left, bottom, right, top = transform_bounds(crs, "EPSG:4326", *bounds)
    right += 360.0 if right < left else 0.0  # across the antimeridian
    lon, lat = (left + right) / 2, (bottom + top) / 2
    zone = int((lon + 180) // 6) % 60 + 1
    return CRS.from_epsg((32600 if lat >= 0 else 32700) + zone)


def _meters(degrees: float) -> float:
    """Degrees of latitude in meters, rounded to 10 m where it is close."""
    size = degrees * 111_320.0
    return round(size / 10) * 10.0 if abs(size / 10 - round(size / 10)) < 0.08 and size > 5 else size


def _common_extent(acquisitions: Sequence[Acquisition], target: CRS, aoi: dict[str, Any] | None) -> tuple[float, ...]:
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for acquisition in acquisitions:
        for path in acquisition.paths:
            with open_raster(path) as source:
                box = source.bounds
                if source.crs != target:
                    _refuse_beyond_the_end(path, source.crs, box)
                    box = transform_bounds(source.crs, target, *area.narrowed(box, source.crs, aoi))
            boxes.setdefault(acquisition.sensor, []).append(tuple(box))
    extents = {
        key: (min(b[0] for b in found), min(b[1] for b in found), max(b[2] for b in found), max(b[3] for b in found))
        for key, found in boxes.items()
    }
    first = acquisitions[0].paths[0]
    meeting = _meeting(extents, target, first)
    if aoi is None:
        return meeting
    found = area.bounds_of(aoi, target, meeting)
    if found is None:
        raise SceneError(f"{first}: --aoi lies elsewhere; give longitudes and latitudes of the scene")
    return _meeting({**extents, "--aoi": found}, target, first)


def _refuse_beyond_the_end(path: str, crs: CRS, box: Sequence[float]) -> None:
    """Raises SceneError where a projection such as Web Mercator ends within a raster: at the antimeridian."""
    if not crs.is_projected:
        return
    ends, middle = [box[0], box[2]], (box[1] + box[3]) / 2
    there = transform(crs, "EPSG:4326", ends, [middle, middle])
    back, _ = transform("EPSG:4326", crs, *there)
    if max(abs(a - b) for a, b in zip(ends, back, strict=True)) > (box[2] - box[0]) / 100:
        utm = _utm(crs, box).to_string()
        raise SceneError(f"{path}: crosses the antimeridian, where {crs.to_string()} ends; gdalwarp it to {utm} first")


def _meeting(extents: dict[str, tuple[float, float, float, float]], target: CRS, first: str) -> tuple[float, ...]:
    left, bottom = (max(e[i] for e in extents.values()) for i in (0, 1))
    right, top = (min(e[i] for e in extents.values()) for i in (2, 3))
    if left >= right or bottom >= top:
        shown = "; ".join(f"{k} {tuple(round(v) for v in e)}" for k, e in extents.items())
        raise SceneError(f"{first}: the extents do not meet in {target.to_string()} ({shown}); give files of one place")
    return left, bottom, right, top


# --- windows and tokens --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Windows side by side that are read and encoded together.

    Attributes:
      row: first pixel row of all of them.
      columns: first pixel column of each.
      height, width: pixels of one window, multiples of the patch.
    """

    row: int
    columns: tuple[int, ...]
    height: int
    width: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """Windows over a scene and the output grid of tokens.

    Token k of an axis covers the pixels k * stride ... k * stride + patch - 1 and is written to the output
    pixel of ``stride`` scene pixels around its center. The last token of an axis starts at or before the
    last ``patch`` pixels rounded up to a whole stride: where the scene is not divisible by the patch, it
    reaches up to patch - 1 pixels beyond the edge, which are mirrored for the encoder, and it counts as
    valid if at least half of its ground within the scene was measured. ``batch`` limits the windows at once.
    """

    grid: Grid
    window: int
    overlap: int
    stride: int
    patch: int = 16
    batch: int = 16

    def __post_init__(self) -> None:
        p = self.patch
        faults = []
        if self.window % p or self.window < p:
            faults.append(f"--window {self.window}: expected a multiple of {p}")
        if self.overlap % p or not 0 <= self.overlap <= self.window - p:
            faults.append(f"--overlap {self.overlap}: expected a multiple of {p} from 0 to {self.window - p}")
        if self.stride < 1 or p % self.stride:
            faults.append(f"--stride {self.stride}: expected a divisor of {p}")
        if faults:
            raise SceneError("; ".join(faults))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the output."""
        return tuple(_tokens(n, self.stride, self.patch) for n in (self.grid.height, self.grid.width))

    @property
    def output(self) -> Grid:
        """The grid of the output: one pixel per token, of ``stride`` scene pixels."""
        shift = (self.patch - self.stride) / 2
        rows, columns = self.shape
        moved = self.grid.window(0, 0, rows, columns)
        g = self.grid.gsd
        return dataclasses.replace(moved, x=moved.x + shift * g, y=moved.y - shift * g, gsd=g * self.stride)

    def chunks(self) -> list[Chunk]:
        """All windows in the order in which they are done: by their first row, then by column."""
        found = []
        for phase_row in range(0, self.patch, self.stride):
            rows, height = self._starts(phase_row, self.shape[0])
            for phase_column in range(0, self.patch, self.stride):
                columns, width = self._starts(phase_column, self.shape[1])
                for row in rows:
                    for i in range(0, len(columns), self.fill):
                        found.append(Chunk(row, tuple(columns[i : i + self.fill]), height, width))
        return sorted(found, key=lambda c: (c.row, c.columns))

    @functools.cached_property
    def fill(self) -> int:
        """Windows encoded at once: at most ``batch``, and such that the chunks of a row are about equally long."""
        phases = range(0, self.patch, self.stride)
        longest = max(len(self._starts(phase, self.shape[1])[0]) for phase in phases)
        return -(-longest // -(-longest // self.batch))

    def _starts(self, phase: int, tokens: int) -> tuple[list[int], int]:
        """First pixels of the windows along one axis at one phase, and their length."""
        count = len(range(phase // self.stride, tokens, self.patch // self.stride))
        if count == 0:
            return [], self.window
        inside = min(self.window // self.patch, count)
        hop = max(1, (self.window - self.overlap) // self.patch)
        starts = [*range(0, count - inside, hop), count - inside]
        return [phase + s * self.patch for s in starts], inside * self.patch

    def taper(self, tokens: int) -> np.ndarray:
        """float32 [tokens]: weight of a window's tokens along one axis, falling to its borders over the overlap."""
        ramp = min(self.overlap // self.patch, tokens)
        at = np.arange(tokens) + 0.5
        near = np.minimum(at, tokens - at)
        return np.where(near < ramp, np.sin(np.pi / 2 * np.minimum(near / max(ramp, 1), 1)) ** 2, 1.0).astype(
            np.float32
        )

    def count(self) -> int:
        """Number of windows."""
        return sum(len(c.columns) for c in self.chunks())

    def tokens_of(self, chunk: Chunk, column: int) -> tuple[slice, slice]:
        """Rows and columns of the output that the window at ``column`` of a chunk fills."""
        every = self.patch // self.stride
        row, first = chunk.row // self.stride, column // self.stride
        rows, columns = chunk.height // self.patch, chunk.width // self.patch
        return (
            slice(row, row + (rows - 1) * every + 1, every),
            slice(first, first + (columns - 1) * every + 1, every),
        )


def _tokens(pixels: int, stride: int, patch: int) -> int:
    return -(-max(pixels - patch, 0) // stride) + 1
