"""Architecture and execution options of the network, as one frozen, hashable value (static under ``jax.jit``)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from terrafm_jax.sensors import SENSOR_KEYS, SENSORS

# (width, depth, heads). B and L are published (arXiv 2506.06281); S is not, we take the usual ViT-S.
SIZES: dict[str, tuple[int, int, int]] = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16)}
STEM_FACTOR = 3  # stems are three times as wide as the backbone
DTYPES = ("float32", "bfloat16", "float64")  # float64 for the parity tests
REMATS = ("none", "dots", "block")
BATCH_AXES = ("slice", "data", "fsdp")  # mesh axes that shard the batch; a mesh need not have all of them
FUSION_KERNELS = ("auto", "xla", "pallas")
STEMS = ("all", "drawn")
ATTENTIONS = ("auto", "xla", "cudnn", "head_major", "pallas")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """Architecture of the network, and how to compute it.

    Attributes:
      width, depth, heads, mlp_ratio: the ViT backbone; stems have width ``3 * width``.
      patch: side of a patch in pixels.
      grid: side of the grid that ``pos_embed`` was learned on (14: 224 px).
      sensors: configured sensors, a subset of SENSOR_KEYS in that order.
      fusion: has the cross-attention over sensors; False is the released network (one sensor per view).
      queries, fusion_heads: learned queries and heads of the fusion. 5 queries are published; heads are inferred.
      drop_path: stochastic depth of the last block, rising linearly from 0 (DINO).
      prototypes, head_hidden, head_bottleneck: the DINO head.
      init_std: standard deviation of linear kernels at init. 0.02 suits widths of 384 and more; narrower models
        need about 0.7 / sqrt(width), else the signal shrinks from layer to layer and they collapse.
      dtype: of matrix products and activations. Parameters, softmax and norms stay in float32.
      scan: runs the blocks as one ``lax.scan`` (compiles faster, needs more temporary memory).
      remat: what the forward pass saves, the rest being recomputed: "none" (saves everything), "dots" (saves
        matrix products) or "block" (saves block inputs only).
      attention: "xla", "cudnn" (bfloat16 on NVIDIA), "head_major" (fastest on CPU), "pallas" (TPU kernels) or
        "auto".
      fusion_kernel: "xla", "pallas" (TPU kernels, for the folded embedding) or "auto".
      stems: in training, "all" applies every sensor's stem to all views, "drawn" only to the views that see the
        sensor (``models.drawn``, needs folded). Same function.
      folded: multiplies stem, projection and fusion weights with each other before they meet activations: same
        function, fewer FLOPs (``models.folding``).
      platform: "cpu", "gpu" or "tpu" the code is compiled for; "" takes the default backend. Set it when
        compiling ahead of time for another machine.
      sum_whole: how gradients of fsdp-sharded weights are reduced. True: all-reduce over all devices, then keep a
        shard. False: reduce-scatter among the devices that share a state, then reduce the shards between these
        groups (``training.sharding.sums_whole`` chooses).
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    patch: int = 16
    grid: int = 14
    sensors: tuple[str, ...] = SENSOR_KEYS
    fusion: bool = True
    queries: int = 5
    fusion_heads: int = 16
    drop_path: float = 0.1
    prototypes: int = 65536
    head_hidden: int = 2048
    head_bottleneck: int = 256
    init_std: float = 0.02
    dtype: str = "float32"
    scan: bool = False
    remat: str = "none"
    attention: str = "auto"
    fusion_kernel: str = "auto"
    stems: str = "all"
    folded: bool = True
    platform: str = ""
    sum_whole: bool = False

    def __post_init__(self) -> None:
        faults = self._faults()
        if faults:
            raise ValueError("model: " + "; ".join(faults))

    @classmethod
    def of_size(cls, size: str, **overrides: Any) -> ModelSpec:
        """ "s", "b" or "l" (case-insensitive), with any field overridden. Raises ValueError on another size."""
        if size.lower() not in SIZES:
            raise ValueError(f"model: unknown size {size!r}; expected one of {sorted(SIZES)}")
        width, depth, heads = SIZES[size.lower()]
        return cls(**{"width": width, "depth": depth, "heads": heads, **overrides})

    @property
    def stem_width(self) -> int:
        return STEM_FACTOR * self.width

    @property
    def hidden(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def backend(self) -> str:
        """Platform the code is traced for: "cpu", "gpu" or "tpu"."""
        return self.platform or jax.default_backend()

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def stat_dtype(self) -> jnp.dtype:
        """Type of norms, softmax and logits: at least float32."""
        return jnp.promote_types(self.compute_dtype, jnp.float32)

    def patch_features(self, sensor: str) -> int:
        """Length of one flattened patch of ``sensor``: patch * patch * bands."""
        return self.patch * self.patch * len(SENSORS[sensor].bands)

    def _faults(self) -> list[str]:
        faults = []
        wanted = tuple(k for k in SENSOR_KEYS if k in self.sensors)
        if not self.sensors or tuple(self.sensors) != wanted:
            faults.append(f"sensors are {self.sensors}; expected a non-empty subset of {SENSOR_KEYS} in that order")
        if self.width % self.heads:
            faults.append(f"width {self.width} is not divisible by heads {self.heads}")
        if self.fusion and self.stem_width % self.fusion_heads:
            faults.append(f"stem width {self.stem_width} is not divisible by fusion_heads {self.fusion_heads}")
        if not 0.0 <= self.drop_path < 1.0:
            faults.append(f"drop_path is {self.drop_path}; expected 0 <= drop_path < 1")
        choices = {
            "dtype": DTYPES,
            "remat": REMATS,
            "attention": ATTENTIONS,
            "fusion_kernel": FUSION_KERNELS,
            "stems": STEMS,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                faults.append(f"{name} is {getattr(self, name)!r}; expected one of {allowed}")
        if self.stems == "drawn" and not self.folded:
            faults.append("stems 'drawn' needs folded; without it use stems='all'")
        return faults
