"""A loaded network as a function of named sensors in stated units: what ``terrafm_jax.load`` returns."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from terrafm_jax import checks, weights
from terrafm_jax import units as units_lib
from terrafm_jax.arguments import (
    Asked,
    InputError,
    check_by_sensor,
    image_of,
    kept_bands,
    mask_of,
    named,
    says,
    unmeasured,
)
from terrafm_jax.devices import LocalDevices
from terrafm_jax.loader import COMPUTE_FIELDS, Loaded, read
from terrafm_jax.models import Features, ModelSpec, patchify, terrafm
from terrafm_jax.sensors import NORMALIZED_MEAN, SENSOR_KEYS, SENSORS, Sensor, normalize

log = logging.getLogger(__name__)

FILL = NORMALIZED_MEAN  # what a pixel without a measurement gets, as in training
_UPSTREAM_STEM = "s2_l1c"  # the stem that upstream's code takes for every 12-band input


class Model:
    """Pretrained weights ready to encode.

    Attributes:
      spec: the network. stats: normalization statistics, ``stats[sensor]`` is (mean, std).
      backbone: parameters (float32). head: those of the DINO head, or None.
      meta: what the writer recorded (config, step, metrics). source: where the weights were read.
      upstream_l2a_stem: reproduce the released code's fault of sending L2A through the L1C stem. Published
        numbers were measured that way; off by default.
    """

    def __init__(self, loaded: Loaded):
        self.spec, self.stats, self.meta, self.source = loaded.spec, loaded.stats, loaded.meta, loaded.source
        self.backbone, self.head = loaded.params["backbone"], loaded.params.get("head")
        self.upstream_l2a_stem = False
        self._said: set[Any] = set()
        self._compiled: dict[Any, Any] = {}

    def __repr__(self) -> str:
        kind = "with fusion" if self.spec.fusion else "one sensor at a time"
        return f"Model(width={self.spec.width}, depth={self.spec.depth}, sensors={self.spec.sensors}, {kind})"

    @functools.cached_property
    def weights_hash(self) -> str:
        """SHA-256 of the backbone: names, shapes and values."""
        return weights.content_hash(self.backbone)

    @functools.cached_property
    def _devices(self) -> LocalDevices:
        return LocalDevices()

    @functools.cached_property
    def _placed(self) -> Any:
        """The backbone on every local device, copied once."""
        return self._devices.everywhere(self.backbone)

    def encode(
        self,
        *,
        s2_l2a: Any = None,
        s2_l1c: Any = None,
        s1: Any = None,
        mask: Any = None,
        units: Mapping[str, str] | None = None,
        offset: Any = None,
        bands: Mapping[str, Sequence[str]] | None = None,
        layers: Sequence[int] = (),
        batch_size: int = 32,
        check: bool = True,
    ) -> Features:
        """Class tokens and patch tokens of images.

        Args:
          s2_l2a, s2_l1c, s1: [B, H, W, bands] (or [H, W, bands], a batch of one) of one or several sensors,
            which are fused. H and W are at least 16; sides that are not a multiple of the patch are continued by
            repeating the last row or column, so the grid is ceil(H / 16) x ceil(W / 16).
          mask: bool, True where a pixel was not measured: [B, H, W] for all sensors, or a dict by sensor. Pixels
            that are not finite or zero (Sentinel-2: in all bands; Sentinel-1: power of any band) are masked anyway.
            Masked pixels get the mean; a sensor without any measurement in an image takes no part in its fusion,
            and an image without any gets NaN.
          units: by sensor, "dn" (default) or "reflectance" for Sentinel-2, "db" (default) or "power" ("linear") for
            Sentinel-1. What is declared wins; what is not declared is refused if it looks like something else.
          offset: DN to subtract from Sentinel-2 (1000 for processing baselines from 04.00 on unless the values
            are harmonized): a number, [B], or a dict of these by sensor. An explicit 0 says that none is inside.
          bands: by sensor, the names of the bands given, in their order. Default: all, in canonical order. B10 of
            Level-1C, if named, is looked at for the offset and dropped.
          layers: blocks (0-based, negative from the end) whose features are returned too.
          batch_size: images a device handles at once.
          check: whether to ask if the values are what they are called (all images together, and each for what no
            ground can look like), and to take zeros for nodata; False only for what was checked, harmonized and masked
            before.

        Returns:
          Features of float32 NumPy arrays: cls [B, d], patches [B, h, w, d], layers.

        Raises:
          InputError, SensorError, UnitError: see the message; nothing was computed.
        """
        images = {k: v for k, v in (("s1", s1), ("s2_l1c", s2_l1c), ("s2_l2a", s2_l2a)) if v is not None}
        check_by_sensor(units=units, bands=bands)
        inputs, columns = self._inputs(images, mask, units or {}, offset, bands or {}, check)
        layers = self._layers(layers)
        empty = self._empty(inputs, refuse=check)
        parts = [self._run(chunk, columns, layers) for chunk in self._chunks(inputs, batch_size)]
        found = jax.tree.map(lambda *x: np.concatenate(x), *parts)
        return jax.tree.map(lambda x: _without(x, empty), found) if empty.any() else found

    # --- checking and converting on the host ---

    def _inputs(
        self,
        given: dict[str, Any],
        mask: Any,
        units: Mapping[str, str],
        offset: Any,
        bands: Mapping[str, Any],
        check: bool,
    ) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, tuple[int, ...]]]:
        """Per sensor values float32 [B, H, W, C] in DN or dB, ignore [B, H, W], offset [B]; and the bands' columns."""
        images = {key: image_of(key, value) for key, value in given.items()}
        by_sensor = {"units": units, "bands": bands, "offset": offset, "mask": mask}
        self._check({key: image for key, (image, _) in images.items()}, by_sensor)
        inputs, columns = {}, {}
        for key, (image, hidden) in images.items():
            sensor, unit = SENSORS[key], units_lib.word(units.get(key), SENSORS[key])
            kept, names, cirrus = kept_bands(sensor, image.shape[-1], bands.get(key))
            columns[key] = sensor.indices(names)
            b10, image = image[..., cirrus], image[..., kept]
            if set(names) != set(sensor.band_names):
                lacking = ", ".join(sorted(set(sensor.band_names) - set(names)))
                self._say_once(f"{key}: stem sliced to {', '.join(names)}; without {lacking}")
            ignore = unmeasured(image, unit) if check else ~np.isfinite(image).all(-1)
            ours = mask.get(key) if isinstance(mask, Mapping) else mask
            if ours is not None:
                ignore |= mask_of(key, ours, image.shape[:3])
            if hidden is not None:
                ignore |= hidden
            said = checks.Declared(unit, key in units, 0.0, says(offset, key))
            dn = self._offset(sensor, offset, unit, len(image))
            asked = Asked(key, names, image, b10, ignore, dn, said)
            if check and not ignore.all():
                self._question(asked)
            inputs[key] = {"values": asked.converted(), "ignore": ignore, "offset": dn}
        return inputs, columns

    def _question(self, asked: Asked) -> None:
        """Refuses values that surely are not what they are called, in all images or in some; warns of the others."""
        found = asked.findings()
        sure = [f.text for f in found if f.sure]
        faults = (asked.faults(None) if sure else asked.faults()) if len(asked.image) > 1 else {}
        if faults and len(faults) < len(asked.image):
            remedy = "a call has one unit for all its images: mend these, or encode them apart"
            raise units_lib.UnitError(f"{asked.key}: {named(faults, len(asked.image))} ({remedy})")
        for text in sure or faults.values():
            raise units_lib.UnitError(f"{asked.key}: {text}")
        for finding in found:
            self._say_once(f"{asked.key}: {finding.text}", logging.WARNING)

    def _empty(self, inputs: Mapping[str, Mapping[str, np.ndarray]], refuse: bool) -> np.ndarray:
        """bool [B]: images in which no sensor measured anything. Raises InputError if that is all of them."""
        empty = np.all([given["ignore"].all((1, 2)) for given in inputs.values()], axis=0)
        if empty.all() and refuse:
            raise InputError(
                "encode: no image holds a measurement (all pixels are zero, NaN or masked); nothing to encode"
            )
        if empty.any():
            shown = np.flatnonzero(empty)[:10].tolist()
            log.warning("encode: %d of %d images hold no measurement, they get NaN: %s", empty.sum(), len(empty), shown)
        return empty

    def _check(self, images: Mapping[str, np.ndarray], by_sensor: Mapping[str, Any]) -> None:
        faults = []
        known = tuple(k for k in SENSOR_KEYS if k in self.spec.sensors)
        if not images:
            faults.append(f"no sensor given; these weights take {', '.join(known)}")
        unknown = [k for k in images if k not in known and not (k == "s2_l2a" and self.upstream_l2a_stem)]
        if unknown:
            faults.append(f"these weights have no stem for {', '.join(unknown)}; they take {', '.join(known)}")
        if len(images) > 1 and not self.spec.fusion:
            faults.append(
                f"{', '.join(images)} together, but these weights have no fusion (the released ones do not); "
                "encode one sensor at a time"
            )
        if len({image.shape[:3] for image in images.values()}) > 1:
            shapes = ", ".join(f"{k} {v.shape[:3]}" for k, v in images.items())
            faults.append(f"sensors differ in [B, H, W]: {shapes}; warp them to one grid")
        for name, value in by_sensor.items():
            stray = sorted(set(value) - set(images)) if isinstance(value, Mapping) else []
            if stray:
                faults.append(f"{name} names {', '.join(stray)}, which was not given")
        if faults:
            raise InputError("encode: " + "; ".join(faults))

    def _offset(self, sensor: Sensor, offset: Any, unit: str, count: int) -> np.ndarray:
        stated = offset.get(sensor.key, 0.0) if isinstance(offset, Mapping) else offset
        try:
            given = np.asarray(0.0 if stated is None else stated, np.float32)
        except (TypeError, ValueError):
            raise InputError(f"offset of {sensor.key}: {stated!r}; expected DN, such as 1000") from None
        if given.shape not in ((), (count,)):
            raise InputError(f"offset of {sensor.key}: shape {given.shape}; expected a number or [{count}]")
        if not given.any() or (sensor.unit != "DN" and not isinstance(offset, Mapping)):
            return np.zeros(count, np.float32)
        for finding in [f for v in np.unique(given) for f in checks.offset(sensor.key, float(v), checks.KEYWORDS)]:
            if finding.sure:
                raise InputError(f"offset of {sensor.key}: {finding.text}")
            self._say_once(finding.text, logging.WARNING)
        if unit == "reflectance":
            raise InputError(f"offset of {sensor.key}: reflectance has none; give DN, or subtract it beforehand")
        return np.broadcast_to(given, (count,)).astype(np.float32)

    def _layers(self, layers: Sequence[int]) -> tuple[int, ...]:
        if isinstance(layers, str) or not isinstance(layers, Sequence | np.ndarray):
            raise InputError(f"layers {layers!r}; expected numbers of blocks in a list, such as [-1]")
        if not all(isinstance(i, int | np.integer) for i in layers):
            raise InputError(f"layers {list(layers)!r}; expected whole numbers of blocks, such as [-1]")
        wrong = [i for i in layers if not -self.spec.depth <= i < self.spec.depth]
        if wrong:
            raise InputError(f"layers {wrong} do not exist; depth is {self.spec.depth}")
        return tuple(int(i) % self.spec.depth for i in layers)

    def _say_once(self, text: str, level: int = logging.INFO) -> None:
        if text not in self._said:
            self._said.add(text)
            log.log(level, text)

    # --- computing on the devices ---

    def _chunks(self, inputs: dict[str, dict[str, np.ndarray]], batch_size: int) -> Iterator[tuple[Any, int]]:
        """Pieces of at most ``batch_size`` images a device, each with its number of images."""
        count = len(next(iter(inputs.values()))["offset"])
        size = max(1, batch_size) * self._devices.count
        for start in range(0, count, size):
            yield jax.tree.map(lambda x, a=start: x[a : a + size], inputs), min(size, count - start)

    def _run(self, chunk: tuple[Any, int], columns: Mapping[str, tuple[int, ...]], layers: tuple[int, ...]) -> Features:
        inputs, count = chunk
        key = (tuple(sorted(columns.items())), layers, self.upstream_l2a_stem)
        if key not in self._compiled:
            forward = functools.partial(self._forward, columns=dict(columns), layers=layers)
            self._compiled[key] = jax.jit(forward)
        found = self._compiled[key](self._placed, self._devices.rows(inputs))
        return jax.tree.map(lambda x: np.asarray(x)[:count], found)

    def _forward(
        self, backbone: Any, inputs: Any, *, columns: Mapping[str, tuple[int, ...]], layers: tuple[int, ...]
    ) -> Features:
        patches, measured = {}, {}
        for key, given in inputs.items():
            mean, std = (jnp.asarray(a)[np.array(columns[key])][None, None, None] for a in self.stats[key])
            x = normalize(given["values"], mean, std, given["offset"][:, None, None, None])
            x = jnp.where(given["ignore"][..., None], FILL, x)
            stem = _UPSTREAM_STEM if key == "s2_l2a" and self.upstream_l2a_stem else key
            backbone = sliced(backbone, stem, columns[key], self.spec)
            patches[stem] = patchify(pad_to_patches(x, self.spec.patch), self.spec.patch)
            measured[stem] = ~given["ignore"].all((1, 2))
        found = terrafm.encode(self.spec, backbone, patches, sensors_present(self.spec, measured), layers=layers)
        return jax.tree.map(lambda x: x.astype(jnp.float32), found)


