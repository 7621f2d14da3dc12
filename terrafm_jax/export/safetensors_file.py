"""Reading and writing ``.safetensors`` with NumPy alone, so that loading weights needs no extra.

Format: eight bytes of header length (little-endian), a JSON header {name: {dtype, shape, data_offsets}},
then the values. Source: the specification of the safetensors project.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from terrafm_jax.paths import write_atomically
from terrafm_jax.weights import WeightsError

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "U8": "u1", "BOOL": "?"}
_MAX_HEADER = 100_000_000  # the specification's limit, which keeps a hostile length from filling memory


def read_safetensors(path: Any) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors (bfloat16 and float16 widened to float32) and the text metadata. Raises WeightsError."""
    content = path.read_bytes()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        if not 2 <= length <= min(_MAX_HEADER, len(content) - 8):
            raise ValueError(f"its header should be {length} bytes long")
        header = json.loads(content[8 : 8 + length])
        metadata = header.pop("__metadata__", {})
        data = memoryview(content)[8 + length :]
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if end != len(data):
            raise ValueError(f"it holds {len(data)} bytes of values and should hold {end}")
        return {name: _tensor(data, entry) for name, entry in header.items()}, metadata
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path}: damaged or truncated safetensors ({error}); copy it again") from error


def _tensor(data: memoryview, entry: Mapping[str, Any]) -> np.ndarray:
    start, stop = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(n < 0 for n in shape) or not 0 <= start <= stop:
        raise ValueError(f"shape {shape} at {start}..{stop}")
    raw = data[start:stop]
    if entry["dtype"] == "BF16":
        bits = np.frombuffer(raw, "<u2").astype("<u4") << 16
        return bits.view("<f4").reshape(shape)
    array = np.frombuffer(raw, _DTYPES[entry["dtype"]])
    if array.size != math.prod(shape):
        raise ValueError(f"{array.size} values for shape {shape}")
    return array.reshape(shape).astype(np.float32) if array.dtype == np.float16 else array.reshape(shape).copy()


def write_safetensors(path: Any, state: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Writes float32 tensors and text metadata; the same input gives the same bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position, parts = 0, []
    for name in sorted(state):
        raw = np.ascontiguousarray(state[name], "<f4").tobytes()
        shape = list(np.shape(state[name]))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [position, position + len(raw)]}
        parts.append(raw)
        position += len(raw)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start aligned
    write_atomically(path, b"".join([struct.pack("<Q", len(text)), text, *parts]))
