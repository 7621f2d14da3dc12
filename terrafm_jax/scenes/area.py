"""The area of interest of ``--aoi``: read in degrees, laid onto a grid in meters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio.features
import shapely
import shapely.affinity
from rasterio.crs import CRS
from rasterio.warp import transform_bounds, transform_geom

from terrafm_jax.scenes.errors import SceneError, first_line

_MARGIN = 0.1  # degrees around a grid beyond which an area is cut off
_OTHER_VECTORS = (".gpkg", ".shp", ".kml", ".kmz", ".fgb", ".gml", ".zip")
_EDGE = 0.02  # degrees; a parallel sags less than a meter over so much


def read_aoi(text: str) -> dict[str, Any]:
    """A GeoJSON geometry in EPSG:4326 from a GeoJSON file or from ``west,south,east,north``.

    A box whose west is larger than its east crosses the antimeridian. Raises SceneError.
    """
    parts = text.split(",")
    kind = Path(text).suffix.lower()
    if len(parts) != 4 and not Path(text).exists():
        raise SceneError(f"--aoi {text}: no such file; expected a GeoJSON file or WEST,SOUTH,EAST,NORTH in degrees")
    if kind in _OTHER_VECTORS:
        raise SceneError(f"--aoi {text}: {kind} is not read; convert it: ogr2ogr -t_srs EPSG:4326 AREA.geojson {text}")
    try:
        shape = _box(*map(float, parts)) if len(parts) == 4 else _polygons(json.loads(Path(text).read_bytes()))
        found = shapely.geometry.shape(shape)
        w, s, e, n = found.bounds
        if not np.isfinite(shapely.get_coordinates(found)).all():
            raise ValueError("a coordinate is no number")
        if not (-180 <= w < e <= 180 and -90 <= s < n <= 90):
            raise ValueError(f"west {w:g}, south {s:g}, east {e:g}, north {n:g} are no degrees of an area")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, shapely.errors.ShapelyError) as error:
        expected = "expected a GeoJSON file or WEST,SOUTH,EAST,NORTH in degrees"
        raise SceneError(f"--aoi {text}: holds no GeoJSON polygon ({first_line(error)}); {expected}") from None
    return shape


def _box(w: float, s: float, e: float, n: float) -> dict[str, Any]:
    if s > n:
        raise ValueError(f"south {s:g} is above north {n:g}")
    return shapely.geometry.mapping(shapely.MultiPolygon([shapely.box(a, s, b, n) for a, b in _spans(w, e)]))


def _spans(west: float, east: float) -> list[tuple[float, float]]:
    """The longitudes from west to east: two spans across the antimeridian."""
    return [(west, east)] if west <= east else [(west, 180.0), (-180.0, east)]


def _polygons(data: dict[str, Any]) -> dict[str, Any]:
    shapes = [f["geometry"] for f in data["features"]] if data["type"] == "FeatureCollection" else [data]
    shapes = [s["geometry"] if s["type"] == "Feature" else s for s in shapes]
    polygons = [s for s in shapes if s["type"] in ("Polygon", "MultiPolygon")]
    crs = data.get("crs", {}).get("properties", {}).get("name", "EPSG:4326").replace("OGC:1.3:CRS84", "EPSG::4326")
    if not polygons:
        kinds = ", ".join(sorted({str(s["type"]) for s in shapes})) or "nothing"
        raise ValueError(f"found {kinds}; places go to --points")
    rings = [r for p in polygons for r in (p["coordinates"] if p["type"] == "MultiPolygon" else [p["coordinates"]])]
    shape = {"type": "MultiPolygon", "coordinates": rings}
    return shape if "4326" in crs else transform_geom(CRS.from_user_input(crs), "EPSG:4326", shape)


def project(aoi: dict[str, Any], crs: CRS, bounds: Sequence[float]) -> dict[str, Any] | None:
    """The part of an area around ``bounds`` (left, bottom, right, top in ``crs``), in ``crs``; None if there is none.

    Distant parts are cut off first, because a UTM zone bends or folds them. Edges are divided into short ones,
    because parallels are curves there.
    """
    west, south, east, north = transform_bounds(crs, "EPSG:4326", *bounds)
    boxes = [shapely.box(a, south, b, north) for a, b in _spans(west, east)]
    near = shapely.union_all([box.buffer(_MARGIN, join_style="mitre") for box in boxes])
    world = shapely.box(-180, -90, 180, 90)
    found = shapely.make_valid(shapely.geometry.shape(aoi)).intersection(near).intersection(world)
    faces = [part for part in shapely.get_parts(found) if part.area > 0]
    if not faces:
        return None
    return transform_geom("EPSG:4326", crs, shapely.geometry.mapping(shapely.union_all(faces).segmentize(_EDGE)))


def bounds_of(aoi: dict[str, Any], crs: CRS, near: Sequence[float]) -> tuple[float, float, float, float] | None:
    """left, bottom, right, top of the part of an area around ``near``, in ``crs``; None if there is none."""
    shape = project(aoi, crs, near)
    return None if shape is None else tuple(rasterio.features.bounds(shape))


def narrowed(box: Sequence[float], crs: CRS, aoi: dict[str, Any] | None) -> tuple[float, ...]:
    """The part of a raster's bounds around an area, with a margin; all of them where the area does not meet them.

    A raster may be wider than a UTM zone can hold, with its center far from the area.
    """
    if aoi is None:
        return tuple(box)
    if crs.is_geographic:  # rasters may go on beyond 180 degrees, areas do not
        shape = shapely.make_valid(shapely.geometry.shape(aoi))
        turns = [shapely.affinity.translate(shape, turn) for turn in (-360.0, 0.0, 360.0)]
        part = shapely.union_all(turns).intersection(shapely.box(*box))
        found, margin = (None, 0.0) if part.is_empty else (part.bounds, _MARGIN)
    else:
        found, margin = bounds_of(aoi, crs, box), _MARGIN * 111_320.0 / crs.linear_units_factor[1]
    if found is None:
        return tuple(box)
    around = shapely.box(*found).buffer(margin, join_style="mitre").intersection(shapely.box(*box))
    return tuple(box) if around.is_empty else around.bounds
