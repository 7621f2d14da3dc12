"""Encoder plus head as one function of trainable and frozen parameters: full, frozen, last blocks or LoRA."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from terrafm_jax import weights
from terrafm_jax.evals import heads
from terrafm_jax.evals.features import encode_images, target_size
from terrafm_jax.models.spec import ModelSpec

LORA_TARGETS = r"backbone/blocks/\d+/(attn/qkv|attn/proj|mlp/fc1|mlp/fc2)/kernel"
MEASURED = 16  # train batches, at most, that batch-norm statistics are measured over
Flat = dict[str, Array]
Batch = Mapping[str, Any]  # images, bands and offset per sensor; targets


@dataclasses.dataclass(frozen=True)
class TuneSpec:
    """What is trained and on what; static under jit.

    Attributes:
      model: the encoder. inputs: sensors that every sample has, fused when several.
      task: classification, multilabel, segmentation or regression. outputs: classes, or 1.
      head: linear, patch_linear or upernet. mode, last_blocks, lora_rank, lora_alpha: what trains.
      image_size: network input, 0 for the images' own. ignore: label that does not count.
    """

    model: ModelSpec
    inputs: tuple[str, ...]
    task: str
    outputs: int
    head: str
    mode: str = "full"
    last_blocks: int = 2
    lora_rank: int = 8
    lora_alpha: float = 16.0
    image_size: int = 224
    ignore: int = -1
    head_norm: bool = False
    upernet_channels: int = 512

    def __post_init__(self) -> None:
        dense = self.head in ("patch_linear", "upernet")
        if dense != (self.task == "segmentation"):
            raise ValueError(f"config.head: {self.head!r} does not do {self.task}")

    def make_head(self) -> heads.Head:
        width, classes = self.model.width, self.outputs
        if self.head == "upernet":
            return heads.upernet_head(width, classes, self.upernet_channels)
        if self.head == "patch_linear":
            return heads.patch_linear_head(width, classes, self.model.patch)
        return heads.linear_head(width, classes, norm=self.head_norm)

    @property
    def layers(self) -> tuple[int, ...]:
        return heads.upernet_layers(self.model.depth) if self.head == "upernet" else ()

    def trains(self, path: str) -> bool:
        """Whether the parameter at ``path`` is trained."""
        if path.startswith(("head/", "lora/")):
            return True
        if self.mode == "full":
            return True
        if self.mode != "last":
            return False
        block = re.match(r"backbone/blocks/(\d+)/", path)
        return path.startswith("backbone/norm/") or bool(block and int(block[1]) >= self.model.depth - self.last_blocks)


def init(spec: TuneSpec, backbone: Mapping[str, Any], key: Array) -> tuple[Flat, Flat, dict]:
    """(trainable, frozen, state): flat dicts of parameters by path, and the head's running statistics."""
    head_key, lora_key = jax.random.split(key)
    head, state = spec.make_head().init(head_key)
    flat = weights.flatten({"backbone": backbone, "head": head})
    flat = {k: jnp.asarray(v, jnp.float32) for k, v in flat.items()}
    if spec.mode == "lora":
        targets = [k for k in flat if re.fullmatch(LORA_TARGETS, k)]
        for i, path in enumerate(targets):
            rows, columns = flat[path].shape
            name = "lora/" + path.removeprefix("backbone/").removesuffix("/kernel")
            scale = rows**-0.5
            flat[f"{name}/a"] = scale * jax.random.normal(jax.random.fold_in(lora_key, i), (rows, spec.lora_rank))
            flat[f"{name}/b"] = jnp.zeros((spec.lora_rank, columns))
    trainable = {k: v for k, v in flat.items() if spec.trains(k)}
    return trainable, {k: v for k, v in flat.items() if k not in trainable}, state


