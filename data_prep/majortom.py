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
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from data_prep import cli, parquet
from data_prep.cell import Cell, Options, SensorInput
from data_prep.chunks import Source, Unit
from data_prep.raster import BadInput, Raster, decode, normalize_crs
from data_prep.times import iso_time
from data_prep.worldcover import WorldCover
from terrafm_jax.sensors import SENSOR_KEYS, SENSORS

FOLDERS = {"s1": "Core-S1RTC", "s2_l1c": "Core-S2L1C", "s2_l2a": "Core-S2L2A"}
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


@dataclasses.dataclass(frozen=True)
class MajorTom:
    """A folder or URL that holds the Major-TOM Core collections."""

    source: str

    def rows(self, key: str) -> list[Row]:
        """All products of one sensor, [] where the source does not have it. Raises ValueError on missing columns."""
        url = f"{self.source}/{FOLDERS[key]}/metadata.parquet"
        table = parquet.read_table(url, _COLUMNS)
        if table is None:
            return []
        missing = [name for name in _NEEDED if name not in table]
        if missing:
            raise ValueError(f"{url}: columns {missing} are missing, found {sorted(table)}")
        count = len(table["grid_cell"])
        columns = {name: table.get(name) or [None] * count for name in _COLUMNS}
        return [
            Row(
                cell=str(cell),
                product=str(product),
                time=iso_time(time),
                cloud=cloud,
                lat=lat,
                lon=lon,
                crs=normalize_crs(str(crs or "")),
                file=str(file).rsplit("/", 1)[-1],
                row=int(row),
                orbit=str(orbit or ""),
            )
            for cell, product, time, cloud, lat, lon, crs, file, row, orbit in zip(
                *(columns[name] for name in _COLUMNS), strict=True
            )
        ]

    def read(self, unit: Unit) -> Cell:
        """Reads and decodes one cell. Raises BadInput, chunks.SourceUnavailable."""
        rows: dict[str, Row] = unit.where
        sensors = {key: self._sensor(key, row) for key, row in rows.items()}
        anchor = next(iter(rows.values()))
        center = None if anchor.lat is None or anchor.lon is None else (anchor.lat, anchor.lon)
        return Cell(unit.cell, sensors, unit.number, unit.split, center)

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


def join(rows: dict[str, list[Row]], require: Sequence[str]) -> tuple[list[dict[str, Row]], dict[str, int]]:
    """Joins the products of each cell into acquisitions.

    Rows that repeat (cell, product) are dropped, never cells alone. Level 1C goes with the Level 2A of
    the same sensing time, what is left over in order of the product id; Sentinel-1 with each, the
    nearest in time (its dates are unrelated anyway). Deterministic in any order of the rows.

    Returns:
      One dict sensor -> row per unit to prepare, and the counts for the summary.
    """
    counts: Counter[str] = Counter()
    cells: dict[str, dict[str, list[Row]]] = defaultdict(lambda: {key: [] for key in SENSOR_KEYS})
    for key, found in rows.items():
        seen = set()
        for row in sorted(found, key=lambda r: (r.cell, r.product, r.file, r.row)):
            if (row.cell, row.product) in seen:
                counts[f"duplicates_{key}"] += 1
                continue
            seen.add((row.cell, row.product))
            cells[row.cell][key].append(row)
    units = []
    for cell in sorted(cells):
        for unit in _acquisitions(cells[cell]):
            if all(key in unit for key in require):
                units.append(unit)
            else:
                counts["without_required_sensors"] += 1
    counts["cells"] = len(cells)
    return units, dict(counts)


def _acquisitions(found: dict[str, list[Row]]) -> Iterable[dict[str, Row]]:
    level_1c = list(found["s2_l1c"])
    partners: dict[str, Row] = {}
    for row in found["s2_l2a"]:
        same = next((r for r in level_1c if sensing(r.product) == sensing(row.product) != ""), None)
        if same is not None:
            partners[row.product] = same
            level_1c.remove(same)
    for row in found["s2_l2a"]:
        if row.product not in partners and level_1c:
            partners[row.product] = level_1c.pop(0)
    optical = [
        {"s2_l2a": r, **({"s2_l1c": partners[r.product]} if r.product in partners else {})} for r in found["s2_l2a"]
    ]
    optical += [{"s2_l1c": r} for r in level_1c]
    if not optical:
        return [{"s1": row} for row in found["s1"]]
    for unit in optical:
        if found["s1"]:
            anchor = next(iter(unit.values())).time
            unit["s1"] = min(found["s1"], key=lambda r: (_days_apart(r.time, anchor), r.product))
    return optical


def sensing(product: str) -> str:
    """Sensing start in a Sentinel-2 product id (``20200223T032739``), or ""."""
    found = re.search(r"\d{8}T\d{6}", product)
    return found.group(0) if found else ""


def _days_apart(time: str, other: str) -> float:
    from datetime import date

    try:
        return abs((date.fromisoformat(time[:10]) - date.fromisoformat(other[:10])).days)
    except ValueError:
        return float("inf")


def plan(args: argparse.Namespace, options: Options, cover: WorldCover) -> tuple[Source, list[Unit], dict[str, Any]]:
    """Units of a Major-TOM source. Raises ValueError: nothing there, WorldCover maps missing."""
    source = MajorTom(str(args.source).rstrip("/"))
    rows = {key: source.rows(key) for key in SENSOR_KEYS}
    if not any(rows.values()):
        raise ValueError(
            f"--source {source.source}: none of {[f'{f}/metadata.parquet' for f in FOLDERS.values()]} is there"
        )
    joined, seen = join(rows, options.require)
    anchors = [next(iter(unit.values())) for unit in joined]
    centers = [None if r.lat is None or r.lon is None else (float(r.lat), float(r.lon)) for r in anchors]
    keep, fixed = cli.chosen_cells([r.cell for r in anchors], centers, args)
    units, numbers = [], Counter[str]()
    for unit, anchor, center, kept in zip(joined, anchors, centers, keep, strict=True):
        number = numbers[anchor.cell]
        numbers[anchor.cell] += 1
        if kept:
            split = fixed.get(anchor.cell)
            expected = split or cli.outlook(center, options.blocks)
            products = tuple((key, row.product) for key, row in unit.items())
            units.append(Unit(anchor.cell, number, unit, products, split, expected))
    cli.check_maps(cover, [c for c, k in zip(centers, keep, strict=True) if k and c])
    return source, units, {**seen, "units": len(units)}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("data_prep.majortom", description=__doc__, formatter_class=cli.Formatter)
    result.add_argument("--source", required=True, help="folder or URL with Core-S2L2A, Core-S2L1C, Core-S1RTC")
    cli.add_arguments(result, require="s2_l2a", snap="on")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; unknown flags go to Beam when a Beam runner is chosen."""
    return cli.run(parser(), plan, argv)


if __name__ == "__main__":
    sys.exit(main())
