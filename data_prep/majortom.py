"""Major-TOM Core parquet (local, or by HTTP range reads) -> prepared tiles.

    python -m data_prep.majortom --source DIR --worldcover DIR/worldcover --out OUT --workers 8
    python -m data_prep.majortom --source hf://datasets/Major-TOM --bbox 5 45 11 48 --worldcover WC --out OUT

``--source`` holds ``Core-S2L2A``, ``Core-S2L1C`` and ``Core-S1RTC``, each with ``metadata.parquet`` and
``images/part_NNNNN.parquet``. The three are joined on ``grid_cell``; ``metadata.parquet`` alone makes the
plan, and only the columns and rows that are needed are read. Pixels: CC-BY-SA-4.0.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import cli, ground, parquet
from data_prep.cell import Options
from data_prep.chunks import Source, Unit
from data_prep.delivered import Cell, SensorInput
from data_prep.ground import Place, Rival
from data_prep.raster import BadInput, Grid, Raster, decode, normalize_crs
from data_prep.times import days_apart, iso_time, paired
from data_prep.worldcover import WorldCover, lonlat_outline, maps_at
from terrafm_jax.sensors import SENSOR_KEYS, SENSORS

FOLDERS = {"s1": "Core-S1RTC", "s2_l1c": "Core-S2L1C", "s2_l2a": "Core-S2L2A"}
_TRIES = 10  # cells to look at for the size of all
RADIUS = 8.0  # km, half the diagonal of a cell (10.68 km a side) and some more
KINDS = {"s1": "RTC gamma0", "s2_l1c": "L1C", "s2_l2a": "L2A"}
_COLUMNS = (
    "grid_cell", "product_id", "timestamp", "cloud_cover", "centre_lat", "centre_lon", "crs", "parquet_url",
    "parquet_row", "orbit_state",
)  # fmt: skip
_NEEDED = ("grid_cell", "product_id", "parquet_url", "parquet_row")


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One product of one cell as ``metadata.parquet`` lists it."""

    cell: str
    product: str
    time: str
    cloud: float | None
    lat: float | None
    lon: float | None
    crs: str
    file: str
    row: int
    orbit: str


def _row(
    same: dict[str, str], cell: Any, product: Any, time: Any, cloud: Any, lat: Any, lon: Any, crs: Any, file: Any,
    row: Any, orbit: Any,
) -> Row:  # fmt: skip
    """One line of the metadata, in the order of ``_COLUMNS``."""

    def text(value: str) -> str:
        return same.setdefault(value, value)

    return Row(
        cell=text(str(cell)),
        product=text(str(product)),
        time=text(iso_time(time)),
        cloud=cloud,
        lat=None if lat is None or math.isnan(lat) else lat,
        lon=None if lon is None or math.isnan(lon) else lon,
        crs=text(normalize_crs(str(crs or ""))),
        file=text(str(file).rsplit("/", 1)[-1]),
        row=-1 if row is None or math.isnan(row) else int(row),  # there is none: its cell is rejected, not the job
        orbit=text(str(orbit or "")),
    )


