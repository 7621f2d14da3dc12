"""STAC items (an API or a static catalog) -> prepared tiles, through odc-stac (extra ``[stac]``).

    python -m data_prep.stac --catalog https://planetarycomputer.microsoft.com/api/stac/v1 \\
        --collection s2_l2a=sentinel-2-l2a --collection s1=sentinel-1-rtc --sign planetary_computer:sign \\
        --bbox 11.2 46.4 11.6 46.7 --datetime 2021-06-01/2021-06-30 --worldcover WC --out OUT

Every Sentinel-2 item is cut into blocks on the 60 m lines of its own UTM grid, so its pixels are copied,
never resampled; Sentinel-1 is warped onto the block in linear power. Providers disagree on the baseline
offset (Planetary Computer and ``sentinel-2-c1-l2a`` deliver it, flags of others are known to be wrong for
some items): the product id and the item's metadata propose, the pixels check.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import importlib
import math
import re
import sys
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from rasterio.warp import transform_bounds

from data_prep import cli, ground, tiling
from data_prep.cell import Options
from data_prep.chunks import Source, SourceUnavailable, Unit
from data_prep.delivered import Cell, SensorInput
from data_prep.ground import Place
from data_prep.raster import BadInput, Grid, Raster, first_line, normalize_crs
from data_prep.scenes import kind_of
from data_prep.times import iso_time
from data_prep.worldcover import WorldCover, lonlat_outline, maps_under
from terrafm_jax.sensors import SENSORS, SensorError, band_name
from terrafm_jax.sensors import sensor as sensor_named

PASS = 1200.0  # seconds: an overpass takes less, the next one comes after 98 minutes


@dataclasses.dataclass(frozen=True)
class Stac:
    """How URLs are signed (``module:function``); the items travel with the units that need them."""

    sign: str = ""

    def read(self, unit: Unit) -> Cell:
        """Loads one block. Raises BadInput, SourceUnavailable."""
        items, grid = unit.where
        sensors = {key: self._sensor(key, those, grid) for key, those in items.items()}
        found = {key: given for key, given in sensors.items() if given is not None}
        return Cell(unit.cell, found, unit.number, unit.split, rivals=unit.rivals)

    def _sensor(self, key: str, items: list[dict[str, Any]], block: Grid) -> SensorInput | None:
        sensor = SENSORS[key]
        assets = assets_of(key, items[0])
        missing = [b for b in sensor.band_names if b not in assets]
        if missing:
            raise BadInput(f"{key}: item {items[0]['id']} has no asset for {', '.join(missing)}")
        bands: dict[str, Raster] = {}
        for step in sorted({b.gsd for b in (*sensor.bands, *sensor.dropped)}):
            names = [b.name for b in (*sensor.bands, *sensor.dropped) if b.gsd == step and b.name in assets]
            if names:
                grid = _coarser(block, step)
                loaded = self._load(key, items, {n: assets[n] for n in names}, grid)
                bands |= {name: Raster(pixels, grid, None if key == "s1" else 0) for name, pixels in loaded.items()}
        if key == "s1" and not any(np.isfinite(r.pixels).any() for r in bands.values()):
            return None  # the footprint of the item touches the block, its pixels do not
        properties = items[0]["properties"]
        product = _product(items[0])
        return SensorInput(
            bands=bands,
            product=product,
            kind=kind_of(key, f"{items[0].get('collection', '')} {product}"),
            time=iso_time(properties.get("datetime")),
            orbit=str(properties.get("sat:orbit_state") or ""),
            unit="power" if key == "s1" else "DN",
            cloud_percent=properties.get("eo:cloud_cover"),
        )

    def _load(self, key: str, items: list[dict[str, Any]], assets: dict[str, str], grid: Grid) -> dict[str, np.ndarray]:
        """band -> [H, W] on ``grid``: S2 copied, S1 bilinear in power with nodata left out.

        S2 is read as floats, which hold all that is delivered: read as uint16, what lies below zero became zero, dark
        water nodata and reflectance black.
        """
        import odc.stac
        import pystac
        from odc.geo.geobox import GeoBox
        from rasterio.errors import RasterioError

        found = [pystac.Item.from_dict(item) for item in items]
        radar = key == "s1"
        described = {"data_type": "float32", "nodata": float("nan") if radar else 0}
        try:
            cube = odc.stac.load(
                found,
                bands=list(assets.values()),
                geobox=GeoBox(grid.shape, grid.affine, grid.crs),
                resampling="bilinear" if radar else "nearest",
                dtype="float32",
                groupby="solar_day",
                stac_cfg={"*": {"assets": {"*": described}}},
                patch_url=_signer(self.sign),
                fail_on_error=True,
            )
        except (RasterioError, OSError) as error:
            where = (
                SourceUnavailable if any("://" in a["href"] for i in items for a in i["assets"].values()) else BadInput
            )
            raise where(f"{key}: item {items[0]['id']} cannot be read ({first_line(error)})") from error
        loaded = {name: np.asarray(cube[asset].isel(time=0).values) for name, asset in assets.items()}
        return loaded if radar else {name: _dn(pixels) for name, pixels in loaded.items()}


def _dn(pixels: np.ndarray) -> np.ndarray:
    """Pixels as uint16 where they all are; else as they came, to be refused for what they are."""
    with np.errstate(invalid="ignore"):
        whole = pixels.astype(np.uint16)
    return whole if (whole == pixels).all() else pixels


def _signer(text: str) -> Callable[[str], str] | None:
    if not text:
        return None
    module, _, name = text.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(f"--sign {text}: expected MODULE:FUNCTION that can be imported ({error})") from error


def _coarser(grid: Grid, step: int) -> Grid:
    """The same ground in pixels of ``step`` metres."""
    a, b, c, d, e, f = grid.transform
    k = round(step / a)
    return Grid(grid.crs, (a * k, b, c, d, e * k, f), grid.height // k, grid.width // k)


def assets_of(key: str, item: Mapping[str, Any]) -> dict[str, str]:
    """ESA band name -> asset key of an item, from the keys or the bands the assets describe.

    Overviews, and copies of a band resampled to another sampling (``B02_20m``), are left out.
    """
    found: dict[str, str] = {}
    sensor = SENSORS[key]
    gsd = {b.name: b.gsd for b in (*sensor.bands, *sensor.dropped)}
    for name, asset in item["assets"].items():
        described = asset.get("bands") or asset.get("eo:bands") or []
        stated = re.search(r"[_-](10|20|60)m$", name)
        band = band_name(re.sub(r"[_-](10|20|60)m$", "", name), sensor)
        if band is None and len(described) == 1:
            words = [described[0].get(k) for k in ("name", "common_name", "eo:common_name")]
            band = next((b for b in (band_name(w, sensor) for w in words if w) if b), None)
        if band is None or (stated and int(stated.group(1)) != gsd[band]):
            continue
        if band not in found or name.lower() == band.lower():
            found[band] = name
    return found


def _product(item: Mapping[str, Any]) -> str:
    """The product id with its processing baseline, wherever the provider keeps it."""
    properties = item["properties"]
    uri = str(properties.get("s2:product_uri") or properties.get("s2:product_id") or item["id"]).removesuffix(".SAFE")
    number = str(properties.get("s2:processing_baseline") or properties.get("processing:version") or "")
    if re.search(r"(?:^|_)N\d{4}(?:_|$)", uri) or not re.fullmatch(r"\d{2}\.\d{2}", number):
        return uri
    return f"{uri}_N{number.replace('.', '')}"


# --- planning ---------------------------------------------------------------------------------


def search(
    catalog: str, collections: Mapping[str, str], bbox: Sequence[float] | None, when: str
) -> dict[str, list[Any]]:
    """Items per sensor, from an API by its search, from a static catalog by walking it. Raises ValueError."""
    try:
        import pystac_client
    except ImportError as error:
        raise ValueError(f"STAC needs pystac-client and odc-stac: pip install 'terrafm_jax[stac]' ({error})") from error
    with warnings.catch_warnings():  # pystac-client warns of every folder of a static catalog that it is not an API
        warnings.filterwarnings("ignore", category=pystac_client.warnings.PystacClientWarning)
        return _found(pystac_client.Client.open(catalog), collections, bbox, when)


def _found(
    client: Any, collections: Mapping[str, str], bbox: Sequence[float] | None, when: str
) -> dict[str, list[Any]]:
    if client.conforms_to("ITEM_SEARCH"):
        return {
            key: list(client.search(collections=[name], bbox=bbox, datetime=when or None).items())
            for key, name in collections.items()
        }
    found: dict[str, list[Any]] = defaultdict(list)
    for item in client.get_items(recursive=True):
        item.make_asset_hrefs_absolute()
        for key, name in collections.items():
            if item.collection_id == name and _wanted(item, bbox, when):
                found[key].append(item)
    return found


def collections_of(texts: Sequence[str]) -> dict[str, str]:
    """``["s1=sentinel-1-rtc", "sentinel-2-l2a"]`` -> sensor key -> collection. Raises ValueError.

    The sensor may be left out where the name of the collection says it, as those of the large catalogs do.
    """
    found: dict[str, str] = {}
    for text in texts:
        name, _, collection = text.partition("=")
        try:
            key = sensor_named(name).key
        except SensorError as error:
            raise ValueError(f"--collection {text}: expected SENSOR=NAME; {error}") from error
        if key in found:
            raise ValueError(f"--collection {text}: {key} has {found[key]} already")
        found[key] = collection or name
    return found


def days_of(text: str) -> tuple[str, str]:
    """First and last day of ``--datetime``; "" and ``..`` leave an end open. Raises ValueError."""
    first, slash, last = text.partition("/")
    ends = [("" if end == ".." else end) for end in (first, last if slash else first)]
    for end in filter(None, ends):
        try:
            dt.date.fromisoformat(end[:10])
        except ValueError as error:
            raise ValueError(
                f"--datetime {text}: {end!r} is no day; expected 2021-06-01 or 2021-06-01/2021-06-30 ({error})"
            ) from None
    return ends[0], ends[1]


def _wanted(item: Any, bbox: Sequence[float] | None, when: str) -> bool:
    if bbox is not None and not _overlap(item.bbox, bbox):
        return False
    first, last = days_of(when)
    day = iso_time(item.datetime or item.properties.get("start_datetime"))[:10]
    return not when or (first[:10] or "0") <= day <= (last[:10] or "9")


def _overlap(box: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two (west, south, east, north) share ground, also across the antimeridian."""
    south = max(box[1], other[1])
    return south <= min(box[3], other[3]) and (cli.in_bbox(box, south, other[0]) or cli.in_bbox(other, south, box[0]))


