"""A record as the bytes of a ``tf.train.Example``, the counterpart of ``terrafm_jax.data.decode``.

Writes the protocol-buffer wire format (https://protobuf.dev/programming-guides/encoding) itself: TFDS
needs five copies of the pixels and leaves the order of the fields to the hash seed of the process, while
shards must be the same bytes in every run. A test holds the result equal to that of TFDS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np

from terrafm_jax.sensors import SENSORS

Parts = list[Any]  # bytes and memoryviews, joined once at the end


def encode_record(record: dict[str, Any]) -> bytes:
    """Serialized record; ``record`` as ``terrafm_jax.data.tiles.features`` describes it."""
    entries: Parts = []
    size = 0
    for name, (parts, length) in sorted(_fields(record)):
        key = name.encode()
        header = b"\x0a" + _varint(len(key)) + key + b"\x12" + _varint(length)
        head = b"\x0a" + _varint(len(header) + length) + header
        entries += [head, *parts]
        size += len(head) + length
    return b"".join([b"\x0a", _varint(size), *entries])


def _fields(record: dict[str, Any]) -> Iterator[tuple[str, tuple[Parts, int]]]:
    """(flat name, encoded ``Feature``) of everything in a record."""
    for name in ("tile_id", "cell", "crs"):
        yield name, _bytes(record[name].encode())
    yield "lat", _float(record["lat"])
    yield "lon", _float(record["lon"])
    yield "landcover", _integers([record["landcover"]])
    yield "fractions", _bytes(_view(record["fractions"], "<f4"))
    yield from _array("landcover_map", record["landcover_map"], "u1")
    for key, sensor in SENSORS.items():
        entry = record[key]
        yield f"{key}/present", _integers([int(entry["present"])])
        for name in ("product", "kind", "time", "orbit", "offset_source", "cloud_source"):
            yield f"{key}/{name}", _bytes(entry[name].encode())
        for name in ("offset", "nodata", "cloud"):
            yield f"{key}/{name}", _float(entry[name])
        for group in sensor.groups:
            yield from _array(f"{key}/{group}/dn", entry[group]["dn"], np.dtype(sensor.dtype).newbyteorder("<"))
            yield from _array(f"{key}/{group}/valid", entry[group]["valid"], "u1")
            yield f"{key}/{group}/transform", _bytes(_view(entry[group]["transform"], "<f8"))


def _array(name: str, array: np.ndarray, dtype: Any) -> Iterator[tuple[str, tuple[Parts, int]]]:
    """An array of any shape: its shape and its bytes."""
    yield f"{name}/shape", _integers(list(array.shape))
    yield f"{name}/value", _bytes(_view(array, dtype))


def _view(array: np.ndarray, dtype: Any) -> memoryview:
    return memoryview(np.ascontiguousarray(array, dtype)).cast("B")


def _bytes(value: bytes | memoryview) -> tuple[Parts, int]:
    """``Feature{bytes_list{value}}``."""
    inner = b"\x0a" + _varint(len(value))
    head = b"\x0a" + _varint(len(inner) + len(value)) + inner
    return [head, value], len(head) + len(value)


def _float(value: float) -> tuple[Parts, int]:
    """``Feature{float_list{value}}``, packed; TFDS keeps float64 scalars as float32, too."""
    data = b"\x12\x06\x0a\x04" + struct.pack("<f", value)
    return [data], len(data)


def _integers(values: list[int]) -> tuple[Parts, int]:
    """``Feature{int64_list{values}}``, packed; no negative ones occur."""
    packed = b"".join(_varint(int(v)) for v in values)
    inner = b"\x0a" + _varint(len(packed)) + packed
    data = b"\x1a" + _varint(len(inner)) + inner
    return [data], len(data)


@lru_cache(maxsize=4096)
def _varint(value: int) -> bytes:
    found = bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
