"""Folders of GeoTIFFs or Sentinel-2 SAFE granules -> prepared tiles.

    python -m data_prep.geotiff --source DIR --worldcover WC --out OUT --tile-size 240
    python -m data_prep.geotiff --source DIR --manifest MANIFEST.csv --select group=terramesh_224 \\
        --select kind=tile,landcover --worldcover none --out OUT

Files are matched by the naming rule or the manifest that ``data_prep/scenes.py`` describes. One file per
band or several bands a file, any of the three sensors, UTM or EPSG:4326, bands at native sampling or all
on one grid. Images smaller than a tile are kept whole; large scenes are read block by block.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from data_prep import cli, ground
from data_prep.cell import Options
from data_prep.chunks import Source, Unit
from data_prep.delivered import Cell, SensorInput
from data_prep.ground import Place
from data_prep.harmonize import Offset
from data_prep.raster import BadInput, Grid, Raster, first_line, grid_of, open_raster
from data_prep.scenes import CLOUD_MASK, LANDCOVER, Scene, SceneFile, from_folder, from_manifest
from data_prep.worldcover import WorldCover, lonlat_outline
from terrafm_jax.data.tiles import EXTENT_ORDER
from terrafm_jax.sensors import SENSORS, band_name

BLOCK_TILES = 2  # tiles a side of the blocks that large scenes are read in


@dataclasses.dataclass(frozen=True)
class GeoTiffs:
    """Scenes as files. ``s1_unit``: ``auto``, ``dB`` or ``power`` where nothing else says it."""

    s1_unit: str = "auto"

    def read(self, unit: Unit) -> Cell:
        """Reads one scene or one block of it. Raises BadInput."""
        scene, block = unit.where
        target = _finest_grid(scene)
        if block is not None:
            target = target.window(*block)
        sensors = {}
        for key in SENSORS:
            files = [f for f in scene.files if f.sensor == key]
            if files:
                sensors[key] = self._sensor(key, files, target if block is not None else None)
        cover = [f for f in scene.files if f.sensor == LANDCOVER]
        codes = _landcover(cover, target) if cover else None
        return Cell(unit.cell, sensors, unit.number, unit.split, None, codes, unit.rivals)

    def _sensor(self, key: str, files: Sequence[SceneFile], area: Grid | None) -> SensorInput:
        rasters: dict[str, Raster] = {}
        for file in files:
            for name, raster in _bands(key, file, area).items():
                if name in rasters:
                    raise BadInput(f"{key}: band {name} twice, again in {file.path}")
                rasters[name] = raster
        mask = rasters.pop(CLOUD_MASK, None)
        first = files[0]
        unit = first.unit or (self.s1_unit if self.s1_unit != "auto" else "")
        if key == "s1" and not unit:
            unit = guess_unit(rasters)
        return SensorInput(
            bands=rasters,
            product=first.product or Path(first.path).stem,
            kind=first.kind,
            time=first.time,
            orbit=first.orbit,
            unit=unit or "DN",
            cloud_mask=None if mask is None else mask.pixels,
            offset=None if first.offset is None else Offset(first.offset, "manifest"),
        )


def guess_unit(rasters: dict[str, Raster]) -> str:
    """``dB`` where values are below zero, ``power`` otherwise: power never is, and decibels of land nearly always."""
    for raster in rasters.values():
        values = raster.pixels[np.isfinite(raster.pixels)]
        values = values[(values != raster.nodata) & (values > -100)]
        if values.size and (values < 0).mean() > 0.01:
            return "dB"
    return "power"


def _bands(key: str, file: SceneFile, area: Grid | None) -> dict[str, Raster]:
    """Bands of one file, all of it or what lies under ``area``. Raises BadInput."""
    with open_raster(file.path) as source:
        grid = grid_of(source, file.path)
        names = file.bands or bands_of(key, source.descriptions, source.count, file.path)
        if len(names) != source.count:
            raise BadInput(f"{file.path}: {source.count} bands, but {len(names)} are named: {', '.join(names)}")
        window = None if area is None else _window(grid, area)
        try:
            pixels = source.read(window=window)
        except RasterioError as error:
            raise BadInput(f"{file.path}: cannot be read, truncated? ({first_line(error)})") from error
        if window is not None:
            grid = grid.window(int(window.row_off), int(window.col_off), *pixels.shape[1:])
        nodata = source.nodata if file.nodata is None else file.nodata
        return {name: Raster(pixels[i], grid, nodata) for i, name in enumerate(names)}


def bands_of(key: str, descriptions: Sequence[str | None], count: int, what: str) -> tuple[str, ...]:
    """Band names from the descriptions, if all are known (junk counts as none), else from their number.

    Raises BadInput where the number fits no documented order; then a manifest must say it.
    """
    sensor = SENSORS[key]
    known = [band_name(text, sensor) if text else None for text in descriptions]
    if None not in known and len(set(known)) == count:
        return tuple(str(name) for name in known)
    for names in (sensor.delivered_names, sensor.band_names):
        if count == len(names):
            return names
    raise BadInput(
        f"{what}: {count} bands described as {list(descriptions)}; say which in the bands column of a manifest"
    )


def _window(grid: Grid, area: Grid) -> Window:
    """The pixels under ``area``: exact where both share a CRS, with a margin of 8 pixels otherwise."""
    a, _, c, _, e, f = grid.transform
    if grid.crs == area.crs:
        left, bottom, right, top = area.bounds()
        col, row = round((left - c) / a), round((top - f) / e)
        width, height = max(1, round((right - left) / a)), max(1, round((top - bottom) / -e))
    else:
        left, bottom, right, top = transform_bounds(area.crs, grid.crs, *area.bounds(), densify_pts=21)
        col, row = math.floor((left - c) / a) - 8, math.floor((top - f) / e) - 8
        width, height = math.ceil((right - left) / a) + 16, math.ceil((top - bottom) / -e) + 16
    col0, row0 = max(0, col), max(0, row)
    col1, row1 = min(grid.width, col + width), min(grid.height, row + height)
    if col1 <= col0 or row1 <= row0:
        raise BadInput(f"no pixel under {area.crs} {tuple(round(v, 5) for v in area.bounds())}")
    return Window(col0, row0, col1 - col0, row1 - row0)


def _landcover(files: Sequence[SceneFile], target: Grid) -> Raster:
    """WorldCover codes of the scene's own map, nearest neighbor on ``target``."""
    from data_prep.worldcover import codes_on

    codes = np.full(target.shape, 255, np.uint8)
    for file in files:
        found = codes_on(file.path, target)
        codes = np.where(codes == 255, found, codes)
    return Raster(codes, target)


