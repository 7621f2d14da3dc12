"""Ground that cells of different splits share, where the splits are listed and not drawn over blocks.

A list may put neighbors into different splits, and neighboring cells of Major-TOM overlap by up to 680 m;
manifests may hold the same place under several names. Planning finds the cells that lie close enough, and
each tile is then compared with their exact footprints: the evaluation split keeps the ground.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from data_prep.raster import BadInput, Grid
from data_prep.worldcover import lonlat_outline, project
from terrafm_jax.data.tiles import SPLITS

EARTH = 6371.0  # km


@dataclasses.dataclass(frozen=True)
class Rival:
    """A cell of another listed split close by. ``footprint``: a Grid, or what the source makes one of.

    ``more``: other cells of the split with the same footprint (dates of one place), for which this one stands.
    """

    cell: str
    split: str
    footprint: Any
    more: int = 0

    def __str__(self) -> str:
        return f"{self.cell} ({self.split})" + (f" and {self.more} more of this footprint" if self.more else "")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a planned cell lies: (lat, lon) of its center, half its diagonal in km, and see :class:`Rival`."""

    cell: str
    split: str | None
    center: tuple[float, float] | None
    radius: float
    footprint: Any


def rivals(places: Sequence[Place]) -> list[tuple[Rival, ...]]:
    """For each place the cells nearby whose split outranks its own (see :func:`outranks`), one per footprint.

    A place with thousands of dates costs as much as one with a few: those of one split and footprint count as one,
    and places that ask the same get the same tuple.
    """
    found: list[tuple[Rival, ...]] = [() for _ in places]
    listed = [i for i, p in enumerate(places) if p.split and p.center]
    if not listed or (len({places[i].split for i in listed}) < 2 and len(listed) == len(places)):
        return found
    groups: dict[Any, list[Place]] = {}
    for i in listed:
        groups.setdefault((places[i].split, places[i].center, places[i].footprint), []).append(places[i])
    first = [group[0] for group in groups.values()]
    stand = [Rival(g[0].cell, str(g[0].split), g[0].footprint, len({p.cell for p in g}) - 1) for g in groups.values()]
    tree = cKDTree(_on_sphere([place.center for place in first]))
    widest = max(place.radius for place in first)
    answers: dict[Any, tuple[Rival, ...]] = {}
    for i, place in enumerate(places):
        if place.center is None:
            continue
        asked = (place.split, place.center, place.radius)
        if asked not in answers:
            (point,) = _on_sphere([place.center])
            near = sorted(tree.query_ball_point(point, (place.radius + widest) / EARTH))
            answers[asked] = tuple(stand[j] for j in near if outranks(first[j].split, place.split))
        found[i] = answers[asked]
    return found


def outranks(other: str | None, own: str | None) -> bool:
    """Whether ground shared by a cell of the listed split ``other`` is lost to ``own`` (None: drawn by block).

    Among listed splits the later one of ``tiles.SPLITS`` keeps it, so that training loses tiles and
    evaluation does not; tiles that no list names give way to every list.
    """
    if other is None:
        return False
    return own is None or SPLITS.index(other) > SPLITS.index(own)


def radius(outline: tuple[np.ndarray, np.ndarray]) -> float:
    """Half the diagonal in km, on the generous side, of a footprint given by its ``worldcover.lonlat_outline``."""
    lon, lat = outline
    corners = _on_sphere(list(zip(lat.tolist(), lon.tolist(), strict=True)))
    middle = corners.mean(axis=0)
    return 1.01 * EARTH * float(np.sqrt(((corners - middle) ** 2).sum(axis=1)).max()) + 0.1


def share_ground(grid: Grid, other: Grid) -> bool:
    """Whether two footprints overlap by more than half a pixel of ``grid``; touching edges do not count.

    Across coordinate systems the outline of ``other`` is projected and taken as convex (it is, to some
    meters); separating axes decide.
    """
    left, bottom, right, top = grid.bounds()
    slack = 0.5 * abs(grid.transform[0])
    if grid.crs == other.crs:
        west, south, east, north = other.bounds()
        turn = _turn(grid, (west + east) / 2)
        west, east = west + turn, east + turn
        return min(right, east) - max(left, west) > slack and min(top, north) - max(bottom, south) > slack
    try:
        x, y = project(grid.crs, *_ring(other))
    except BadInput:  # so far away that it has no place in this system
        return False
    box = np.array([(left, bottom), (right, bottom), (right, top), (left, top)])
    ring = np.stack([x + _turn(grid, float(np.mean(x))), y], axis=1)
    edges = np.roll(ring, -1, axis=0) - ring
    normals = np.concatenate([np.eye(2), np.stack([-edges[:, 1], edges[:, 0]], axis=1)])
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    a, b = box @ normals.T, ring @ normals.T
    return bool((np.minimum(a.max(0), b.max(0)) - np.maximum(a.min(0), b.min(0)) > slack).all())


def _turn(grid: Grid, longitude: float) -> float:
    """Degrees by which to turn a longitude to where a grid in degrees lies: 181 E is 179 W. 0 for grids in meters."""
    left, _, right, _ = grid.bounds()
    return 360.0 * round(((left + right) / 2 - longitude) / 360) if grid.crs == "EPSG:4326" else 0.0


def _ring(grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes along the outline, in order."""
    lon, lat = lonlat_outline(grid)
    n = len(lon) // 4
    bottom, top, left, right = (slice(i * n, (i + 1) * n) for i in range(4))

    def walk(values: np.ndarray) -> np.ndarray:
        sides = (values[bottom], values[right], values[top][::-1], values[left][::-1])
        return np.concatenate([side[:-1] for side in sides])  # each corner once

    return walk(lon), walk(lat)


def _on_sphere(places: Sequence[Any]) -> np.ndarray:
    """Unit vectors [n, 3] of (lat, lon) in degrees."""
    lat, lon = np.radians(np.asarray(places, np.float64).reshape(-1, 2)).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
