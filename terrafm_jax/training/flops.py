"""Matrix-product FLOPs of pretraining by formula, and what devices can do.

The formula counts the cheapest algorithm we know for the views drawn: folded embedding and fusion, drawn
sensors only, no work for samples that drop path skips. Weight products, resampling, recomputation,
normalization (with the fusion's sums over heads) and the loss do not count, so that a wasteful step does not
score higher. One multiply-add is two FLOPs; the backward pass is twice the forward, except where the input
needs no gradient.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.ssl.views import ViewSpec

if TYPE_CHECKING:
    from terrafm_jax.training.step import TrainSpec

# Dense peak FLOP/s (no structured sparsity) of one device as jax names it; vendors' data sheets. fp32 is
# what a product of fp32 arrays can reach with TF32 off.
_PEAKS: tuple[tuple[str, float, float], ...] = (
    # substring of device_kind, bf16, fp32
    ("h200", 989e12, 67e12),
    ("h100 pcie", 756e12, 51e12),
    ("h100 nvl", 835e12, 60e12),
    ("h100", 989e12, 67e12),
    ("b200", 2250e12, 75e12),
    ("a100", 312e12, 19.5e12),
    ("l40s", 362e12, 91.6e12),
    ("l40", 181e12, 90.5e12),
    ("l4", 121e12, 30.3e12),
    ("v100", 125e12, 15.7e12),
    ("t4", 65e12, 8.1e12),
    ("tpu v6 lite", 918e12, 0.0),
    ("tpu v6e", 918e12, 0.0),
    ("tpu7x", 2307e12, 0.0),
    ("tpu v5 lite", 197e12, 0.0),
    ("tpu v5e", 197e12, 0.0),
    ("tpu v5p", 459e12, 0.0),
    ("tpu v5", 459e12, 0.0),
    ("tpu v4", 275e12, 0.0),
    ("tpu v3", 61.5e12, 0.0),  # per core, of which a chip has two
    ("tpu v2", 22.5e12, 0.0),
)


def peak_flops(device_kind: str, dtype: str = "bfloat16") -> float:
    """Dense peak FLOP/s of a device (``jax.Device.device_kind``) for products in ``dtype``; 0 where not known."""
    kind = device_kind.lower()
    for name, bf16, fp32 in _PEAKS:
        if name in kind:
            return bf16 if dtype == "bfloat16" else fp32
    return 0.0


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs per image of one training step, by part."""

    embedding: float  # stems, fusion and projection to the width of the backbone
    blocks: float
    head: float

    @property
    def total(self) -> float:
        return self.embedding + self.blocks + self.head


def drawn_share(rule: str, threshold: float, sensors: int) -> float:
    """Expected share of ``sensors`` present sensors that a view draws, for a modality rule of ``ssl.modalities``."""
    if rule == "all":
        return 1.0
    if rule == "one":
        return 1.0 / sensors
    if rule == "fuse_or_one":
        return threshold + (1.0 - threshold) / sensors
    return threshold / (1.0 - (1.0 - threshold) ** sensors)  # Bernoulli, given that one was drawn


def embedding_flops(model: ModelSpec, tokens: int, share: float) -> tuple[float, float]:
    """Forward FLOPs of embedding one view: (products with pixels, products with activations).

    With fusion, the pixels meet the stem folded into values (3 d columns) and the one folded into scores
    (queries x heads columns); the weighted sum of values then meets one matrix 3 d -> d. Without fusion the
    only non-linearity is the norm between two linear maps, so the same two products remain, without scores.
    """
    width = model.stem_width
    columns = width + (model.queries * model.fusion_heads if model.fusion else 0)
    pixels = share * sum(model.patch_features(s) for s in model.sensors)
    return 2.0 * tokens * pixels * columns, 2.0 * tokens * width * model.width


def block_flops(model: ModelSpec, tokens: int) -> tuple[float, float]:
    """Forward FLOPs of the (attention, MLP) branches of one block for ``tokens`` tokens (class token included)."""
    d = model.width
    attention = 2.0 * tokens * (4 * d * d) + 2.0 * 2.0 * tokens * tokens * d
    return attention, 2.0 * tokens * (2 * d * model.hidden)


def head_flops(model: ModelSpec) -> float:
    """Forward FLOPs of the DINO head for one class token."""
    h, b = model.head_hidden, model.head_bottleneck
    return 2.0 * (model.width * h + h * h + h * b + b * model.prototypes)


def image_flops(model: ModelSpec, views: ViewSpec, share: float | None = None) -> Flops:
    """FLOPs per image (sample) of one training step.

    Args:
      model, views: specs.
      share: mean share of the configured sensors that a view sees; by default the expectation of the modality
        rule for records that hold all sensors.
    """
    if share is None:
        share = drawn_share(views.modality_rule, views.modality_threshold, len(model.sensors))
    kept = 1.0 - np.linspace(0.0, model.drop_path, model.depth) if model.depth else np.zeros(0)
    embedding = blocks = head = 0.0
    for count, size, teacher in ((views.globals, views.global_size, True), (views.locals, views.local_size, False)):
        patches = (size // views.patch) ** 2
        pixels, project = embedding_flops(model, patches, share)
        both = sum(block_flops(model, patches + 1))
        # Student: forward and backward; pixels need no gradient. Teacher: forward only.
        embedding += count * (2 * pixels + 3 * project + teacher * (pixels + project))
        blocks += count * both * (3 * float(kept.sum()) + teacher * model.depth)
        head += count * head_flops(model) * (3 + teacher)
    return Flops(embedding, blocks, head)


def step_flops(spec: TrainSpec) -> float:
    """FLOPs per image of one training step; see :func:`image_flops`."""
    return image_flops(spec.model, spec.views).total