def grid_of_item(item: Mapping[str, Any]) -> Grid:
    """The item's extent in 10 m pixels on the 60 m lines of its CRS. Raises BadInput."""
    properties = item["properties"]
    code = properties.get("proj:code") or properties.get("proj:epsg")
    if not code:
        raise BadInput(f"item {item['id']}: neither proj:code nor proj:epsg")
    crs = normalize_crs(str(code))
    boxes = (_projected(part) for part in (properties, *item["assets"].values()))
    box = next((found for found in boxes if found), None)
    left, bottom, right, top = box or transform_bounds("EPSG:4326", crs, *item["bbox"], densify_pts=21)
    size = 10 * tiling.UNIT
    # A given extent is exact; one from lon/lat is only shrunk to whole pixels, blocks at its rim may hold nodata.
    left, top = math.ceil(left / size - 1e-6) * size, math.floor(top / size + 1e-6) * size
    height, width = (int((top - bottom) / size + 1e-6) * tiling.UNIT, int((right - left) / size + 1e-6) * tiling.UNIT)
    return Grid(crs, (10.0, 0.0, float(left), 0.0, -10.0, float(top)), height, width)


def _projected(part: Mapping[str, Any]) -> Sequence[float] | None:
    """left, bottom, right, top in the item's CRS, as its properties or one of its assets states them; None if not."""
    if part.get("proj:bbox"):
        return part["proj:bbox"]
    shape, affine = part.get("proj:shape"), part.get("proj:transform")
    if not shape or not affine:
        return None
    (rows, columns), (a, _, left, _, e, top) = shape, affine[:6]
    return left, top + rows * e, left + columns * a, top