def sensors_present(spec: ModelSpec, measured: Mapping[str, Array]) -> Array | None:
    """bool [B, S] from bool [B] by sensor; an image in which nothing at all was measured keeps its sensors, to stay
    defined. None for one sensor.
    """
    if len(measured) == 1:
        return None
    nothing = jnp.zeros_like(next(iter(measured.values())))
    given = jnp.array([[s in measured for s in spec.sensors]])
    present = jnp.stack([measured.get(s, nothing) for s in spec.sensors], axis=1)
    return jnp.where(present.any(1, keepdims=True), present, given)


def _without(rows: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Rows of images without a measurement as NaN."""
    return np.where(empty.reshape(-1, *[1] * (rows.ndim - 1)), np.float32(np.nan), rows)


def sliced(backbone: Any, sensor: str, columns: Sequence[int], spec: ModelSpec) -> Any:
    """The backbone with the stem of ``sensor`` cut to the bands at ``columns``, in that order."""
    bands = len(SENSORS[sensor].bands)
    if tuple(columns) == tuple(range(bands)):
        return backbone
    embed = backbone["patch_embed"]
    stem = embed[f"conv2d_{sensor}"]
    kernel = jnp.asarray(stem["kernel"]).reshape(spec.patch**2, bands, -1)[:, np.array(columns)]
    stem = {**stem, "kernel": kernel.reshape(spec.patch**2 * len(columns), -1)}
    return {**backbone, "patch_embed": {**embed, f"conv2d_{sensor}": stem}}


def pad_to_patches(x: Array, patch: int) -> Array:
    """[B, H, W, C] continued to multiples of ``patch`` by repeating the last row and column."""
    rows, columns = -x.shape[1] % patch, -x.shape[2] % patch
    return jnp.pad(x, ((0, 0), (0, rows), (0, columns), (0, 0)), mode="edge") if rows or columns else x


def load(path: Any, *, which: str = "teacher", heads: int = 0, fusion_heads: int = 0, **how: Any) -> Model:
    """Opens weights and returns a :class:`Model`.

    Args:
      path: a workdir, a checkpoint or hub folder, a ``.pth`` or ``.safetensors`` file: as :func:`loader.read`.
      which, heads, fusion_heads: as there.
      how: fields of ModelSpec that say how to compute (``dtype="bfloat16"``, ``attention=``, ``scan=`` ...).

    Raises:
      WeightsError: the path is missing, damaged or hostile, or its tensors do not fit; all mismatches at once.
    """
    found = read(path, which=which, heads=heads, fusion_heads=fusion_heads)
    wrong = sorted(set(how) - set(COMPUTE_FIELDS))
    if wrong:
        raise weights.WeightsError(
            f"load: {', '.join(wrong)} cannot be changed; expected some of {', '.join(COMPUTE_FIELDS)}"
        )
    return Model(dataclasses.replace(found, spec=dataclasses.replace(found.spec, **how)))