@dataclasses.dataclass(frozen=True)
class MajorTom:
    """A folder or URL that holds the Major-TOM Core collections."""

    source: str

    def rows(self, key: str, same: dict[str, str] | None = None) -> list[Row]:
        """All products of one sensor, [] where the source does not have it. Raises ValueError on missing columns.

        ``same`` holds the texts that many rows share (cell, product, time, file), across calls.
        """
        url = f"{self.source}/{FOLDERS[key]}/metadata.parquet"
        table = parquet.read_table(url, _COLUMNS)
        if table is None:
            return []
        missing = [name for name in _NEEDED if name not in table.column_names]
        if missing:
            raise ValueError(f"{url}: columns {missing} are missing, found {sorted(table.column_names)}")
        same = {} if same is None else same
        found: list[Row] = []
        for batch in table.to_batches(max_chunksize=65536):  # Python objects of all rows at once would take gigabytes
            columns = batch.to_pydict()
            absent = [None] * batch.num_rows
            values = zip(*(columns.get(name, absent) for name in _COLUMNS), strict=True)
            found += [_row(same, *line) for line in values]
        return found

    def at_hand(self, key: str, rows: Sequence[Row]) -> list[Row]:
        """The rows whose part lies in a local folder, where some parts may have been downloaded and others not."""
        if parquet.is_remote(self.source):
            return list(rows)
        parts = {path.name for path in Path(self.source, FOLDERS[key], "images").glob("*.parquet")}
        return [row for row in rows if row.file in parts]

    def read(self, unit: Unit) -> Cell:
        """Reads and decodes one cell. Raises BadInput, chunks.SourceUnavailable."""
        rows: dict[str, Row] = unit.where
        sensors = {key: self._sensor(key, row) for key, row in rows.items()}
        anchor = next(iter(rows.values()))
        center = None if anchor.lat is None or anchor.lon is None else (anchor.lat, anchor.lon)
        near = [dataclasses.replace(r, footprint=_footprint(self.source, *r.footprint)) for r in unit.rivals]
        return Cell(unit.cell, sensors, unit.number, unit.split, center, rivals=[r for r in near if r.footprint])

    def _sensor(self, key: str, row: Row) -> SensorInput:
        sensor = SENSORS[key]
        bands = {
            band.name: band.name.lower() if key == "s1" else band.name for band in (*sensor.bands, *sensor.dropped)
        }
        columns = ["product_id", "grid_cell", *bands.values(), *(["cloud_mask"] if key == "s2_l2a" else [])]
        url = f"{self.source}/{FOLDERS[key]}/images/{row.file}"
        values = parquet.read_row(url, row.row, columns)
        if (values.get("grid_cell"), values.get("product_id")) != (row.cell, row.product):
            raise BadInput(
                f"{key}: {row.file} row {row.row} holds {values.get('grid_cell')} {values.get('product_id')}"
            )
        what = f"{key} {row.cell}"
        rasters = {name: decode(values[c], f"{what} {name}") for name, c in bands.items() if values.get(c) is not None}
        self._check_crs(key, row, rasters)
        mask = values.get("cloud_mask")
        return SensorInput(
            bands=rasters,
            product=row.product,
            kind=KINDS[key],
            time=row.time,
            orbit=row.orbit,
            unit="power" if key == "s1" else "DN",
            cloud_mask=decode(mask, f"{what} cloud_mask").pixels if mask else None,
            cloud_percent=row.cloud,
        )

    @staticmethod
    def _check_crs(key: str, row: Row, rasters: dict[str, Raster]) -> None:
        """Sentinel-1 may lie in another zone and is warped; Sentinel-2 must be where the metadata say."""
        wrong = sorted({r.grid.crs for r in rasters.values()} - {row.crs})
        if key != "s1" and row.crs and wrong:
            raise BadInput(f"{key}: wrong CRS, metadata say {row.crs}, the bands {', '.join(wrong)}")


@lru_cache(maxsize=1024)
def _footprint(source: str, key: str, row: Row) -> Grid | None:
    """Where a cell lies, with a margin of one pixel (origins may be snapped); None if it cannot be read."""
    band = "vv" if key == "s1" else "B09"  # the smallest
    try:
        values = parquet.read_row(f"{source}/{FOLDERS[key]}/images/{row.file}", row.row, [band])
        grid = decode(values.get(band) or b"", f"{key} {row.cell} {band}").grid
    except BadInput:  # it will be rejected when its turn comes
        return None
    return grid.window(-1, -1, grid.height + 2, grid.width + 2)


def join(rows: dict[str, list[Row]], require: Sequence[str]) -> tuple[list[dict[str, Row]], dict[str, int]]:
    """Joins the products of each cell into acquisitions.

    Rows that repeat (cell, product) are dropped, never cells alone. Level 1C goes with the Level 2A of
    the same sensing time, what is left over in order of the product id; Sentinel-1 with each, the
    nearest in time (its dates are unrelated anyway). Deterministic in any order of the rows.

    Returns:
      One dict sensor -> row per unit to prepare, and the counts for the summary.
    """
    counts: Counter[str] = Counter()
    units = []
    streams = [_by_cell(order, rows[key], key, counts) for order, key in enumerate(SENSOR_KEYS) if key in rows]
    for _, group in itertools.groupby(heapq.merge(*streams), key=lambda entry: entry[0]):
        found: dict[str, list[Row]] = {key: [] for key in SENSOR_KEYS}
        found |= {SENSOR_KEYS[order]: those for _, order, those in group}
        counts["cells"] += 1
        for unit in _acquisitions(found):
            if all(key in unit for key in require):
                units.append(unit)
            else:
                counts["without_required_sensors"] += 1
    return units, dict(counts)


def _by_cell(order: int, rows: Iterable[Row], key: str, counts: Counter[str]) -> Iterator[tuple[str, int, list[Row]]]:
    """(cell, ``order``, its rows) in order of the cell, each (cell, product) once."""
    ordered = sorted(rows, key=lambda r: (r.cell, r.product, r.file, r.row))
    for cell, group in itertools.groupby(ordered, key=lambda r: r.cell):
        first: dict[str, Row] = {}
        for row in group:
            if first.setdefault(row.product, row) is not row:
                counts[f"duplicates_{key}"] += 1
        yield cell, order, list(first.values())


