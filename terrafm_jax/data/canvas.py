"""Canvases: the few array shapes that tiles of different sizes are padded to, and the batches on them.

The train step is compiled once per canvas. Layouts (the shapes of one record's arrays) are merged into
buckets with one canvas each, first those whose merging adds the fewest bytes of padding.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terrafm_jax import landcover
from terrafm_jax.data import tiles
from terrafm_jax.sensors import SENSORS

_ALIGN = 64  # JAX on CPU takes host arrays without a copy only at this alignment


@dataclasses.dataclass(frozen=True)
class Canvas:
    """Rows and columns of every ``sensor/group`` of the configured sensors."""

    shapes: Mapping[str, tuple[int, int]]

    @property
    def nbytes(self) -> int:
        """Bytes of pixels and valid bits of one record."""
        return sum(_group_bytes(*name.split("/"), *shape) for name, shape in self.shapes.items())


def group_names(sensors: Sequence[str]) -> list[str]:
    """``["s1/10m", "s2_l1c/10m", ...]`` for the configured sensors, in order."""
    return [f"{key}/{group}" for key in sensors for group in SENSORS[key].groups]


def plan_canvases(
    layouts: Sequence[Mapping[str, tuple[int, int]]],
    counts: Sequence[int],
    sensors: Sequence[str],
    limit: int = 4,
    waste: float = 0.02,
) -> tuple[list[Canvas], np.ndarray]:
    """Merges layouts into at most ``limit`` canvases.

    Args:
      layouts: rows and columns per ``sensor/group`` that a layout holds (``layouts.json``).
      counts: records of each layout.
      sensors: configured sensors.
      limit: largest number of canvases (each is one compilation); at least 1.
      waste: merging continues below ``limit`` as long as padding stays within this share of all bytes.

    Returns:
      The canvases and the canvas of every layout, int64 ``[number of layouts]``.
    """
    names = group_names(sensors)
    shapes = np.array([[layout.get(n, (0, 0)) for n in names] for layout in layouts], np.int64)
    groups = [[i] for i in range(len(layouts))]
    weight = np.maximum(np.asarray(counts, np.float64), 1e-9)
    needed = float((weight * _bytes(shapes, names)).sum())
    while len(groups) > 1:
        merged = np.maximum(shapes[:, None], shapes[None])
        now = weight * _bytes(shapes, names)
        extra = (weight[:, None] + weight) * _bytes(merged, names) - now[:, None] - now
        np.fill_diagonal(extra, np.inf)
        a, b = sorted(np.unravel_index(int(np.argmin(extra)), extra.shape))
        if len(groups) <= limit and now.sum() + extra[a, b] > (1 + waste) * needed:
            break
        shapes[a], weight[a] = merged[a, b], weight[a] + weight[b]
        groups[a] += groups.pop(b)
        shapes, weight = np.delete(shapes, b, 0), np.delete(weight, b)
    bucket = np.zeros(len(layouts), np.int64)
    for number, members in enumerate(groups):
        bucket[members] = number
    canvases = [
        Canvas({n: (max(1, int(h)), max(1, int(w))) for n, (h, w) in zip(names, shape, strict=True)})
        for shape in shapes
    ]
    return canvases, bucket


def _bytes(shapes: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Bytes of a record on shapes [..., groups, 2]."""
    per_pixel = np.array([_group_bytes(*name.split("/"), 1, 8) / 8 for name in names])
    return (shapes[..., 0] * shapes[..., 1]) @ per_pixel


