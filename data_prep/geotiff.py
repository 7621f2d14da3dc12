"""Folders of GeoTIFFs or Sentinel-2 SAFE granules -> prepared tiles.

    python -m data_prep.geotiff --source DIR --worldcover WC --out OUT --tile-size 240
    python -m data_prep.geotiff --source DIR --bands s2_l1c=B01..B12,B8A --worldcover WC --out OUT
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
from collections.abc import Mapping, Sequence
from functools import partial
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
from data_prep.raster import BadInput, Grid, NotThere, Raster, first_line, grid_of, open_raster
from data_prep.scenes import (
    CLOUD_MASK,
    LANDCOVER,
    UNKNOWN_SENSOR,
    Scene,
    SceneFile,
    facts,
    from_folder,
    from_manifest,
    stated_orders,
)
from data_prep.units import delivered_units, unit_word
from data_prep.worldcover import WorldCover, lonlat_outline, maps_under
from terrafm_jax.data.tiles import EXTENT_ORDER
from terrafm_jax.sensors import SENSORS, band_name

BLOCK_TILES = 2  # tiles a side of the blocks that large scenes are read in


@dataclasses.dataclass(frozen=True)
class GeoTiffs:
    """Scenes as files, and what is known of those that do not say it themselves.

    Attributes:
      s1_unit: ``auto``, ``dB`` or ``power``.
      s2_unit: ``DN`` or ``reflectance``.
      bands: sensor -> names of the bands in the files' order.
      manifest: digest of what a manifest says, or "".
    """

    s1_unit: str = "auto"
    s2_unit: str = "DN"
    bands: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    manifest: str = ""

    @property
    def stated(self) -> dict[str, Any]:
        """Whatever of this decides about the content (``identity.parts_of``); {} if nothing was said."""
        said: dict[str, Any] = {f"--bands {key}": list(names) for key, names in self.bands.items()}
        said |= {"--s1-unit": self.s1_unit} if self.s1_unit != "auto" else {}
        said |= {"--s2-unit": self.s2_unit} if self.s2_unit != "DN" else {}
        return said | ({"manifest": self.manifest} if self.manifest else {})

    def read(self, unit: Unit) -> Cell:
        """Reads one scene or one block of it. Raises BadInput."""
        scene, block = unit.where
        target = _finest_grid(scene)
        if block is not None:
            target = target.window(*block)
        sensors, beside, unnamed = {}, [], []
        for key in SENSORS:
            files = [f for f in scene.files if f.sensor == key]
            try:
                if files:
                    sensors[key] = self._sensor(key, files, target if block is not None else None)
            except NotThere:  # swaths differ: a part of the scene has this sensor, another has not
                beside.append(key)
            except Unnamed as error:  # all of them at once: else every sensor costs another start
                unnamed.append((key, error))
        if unnamed:
            raise _together(unnamed)
        cover = [f for f in scene.files if f.sensor == LANDCOVER]
        codes = _landcover(cover, target) if cover else None
        return Cell(unit.cell, sensors, unit.number, unit.split, None, codes, unit.rivals, beside)

    def _sensor(self, key: str, files: Sequence[SceneFile], area: Grid | None) -> SensorInput:
        rasters: dict[str, Raster] = {}
        for file in files:
            for name, raster in _bands(key, file, area, self.bands.get(key, ())).items():
                if name in rasters:
                    raise BadInput(f"{key}: band {name} twice, again in {file.path}")
                rasters[name] = raster
        mask = rasters.pop(CLOUD_MASK, None)
        first = files[0]
        unit = _common(key, "units", [f.unit for f in files]) or (self.s1_unit if key == "s1" else self.s2_unit)
        if unit == "auto":
            unit = guess_unit(rasters)
        offset = _common(key, "offsets", [f.offset for f in files])
        return SensorInput(
            bands=rasters,
            product=first.product or Path(first.path).stem,
            kind=first.kind + (", from reflectance" if unit == "reflectance" else ""),
            time=first.time,
            orbit=first.orbit,
            unit=unit,
            cloud_mask=None if mask is None else mask.pixels,
            offset=None if offset is None else Offset(offset, "manifest"),
        )


class Unnamed(BadInput):
    """A file whose bands nobody names; ``fits`` says which flag may."""

    def __init__(self, what: str, found: str, fits: str):
        super().__init__(f"{what}: bands without names{found}{_STATE}; {fits}")
        self.fits = fits


_STATE = ": state their order in the bands column of a manifest or with --bands"


def _together(unnamed: Sequence[tuple[str, Unnamed]]) -> BadInput:
    """One error of all sensors of a scene whose bands nobody names, short enough for rejected.csv."""
    if len(unnamed) == 1:
        return BadInput(str(unnamed[0][1]))  # of the plain kind, which travels between processes
    sensors, fits = ", ".join(key for key, _ in unnamed), "; ".join(error.fits for _, error in unnamed)
    return BadInput(f"{sensors}: bands without names{_STATE}; {fits}")


def _common(key: str, what: str, stated: Sequence[Any]) -> Any:
    """What the files of one sensor say with one voice, None if none says anything. Raises BadInput."""
    found = sorted({value for value in stated if value not in (None, "")})
    if len(found) > 1:
        raise BadInput(f"{key}: files of one scene in different {what}: {found}")
    return found[0] if found else None


def guess_unit(rasters: dict[str, Raster]) -> str:
    """``dB`` where values are below zero, ``power`` otherwise: power never is, and decibels of land nearly always."""
    for raster in rasters.values():
        values = raster.pixels[np.isfinite(raster.pixels)]
        values = values[(values != raster.nodata) & (values > -100)]
        if values.size and (values < 0).mean() > 0.01:
            return "dB"
    return "power"


def _bands(key: str, file: SceneFile, area: Grid | None, order: Sequence[str]) -> dict[str, Raster]:
    """Bands of one file, all of it or what lies under ``area``; ``order`` if it names none. Raises BadInput."""
    with open_raster(file.path) as source:
        grid = grid_of(source, file.path)
        names = file.bands or named(key, source.descriptions) or tuple(order)
        if not names:
            raise _unnamed(key, source, file.path)
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


def named(key: str, descriptions: Sequence[str | None]) -> tuple[str, ...]:
    """Band names from the descriptions, () unless all are known (junk counts as none). Their number says nothing.

    Files without names hold bands in ESA's order, with B8A at the end (EuroSAT) or in the order of a script.
    """
    sensor = SENSORS[key]
    known = [band_name(text, sensor) if text else None for text in descriptions]
    return tuple(map(str, known)) if None not in known and len(set(known)) == len(known) else ()


def _unnamed(key: str, source: rasterio.DatasetReader, what: str) -> Unnamed:
    """Why a file is refused whose bands nobody names, with the flag that names them."""
    usual = "VV,VH" if key == "s1" else f"B01..B08,B8A,B09{'..B12' if key == 's2_l1c' else ',B11,B12'}"
    fits = f"in ESA's order --bands {key}={usual}"
    if key == "s2_l2a" and (source.count == 13 or "B10" in [band_name(d) for d in source.descriptions if d]):
        fits = "a 13th band is B10, and B10 means Level-1C: is the sensor s2_l1c?"
    elif key == "s2_l1c" and source.count == 13:
        dark = _cirrus_band(source)
        order = {10: usual, 9: "B01..B12,B8A"}.get(dark)
        fits = f"band {dark + 1} is dark as B10 is, so --bands {key}={order} may fit" if order else fits
    found = [text for text in source.descriptions if text]
    described = f", described as {found[:13]}" if found else ""
    return Unnamed(what, f" ({source.count}{described})", fits)


def _cirrus_band(source: rasterio.DatasetReader) -> int:
    """Number (from 0) of the band that is darkest by far, -1 if none is."""
    try:
        pixels = source.read(out_shape=(source.count, min(64, source.height), min(64, source.width)))
    except RasterioError:
        return -1
    middle = np.median(pixels.reshape(source.count, -1).astype(np.float64), axis=1)
    darkest, next_one = np.sort(middle)[:2] if source.count > 1 else (0, 0)
    return int(middle.argmin()) if next_one - darkest > 200 else -1


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
        raise NotThere(f"no pixel under {area.crs} {tuple(round(v, 5) for v in area.bounds())}")
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


def _maps(unit: Unit, place: Place) -> list[str]:
    """WorldCover maps under a unit; none where the scene brings a map of its own or cannot be read."""
    scene, block = unit.where
    if place.footprint is None or any(f.sensor == LANDCOVER for f in scene.files):
        return []
    return maps_under(place.footprint if block is None else place.footprint.window(*block))


def plan(args: argparse.Namespace, options: Options, cover: WorldCover) -> tuple[Source, list[Unit], dict[str, Any]]:
    """Units of a folder. Raises ValueError."""
    scenes, skipped = _found(args)
    source = GeoTiffs(args.s1_unit, args.s2_unit, stated_orders(args.bands), facts(scenes) if args.manifest else "")
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
    cli.check_maps(cover, {name for found, place in chosen for u in found for name in _maps(u, place)})
    counts: Counter[str] = Counter({f"files: {reason}": n for reason, n in skipped.items()})
    return source, units, {"scenes": len(scenes), "units": len(units), **counts}


def _found(args: argparse.Namespace) -> tuple[list[Scene], Counter[str]]:
    """All scenes of the folder and what was left out, by reason. Raises ValueError where there is no scene."""
    root = Path(args.source)
    if not root.is_dir():
        raise ValueError(f"--source {root}: no such folder")
    if not args.manifest:
        scenes, skipped = from_folder(root)
    else:
        select: dict[str, set[str]] = {}
        for text in args.select:
            column, sign, values = text.partition("=")
            if not sign:
                raise ValueError(f"--select {text!r}: expected COLUMN=VALUE[,VALUE]")
            select.setdefault(column.strip().lower(), set()).update(v.strip() for v in values.split(","))
        scenes, skipped = from_manifest(Path(args.manifest), root, select)
    unknown = {reason.removeprefix(UNKNOWN_SENSOR): n for reason, n in skipped.items() if UNKNOWN_SENSOR in reason}
    if unknown:
        rows = ", ".join(f"{name!r} ({n})" for name, n in sorted(unknown.items()))
        known = ", ".join(name for s in SENSORS.values() for name in (s.key, *s.aliases))
        print(
            f"data_prep: {args.manifest}: {sum(unknown.values())} rows are LEFT OUT, their sensor is unknown: {rows}; "
            f"expected one of {known}, worldcover", file=sys.stderr,
        )  # fmt: skip
    if not scenes:
        raise ValueError(_nothing(args, skipped))
    return scenes, skipped


def _nothing(args: argparse.Namespace, skipped: Mapping[str, int]) -> str:
    """Why there is no scene, and what to do."""
    seen = ", ".join(f"{n} x {reason}" for reason, n in skipped.items())
    if args.manifest:
        return f"{args.manifest}: no row is left to prepare ({seen})"
    if not skipped:
        return f"--source {args.source}: no GeoTIFF or JPEG 2000 file in it"
    return (
        f"--source {args.source}: the naming rule explains none of the files ({seen}). Let a folder or file name say "
        "the sensor (S2L2A/<cell>.tif, <cell>/S1RTC.tif), or list the files in a CSV with columns file, location, "
        "sensor and pass --manifest; --help describes both"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("python -m data_prep.geotiff", description=__doc__, formatter_class=cli.Formatter)
    result.add_argument("--source", required=True, help="folder with the files")
    result.add_argument("--manifest", default=None, help="CSV; without it the naming rule applies")
    result.add_argument("--select", action="append", default=[], metavar="COLUMN=VALUE[,VALUE]", help="rows to use")
    result.add_argument(
        "--bands", action="append", default=[], metavar="SENSOR=NAME,...",
        help="order of the bands in files that do not name them; X..Y are the numbered bands from X to Y",
    )  # fmt: skip
    result.add_argument(
        "--s1-unit", type=partial(unit_word, "s1"), choices=("auto", *delivered_units("s1")), default="auto",
        help="of files that do not say it (power = linear)",
    )  # fmt: skip
    result.add_argument(
        "--s2-unit", type=partial(unit_word, "s2_l2a"), choices=delivered_units("s2_l2a"), default="DN",
        help="of files that do not say it",
    )  # fmt: skip
    cli.add_arguments(result, require="", snap="auto", sea_keep=1.0)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; unknown flags go to Beam when a Beam runner is chosen."""
    return cli.run(parser(), plan, argv)


if __name__ == "__main__":
    sys.exit(main())
