"""What ``--checkpoint`` may name: weights, the same network with random weights, or no network at all."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from terrafm_jax.evals.features import Encoder, FeatureError, ImageBatch, prepare_image, target_size
from terrafm_jax.evals.raw import fused_statistics
from terrafm_jax.models import terrafm
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import SENSOR_KEYS, Statistics


class RawStatistics:
    """Mean and deviation per band as features (of the image; dense: of each patch). Needs no weights.

    ``standardize`` tells the protocols to scale the columns by the train split first.
    """

    name, standardize = "raw band statistics", True
    weights_hash = cache_key = hashlib.sha256(b"raw band statistics/1").hexdigest()

    def __init__(self, image_size: int = 0, patch: int = 16):
        self.image_size, self.patch, self.depth = image_size, patch, 1
        self.stats = Statistics.published()

    def check(self, sensors: Iterable[str]) -> tuple[str, ...]:
        return tuple(k for k in SENSOR_KEYS if k in set(sensors))

    def __call__(
        self, batch: ImageBatch, *, layers: Sequence[int] = (), patches: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray] | None]:
        images = {}
        for key, image in batch.images.items():
            offset = np.asarray(batch.offset.get(key, np.zeros(len(image))), np.float32)
            images[key] = image - offset[:, None, None, None]
        cls = fused_statistics(images)
        return cls, [self._maps(batch)] * max(1, len(layers)) if patches else None

    def _maps(self, batch: ImageBatch) -> np.ndarray:
        parts = []
        for key in self.check(batch.images):
            image = jnp.asarray(batch.images[key], jnp.float32)
            size = target_size(*image.shape[1:3], self.image_size, self.patch)
            offset = jnp.asarray(batch.offset.get(key, np.zeros(len(image))), jnp.float32)
            bands = jnp.asarray(batch.bands.get(key, np.ones(image.shape[3], bool)))
            pixels = terrafm.patchify(prepare_image(image, *self.stats[key], offset, bands, size), self.patch)
            pixels = pixels.reshape(*pixels.shape[:3], -1, image.shape[3])
            parts += [pixels.mean(3), pixels.std(3)]
        return np.asarray(jnp.concatenate(parts, -1))


def random_encoder(spec: ModelSpec, seed: int, image_size: int, stats: Statistics, name: str = "") -> Encoder:
    """The network with fresh weights."""
    params = jax.jit(lambda key: terrafm.init_params(spec, key)["backbone"])(jax.random.key(seed))
    digest = hashlib.sha256(f"random {spec!r} {seed} {stats.to_json()}".encode()).hexdigest()
    return Encoder(spec, params, stats, name=name or f"random init {seed}", weights_hash=digest, image_size=image_size)


AnyEncoder = Encoder | RawStatistics


def split_name(text: str) -> tuple[str, str]:
    """(name, what it names) of ``[NAME=]WHAT``; a path may have an "=" itself, as folders of runs do (``lr=0.001``)."""
    for i in (0, *(match.end() for match in re.finditer("=", text))):
        what = text[i:]
        if re.match(r"raw$|random[:@]|[a-z]+://", what) or (what and Path(what).exists()):
            return text[: max(0, i - 1)], what
    name, _, what = text.rpartition("=")
    return name, what


def open_encoder(text: str, image_size: int = 224, dtype: str = "", upstream_l2a_stem: bool = False) -> AnyEncoder:
    """Opens what a user typed after ``--checkpoint``.

    ``raw``: band statistics. ``random:SIZE[:SEED]`` (s, b, l): fresh weights. ``random@PATH[:SEED]``: the network and
    statistics of a checkpoint with fresh weights. Anything else is a path for ``terrafm_jax.load``. ``NAME=`` in front
    gives the name in the tables. ``upstream_l2a_stem`` sends L2A through the L1C stem, the fault of the released code
    under which the published numbers were measured.
    """
    name, rest = split_name(text)
    if rest == "raw":
        return RawStatistics(image_size)
    if rest.startswith("random:"):
        size, _, seed = rest.removeprefix("random:").partition(":")
        try:
            return random_encoder(ModelSpec.of_size(size), int(seed or 0), image_size, Statistics.published(), name)
        except ValueError as e:
            raise FeatureError(f"--checkpoint {text}: expected random:SIZE[:SEED] with s, b or l ({e})") from e
    if rest.startswith("random@"):
        path, _, seed = rest.removeprefix("random@").rpartition(":")
        path, seed = (path, seed) if path and seed.isdigit() else (rest.removeprefix("random@"), "0")
        found = open_encoder(path, image_size, dtype)
        if isinstance(found, RawStatistics):
            raise FeatureError(f"--checkpoint {text}: raw has no network; expected random@PATH[:SEED] of a checkpoint")
        return random_encoder(found.spec, int(seed), image_size, found.stats, name)
    return _from_weights(rest, name, image_size, dtype, upstream_l2a_stem)


def _from_weights(path: str, name: str, image_size: int, dtype: str, upstream: bool) -> Encoder:
    import terrafm_jax

    model = terrafm_jax.load(path, **({"dtype": dtype} if dtype else {}))
    backbone, digest = model.backbone, model.weights_hash
    if upstream:
        embed = dict(backbone["patch_embed"])
        embed["conv2d_s2_l2a"], embed["s2_l2a_embed"] = embed["conv2d_s2_l1c"], embed["s2_l1c_embed"]
        backbone, digest = {**backbone, "patch_embed": embed}, hashlib.sha256(f"{digest} upstream".encode()).hexdigest()
    shown = name or path.rstrip("/").split("/")[-1] + (", L2A through the L1C stem" if upstream else "")
    return Encoder(model.spec, backbone, model.stats, name=shown, weights_hash=digest, image_size=image_size)
