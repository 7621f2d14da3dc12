"""Places to embed: CSV, GeoJSON or Parquet in, Parquet out."""

from __future__ import annotations

import json
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rasterio.warp import transform as transform_points

from terrafm_jax.scenes import output
from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.scenes.grid import Grid
from terrafm_jax.tables import read_csv

_log = logging.getLogger(__name__)
_NEAR = np.cos(np.radians(45.0))  # of the angle between two places; no scene is as wide
_NAMES = (("lon", "lat"), ("longitude", "latitude"), ("x", "y"))


def read_points(path: Path) -> tuple[np.ndarray, dict[str, list[Any]]]:
    """Longitude and latitude float64 [N, 2] and the other columns, from CSV, GeoJSON points or Parquet.

    Raises:
      SceneError: unreadable, no coordinates, or coordinates beyond 180 and 90 degrees (all rows are named).
    """
    try:
        columns = _columns(path)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise SceneError(f"--points {path}: cannot be read ({first_line(error)}); give CSV with lon,lat") from None
    names = next((pair for pair in _NAMES if set(pair) <= set(columns)), None)
    if names is None:
        raise SceneError(f"--points {path}: columns {list(columns)[:8]} hold no lon and lat; name two so")
    try:
        places = np.array([columns.pop(names[0]), columns.pop(names[1])], np.float64).T.reshape(-1, 2)
    except ValueError as error:
        raise SceneError(f"--points {path}: a coordinate is no number ({first_line(error)})") from None
    bad = np.flatnonzero(~((np.abs(places[:, 0]) <= 180) & (np.abs(places[:, 1]) <= 90)))
    if bad.size and (np.abs(places[:, 0]) <= 90).all() and (np.abs(places[:, 1]) <= 180).all():
        raise SceneError(f"--points {path}: latitudes beyond 90 degrees; are lon and lat swapped?")
    if bad.size or not len(places):
        raise SceneError(
            f"--points {path}: {len(places)} places, rows {bad[:5].tolist()} are no degrees; expected EPSG:4326"
        )
    return places, columns


def _columns(path: Path) -> dict[str, list[Any]]:
    kind = path.suffix.lower()
    if kind in (".parquet", ".geoparquet"):
        import pyarrow.parquet as pq

        table = pq.read_table(path)
        return {name: table[name].to_pylist() for name in table.column_names if name != "geometry"}
    if kind in (".geojson", ".json"):
        features = json.loads(path.read_bytes())["features"]
        places = [f["geometry"]["coordinates"] for f in features]
        keys = sorted({k for f in features for k in (f.get("properties") or {})} - {"lon", "lat"})
        rest = {k: [(f.get("properties") or {}).get(k) for f in features] for k in keys}
        return {"lon": [p[0] for p in places], "lat": [p[1] for p in places], **rest}
    rows = read_csv(path, lower=True)
    return {name: [row[name] for row in rows] for name in (rows[0] if rows else {})}


def to_grid(places: np.ndarray, grid: Grid) -> np.ndarray:
    """Longitude, latitude -> x, y in the CRS of a grid; float64 [N, 2], infinite for places far from the grid."""
    left, bottom, right, top = grid.bounds
    (lon,), (lat,) = transform_points(grid.crs, "EPSG:4326", [(left + right) / 2], [(bottom + top) / 2])
    turn, own = np.radians(places[:, 0] - lon), np.radians(places[:, 1])
    north = np.radians(lat)
    # A projection folds, or fails for all places, where one lies a quarter of the Earth away.
    near = np.sin(own) * np.sin(north) + np.cos(own) * np.cos(north) * np.cos(turn) > _NEAR
    found = np.full(places.shape, np.inf)
    if near.any():
        xs, ys = transform_points("EPSG:4326", grid.crs, places[near, 0].tolist(), places[near, 1].tolist())
        found[near] = np.array([xs, ys]).T
    return found


def outside(path: Path, places: np.ndarray, wanted: np.ndarray, grid: Grid) -> list[str]:
    """A sentence, also warned of, on places [N, 2] that are none of ``wanted`` (positions); none if all are.

    Raises:
      SceneError: no place lies in the scene.
    """
    count = len(places) - len(wanted)
    if not len(wanted):
        hint = "give degrees of EPSG:4326 in this scene and --aoi"
        if (np.abs(places) <= 90).all():
            x, y = to_grid(places[:, ::-1], grid).T
            left, bottom, right, top = grid.bounds
            if ((left <= x) & (x <= right) & (bottom <= y) & (y <= top)).any():
                hint = "they lie in it with lon and lat swapped: correct the columns"
        raise SceneError(f"--points {path}: all {count} places lie outside the scene; {hint}")
    if not count:
        return []
    text = f"{count} of {len(places)} places outside the scene or --aoi"
    _log.warning("--points %s: %s", path, text)
    return [text]


def write_points(
    out: Path, places: np.ndarray, columns: Mapping[str, list[Any]], patches: np.ndarray, cls: np.ndarray, tags: Any
) -> None:
    """One row per place: the columns given, lon, lat, ``embedding``, ``class_token``, ``geometry``."""
    kept = {k: v for k, v in columns.items() if k not in ("embedding", "class_token", "geometry")}
    table = {
        **kept,
        "lon": places[:, 0].tolist(),
        "lat": places[:, 1].tolist(),
        "embedding": patches,
        "class_token": cls,
        "point": [struct.pack("<BIdd", 1, 1, x, y) for x, y in places],
    }
    output.write_parquet(out, table, tags, geometry="point")