def merged(spec: TuneSpec, trainable: Flat, frozen: Flat) -> dict[str, Any]:
    """Nested {"backbone", "head"} with LoRA folded into the kernels; differentiable."""
    flat = {**frozen, **trainable}
    out = {k: v for k, v in flat.items() if not k.startswith("lora/")}
    for path in [k for k in flat if k.startswith("lora/") and k.endswith("/a")]:
        kernel = "backbone/" + path.removeprefix("lora/").removesuffix("/a") + "/kernel"
        update = jnp.matmul(flat[path], flat[path.removesuffix("a") + "b"], precision=jax.lax.Precision.HIGHEST)
        out[kernel] = out[kernel] + (spec.lora_alpha / spec.lora_rank) * update
    return weights.unflatten(out)


def forward(
    spec: TuneSpec,
    params: Mapping[str, Any],
    state: dict,
    stats: Any,
    batch: Batch,
    *,
    train: bool = False,
    key: Array | None = None,
) -> tuple[tuple[Array, ...], dict]:
    """Outputs of the head (logits, auxiliary logits) and its new state.

    Args:
      params: see :func:`merged`. stats: per sensor mean and std.
      batch: ``images`` per sensor [B, H, W, C] raw, ``bands`` bool [C], ``offset`` [B].
      key: drop path and dropout; None switches both off.
    """
    first = batch["images"][spec.inputs[0]]
    size = target_size(first.shape[1], first.shape[2], spec.image_size, spec.model.patch)
    drop, rest = (None, None) if key is None else jax.random.split(key)
    found = encode_images(
        spec.model, params["backbone"], stats, batch["images"], batch["bands"], batch["offset"],
        size=size, layers=spec.layers, drop_key=drop if train and spec.mode in ("full", "last") else None,
    )  # fmt: skip
    maps = tuple(m for _, m in found.layers) if spec.layers else (found.patches,)
    return spec.make_head().apply(params["head"], state, heads.Features(found.cls, maps), train, rest)


def measured(spec: TuneSpec, params: Mapping[str, Any], state: dict, stats: Any, batch: Batch) -> dict:
    """The head's batch-norm statistics of this batch alone, in the shape of ``state``, whose values do not count."""
    nothing = jax.tree.map(jnp.zeros_like, state)  # a step from zero is exact; one from running ones would cancel
    _, found = forward(spec, params, nothing, stats, batch, train=True)
    return jax.tree.map(lambda x: x / heads.MOMENTUM, found)


def loss(
    spec: TuneSpec, outputs: tuple[Array, ...], targets: Array, class_weights: Array | None, smoothing: float = 0.0
) -> Array:
    """Mean loss. Soft class targets [B, C] (mixup) are allowed for classification."""
    logits = outputs[0]
    if spec.task == "segmentation":
        return heads.dense_loss(outputs, targets, ignore=spec.ignore, class_weights=class_weights)
    if spec.task == "regression":
        return jnp.mean((logits[:, 0] - targets) ** 2)
    if spec.task == "multilabel":
        return heads.binary_cross_entropy(logits, targets)
    if targets.ndim == 1 and not smoothing:
        return heads.cross_entropy(logits, targets, ignore=spec.ignore, class_weights=class_weights)
    soft = targets if targets.ndim == 2 else jax.nn.one_hot(targets, spec.outputs)
    soft = soft * (1 - smoothing) + smoothing / spec.outputs
    if class_weights is not None:
        soft = soft * class_weights[None]
        return heads.soft_cross_entropy(logits, soft) * len(soft) / jnp.maximum(soft.sum(), 1e-9)
    return heads.soft_cross_entropy(logits, soft)


def scores(spec: TuneSpec, logits: Array, scale: tuple[float, float]) -> Array:
    """Logits [..., C] as probabilities, or as values in the unit of the targets.

    ``scale`` is the mean and the deviation of regression targets.
    """
    if spec.task == "multilabel":
        return jax.nn.sigmoid(logits)
    if spec.task == "regression":
        return logits * scale[1] + scale[0]
    return jax.nn.softmax(logits, axis=-1)


