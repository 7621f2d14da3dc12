"""Folders of GeoTIFFs or Sentinel-2 SAFE granules -> prepared tiles.

    python -m data_prep.geotiff --source DIR --worldcover WC --out OUT --tile-size 240
    python -m data_prep.geotiff --source DIR --bands s2_l1c=B01..B12,B8A --worldcover WC --out OUT
    python -m data_prep.geotiff --source DIR --manifest MANIFEST.csv --select group=terramesh_224 \\
        --select kind=tile,landcover --worldcover none --out OUT

Files are matched by the naming rule (``data_prep/scenes.py``) or by a manifest (``manifest.py``). One file per
band or several bands a file, any of the three sensors, UTM or EPSG:4326, bands at native sampling or all
on one grid. Images smaller than a tile are kept whole; large scenes are read block by block.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds
from rasterio.windows import Window

from data_prep import cli, ground, tiling
from data_prep.bands import Unnamed, named, together, unnamed
from data_prep.cell import Options
from data_prep.chunks import MOST_LAYOUTS, TOO_MANY_LAYOUTS, Source, Unit
from data_prep.delivered import Cell, SensorInput
from data_prep.ground import Place
from data_prep.harmonize import Offset
from data_prep.manifest import from_manifest
from data_prep.raster import BadInput, Grid, NotThere, Raster, check_projection, first_line, grid_of, open_raster
from data_prep.scenes import (
    CLOUD_MASK,
    LANDCOVER,
    UNKNOWN_SENSOR,
    Scene,
    SceneFile,
    facts,
    from_folder,
    stated_orders,
)
from data_prep.units import delivered_units, radar_scaled, stated_offset, unit_word
from data_prep.worldcover import WorldCover, codes_on, lonlat_outline, maps_under
from terrafm_jax.checks import hides
from terrafm_jax.data.tiles import EXTENT_ORDER
from terrafm_jax.sensors import SENSORS
from terrafm_jax.units import AS_STORED, stated_scaling


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
        sensors: dict[str, SensorInput] = {}
        beside, nameless = [], []
        systems: dict[str, dict[str, str]] = {key: {} for key in EXTENT_ORDER}
        for key in EXTENT_ORDER:  # Sentinel-1 last: with Sentinel-2 it will be warped, alone it is cut
            files = [f for f in scene.files if f.sensor == key]
            try:
                if files:
                    area = None if block is None else _Area(target, key == "s1" and bool(sensors))
                    sensors[key] = self._sensor(key, files, area, systems[key])
            except NotThere:  # swaths differ: a part of the scene has this sensor, another has not
                beside.append(key)
            except Unnamed as error:  # all of them at once: else every sensor costs another start
                nameless.append((key, error))
        if nameless:
            raise together(nameless)
        optical = {path: crs for key, those in systems.items() if key != "s1" for path, crs in those.items()}
        check_projection(optical or systems["s1"])  # beside Sentinel-2, Sentinel-1 is warped from wherever it lies
        cover = [f for f in scene.files if f.sensor == LANDCOVER]
        codes = _landcover(cover, target) if cover else None
        return Cell(unit.cell, sensors, unit.number, unit.split, None, codes, unit.rivals, beside)

    def _sensor(self, key: str, files: Sequence[SceneFile], area: _Area | None, systems: dict[str, str]) -> SensorInput:
        """The bands of one sensor; adds the CRS of each file to ``systems``. Raises BadInput."""
        rasters: dict[str, Raster] = {}
        doubts: list[str] = []
        for file in files:
            for name, raster in _bands(key, file, area, self.bands.get(key, ()), doubts).items():
                systems[file.path] = raster.grid.crs
                if name in rasters:
                    raise BadInput(f"{key}: band {name} twice, again in {file.path}")
                rasters[name] = raster
        mask = rasters.pop(CLOUD_MASK, None)
        first = files[0]
        unit = _common(key, "units", [f.unit for f in files]) or (self.s1_unit if key == "s1" else self.s2_unit)
        offset = _common(key, "offsets", [f.offset for f in files])
        known = None if offset is None else Offset(offset, "manifest")
        if key == "s1":
            rasters = {name: radar_scaled(r) if r.scaling != AS_STORED else r for name, r in rasters.items()}
        else:
            unit, known = stated_offset(key, rasters, unit, known)
        if unit == "auto":
            unit = guess_unit(rasters)
        return SensorInput(
            bands=rasters,
            product=first.product or Path(first.path).stem,
            kind=first.kind + (", from reflectance" if unit == "reflectance" else ""),
            time=first.time,
            orbit=first.orbit,
            unit=unit,
            cloud_mask=None if mask is None else mask.pixels,
            offset=known,
            doubts=tuple(dict.fromkeys(doubts)),
        )


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


@dataclasses.dataclass(frozen=True)
class _Area:
    """The block of a scene that is read; ``warped``: onto its grid, so that neighbors beyond its edge count, too."""

    grid: Grid
    warped: bool


def _bands(key: str, file: SceneFile, area: _Area | None, order: Sequence[str], doubts: list[str]) -> dict[str, Raster]:
    """Bands of one file, all of it or what lies under ``area``; ``order`` if it names none. Raises BadInput.

    A manifest that names them otherwise than the file does is believed, and adds to ``doubts``.
    """
    with open_raster(file.path) as source:
        grid = grid_of(source, file.path)
        described = named(key, source.descriptions)
        names = file.bands or described or tuple(order)
        if file.bands and described and len(described) == len(names) and described != names:
            wrong = [f"{said} for {own}" for said, own in zip(names, described, strict=True) if said != own]
            doubts.append(
                f"{key}: the manifest contradicts the names in the files: {', '.join(wrong[:5])}; which is right?"
            )
        if not names:
            raise unnamed(key, source, file.path)
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
        if hides(source) and pixels.dtype.itemsize > 1:  # bytes are previews
            pixels, nodata = _hidden(pixels, source.read_masks(1, window=window) == 0, nodata), np.nan
        scaling = [stated_scaling(source, i + 1) for i in range(source.count)]
        return {name: Raster(pixels[i], grid, nodata, scaling[i]) for i, name in enumerate(names) if name}


def _hidden(pixels: np.ndarray, hidden: np.ndarray, nodata: float | None) -> np.ndarray:
    """Pixels [bands, H, W] as floats that hold them all, NaN where the file's own mask hides them or for its nodata."""
    gone = hidden | (pixels == nodata) if nodata else np.broadcast_to(hidden, pixels.shape)
    return np.where(gone, np.nan, pixels).astype(np.result_type(pixels.dtype, np.float32))


