"""The devices of this process as one: rows split over them, weights on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class LocalDevices:
    """Spreads rows over the devices of this process, and copies weights to all of them.

    Attributes:
      count: number of devices.
    """

    def __init__(self, devices: Sequence[jax.Device] = ()):
        devices = devices or jax.local_devices()
        self.count = len(devices)
        mesh = jax.make_mesh((self.count,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
        self._split, self._whole = NamedSharding(mesh, PartitionSpec("data")), NamedSharding(mesh, PartitionSpec())

    def rows(self, tree: Any) -> Any:
        """NumPy arrays [B, ...] -> device arrays; the last row is repeated until the devices divide B."""
        return jax.tree.map(lambda x: jax.device_put(self._padded(np.asarray(x)), self._split), tree)

    def _padded(self, x: np.ndarray) -> np.ndarray:
        pad = -len(x) % self.count
        return np.concatenate([x, np.repeat(x[-1:], pad, axis=0)]) if pad else x

    def everywhere(self, tree: Any) -> Any:
        """The whole tree on every device."""
        return jax.device_put(tree, self._whole)