def _group_bytes(key: str, group: str, rows: int, columns: int) -> int:
    bands = len(SENSORS[key].groups[group])
    return rows * columns * bands * np.dtype(SENSORS[key].dtype).itemsize + rows * -(-columns // 8)


def batch_spec(canvas: Canvas, sensors: Sequence[str], batch_size: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of every array of a batch by path (``s1/10m/dn``)."""
    spec: dict[str, tuple[tuple[int, ...], Any]] = {
        "index": ((batch_size,), np.int32),
        "landcover": ((batch_size,), np.int32),
        "present": ((batch_size, len(sensors)), np.bool_),
        "offset": ((batch_size, len(sensors)), np.float32),
    }
    for name in group_names(sensors):
        key, group = name.split("/")
        rows, columns = canvas.shapes[name]
        bands = len(SENSORS[key].groups[group])
        spec[f"{name}/dn"] = ((batch_size, rows, columns, bands), np.dtype(SENSORS[key].dtype))
        spec[f"{name}/valid"] = ((batch_size, rows, -(-columns // 8)), np.uint8)
        spec[f"{name}/geometry"] = ((batch_size, 4), np.float32)
        spec[f"{name}/extent"] = ((batch_size, 2), np.int32)
    return spec


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{"a/b": x}`` -> ``{"a": {"b": x}}``."""
    out: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = out
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return out


class Slabs:
    """Memory of batches, reused as soon as no array of a batch is referenced any more.

    Fresh pages cost more than the copy into them (measured: three to ten times). An array handed out
    keeps its slab from being reused, so an accelerator runtime that aliases host memory stays safe.
    """

    def __init__(self, keep: int = 4):
        self._keep = keep
        self._reset()

    def _reset(self) -> None:
        self._free: list[np.ndarray] = []
        # Reentrant: garbage collection within take() may finalize a lease, which returns its slab in the same thread.
        self._lock = threading.RLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_keep": self._keep}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def take(self, nbytes: int) -> np.ndarray:
        """uint8 [nbytes], aligned to 64 bytes, content undefined."""
        with self._lock:
            fits = [i for i, slab in enumerate(self._free) if nbytes <= slab.nbytes - _ALIGN <= 2 * nbytes]
            slab = self._free.pop(fits[0]) if fits else None
        if slab is None:
            slab = np.empty(nbytes + _ALIGN, np.uint8)
        lease = _Lease(slab, -slab.ctypes.data % _ALIGN, nbytes)
        weakref.finalize(lease, self._give, slab).atexit = False
        return np.asarray(lease)

    def _give(self, slab: np.ndarray) -> None:
        with self._lock:
            if len(self._free) < self._keep:
                self._free.append(slab)


class _Lease:
    """The base object of arrays on a slab: it lives as long as any of them."""

    def __init__(self, slab: np.ndarray, start: int, nbytes: int):
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (slab.ctypes.data + start, False),
        }


def empty_batch(canvas: Canvas, sensors: Sequence[str], batch_size: int, slabs: Slabs) -> dict[str, Any]:
    """Batch with undefined content; :func:`place` fills one row after the other."""
    spec = batch_spec(canvas, sensors, batch_size)
    sizes = {k: int(np.prod(shape)) * np.dtype(dtype).itemsize for k, (shape, dtype) in spec.items()}
    slab = slabs.take(sum(-(-n // _ALIGN) * _ALIGN for n in sizes.values()))
    flat, at = {}, 0
    for path, (shape, dtype) in spec.items():
        flat[path] = slab[at : at + sizes[path]].view(dtype).reshape(shape)
        at += -(-sizes[path] // _ALIGN) * _ALIGN
    return nested(flat)


def place(batch: dict[str, Any], row: int, number: int, record: dict[str, Any], sensors: Sequence[str]) -> None:
    """Writes one record into row ``row`` of a batch. Raises ValueError if it does not fit the canvas."""
    batch["index"][row] = number
    batch["landcover"][row] = record["landcover"]
    for column, key in enumerate(sensors):
        entry = record[key]
        batch["present"][row, column] = entry["present"]
        batch["offset"][row, column] = entry["offset"] if entry["present"] else 0.0
        for group, target in batch[key].items():
            if entry["present"]:
                _place_group(target, row, entry[group], tiles.geometry(record, key, group), f"{key}/{group}")
            else:
                _clear_group(target, row)


def clear(batch: dict[str, Any], row: int, sensors: Sequence[str]) -> None:
    """Makes an empty row: no sensor present, index -1, land cover unknown."""
    batch["index"][row], batch["landcover"][row] = -1, landcover.UNKNOWN
    batch["present"][row], batch["offset"][row] = False, 0.0
    for key in sensors:
        for target in batch[key].values():
            _clear_group(target, row)


def _clear_group(target: dict[str, Any], row: int) -> None:
    """Clears a row of one group. The extent is one pixel, not zero, so that nothing downstream divides by zero."""
    target["dn"][row], target["valid"][row] = 0, 0
    target["geometry"][row], target["extent"][row] = (0, 1, 0, 1), 1


def _place_group(target: dict[str, Any], row: int, source: dict[str, Any], geometry: np.ndarray, name: str) -> None:
    (rows, columns), (height, width) = source["dn"].shape[:2], target["dn"].shape[1:3]
    if rows > height or columns > width:
        raise ValueError(f"{name} is {rows}x{columns}, its canvas {height}x{width}: layouts.json does not fit")
    _pad_copy(target["dn"][row], source["dn"])
    _pad_copy(target["valid"][row], source["valid"])
    target["geometry"][row] = geometry
    target["extent"][row] = rows, columns


def _pad_copy(target: np.ndarray, source: np.ndarray) -> None:
    rows, columns = source.shape[:2]
    target[:rows, :columns] = source
    target[rows:] = 0
    target[:rows, columns:] = 0
