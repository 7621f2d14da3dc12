"""Features for evaluation: of prepared tiles (inside training) and of labelled images (raw arrays).

Both normalize through ``sensors.normalize`` and hand patches to ``models.terrafm.encode``; neither knows files.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from terrafm_jax.devices import LocalDevices
from terrafm_jax.inference import sensors_present
from terrafm_jax.models import terrafm
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import SENSOR_KEYS, SENSORS, Statistics, normalize
from terrafm_jax.ssl.resample import FILL, MIN_WEIGHT, resample_sensor

Stats = Statistics | Mapping[str, tuple[np.ndarray, np.ndarray]]  # sensor -> mean and std, each [bands]


class FeatureError(ValueError):
    """Images do not fit the model: sensor, size, shape."""


# --- prepared tiles -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TileFeatures:
    """cls float32 [N, d], landcover int [N] (majority category), index int [N] (record in the split)."""

    cls: np.ndarray
    landcover: np.ndarray
    index: np.ndarray


def tile_patches(
    batch: Mapping[str, Any],
    sensors: Sequence[str],
    stats: Stats,
    *,
    size: int,
    patch: int = 16,
) -> tuple[dict[str, Array], Array]:
    """The whole tile as one view: no crop, no flip, resampled to ``size`` px exactly like a training view.

    Args:
      batch: layout of data/tiles.py, with B tiles.

    Returns:
      patches per sensor [B, h, w, patch * patch * C] and the sensors present, bool [B, S] in their order.
    """
    count = batch["present"].shape[0]
    columns = [SENSOR_KEYS.index(k) for k in sensors]
    if batch["present"].shape[1] != len(SENSOR_KEYS):
        columns = list(range(len(sensors)))
    boxes = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0], jnp.float32)[None, None], (count, 1, 4))
    flips = jnp.zeros((count, 1, 2), bool)
    offset = jnp.asarray(batch["offset"])[:, jnp.array(columns)]
    patches = {}
    for i, key in enumerate(sensors):
        views = [(boxes, flips, size)]
        (cut,) = resample_sensor(key, batch[key], stats[key], offset[:, i], views, patch, jnp.dtype("float32"))
        patches[key] = cut[:, 0]
    return patches, jnp.asarray(batch["present"]).astype(bool)[:, jnp.array(columns)]


def tile_encoder(spec: ModelSpec, stats: Stats, *, size: int) -> Callable[[Any, Any], Array]:
    """A jitted function (backbone parameters, batch) -> class tokens [B, d].

    All sensors present are fused. Weights without fusion take, per tile, the first present of s2_l2a, s2_l1c, s1.
    """

    @jax.jit
    def encode(params: Any, batch: Any) -> Array:
        patches, present = tile_patches(batch, spec.sensors, stats, size=size, patch=spec.patch)
        if spec.fusion and len(spec.sensors) > 1:
            return terrafm.encode(spec, params, patches, present).cls
        preferred = [k for k in ("s2_l2a", "s2_l1c", "s1") if k in spec.sensors]
        cls = terrafm.encode(spec, params, {preferred[-1]: patches[preferred[-1]]}).cls
        for key in preferred[-2::-1]:
            there = present[:, spec.sensors.index(key), None]
            cls = jnp.where(there, terrafm.encode(spec, params, {key: patches[key]}).cls, cls)
        return cls

    return encode


def tile_features(encode: Callable[[Mapping[str, Any]], Array], batches: Iterable[Mapping[str, Any]]) -> TileFeatures:
    """Runs ``encode(batch) -> [B, d]`` over batches of prepared tiles; rows with ``index`` < 0 are padding.

    Results are fetched one batch late, so that the device works while the host reads.

    Raises FeatureError where there is no batch.
    """
    rows: list[tuple[Any, np.ndarray, np.ndarray]] = []
    pending: tuple[Any, np.ndarray, np.ndarray] | None = None
    for batch in batches:
        current = (encode(batch), np.asarray(batch["landcover"]), np.asarray(batch["index"]))
        if pending is not None:
            rows.append((np.asarray(pending[0]), *pending[1:]))
        pending = current
    if pending is None:
        raise FeatureError("tile features: the split has no batch")
    rows.append((np.asarray(pending[0]), *pending[1:]))
    cls, landcover, index = (np.concatenate(part) for part in zip(*rows, strict=True))
    keep = np.nonzero(index >= 0)[0]
    return TileFeatures(cls[keep].astype(np.float32), landcover[keep], index[keep])


# --- labelled images ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class ImageBatch:
    """Images of B samples in the sensors' units and canonical band order.

    Attributes:
      images: per sensor float32 [B, H, W, C]; NaN where nothing was measured (sizes may differ per sensor).
      bands: per sensor bool [C]; False: the data set lacks the band, its slice of the stem is left out.
      offset: per sensor float32 [B], DN of the processing baseline still inside.
    """

    images: dict[str, np.ndarray]
    bands: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    offset: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.images.values())))


def prepare_image(
    image: Array, mean: np.ndarray, std: np.ndarray, offset: Array, bands: Array, size: tuple[int, int]
) -> Array:
    """Normalizes and resizes [B, H, W, C] to [B, *size, C] (bilinear, half-pixel centers, antialiased when shrinking).

    Pixels without measurement (NaN) are left out by masked renormalization and filled with the mean. A band that
    the data set lacks becomes exactly zero after normalization, which equals slicing it out of the linear stem;
    zero before normalization would mean "dark" and costs several points.
    """
    mean, std = (jnp.asarray(a, jnp.float32)[None, None, None] for a in (mean, std))
    values = normalize(image.astype(jnp.float32), mean, std, offset[:, None, None, None]) - FILL
    if image.shape[1:3] == size:
        values = jnp.where(jnp.isfinite(values), values, 0.0)
    else:
        measured = jnp.isfinite(values)
        resize = partial(jax.image.resize, shape=(image.shape[0], *size, image.shape[3]), method="bilinear")
        weight = resize(measured.astype(jnp.float32))
        total = resize(jnp.where(measured, values, 0.0))
        values = jnp.where(weight > MIN_WEIGHT, total / jnp.maximum(weight, MIN_WEIGHT), 0.0)
    return jnp.where(bands[None, None, None], values + FILL, 0.0)


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """float32 [H, W, C] -> [side, side, C] as :func:`prepare_image` resizes; NaN where too little was measured.

    For images of several sizes that have to lie in one array before the device sees them.
    """
    if image.shape[:2] == (side, side):
        return image
    measured = np.isfinite(image)
    rows, columns = (_triangles(count, side) for count in image.shape[:2])

    def both_ways(values: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.tensordot(columns, np.tensordot(rows, values, 1), ((1,), (1,))), 0, 1)

    weight = both_ways(measured.astype(np.float32))
    total = both_ways(np.where(measured, image, np.float32(0)))
    return np.where(weight > MIN_WEIGHT, total / np.maximum(weight, MIN_WEIGHT), np.float32(np.nan))


def _triangles(count: int, side: int) -> np.ndarray:
    """float32 [side, count]: weights of the pixels of one axis, half-pixel centers, antialiased when shrinking."""
    step = count / side
    away = np.abs((np.arange(side)[:, None] + 0.5) * step - (np.arange(count) + 0.5))
    weight = np.maximum(0.0, 1.0 - away / max(step, 1.0))
    return (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def target_size(height: int, width: int, image_size: int, patch: int) -> tuple[int, int]:
    """Network input of an image: ``image_size`` squared, or (0) its own size rounded up to whole patches."""
    if image_size:
        if image_size % patch:
            raise FeatureError(f"image_size {image_size}: expected a multiple of the patch size {patch}")
        return image_size, image_size
    return -(-height // patch) * patch, -(-width // patch) * patch


def encode_images(
    spec: ModelSpec,
    params: Any,
    stats: Stats,
    images: Mapping[str, Array],
    bands: Mapping[str, Array],
    offset: Mapping[str, Array],
    *,
    size: tuple[int, int],
    layers: Sequence[int] = (),
    drop_key: Array | None = None,
) -> terrafm.Features:
    """Traceable: features of images per sensor (see :class:`ImageBatch`), fused when there are several sensors.

    A sensor that measured nothing in an image takes no part in its fusion, as in training and ``inference.Model``.
    """
    patches, measured = {}, {}
    for key in (k for k in spec.sensors if k in images):
        image = prepare_image(images[key], *stats[key], offset[key], bands[key], size)
        patches[key] = terrafm.patchify(image, spec.patch).astype(spec.dtype)
        measured[key] = (jnp.isfinite(images[key]) & bands[key][None, None, None]).any((1, 2, 3))
    return terrafm.encode(spec, params, patches, sensors_present(spec, measured), drop_key=drop_key, layers=layers)


class Encoder:
    """Frozen weights as a function of labelled images, sharded over the local devices.

    Attributes:
      name: shown in tables. weights_hash: of the weights. cache_key: of all that features depend on.
      standardize: whether protocols scale the features first (no: they are used as they are).
    """

    standardize = False

    def __init__(
        self, spec: ModelSpec, backbone: Any, stats: Statistics, *, name: str, weights_hash: str, image_size: int = 224
    ):
        target_size(1, 1, image_size, spec.patch)
        self.spec, self.name, self.weights_hash, self.image_size = spec, name, weights_hash, image_size
        self.stats = stats
        text = f"{weights_hash} {spec.dtype} {stats.to_json()}"
        self.cache_key = hashlib.sha256(text.encode()).hexdigest()
        self._devices = LocalDevices()
        self.params = self._devices.everywhere(backbone)
        self._jit = jax.jit(self._encode, static_argnames=("size", "layers", "patches"))

    def _encode(
        self, params: Any, images: Mapping[str, Array], bands: Mapping[str, Array], offset: Mapping[str, Array], *,
        size: tuple[int, int], layers: tuple[int, ...], patches: bool,
    ) -> tuple[Array, list[Array] | None]:  # fmt: skip
        found = encode_images(self.spec, params, self.stats, images, bands, offset, size=size, layers=layers)
        if not patches:
            return found.cls.astype(jnp.float32), None
        maps = [p for _, p in found.layers] if layers else [found.patches]
        return found.cls.astype(jnp.float32), [m.astype(jnp.float32) for m in maps]

    @property
    def patch(self) -> int:
        return self.spec.patch

    @property
    def depth(self) -> int:
        return self.spec.depth

    def check(self, sensors: Iterable[str]) -> tuple[str, ...]:
        """The sensors in the model's order. Raises FeatureError naming what the weights cannot take."""
        sensors = list(sensors)
        unknown = [k for k in sensors if k not in self.spec.sensors]
        if unknown or not sensors:
            raise FeatureError(f"{self.name}: weights take {list(self.spec.sensors)}, the data gives {sensors}")
        if len(sensors) > 1 and not self.spec.fusion:
            raise FeatureError(f"{self.name}: weights have no fusion block; evaluate {sensors} one at a time")
        return tuple(k for k in self.spec.sensors if k in sensors)

    def __call__(
        self, batch: ImageBatch, *, layers: Sequence[int] = (), patches: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """Class tokens float32 [B, d] and, with ``patches``, a list of patch maps [B, h, w, d] (one per layer)."""
        sensors = self.check(batch.images)
        count, put = len(batch), self._devices
        height, width = batch.images[sensors[0]].shape[1:3]
        images, bands, offset = {}, {}, {}
        for key in sensors:
            full = np.ones(len(SENSORS[key].bands), bool)
            images[key] = put.rows(np.asarray(batch.images[key], np.float32))
            bands[key] = put.everywhere(np.asarray(batch.bands.get(key, full), bool))
            offset[key] = put.rows(np.asarray(batch.offset.get(key, np.zeros(count)), np.float32))
        size = target_size(height, width, self.image_size, self.spec.patch)
        cls, maps = self._jit(self.params, images, bands, offset, size=size, layers=tuple(layers), patches=patches)
        return np.asarray(cls)[:count], None if maps is None else [np.asarray(m)[:count] for m in maps]
