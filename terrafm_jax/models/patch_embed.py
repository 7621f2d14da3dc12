"""From patches of one or several sensors to tokens of the backbone: stems, fusion, projection.

Names and shapes of the released path are upstream's. The fusion is a reconstruction (the paper gives
5 learned queries per position and a learned pooling; Panopticon, its ancestor, the rest). With a single
sensor present it equals the released path, whatever the queries, keys and pooling vector are.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from terrafm_jax.models import folding, fusion_rows
from terrafm_jax.models.columns import stem_product
from terrafm_jax.models.layers import LayerNorm, Linear, expand, precision, trunc_normal, uniform_fan_in
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import NORMALIZED_MEAN


class Stem(nnx.Module):
    """A convolution with kernel = stride = patch, as a matrix product: kernel [p*p*C, 3d].

    The bias starts at minus the kernel's response to the mean image. Normalised values lie around 0.5, not 0; with a
    random bias that constant outweighs what differs between patches, tokens start out nearly alike, and small models
    spend hundreds of steps near collapse (docs/experiments.md).
    """

    def __init__(self, spec: ModelSpec, sensor: str, *, rngs: nnx.Rngs):
        fan_in = spec.patch_features(sensor)
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), (fan_in, spec.stem_width), fan_in))
        self.bias = nnx.Param(-NORMALIZED_MEAN * self.kernel[...].sum(0))


class Projection(nnx.Module):
    """proj1 (no bias), LayerNorm (eps 1e-5), proj2, proj3: 3d -> 3d -> 3d -> d without a non-linearity."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        wide = spec.stem_width
        self.proj1 = Linear(spec, wide, wide, bias=False, rngs=rngs)
        self.norm_input = LayerNorm(spec, wide, eps=fusion_rows.NORM_EPS)
        self.proj2 = Linear(spec, wide, wide, rngs=rngs)
        self.proj3 = Linear(spec, wide, spec.width, rngs=rngs)


class Fusion(nnx.Module):
    """Parameters of the cross-attention over sensors: queries [Q, 3d], key kernel [3d, 3d], pool [3d]."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        wide = spec.stem_width
        self.spec = spec
        self.queries = nnx.Param(trunc_normal(rngs.params(), (spec.queries, wide)))
        self.key = Linear(spec, wide, wide, bias=False, rngs=rngs)
        self.pool = nnx.Param(trunc_normal(rngs.params(), (wide,)))

    def __call__(self, tokens: Array, values: Array, present: Array | None) -> Array:
        """As written in the paper: tokens, values [B, h, w, M, 3d] -> the queries' vectors [B, h, w, Q, 3d]."""
        spec = self.spec
        exact = precision(spec.compute_dtype)
        split = (spec.fusion_heads, spec.stem_width // spec.fusion_heads)
        keys = self.key(tokens).reshape(*tokens.shape[:-1], *split)
        queries = self.queries[...].reshape(spec.queries, *split).astype(spec.compute_dtype)
        scores = jnp.einsum(
            "bijmhc,qhc->bijqhm", keys, queries, precision=exact, preferred_element_type=spec.stat_dtype
        )
        scores = scores * split[1] ** -0.5
        if present is not None:
            scores = jnp.where(present[:, None, None, None, None, :], scores, fusion_rows.ABSENT)
        weights = jax.nn.softmax(scores, axis=-1).astype(spec.compute_dtype)
        heads = values.reshape(*values.shape[:-1], *split)
        fused = jnp.einsum("bijqhm,bijmhc->bijqhc", weights, heads, precision=exact)
        return fused.reshape(*fused.shape[:4], spec.stem_width)

    def pooled(self, normed: Array) -> Array:
        """Softmax-weighted mean over the queries: [B, h, w, Q, 3d] -> [B, h, w, 3d]."""
        pool = self.pool[...]
        logits = (normed.astype(self.spec.stat_dtype) * expand(pool, normed.ndim)).sum(-1)
        weights = jax.nn.softmax(logits, axis=-1)[..., None].astype(normed.dtype)
        return (weights * normed).sum(-2)


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

        Kernels for patches are brought into the order of ``models.columns`` if ``by_columns``.
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
        """Follows the published order of operations, one product after another.

        Args:
          patches: per sensor [B, h, w, p*p*C], or the other layout of ``models.columns``.
          present: bool [B, M] over the keys of ``patches``, or None when all are there. Without fusion
            weights it names one sensor a sample.
        """
        tokens = []
        for sensor, x in patches.items():
            kernel, bias = self.stem(sensor)
            tokens.append(stem_product(x, kernel, bias, self.spec))
        projection = self.projection
        if len(tokens) == 1:
            fused = projection.norm_input(projection.proj1(tokens[0]))
        elif not self.spec.fusion:
            chosen = folding.select(dict(zip(patches, tokens, strict=True)), present)
            fused = projection.norm_input(projection.proj1(chosen))
        else:
            stacked = jnp.stack(tokens, axis=-2)
            fused = self.fusion.pooled(projection.norm_input(self.fusion(stacked, projection.proj1(stacked), present)))
        return projection.proj3(projection.proj2(fused))