def _finest_grid(scene: Scene) -> Grid:
    """Grid of the finest band of the sensor that defines the ground extent. Raises BadInput."""
    for key in EXTENT_ORDER:
        files = [f for f in scene.files if f.sensor == key]
        finest = set(next(iter(SENSORS[key].groups.values())))
        for file in files:
            if not file.bands or finest & set(file.bands):
                with open_raster(file.path) as source:
                    return grid_of(source, file.path)
    raise BadInput(f"{scene.cell}: no 10 m band in {[f.path for f in scene.files]}")


def blocks(grid: Grid, options: Options) -> list[tuple[int, int, int, int] | None]:
    """(row, column, height, width) of the blocks of a large scene; [None] where one read is enough."""
    side = options.stride * (BLOCK_TILES - 1) + options.tile_size
    if max(grid.shape) <= 2 * side:
        return [None]
    step = options.stride * BLOCK_TILES
    return [
        (row, col, min(side, grid.height - row), min(side, grid.width - col))
        for row in range(0, max(1, grid.height - options.tile_size + 1), step)
        for col in range(0, max(1, grid.width - options.tile_size + 1), step)
    ]


def units_of(scene: Scene, options: Options, split: str | None) -> tuple[list[Unit], Place]:
    """The units of a scene, and where it lies if its header can be read."""
    products = tuple({(f.sensor, f.product): None for f in scene.files if f.sensor != LANDCOVER and f.product})
    try:
        grid = _finest_grid(scene)
        lon, lat = lonlat_outline(grid)
    except (BadInput, rasterio.errors.CRSError):  # it will be rejected when it is read
        unit = Unit(scene.cell, scene.number, (scene, None), products, split, split or "unknown")
        return [unit], Place(scene.cell, split, None, 0.0, None)
    found = []
    for block in blocks(grid, options):
        name = scene.cell if block is None else f"{scene.cell}@r{block[0]}_c{block[1]}"
        area = lonlat_outline(grid if block is None else grid.window(*block))
        expected = options.blocks.splits(*area)
        outlook = split or (expected.pop() if len(expected) == 1 else "mixed")
        found.append(Unit(name, scene.number, (scene, block), products, split, outlook))
    center = (float(lat.mean()), (float(lon.mean()) + 180.0) % 360.0 - 180.0)
    return found, Place(scene.cell, split, center, ground.radius(grid), grid)


