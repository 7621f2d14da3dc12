"""A fine-tuned network read back from its workdir, as a function of images."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from terrafm_jax import provenance, weights
from terrafm_jax.evals import heads
from terrafm_jax.finetuning import network
from terrafm_jax.finetuning.network import TuneSpec
from terrafm_jax.sensors import SENSORS
from terrafm_jax.weights import WeightsError

_RECORDED = ("bands", "classes", "scale", "image_px", "gsd", "unit")  # of meta["finetuned"], not fields of TuneSpec
_SAME_SCALE = 0.1  # pixels of degrees, or of a neighboring projection, differ by some percent


class Tuned:
    """Encoder and task head.

    Attributes:
      spec: what was trained. classes: names, empty for regression. bands: per sensor, the bands it expects.
      image_px: side of the images it was tuned on before they were resized to ``spec.image_size``; 0: not recorded.
      gsd: meters per pixel of those images, 0: not recorded. unit: of a regression target, or "".
      loaded: the encoder as the usual loader reads it (statistics, provenance).
    """

    def __init__(self, path: str | Path):
        from terrafm_jax import loader

        folder = Path(path)
        folder = folder / "best" if (folder / "best").is_dir() else folder
        if not (folder / "head").is_dir():
            raise WeightsError(f"{path}: holds no fine-tuned network; expected a workdir of terrafm_jax.finetune")
        self.folder, self.loaded = folder, loader.read(str(folder))
        head, recorded = weights.load_npz(folder / "head")
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items() if k not in _RECORDED}
        self.spec = TuneSpec(model=self.loaded.spec, **fields)
        self.classes: list[str] = recorded["classes"]
        self.bands: dict[str, list[str]] = recorded["bands"]
        self.scale = tuple(recorded["scale"])
        self.image_px: int = recorded.get("image_px", 0)
        self.gsd: float = recorded.get("gsd", 0.0)
        self.unit: str = recorded.get("unit", "")
        self.head, self.state = head["head"], head.get("head_state", {})
        self._jit = jax.jit(self._forward, static_argnames="size")

    def _forward(self, params: Any, state: Any, batch: Any, size: tuple[int, int]) -> jax.Array:
        (logits, *_), _ = network.forward(self.spec, params, state, self.loaded.stats, batch)
        logits = logits.astype(jnp.float32)
        if self.spec.task == "segmentation":
            logits = heads.resize(logits, size)
        return network.scores(self.spec, logits, self.scale)

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 of encoder and head: names, shapes and values."""
        return weights.content_hash(
            {"backbone": self.loaded.params["backbone"], "head": self.head, "state": self.state}
        )

    def tags(self) -> dict[str, str]:
        """Where the network came from, for files that others get: name of the workdir, protocol, digest of the config.

        The last two only where ``path`` was a finished workdir.
        """
        workdir = self.folder.parent if self.folder.name == "best" else self.folder
        found = {"TERRAFM_TUNED": provenance.place(workdir), "TERRAFM_TASK": self.spec.task}
        if (workdir / "results.jsonl").exists():
            found["TERRAFM_PROTOCOL"] = json.loads((workdir / "results.jsonl").read_text())["protocol"]
        if (workdir / "config.json").exists():
            found["TERRAFM_CONFIG"] = provenance.digest(json.loads((workdir / "config.json").read_text()))
        return found

    @property
    def window(self) -> int:
        """Side in px, a multiple of the patch, of the windows of a scene that look to the network as its images did.

        Images are stretched to ``spec.image_size``: a window of that size would show the ground at another scale.
        """
        patch = self.spec.model.patch
        return max(patch, round((self.image_px or self.spec.image_size or 224) / patch) * patch)

    def other_sampling(self, gsd: float) -> str:
        """A warning where a scene of ``gsd`` meters per pixel shows the ground at another scale; "" where not."""
        if not self.gsd or abs(gsd / self.gsd - 1) <= _SAME_SCALE:
            return ""
        return (
            f"the map is made at {gsd:g} m a pixel, but the network was tuned on images of {self.gsd:g} m: it sees the "
            f"ground at another scale; pass --gsd {self.gsd:g}"
        )

    def mask(self, sensor: str) -> np.ndarray:
        """bool [C] of the bands that the network was tuned on."""
        return np.array([n in self.bands[sensor] for n in SENSORS[sensor].band_names])

    def __call__(self, images: Mapping[str, np.ndarray], offset: Mapping[str, float] | None = None) -> np.ndarray:
        """Scores of images.

        Args:
          images: per sensor float [B, H, W, C] in the sensor's unit, all canonical bands in order (those that the
            network was not tuned on are ignored); NaN where nothing was measured.
          offset: DN to subtract, per sensor.

        Returns:
          Probabilities [B, classes] or [B, H, W, classes], or values [B, 1].

        Raises:
          ValueError: sensors other than those it was tuned on.
        """
        if set(images) != set(self.spec.inputs):
            raise ValueError(f"{self.folder}: tuned on {list(self.spec.inputs)}, given {list(images)}")
        count = len(next(iter(images.values())))
        batch = {
            "images": {k: jnp.asarray(v, jnp.float32) for k, v in images.items()},
            "bands": {k: jnp.asarray(self.mask(k)) for k in images},
            "offset": {k: jnp.full(count, (offset or {}).get(k, 0.0), jnp.float32) for k in images},
        }
        params = {"backbone": self.loaded.params["backbone"], "head": self.head}
        size = tuple(next(iter(images.values())).shape[1:3])
        return np.asarray(self._jit(params, self.state, batch, size=size))

    def check_bands(self, given: Mapping[str, Sequence[str]]) -> None:
        """Raises ValueError naming sensors and bands that a scene lacks."""
        faults = [f"sensor {k}" for k in self.spec.inputs if k not in given]
        for key in self.spec.inputs:
            lacking = [b for b in self.bands[key] if b not in given.get(key, self.bands[key])]
            faults += [f"{key} bands {lacking}"] if lacking else []
        if faults:
            raise ValueError(f"the network was tuned on {self.bands}; the scene lacks {'; '.join(faults)}")
