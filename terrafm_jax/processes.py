"""Gathers what the processes of a job hold; with a single process there is nothing to gather."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np


def to_host(tree: Any) -> Any:
    """Sharded arrays -> full NumPy arrays on every process (a collective on several processes)."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def rows_of_all(rows: np.ndarray) -> list[np.ndarray]:
    """The rows [n, ...] of every process, by its index; n may differ (a collective on several processes)."""
    if jax.process_count() == 1:
        return [rows]
    from jax.experimental import multihost_utils

    counts = multihost_utils.process_allgather(np.int32(len(rows)))
    padded = np.zeros((int(counts.max()), *rows.shape[1:]), rows.dtype)
    padded[: len(rows)] = rows
    return [part[:n] for part, n in zip(multihost_utils.process_allgather(padded), counts, strict=True)]


def objects_of_all(value: Any) -> list[Any]:
    """What every process holds, by its index: anything that JSON can (a collective on several processes)."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    return [json.loads(found.tobytes()) for found in rows_of_all(text)]
