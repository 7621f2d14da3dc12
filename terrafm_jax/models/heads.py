"""The DINO projection head: an MLP, an L2 norm and prototypes of unit length."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
from flax import nnx
from jax import Array, lax

from terrafm_jax.models.layers import Linear, gelu, linear, uniform_fan_in
from terrafm_jax.models.placement import gather_columns
from terrafm_jax.models.spec import ModelSpec

_TINY = 1e-12  # eps of torch.nn.functional.normalize


def unit(x: Array, axis: int, dtype: jnp.dtype) -> Array:
    """``x`` at unit length along ``axis``, computed in ``dtype``; gradients stay finite at zero."""
    x = x.astype(dtype)
    square = jnp.square(x).sum(axis, keepdims=True)
    return x * lax.rsqrt(jnp.maximum(square, _TINY**2))


class Prototypes(nnx.Module):
    """Weight-normed linear layer without bias, its gain fixed at 1: kernel [bottleneck, K]."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        shape = (spec.head_bottleneck, spec.prototypes)
        self.kernel = nnx.Param(uniform_fan_in(rngs.params(), shape, spec.head_bottleneck))


class DinoHead(nnx.Module):
    """Class tokens [B, d] -> logits [B, K] (DINO, arXiv 2104.14294)."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        sizes = (spec.width, spec.head_hidden, spec.head_hidden, spec.head_bottleneck)
        self.mlp = nnx.List([Linear(spec, a, b, rngs=rngs) for a, b in itertools.pairwise(sizes)])
        self.last_layer = Prototypes(spec, rngs=rngs)

    def bottleneck(self, cls: Array) -> Array:
        """[B, d] -> unit vectors [B, bottleneck] in ``stat_dtype``."""
        first, second, third = self.mlp
        return unit(third(gelu(second(gelu(first(cls))))), -1, self.spec.stat_dtype)

    def prototypes(self) -> Array:
        """Unit columns [bottleneck, K] in ``stat_dtype``; each device normalizes its own before they are gathered."""
        columns = unit(self.last_layer.kernel[...], 0, self.spec.stat_dtype)
        return gather_columns(columns, self.spec)

    def __call__(self, cls: Array) -> Array:
        """Logits [B, K] in ``stat_dtype``: products in the compute dtype with float32 sums."""
        return linear(self.bottleneck(cls), self.prototypes(), None, self.spec, out_dtype=self.spec.stat_dtype)
