"""From the bytes of a record to arrays, without TensorFlow, TFDS or a copy.

A record is a ``tf.train.Example`` as ``tiles.features()`` writes it. TFDS decodes it too; this reader
walks the protocol-buffer wire format (https://protobuf.dev/programming-guides/encoding) itself, so that
a worker imports nothing but NumPy and pixels are not copied: every array is a view of the bytes.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from terrafm_jax import landcover
from terrafm_jax.sensors import SENSORS


class DecodeError(ValueError):
    """The bytes are not a record of :func:`terrafm_jax.data.tiles.features`."""


def _varint(data: bytes, at: int) -> tuple[int, int]:
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift, at = byte & 0x7F, 7, at + 1
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yields (field number, wire type, start, stop) of every field in data[at:end]."""
    while at < end:
        tag, at = _varint(data, at)
        kind = tag & 7
        if kind == 2:
            size, at = _varint(data, at)
            stop = at + size
        elif kind == 0:
            _, stop = _varint(data, at)
        elif kind == 5:
            stop = at + 4
        elif kind == 1:
            stop = at + 8
        else:
            raise DecodeError(f"wire type {kind} at byte {at}")
        if stop > end:
            raise DecodeError(f"field {tag >> 3} ends at byte {stop}, its message at {end}")
        yield tag >> 3, kind, at, stop
        at = stop


def _value(data: bytes, at: int, end: int) -> Any:
    """The value of a ``Feature``: (start, stop) of its first bytes value, or the list of its numbers."""
    for kind, _, start, stop in _fields(data, at, end):
        if kind == 1:  # bytes_list
            return next(((a, b) for number, _, a, b in _fields(data, start, stop) if number == 1), (start, start))
        if kind == 2:  # float_list, packed or not
            spans = [(a, b) for number, _, a, b in _fields(data, start, stop) if number == 1]
            return [x for a, b in spans for x in struct.unpack(f"<{(b - a) // 4}f", data[a:b])]
        if kind == 3:  # int64_list, packed or not
            numbers = []
            for _, _, a, b in _fields(data, start, stop):
                while a < b:
                    value, a = _varint(data, a)
                    numbers.append(value - (1 << 64) if value >> 63 else value)
            return numbers
    return []


def parse_example(data: bytes) -> dict[str, Any]:
    """Features of a ``tf.train.Example`` by name: ``(start, stop)`` into ``data`` for bytes, else a list.

    Raises:
      DecodeError: the bytes are cut off or no such message.
    """
    found: dict[str, Any] = {}
    try:
        for number, _, start, stop in _fields(data, 0, len(data)):
            if number != 1:
                continue
            for entry, _, a, b in _fields(data, start, stop):
                if entry != 1:
                    continue
                name, value = "", []
                for part, _, c, d in _fields(data, a, b):
                    if part == 1:
                        name = data[c:d].decode()
                    elif part == 2:
                        value = _value(data, c, d)
                found[name] = value
    except (IndexError, UnicodeDecodeError, struct.error) as error:
        raise DecodeError(f"not a tf.train.Example: {error}") from error
    return found


def decode_record(data: bytes) -> dict[str, Any]:
    """The nested dict of ``tiles.features()``; arrays are read-only views of ``data``, text is ``str``.

    Raises:
      DecodeError: names what is missing or does not fit.
    """
    found = parse_example(data)
    try:
        record: dict[str, Any] = {name: _text(data, found, name) for name in ("tile_id", "cell", "crs")}
        record |= {name: _number(found, name, float) for name in ("lat", "lon")}
        record["landcover"] = _number(found, "landcover", int)
        if not 0 <= record["landcover"] < landcover.NUM_CATEGORIES:
            raise DecodeError(f"landcover is {record['landcover']}, expected 0 to {landcover.NUM_CATEGORIES - 1}")
        record["fractions"] = _array(data, found, "fractions", "<f4", (landcover.NUM_CATEGORIES,))
        record["landcover_map"] = _shaped(data, found, "landcover_map", "u1")
        for key, sensor in SENSORS.items():
            record[key] = _sensor(data, found, key, sensor)
    except KeyError as error:
        raise DecodeError(f"record lacks {error}") from error
    except UnicodeDecodeError as error:
        raise DecodeError(f"record holds text that is not UTF-8: {error}") from error
    return record


def _sensor(data: bytes, found: dict[str, Any], key: str, sensor: Any) -> dict[str, Any]:
    names = ("product", "kind", "time", "orbit", "offset_source", "cloud_source")
    entry: dict[str, Any] = {name: _text(data, found, f"{key}/{name}") for name in names}
    entry |= {name: _number(found, f"{key}/{name}", float) for name in ("offset", "nodata", "cloud")}
    entry["present"] = bool(_number(found, f"{key}/present", int))
    for group, bands in sensor.groups.items():
        path = f"{key}/{group}"
        dn = _shaped(data, found, f"{path}/dn", np.dtype(sensor.dtype).newbyteorder("<"))
        valid = _shaped(data, found, f"{path}/valid", "u1")
        if dn.ndim != 3 or dn.shape[2] != len(bands):
            raise DecodeError(f"{path}/dn has shape {dn.shape}, expected {len(bands)} bands")
        if entry["present"] and valid.shape != (dn.shape[0], -(-dn.shape[1] // 8)):
            raise DecodeError(f"{path}/valid has shape {valid.shape}, which does not fit dn {dn.shape}")
        transform = _array(data, found, f"{path}/transform", "<f8", (6,))
        entry[group] = {"dn": dn, "valid": valid, "transform": transform}
    return entry


def _span(found: dict[str, Any], name: str) -> tuple[int, int]:
    if not isinstance(found[name], tuple):
        raise DecodeError(f"{name} holds numbers or nothing, expected bytes")
    return found[name]


def _numbers(found: dict[str, Any], name: str, kind: type) -> list[Any]:
    values = found[name]
    if not isinstance(values, list) or not all(isinstance(value, kind) for value in values):
        raise DecodeError(f"{name} is not a list of {kind.__name__}")
    return values


def _number(found: dict[str, Any], name: str, kind: type) -> Any:
    values = _numbers(found, name, kind)
    if len(values) != 1:
        raise DecodeError(f"{name} holds {len(values)} values, expected one")
    return values[0]


def _text(data: bytes, found: dict[str, Any], name: str) -> str:
    start, stop = _span(found, name)
    return data[start:stop].decode()


def _shaped(data: bytes, found: dict[str, Any], name: str, dtype: Any) -> np.ndarray:
    return _array(data, found, f"{name}/value", dtype, tuple(_numbers(found, f"{name}/shape", int)))


def _array(data: bytes, found: dict[str, Any], name: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    dtype, (start, stop) = np.dtype(dtype), _span(found, name)
    count = math.prod(shape)  # in Python's integers: a damaged shape overflows those of NumPy
    if min(shape, default=1) < 1 or count * dtype.itemsize != stop - start:
        raise DecodeError(f"{name}: {stop - start} bytes do not make shape {shape} of {dtype}")
    return np.frombuffer(data, dtype, count, start).reshape(shape)