def _window(grid: Grid, area: _Area) -> Window:
    """The pixels under ``area``: these alone where they are copied, with a margin of 8 where they are resampled.

    Raises NotThere.
    """
    a, _, c, _, e, f = grid.transform
    same = grid.crs == area.grid.crs
    bounds = area.grid.bounds()
    left, bottom, right, top = bounds if same else transform_bounds(area.grid.crs, grid.crs, *bounds, densify_pts=21)
    if same and not area.warped:
        margin, col, row = 0, round((left - c) / a), round((top - f) / e)
        end_col, end_row = col + max(1, round((right - left) / a)), row + max(1, round((top - bottom) / -e))
    else:
        margin, col, row = 8, math.floor((left - c) / a), math.floor((top - f) / e)
        end_col, end_row = math.ceil((right - c) / a), math.ceil((bottom - f) / e)
    if min(grid.width, end_col) <= max(0, col) or min(grid.height, end_row) <= max(0, row):
        raise NotThere(f"no pixel under {area.grid.crs} {tuple(round(v, 5) for v in bounds)}")
    col, row = max(0, col - margin), max(0, row - margin)
    return Window(col, row, min(grid.width, end_col + margin) - col, min(grid.height, end_row + margin) - row)


def _landcover(files: Sequence[SceneFile], target: Grid) -> Raster:
    """WorldCover codes of the scene's own map, nearest neighbor on ``target``."""
    codes = np.full(target.shape, 255, np.uint8)
    for file in files:
        codes = np.where(codes == 255, codes_on(file.path, target), codes)
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
    if max(grid.shape) <= 2 * tiling.block_side(options.tile_size, options.stride):
        return [None]
    return [dataclasses.astuple(w) for w in tiling.blocks(*grid.shape, options.tile_size, options.stride)]