def blocks_of(grid: Grid, options: Options, bbox: Sequence[float] | None) -> Iterable[tuple[int, int, Grid]]:
    """(row, column, grid) of the blocks whose center lies in ``bbox``."""
    for window in tiling.blocks(*grid.shape, options.tile_size, options.stride):
        block = grid.window(*dataclasses.astuple(window))
        lon, lat = lonlat_outline(block)
        if bbox is None or cli.in_bbox(bbox, float(lat.mean()), float(lon.mean())):
            yield window.row, window.col, block


def plan(args: argparse.Namespace, options: Options, cover: WorldCover) -> tuple[Source, list[Unit], dict[str, Any]]:
    """Units of a catalog. Raises ValueError."""
    collections = collections_of(args.collection)
    days_of(args.datetime)  # before the catalog is asked, and the signer before work starts
    _signer(args.sign)
    found = search(args.catalog, collections, args.bbox, args.datetime)
    items = {key: {i.id: i.to_dict() for i in sorted(group, key=lambda i: i.id)} for key, group in found.items()}
    units: list[Unit] = []
    centers: list[tuple[float, float]] = []
    skipped: Counter[str] = Counter()
    for anchor_key, name, partners in _acquisitions(items):
        try:
            grid = grid_of_item(items[anchor_key][name])
        except BadInput as error:
            skipped[str(error)] += 1
            continue
        for row, col, block in blocks_of(grid, options, args.bbox):
            ids = {anchor_key: [name], **partners}
            nearest = _radar_of(items.get("s1", {}), block, items[anchor_key][name])
            if nearest and anchor_key != "s1":
                ids["s1"] = nearest
            if not all(key in ids for key in options.require):
                skipped["blocks without required sensors"] += 1
                continue
            lon, lat = lonlat_outline(block)
            used = {key: [items[key][i] for i in names] for key, names in ids.items()}
            products = tuple((key, _product(those[0])) for key, those in used.items())
            outlook = options.blocks.split(lon, lat) or "mixed"
            units.append(Unit(f"{name}@r{row}_c{col}", 0, (used, block), products, None, outlook))
            centers.append((float(lat.mean()), float(lon.mean())))
    keep, fixed = cli.chosen_cells([u.cell for u in units], centers, args)
    chosen = [u for u, k in zip(units, keep, strict=True) if k]
    cli.check_maps(cover, {name for u in chosen for name in maps_under(u.where[1])})
    places = [
        Place(u.cell, fixed.get(u.cell), c, ground.radius(lonlat_outline(u.where[1])), u.where[1])
        for u, c, k in zip(units, centers, keep, strict=True)
        if k
    ]
    kept = [
        dataclasses.replace(u, split=p.split, outlook=p.split or u.outlook, rivals=near)
        for u, p, near in zip(chosen, places, ground.rivals(places), strict=True)
    ]
    seen = {f"items_{key}": len(group) for key, group in items.items()}
    return Stac(args.sign), kept, {**seen, **skipped, "units": len(kept)}


