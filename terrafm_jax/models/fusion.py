"""Cross-attention over the sensors of a view as the paper describes it, and what all its implementations share.

A reconstruction: the paper gives 5 learned queries per position and a learned pooling; the rest follows Panopticon, on
which it builds. With a single sensor present the result does not depend on queries, keys and pooling vector: it is that
of the released network. ``folding`` and, on TPU, ``tpu.fusion_kernels`` compute the same with fewer operations.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from terrafm_jax.models.layers import Linear, expand, precision, trunc_normal
from terrafm_jax.models.spec import ModelSpec

NORM_EPS = 1e-5  # of the LayerNorm over a query's vector: PyTorch's default, which upstream keeps for this norm alone
ABSENT = -1e30  # score of an absent sensor: finite, so that a view without any sensor stays finite


def masked(scores: Sequence[Array], present: Array | None) -> list[Array]:
    """Scores [B, ...] of every sensor with ABSENT where it is absent; ``present``: bool [B, M] or None."""
    if present is None:
        return list(scores)
    seen = (lax.expand_dims(present[:, i], range(1, score.ndim)) for i, score in enumerate(scores))
    return [jnp.where(there, score, ABSENT) for there, score in zip(seen, scores, strict=True)]


def head_columns(spec: ModelSpec) -> np.ndarray:
    """[D, H]: 1 where a column of D belongs to the head.

    A product with it sums over each head's columns; one with its transpose repeats numbers over them. An explicit axis
    of heads would be padded to nearly twice its size, as a head's 144 or so columns do not fill whole vector registers.
    """
    return np.repeat(np.eye(spec.fusion_heads), spec.stem_width // spec.fusion_heads, axis=0)


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
            scores = jnp.where(present[:, None, None, None, None, :], scores, ABSENT)
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
