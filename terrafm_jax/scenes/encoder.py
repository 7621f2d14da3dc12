"""Loaded weights as a function of windows that does not wait: the device works while the next windows are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.read import Pixels


class WindowEncoder:
    """Encodes windows of one scene with ``Model.encode``, in a thread of its own.

    Args:
      model: from ``terrafm_jax.load``.
      bands: the bands that the scene has, per sensor, in canonical order.
      batch: windows handed over at once.

    Raises:
      SceneError: the weights lack a sensor, or have no fusion for several.
    """

    def __init__(self, model: Any, bands: Mapping[str, Sequence[str]], batch: int):
        unknown = [key for key in bands if key not in model.spec.sensors]
        if unknown:
            raise SceneError(
                f"--sensor {unknown[0]}: these weights know {list(model.spec.sensors)} only; "
                "leave it out or load other weights"
            )
        if len(bands) > 1 and not model.spec.fusion:
            raise SceneError(
                f"--sensor {', '.join(bands)}: these weights have no fusion and take one sensor; run once for each"
            )
        self.width, self.devices = model.spec.width, jax.local_device_count()
        self._model, self._bands = model, {key: tuple(names) for key, names in bands.items()}
        self._share = -(-batch // self.devices)
        self._pool = ThreadPoolExecutor(1, "terrafm-encode")

    def __call__(self, windows: Mapping[str, Pixels]) -> Future[tuple[np.ndarray, np.ndarray]]:
        """Class tokens [B, d] and patch tokens [B, h, w, d], float32, once they are done."""
        return self._pool.submit(self._encode, windows)

    def _encode(self, windows: Mapping[str, Pixels]) -> tuple[np.ndarray, np.ndarray]:
        features = self._model.encode(
            **{key: windows[key].values for key in self._bands},
            mask={key: ~windows[key].valid for key in self._bands},
            bands=self._bands,
            batch_size=self._share,
            check=False,  # the scene was, as a whole: a window of dark water proves nothing
        )
        return np.asarray(features.cls), np.asarray(features.patches)