def _acquisitions(found: dict[str, list[Row]]) -> Iterable[dict[str, Row]]:
    level_2a = found["s2_l2a"]
    partners, alone = paired(
        level_2a,
        found["s2_l1c"],
        lambda a: sensing(a.product),
        lambda a, b: sensing(a.product) == sensing(b.product) != "",
    )
    optical = [{"s2_l2a": r, **({"s2_l1c": p} if p else {})} for r, p in zip(level_2a, partners, strict=True)]
    optical += [{"s2_l1c": r} for r in alone]
    if not optical:
        return [{"s1": row} for row in found["s1"]]
    for unit in optical:
        if found["s1"]:
            anchor = next(iter(unit.values())).time
            unit["s1"] = min(found["s1"], key=lambda r: (days_apart(r.time, anchor), r.product))
    return optical


def sensing(product: str) -> str:
    """Sensing start in a Sentinel-2 product id (``20200223T032739``), or ""."""
    found = re.search(r"\d{8}T\d{6}", product)
    return found.group(0) if found else ""


def plan(args: argparse.Namespace, options: Options, cover: WorldCover) -> tuple[Source, list[Unit], dict[str, Any]]:
    """Units of a Major-TOM source. Raises ValueError: nothing there, WorldCover maps missing."""
    source = MajorTom(str(args.source).rstrip("/"))
    same: dict[Any, Any] = {}
    rows = {key: source.rows(key, same) for key in SENSOR_KEYS}
    if not any(rows.values()):
        raise ValueError(
            f"--source {source.source}: none of {[f'{f}/metadata.parquet' for f in FOLDERS.values()]} is there"
        )
    without: Counter[str] = Counter()
    for key, listed in rows.items():
        rows[key] = source.at_hand(key, listed)
        if len(rows[key]) < len(listed):
            without[f"rows_without_part_{key}"] = len(listed) - len(rows[key])
            print(
                f"{FOLDERS[key]}: {len(listed) - len(rows[key])} of {len(listed)} rows lie in parts that are not in "
                "images/ and are left out", file=sys.stderr,
            )  # fmt: skip
    joined, seen = join(rows, options.require)
    del rows, listed
    anchors = [next(iter(unit.values())) for unit in joined]
    centers = [None if r.lat is None or r.lon is None else (float(r.lat), float(r.lon)) for r in anchors]
    keep, fixed = cli.chosen_cells([r.cell for r in anchors], centers, args)
    picked, numbers = [], Counter[str]()
    for unit, anchor, center, kept in zip(joined, anchors, centers, keep, strict=True):
        if kept:
            picked.append((unit, anchor, center, numbers[anchor.cell]))
        numbers[anchor.cell] += 1
    near: Iterable[tuple[Rival, ...]] = itertools.repeat((), len(picked))
    if fixed:
        lie = [
            Place(anchor.cell, fixed[anchor.cell], center, RADIUS, (next(iter(unit)), anchor))
            for unit, anchor, center, _ in picked
        ]
        near = ground.rivals(lie)
    units = []
    for (unit, anchor, center, number), those in zip(picked, near, strict=True):
        split = fixed.get(anchor.cell)
        expected = split or cli.outlook(center, options.blocks)
        products = tuple(same.setdefault(pair, pair) for key, row in unit.items() if (pair := (key, row.product)))
        units.append(Unit(anchor.cell, number, unit, products, split, expected, those))
    cli.check_maps(cover, _maps(source, picked) if cover.folder else ())
    return source, units, {**seen, **without, "units": len(units)}


def _maps(source: MajorTom, picked: Sequence[tuple[dict[str, Row], Row, Any, int]]) -> set[str]:
    """WorldCover maps under the centers of all cells, and under what lies around them within the size of one cell."""
    places = np.array([center for _, _, center, _ in picked if center], np.float64).reshape(-1, 2)
    grids = (_footprint(source.source, next(iter(unit)), anchor) for unit, anchor, _, _ in picked[:_TRIES])
    grid = next((g for g in grids if g), None)
    half = 0.0
    if grid:  # a point well within the circle inside the square lies in the cell, however that is turned
        _, lat = lonlat_outline(grid)
        half = 0.45 * float(np.ptp(lat)) * (1 - 2 / grid.height)  # without its margin
    names: set[str] = set()
    for north, east in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
        lat = places[:, 0] + north * half
        names |= maps_at(places[:, 1] + east * half / np.cos(np.radians(places[:, 0])).clip(0.05), lat)
    return names


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("python -m data_prep.majortom", description=__doc__, formatter_class=cli.Formatter)
    result.add_argument("--source", required=True, help="folder or URL with Core-S2L2A, Core-S2L1C, Core-S1RTC")
    cli.add_arguments(result, require="s2_l2a", snap="on")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; unknown flags go to Beam when a Beam runner is chosen."""
    return cli.run(parser(), plan, argv)


if __name__ == "__main__":
    sys.exit(main())