def plan(args: argparse.Namespace, options: Options, cover: WorldCover) -> tuple[Source, list[Unit], dict[str, Any]]:
    """Units of a folder. Raises ValueError."""
    root = Path(args.source)
    if not root.is_dir():
        raise ValueError(f"--source {root}: no such folder")
    if args.manifest:
        select: dict[str, set[str]] = {}
        for text in args.select:
            column, sign, values = text.partition("=")
            if not sign:
                raise ValueError(f"--select {text!r}: expected COLUMN=VALUE[,VALUE]")
            select.setdefault(column.strip().lower(), set()).update(v.strip() for v in values.split(","))
        scenes, skipped = from_manifest(Path(args.manifest), root, select)
    else:
        scenes, skipped = from_folder(root)
    scenes = [s for s in scenes if all(any(f.sensor == key for f in s.files) for key in options.require)]
    planned = [units_of(scene, options, scene.split) for scene in scenes]
    centers = [place.center for _, place in planned]
    keep, fixed = cli.chosen_cells([s.cell for s in scenes], centers, args)
    chosen = [
        (found, dataclasses.replace(place, split=scene.split or fixed.get(scene.cell)))
        for scene, (found, place), kept in zip(scenes, planned, keep, strict=True)
        if kept
    ]
    units = []
    for (found, place), near in zip(chosen, ground.rivals([place for _, place in chosen]), strict=True):
        split = place.split
        units += [dataclasses.replace(u, split=split, outlook=split or u.outlook, rivals=near) for u in found]
    own_map = {s.cell for s in scenes if any(f.sensor == LANDCOVER for f in s.files)}
    cli.check_maps(
        cover, [c for s, c, k in zip(scenes, centers, keep, strict=True) if k and c and s.cell not in own_map]
    )
    counts: Counter[str] = Counter({f"files: {reason}": n for reason, n in skipped.items()})
    return GeoTiffs(args.s1_unit), units, {"scenes": len(scenes), "units": len(units), **counts}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("data_prep.geotiff", description=__doc__, formatter_class=cli.Formatter)
    result.add_argument("--source", required=True, help="folder with the files")
    result.add_argument("--manifest", default=None, help="CSV; without it the naming rule applies")
    result.add_argument("--select", action="append", default=[], metavar="COLUMN=VALUE[,VALUE]", help="rows to use")
    result.add_argument("--s1-unit", choices=("auto", "dB", "power"), default="auto")
    cli.add_arguments(result, require="", snap="auto", sea_keep=1.0)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; unknown flags go to Beam when a Beam runner is chosen."""
    return cli.run(parser(), plan, argv)


if __name__ == "__main__":
    sys.exit(main())
