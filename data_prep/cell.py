"""One cell in, its tiles out: a pure function of the decoded bands, the land-cover maps and the options."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep import quality, records, tiling
from data_prep.delivered import Cell, SensorInput
from data_prep.doubts import check_radar, check_sampling, check_zeros
from data_prep.ground import share_ground
from data_prep.harmonize import Offset, snap_origin
from data_prep.optical import optical
from data_prep.radar import power_from, same_place, to_hundredths, warp_power
from data_prep.raster import BadInput, Grid, NotThere, check_projection
from data_prep.records import Group, Layer
from data_prep.splits import BlockSplit, unit_hash
from data_prep.worldcover import WorldCover, fractions, lonlat_outline, majority, oceans
from terrafm_jax import checks, landcover
from terrafm_jax.data.tiles import EXTENT_ORDER, INDEX_DTYPE, SPLITS
from terrafm_jax.sensors import S1, SENSOR_KEYS

SHARED = "shares ground with another split"
MAX_DISTANCE = 0.2  # degrees of latitude between where a cell is said to lie and where its pixels lie


@dataclasses.dataclass(frozen=True)
class Options:
    """What decides about the content of a prepared data set.

    Attributes:
      tile_size, stride: pixels of the finest grid, multiples of 60 m.
      require: sensors without which a cell is left out.
      max_nodata: a sensor with a larger nodata share is absent from that tile.
      sea_keep: share of the open-ocean tiles to keep.
      blocks: how splits are drawn where the cell does not name one.
      keep_map: store the land-cover map with each tile.
      snap: ``on``, ``off`` or ``auto`` (only where the bands show the Major-TOM defect).
    """

    tile_size: int = 534
    stride: int = 534
    require: tuple[str, ...] = ()
    max_nodata: float = 0.5
    sea_keep: float = 0.02
    blocks: BlockSplit = dataclasses.field(default_factory=BlockSplit)
    keep_map: bool = True
    snap: str = "auto"

    def __post_init__(self) -> None:
        tiling.check_multiple(self.tile_size, "--tile-size")
        tiling.check_multiple(self.stride, "--stride")
        if self.tile_size < tiling.LEAST:
            raise ValueError(f"--tile-size {self.tile_size}: expected at least {tiling.LEAST}, two pixels of 60 m")
        unknown = [key for key in self.require if key not in SENSOR_KEYS]
        if unknown:
            raise ValueError(f"--require: unknown sensors {unknown}, expected some of {list(SENSOR_KEYS)}")
        for name in ("max_nodata", "sea_keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0..1")


@dataclasses.dataclass
class Tile:
    """One tile and what the files beside the shards need to know of it.

    ``parts`` are views of the cell and ``fields`` the rest of the record; :meth:`record` copies the pixels,
    so that memory (and the processor's cache) holds the copy of one tile at a time.
    """

    fields: dict[str, Any]
    parts: dict[str, Layer]
    split: str
    row: np.ndarray  # INDEX_DTYPE scalar; ``layout`` is filled in by the writer
    layout: dict[str, list[int]]

    def record(self) -> dict[str, Any]:
        """The record as ``terrafm_jax.data.tiles.features`` describes it."""
        return records.record(parts=self.parts, **self.fields)


@dataclasses.dataclass
class Prepared:
    """Tiles of a cell, how many were left out and why.

    ``notes``: offsets where product id and pixels disagree; ``shared``: cells whose listed split keeps ground
    that a tile would have covered, too; ``doubts``: what looks wrong with the cell as a whole.
    """

    tiles: list[Tile]
    dropped: Counter[str]
    notes: list[str]
    shared: set[str]
    doubts: list[str] = dataclasses.field(default_factory=list)


def prepare(cell: Cell, cover: WorldCover, options: Options) -> Prepared:
    """Harmonizes, overlays, cuts. Raises BadInput where the cell cannot be used."""
    lacking = [key for key in options.require if key not in cell.sensors]
    if lacking or not cell.sensors:
        beside = f"; {', '.join(cell.beside)} does not reach this part of the scene" if cell.beside else ""
        raise BadInput(f"sensors missing: {', '.join(lacking) or 'all'}{beside}")
    dropped: Counter[str] = Counter(f"{key} does not reach a cell" for key in cell.beside)
    layers = _layers(cell, options, dropped)
    finest = _finest(layers)
    native = any(
        group.grid.transform[0] > 1.5 * finest.transform[0] for x in layers.values() for group in x.groups.values()
    )
    height, width = tiling.whole(finest.height, native), tiling.whole(finest.width, native)
    categories = _categories(cell, cover, finest)
    tiles: list[Tile] = []
    shared: set[str] = set()
    windows = tiling.windows(height, width, options.tile_size, options.stride)
    for window, is_sea in zip(windows, oceans(categories, windows), strict=True):
        tile = _tile(cell, layers, finest, window, categories, is_sea, options, shared)
        if isinstance(tile, Tile):
            tiles.append(tile)
        else:
            dropped[tile] += 1
    notes = [f"{key} {x.given.product}: {x.offset.source}" for key, x in layers.items() if x.offset.conflict]
    levels = [checks.without_b10(key, list(x.given.bands), x.given.product) for key, x in layers.items()]
    sizes = [check_sampling(key, x.finest) for key, x in layers.items()]
    delivered = [text for x in layers.values() for text in x.given.doubts]
    return Prepared(tiles, dropped, notes, shared, [text for text in (*levels, *sizes, *delivered) if text])


def _layers(cell: Cell, options: Options, dropped: Counter[str]) -> dict[str, Layer]:
    """All sensors of the cell in their stored form, Sentinel-1 on the finest Sentinel-2 grid."""
    layers = {
        key: optical(key, cell.sensors[key], options.snap) for key in SENSOR_KEYS if key in cell.sensors and key != "s1"
    }
    for layer in layers.values():
        _check_position(cell, layer.finest)
    systems = {key: layer.finest.crs for key, layer in layers.items()}
    if len(set(systems.values())) > 1:
        raise BadInput(f"sensors in different CRS cannot share a tile: {systems}")
    if "s1" in cell.sensors:
        target = _finest(layers) if layers else None
        try:
            layers["s1"] = _radar(cell.sensors["s1"], target, options.snap)
            _check_position(cell, layers["s1"].finest)
        except NotThere:
            if "s1" in options.require:
                raise
            dropped["s1 does not reach a cell"] += 1
    check_projection(systems or {key: layer.finest.crs for key, layer in layers.items()})
    for key in list(layers):
        share = quality.nodata_share(layers[key].valid)
        if quality.is_black(share):
            if key in options.require or len(layers) == 1:
                raise BadInput(f"{key}: black, {100 * share:.1f} % of the pixels are nodata")
            del layers[key]
            dropped[f"{key} black in a cell"] += 1
    return layers


def _radar(given: SensorInput, target: Grid | None, snap: str) -> Layer:
    """Sentinel-1 in hundredths of dB, on ``target`` if given, else on its own grid. Raises BadInput, NotThere."""
    missing = [name for name in S1.band_names if name not in given.bands]
    if missing:
        raise BadInput(f"s1: missing band {', '.join(missing)}, found {sorted(given.bands)}")
    rasters = [given.bands[name] for name in S1.band_names]
    grid = rasters[0].grid
    if any(not same_place(r.grid, grid) for r in rasters):
        raise BadInput(f"s1: VV and VH lie on different grids: {[(r.grid.crs, r.grid.shape) for r in rasters]}")
    for name, raster in zip(S1.band_names, rasters, strict=True):
        check_radar(name, raster, given.unit)
    check_zeros(rasters, given.unit)
    grid = snap_origin(grid) if snap == "on" else grid
    power = np.stack([power_from(r.pixels, given.unit, r.nodata) for r in rasters])
    if np.isnan(power.min()):  # -32768 in one polarization must never pass for a value
        power[:, np.isnan(power).any(axis=0)] = np.nan
    target = target or grid
    stored = to_hundredths(warp_power(power, grid, target))
    group = Group(tuple(stored), stored[0] != S1.nodata, target)
    if not group.valid.any() and not np.isnan(power).all():
        where, there = (tuple(round(v, 5) for v in g.bounds()) for g in (grid, target))
        raise NotThere(
            f"s1: wrong place, its pixels lie at {grid.crs} {where}, those of Sentinel-2 at {target.crs} {there}"
        )
    return Layer(given, {"10m": group}, Offset(0.0, ""))


def _finest(layers: Mapping[str, Layer]) -> Grid:
    """The grid that defines the ground extent; the same choice as ``tiles.extent_affine``."""
    return next(layers[key].finest for key in EXTENT_ORDER if key in layers)


def _check_position(cell: Cell, grid: Grid) -> None:
    """Raises BadInput where the pixels lie elsewhere than the metadata say: a wrong CRS or transform."""
    lon, lat = lonlat_outline(grid)
    if not (lat.min() >= -90 and lat.max() <= 90 and np.ptp(lon) < 90):
        raise BadInput(
            f"footprint {lon.min():.2f}..{lon.max():.2f} E, {lat.min():.2f}..{lat.max():.2f} N is no place on Earth"
        )
    if cell.center is None:
        return
    off_lat = abs(float(lat.mean()) - cell.center[0])
    off_lon = abs((float(lon.mean()) - cell.center[1] + 180) % 360 - 180) * np.cos(np.radians(cell.center[0]))
    if max(off_lat, off_lon) > MAX_DISTANCE:
        raise BadInput(
            f"wrong CRS or transform: {grid.crs} puts the cell at {lat.mean():.3f} N {lon.mean():.3f} E, "
            f"the metadata at {cell.center[0]:.3f} N {cell.center[1]:.3f} E"
        )


def _categories(cell: Cell, cover: WorldCover, grid: Grid) -> np.ndarray:
    if cell.landcover is None:
        return cover.overlay(grid)
    if cell.landcover.grid.shape != grid.shape:
        raise BadInput(f"land cover of the cell is {cell.landcover.grid.shape}, expected {grid.shape}")
    return landcover.code_to_index()[cell.landcover.pixels]


def _tile(
    cell: Cell,
    layers: Mapping[str, Layer],
    finest: Grid,
    window: tiling.Window,
    categories: np.ndarray,
    is_sea: bool,
    options: Options,
    shared: set[str],
) -> Tile | str:
    """The tile of one window, or the reason why there is none; adds the rivals it gives way to to ``shared``."""
    grid = finest.window(window.row, window.col, window.height, window.width)
    lon, lat = lonlat_outline(grid)
    split = cell.split or options.blocks.split(lon, lat)
    if split is None:
        return "straddles splits"
    rivals = [r for r in cell.rivals if r.split != split and share_ground(grid, r.footprint)]
    if rivals:
        shared |= {f"{cell.name} ({split}) gives way to {r}" for r in rivals}
        return SHARED
    name = cell.name if cell.number == 0 else f"{cell.name}/p{cell.number}"
    tile_id = f"{name}/{window.name}"
    thinned = cell.split is None or cell.split == SPLITS[0]  # a split file is taken at its word for evaluation
    if is_sea and thinned and unit_hash(f"sea {tile_id}") >= options.sea_keep:
        return "open ocean" if split == SPLITS[0] else f"open ocean of {split}"
    parts = {key: layer.cut(finest, window) for key, layer in layers.items()}
    shares = {key: quality.nodata_share(part.valid) for key, part in parts.items()}
    parts = {key: part for key, part in parts.items() if shares[key] <= options.max_nodata}
    if not parts or any(key not in parts for key in options.require):
        return "black" if quality.is_black(max(shares.values())) else "nodata"
    shown = tiling.cut(categories, window, landcover.UNKNOWN)
    share = fractions(shown)
    center_lon = (float(lon.mean()) + 180.0) % 360.0 - 180.0
    fields = {
        "tile_id": tile_id,
        "cell": cell.name,
        "crs": finest.crs,
        "lat": float(lat.mean()),
        "lon": center_lon,
        "landcover": majority(share),
        "fractions": share,
        "landcover_map": shown if options.keep_map else None,
        "nodata": {key: shares[key] for key in parts},
    }
    present = sum(1 << i for i, key in enumerate(SENSOR_KEYS) if key in parts)
    row = np.array(
        (fields["landcover"], 0, present, is_sea, lat.mean(), center_lon, max(shares[key] for key in parts)),
        INDEX_DTYPE,
    )
    return Tile(fields, parts, split, row, records.layout(parts))