def mixup(key: Array, batch: Batch, targets: Array, alpha: float, outputs: int) -> tuple[dict, Array]:
    """Mixes every sample with another of the batch; offsets are subtracted first, class targets become soft."""
    a, b = jax.random.split(key)
    lam = jax.random.beta(a, alpha, alpha)
    order = jax.random.permutation(b, len(targets))
    soft = targets if targets.ndim == 2 else jax.nn.one_hot(targets, outputs)
    images = {}
    for name, image in batch["images"].items():
        image = image - batch["offset"][name][:, None, None, None]
        images[name] = lam * image + (1 - lam) * image[order]
    offset = {k: jnp.zeros_like(v) for k, v in batch["offset"].items()}
    return {**batch, "images": images, "offset": offset}, lam * soft + (1 - lam) * soft[order]


def flip(key: Array, batch: Batch, targets: Array) -> tuple[dict, Array]:
    """Flips every sample up-down and left-right with probability one half each; masks go along."""
    choice = jax.random.bernoulli(key, 0.5, (2, len(targets)))

    def turn(x: Array) -> Array:
        for axis in (0, 1):
            pick = choice[axis].reshape((-1,) + (1,) * (x.ndim - 1))
            x = jnp.where(pick, jnp.flip(x, axis + 1), x)
        return x

    images = {k: turn(v) for k, v in batch["images"].items()}
    return {**batch, "images": images}, turn(targets) if targets.ndim == 3 else targets


# --- optimizer ------------------------------------------------------------------------------------------------


def layer_scale(spec: TuneSpec, path: str, decay: float) -> float:
    """Learning-rate multiplier: 1 for head, LoRA and final norm, ``decay`` once more for each block below."""
    block = re.match(r"backbone/blocks/(\d+)/", path)
    depth = spec.model.depth
    if block:
        return decay ** (depth - int(block[1]))
    if path.startswith(("head/", "lora/", "backbone/norm/")):
        return 1.0
    return decay ** (depth + 1)  # patch embedding, class token, positions


def decays(path: str, shape: tuple[int, ...]) -> bool:
    """Weight decay for matrices only: no biases, norms, tokens, positions or modality embeddings."""
    return len(shape) > 1 and path.rsplit("/", 1)[-1] in ("kernel", "a", "b")


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW with linear warm-up, cosine to ``min_rate``, global-norm clip and layer-wise rates.

    The peak rate is an argument of its methods, not a field: all rates of a sweep share one compilation.
    """

    steps: int
    warmup: int
    min_rate: float = 1e-6
    weight_decay: float = 0.01
    clip: float = 1.0
    layer_decay: float = 1.0

    def learning_rate(self, step: Array, rate: Array | float) -> Array:
        step = jnp.asarray(step, jnp.float32)
        rising = (step + 1) / max(self.warmup, 1)
        along = jnp.clip((step - self.warmup) / max(self.steps - self.warmup, 1), 0, 1)
        low = jnp.minimum(self.min_rate, rate)
        cosine = low + (rate - low) * 0.5 * (1 + jnp.cos(np.pi * along))
        return jnp.where(step < self.warmup, rate * rising, cosine)

    def update(
        self, spec: TuneSpec, params: Flat, grads: Flat, mu: Flat, nu: Flat, step: Array, rate: Array | float
    ) -> tuple[Flat, Flat, Flat, Array]:
        """(params, mu, nu, norm of the gradient) after one step."""
        norm = jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in grads.values()))
        factor = jnp.minimum(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        lr, t = self.learning_rate(step, rate), step.astype(jnp.float32) + 1
        out: tuple[Flat, Flat, Flat] = ({}, {}, {})
        for path, p in params.items():
            g = grads[path].astype(jnp.float32) * factor
            m, v = 0.9 * mu[path] + 0.1 * g, 0.999 * nu[path] + 0.001 * jnp.square(g)
            scale = lr * layer_scale(spec, path, self.layer_decay)
            direction = (m / (1 - 0.9**t)) / (jnp.sqrt(v / (1 - 0.999**t)) + 1e-8)
            if decays(path, p.shape):
                direction = direction + self.weight_decay * p
            for tree, value in zip(out, (p - scale * direction, m, v), strict=True):
                tree[path] = value
        return (*out, norm)
