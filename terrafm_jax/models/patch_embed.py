"""From patches of one or several sensors to tokens of the backbone: stems, fusion, projection.

Names and shapes of the released path are upstream's; what fuses several sensors is ours (``fusion``).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from flax import nnx
from jax import Array

from terrafm_jax.models import folding
from terrafm_jax.models.fusion import NORM_EPS, Fusion
from terrafm_jax.models.layers import LayerNorm, Linear
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.stems import Stem, stem_product


class Projection(nnx.Module):
    """proj1 (no bias), LayerNorm (eps 1e-5), proj2, proj3: 3d -> 3d -> 3d -> d without a non-linearity."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        wide = spec.stem_width
        self.proj1 = Linear(spec, wide, wide, bias=False, rngs=rngs)
        self.norm_input = LayerNorm(spec, wide, eps=NORM_EPS)
        self.proj2 = Linear(spec, wide, wide, rngs=rngs)
        self.proj3 = Linear(spec, wide, spec.width, rngs=rngs)


class PatchEmbed(nnx.Module):
    """Patches of the sensors present -> tokens ``[B, h, w, d]``."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        for sensor in spec.sensors:
            setattr(self, f"conv2d_{sensor}", Stem(spec, sensor, rngs=rngs))
            setattr(self, f"{sensor}_embed", nnx.Param(jnp.zeros((1, spec.stem_width), jnp.float32)))
        self.projection = Projection(spec, rngs=rngs)
        if spec.fusion:
            self.fusion = Fusion(spec, rngs=rngs)

    def stem(self, sensor: str) -> tuple[Array, Array]:
        """Kernel [p*p*C, 3d] and bias [3d] of one sensor, the modality embedding included."""
        stem = getattr(self, f"conv2d_{sensor}")
        return stem.kernel[...], stem.bias[...] + getattr(self, f"{sensor}_embed")[0]

    def fold(self, *, by_columns: bool = False) -> folding.Folded:
        """Multiplies the weights that meet without a non-linearity in between; gradients flow through.

        ``by_columns`` permutes the stem kernels for the column layout of ``models.stems``.
        """
        projection = self.projection
        return folding.fold(
            self.spec,
            stems={sensor: self.stem(sensor) for sensor in self.spec.sensors},
            proj1=projection.proj1.kernel[...],
            norm=(projection.norm_input.scale[...], projection.norm_input.bias[...]),
            proj2=(projection.proj2.kernel[...], projection.proj2.bias[...]),
            proj3=(projection.proj3.kernel[...], projection.proj3.bias[...]),
            fusion=(self.fusion.queries[...], self.fusion.key.kernel[...], self.fusion.pool[...])
            if self.spec.fusion
            else None,
            by_columns=by_columns,
        )

    def __call__(self, patches: Mapping[str, Array], present: Array | None) -> Array:
        """The unfolded form, in the published order of operations.

        Args:
          patches: per sensor [B, h, w, p*p*C], or the other layout of ``models.stems``.
          present: bool [B, M] over the keys of ``patches``, or None when all are there. Without fusion
            weights it has exactly one True per sample.
        """
        tokens = []
        for sensor, x in patches.items():
            kernel, bias = self.stem(sensor)
            tokens.append(stem_product(x, kernel, bias, self.spec))
        projection = self.projection
        if len(tokens) == 1:
            fused = projection.norm_input(projection.proj1(tokens[0]))
        elif not self.spec.fusion:
            chosen = folding.select(tokens, present)
            fused = projection.norm_input(projection.proj1(chosen))
        else:
            stacked = jnp.stack(tokens, axis=-2)
            fused = self.fusion.pooled(projection.norm_input(self.fusion(stacked, projection.proj1(stacked), present)))
        return projection.proj3(projection.proj2(fused))