def units_of(scene: Scene, options: Options, split: str | None) -> tuple[list[Unit], Place]:
    """The units of a scene, and where it lies if its header can be read."""
    products = tuple({(f.sensor, f.product): None for f in scene.files if f.sensor != LANDCOVER and f.product})
    try:
        grid = _finest_grid(scene)
        lon, lat = outline = lonlat_outline(grid)
    except (BadInput, rasterio.errors.CRSError):  # it will be rejected when it is read
        unit = Unit(scene.cell, scene.number, (scene, None), products, split, split or "unknown")
        return [unit], Place(scene.cell, split, None, 0.0, None)
    found = []
    parts = blocks(grid, options)
    if len(parts) > 1:  # so that the offset is decided once for all of them
        products += _without_id(scene, {key for key, _ in products})
    for block in parts:
        name = scene.cell if block is None else f"{scene.cell}@r{block[0]}_c{block[1]}"
        area = outline if block is None else lonlat_outline(grid.window(*block))
        outlook = split or options.blocks.split(*area) or "mixed"
        found.append(Unit(name, scene.number, (scene, block), products, split, outlook))
    center = (float(lat.mean()), (float(lon.mean()) + 180.0) % 360.0 - 180.0)
    return found, Place(scene.cell, split, center, ground.radius(outline), grid)


def _without_id(scene: Scene, known: Set[str]) -> tuple[tuple[str, str], ...]:
    """What stands for the product of each optical sensor but those ``known``, whose files name none."""
    first: dict[str, SceneFile] = {}
    for file in scene.files:
        if file.sensor not in (*known, "s1", LANDCOVER):
            first.setdefault(file.sensor, file)
    return tuple((key, f"{scene.cell}/p{scene.number}/{Path(file.path).stem}") for key, file in first.items())


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
    with rasterio.Env():  # one, or every open and every outline sets up its own
        planned = [units_of(scene, options, scene.split) for scene in scenes]
    centers = [place.center for _, place in planned]
    keep, fixed = cli.chosen_cells([s.cell for s in scenes], centers, args)
    chosen = [
        (found, dataclasses.replace(place, split=scene.split or fixed.get(scene.cell)))
        for scene, (found, place), kept in zip(scenes, planned, keep, strict=True)
        if kept
    ]
    _check_shapes([place.footprint for _, place in chosen if place.footprint], options.tile_size)
    units = []
    for (found, place), near in zip(chosen, ground.rivals([place for _, place in chosen]), strict=True):
        split = place.split
        units += [dataclasses.replace(u, split=split, outlook=split or u.outlook, rivals=near) for u in found]
    if cover.folder:
        cli.check_maps(cover, {name for found, place in chosen for u in found for name in _maps(u, place)})
    counts: Counter[str] = Counter({f"files: {reason}": n for reason, n in skipped.items()})
    return source, units, {"scenes": len(scenes), "units": len(units), **counts}


def _check_shapes(grids: Sequence[Grid], size: int) -> None:
    """Raises ValueError where images smaller than a tile make too many shapes: now, and not after the last cell."""
    shapes = {tuple(min(side, size) // tiling.UNIT for side in grid.shape) for grid in grids}
    if len(shapes) > MOST_LAYOUTS:
        common = max(1, min(min(grid.shape) for grid in grids) // tiling.UNIT) * tiling.UNIT
        raise ValueError(f"{TOO_MANY_LAYOUTS} {size} or less; all images hold {common}")


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
