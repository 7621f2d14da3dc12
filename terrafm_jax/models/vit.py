"""Pre-norm ViT blocks (timm's and DINO's form), run one by one or as one ``lax.scan``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from terrafm_jax.models.attention import attend, rows
from terrafm_jax.models.layers import MOMENTS, PRODUCT, LayerNorm, Linear, gelu, materialize_gradient, with_parameters
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.tpu import attention_kernels

Params = Mapping[str, Any]


class Attention(nnx.Module):
    """Multi-head self-attention; ``qkv`` is packed as [3, heads, head_dim]."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.qkv = Linear(spec, spec.width, 3 * spec.width, rngs=rngs)
        self.proj = Linear(spec, spec.width, spec.width, rngs=rngs)

    def __call__(self, x: Array, views: int, tokens: int) -> Array:
        """[views, N, d] or [views * N, d]; only the first ``tokens`` of the N rows of a view are attended to."""
        qkv = self.qkv(x)
        mixed = attend(qkv.reshape(views, -1, qkv.shape[-1]), self.spec, tokens)
        return self.proj(mixed.reshape(x.shape))


class Mlp(nnx.Module):
    """d -> mlp_ratio * d -> d with exact GELU."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.fc1 = Linear(spec, spec.width, spec.hidden, rngs=rngs)
        self.fc2 = Linear(spec, spec.hidden, spec.width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(gelu(self.fc1(x)))


class Block(nnx.Module):
    """``x + keep * attn(norm1(x))``, then the same with the MLP."""

    def __init__(self, spec: ModelSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        self.norm1 = LayerNorm(spec, spec.width)
        self.attn = Attention(spec, rngs=rngs)
        self.norm2 = LayerNorm(spec, spec.width)
        self.mlp = Mlp(spec, rngs=rngs)

    def __call__(self, x: Array, keep: Array | None, tokens: int) -> Array:
        """[B, N, d]; ``keep`` [2, B] scales the two residuals of each sample (0 drops), or None.

        The first ``tokens`` of the N rows are tokens, the others padding.
        """
        views, rows, width = x.shape
        if self.spec.backend == "gpu":  # as an axis, views would become the minor one in memory, at the price of copies
            x = x.reshape(views * rows, width)
        x = materialize_gradient(x, self.spec)
        x = materialize_gradient(x + _scaled(self.attn(self.norm1(x), views, tokens), keep, 0), self.spec)
        x = x + _scaled(self.mlp(self.norm2(x)), keep, 1)
        return x.reshape(views, rows, width)


def _scaled(residual: Array, keep: Array | None, which: int) -> Array:
    if keep is None:
        return residual
    factors = keep[which]
    if residual.ndim == 2:
        each = jnp.repeat(factors, residual.shape[0] // factors.shape[0])
        return residual * each[:, None].astype(residual.dtype)
    return residual * factors[:, None, None].astype(residual.dtype)


def apply_block(
    spec: ModelSpec, params: Params, x: Array, keep: Array | None = None, tokens: int | None = None
) -> Array:
    """One block with plain parameters: [B, N, d] -> [B, N, d]. Rows from ``tokens`` on are padding; None: no row is."""
    return with_parameters(Block, spec, params)(x, keep, x.shape[1] if tokens is None else tokens)


def drop_path_keep(spec: ModelSpec, batch: int, key: Array) -> Array:
    """float32 [depth, 2, B]: 0 where a sample skips a residual, else 1 / keep probability.

    The rate rises linearly from 0 in the first block to ``spec.drop_path`` in the last (DINO).
    """
    kept = 1.0 - np.linspace(0.0, spec.drop_path, spec.depth, dtype=np.float32)[:, None, None]
    draws = jax.random.uniform(key, (spec.depth, 2, batch), jnp.float32)
    return jnp.where(draws < kept, 1.0 / kept, 0.0)


def _layer_step(spec: ModelSpec, tokens: Sequence[int]) -> Any:
    """One layer over several token arrays, ``step(params, x, keep)``, recomputed in the backward pass by ``remat``."""

    def step(params: Params, x: tuple[Array, ...], keep: tuple[Array | None, ...]) -> tuple[Array, ...]:
        return tuple(apply_block(spec, params, *each) for each in zip(x, keep, tokens, strict=True))

    if spec.remat == "none":
        return step
    kept = jax.checkpoint_policies.save_only_these_names(PRODUCT, MOMENTS, attention_kernels.SAVED)
    return jax.checkpoint(step, policy=kept if spec.remat == "dots" else None, prevent_cse=not spec.scan)


def stack_blocks(blocks: Params, depth: int) -> Params:
    """Per-layer dicts "0", "1", ... -> one dict with a leading layer axis; differentiable."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[str(i)] for i in range(depth)))


def run_blocks(
    spec: ModelSpec, blocks: Params, x: Array, keep: Array | None, taps: Sequence[int] = ()
) -> tuple[Array, dict[int, Array]]:
    """All blocks over tokens [B, N, d]. Returns the last tokens and those after each block in ``taps``."""
    (last,), tapped = run_blocks_together(spec, blocks, (x,), (keep,), taps)
    return last, {i: tokens[0] for i, tokens in tapped.items()}


def run_blocks_together(
    spec: ModelSpec, blocks: Params, x: Sequence[Array], keep: Sequence[Array | None], taps: Sequence[int] = ()
) -> tuple[tuple[Array, ...], dict[int, tuple[Array, ...]]]:
    """All blocks over several token arrays [B_i, N_i, d], layer by layer.

    Each layer's weights are read and cast once for all arrays. In the backward pass of a scan, their gradients are
    added locally before the all-reduce over devices: one collective per layer instead of one per array.

    Args:
      keep: per array the result of :func:`drop_path_keep`, or None.
    """
    tokens = [a.shape[1] for a in x]
    step = _layer_step(spec, tokens)
    x, keep, tapped = tuple(_pad(a, rows(spec, n)) for a, n in zip(x, tokens, strict=True)), tuple(keep), {}
    if not spec.scan:
        for i in range(spec.depth):
            x = step(blocks[str(i)], x, tuple(None if k is None else k[i] for k in keep))
            if i in taps:
                tapped[i] = x
        return _cut(x, tokens), {i: _cut(a, tokens) for i, a in tapped.items()}
    stacked = stack_blocks(blocks, spec.depth)
    start = 0
    for stop in sorted({*(i + 1 for i in taps), spec.depth}):  # one scan up to each tap
        part = jax.tree.map(lambda leaf, a=start, b=stop: leaf[a:b], (stacked, keep))
        x, _ = lax.scan(lambda carry, layer: (step(layer[0], carry, layer[1]), None), x, part)
        start = stop
        if stop - 1 in taps:
            tapped[stop - 1] = x
    return _cut(x, tokens), {i: _cut(a, tokens) for i, a in tapped.items()}


def _pad(x: Array, length: int) -> Array:
    """[B, N, d] -> [B, length, d], zero-padded. No token attends to the padding, so it gives no gradient."""
    return x if x.shape[1] == length else jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0)))


def _cut(x: Sequence[Array], tokens: Sequence[int]) -> tuple[Array, ...]:
    return tuple(a[:, :n] for a, n in zip(x, tokens, strict=True))