def _acquisitions(items: Mapping[str, Mapping[str, Any]]) -> Iterable[tuple[str, str, dict[str, list[str]]]]:
    """(sensor, item, partners) of every overpass: Level 2A with the Level 1C of its tile and time, or either alone."""
    level_1c = {_scene(item): name for name, item in sorted(items.get("s2_l1c", {}).items(), reverse=True)}
    for name, item in items.get("s2_l2a", {}).items():
        partner = level_1c.pop(_scene(item), None)
        yield "s2_l2a", name, {"s2_l1c": [partner]} if partner else {}
    for name in sorted(level_1c.values()):
        yield "s2_l1c", name, {}
    if not items.get("s2_l2a") and not items.get("s2_l1c"):
        for name in items.get("s1", {}):
            yield "s1", name, {}


def _scene(item: Mapping[str, Any]) -> tuple[str, str]:
    properties = item["properties"]
    tile = properties.get("s2:mgrs_tile") or properties.get("grid:code") or ""
    found = re.search(r"(\d{1,2}[A-Z]{3})(?:_|$)", str(tile) or item["id"])
    return (found.group(1) if found else str(tile)), iso_time(properties.get("datetime"))[:16]


def _radar_of(items: Mapping[str, Any], block: Grid, anchor: Mapping[str, Any]) -> list[str]:
    """Ids of the Sentinel-1 items under the block of the overpass nearest in time, in order.

    Not those of the whole day: it may hold an ascending and a descending pass, which look from opposite sides.
    """
    lon, lat = lonlat_outline(block)
    area = (lon.min(), lat.min(), lon.max(), lat.max())
    under = {name: _seconds(i) for name, i in sorted(items.items()) if _overlap(i["bbox"], area)}
    if not under:
        return []
    wanted = _seconds(anchor)
    best = min(under.values(), key=lambda when: abs(when - wanted))
    return [name for name, when in under.items() if abs(when - best) < PASS]


def _seconds(item: Mapping[str, Any]) -> float:
    """Time of an item since 1970, 0 if it states none."""
    text = iso_time(item["properties"].get("datetime") or item["properties"].get("start_datetime"))
    return dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp() if text else 0.0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("python -m data_prep.stac", description=__doc__, formatter_class=cli.Formatter)
    result.add_argument("--catalog", required=True, help="URL of a STAC API, or URL or file of a catalog.json")
    result.add_argument("--collection", action="append", required=True, metavar="[SENSOR=]NAME", help="once per sensor")
    result.add_argument("--datetime", default="", help="day or first/last day, as in 2021-06-01/2021-06-30")
    result.add_argument("--sign", default="", metavar="MODULE:FUNCTION", help="signs asset URLs")
    cli.add_arguments(result, require="", snap="off")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; unknown flags go to Beam when a Beam runner is chosen."""
    return cli.run(parser(), plan, argv)


if __name__ == "__main__":
    sys.exit(main())
