"""A train step as one writes it in an afternoon: the baseline for the real one on TPU.

Plain DINO with a ViT on finished 12-band patches: bf16 products, unrolled blocks, data parallel, JAX's
own derivatives and layouts, optax; no views, no fusion, one center. Its MFU counts its own matmul FLOPs, so
the comparison is about how well the compiler uses the chip, not about the amount of work.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@dataclasses.dataclass(frozen=True)
class Naive:
    """Sizes; 12 bands, patch 16, 2 views of 224 px and 8 of 96 px."""

    width: int = 768
    depth: int = 12
    heads: int = 12
    prototypes: int = 65536
    pixels: int = 16 * 16 * 12
    views: tuple[tuple[int, int], ...] = ((2, 196), (8, 36))

    def flops(self) -> float:
        """Matmul FLOPs per image: student forward and backward on all views, teacher forward on the first kind."""
        d, total = self.width, 0.0
        for i, (count, tokens) in enumerate(self.views):
            n = tokens + 1
            embed = 2.0 * tokens * self.pixels * d
            blocks = self.depth * (2.0 * n * 12 * d * d + 4.0 * n * n * d)
            head = 2.0 * (d * 2048 + 2048 * 2048 + 2048 * 256 + 256 * self.prototypes)
            teacher = 1 if i == 0 else 0
            total += count * (embed * (2 + teacher) + (blocks + head) * (3 + teacher))
        return total


def _dense(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["kernel"].astype(jnp.bfloat16) + p["bias"].astype(jnp.bfloat16)


def _norm(p: Any, x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    y = (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6)
    return (y * p["scale"] + p["bias"]).astype(jnp.bfloat16)


def _block(spec: Naive, p: Any, x: jax.Array) -> jax.Array:
    b, n, d = x.shape
    q, k, v = jnp.split(_dense(p["qkv"], _norm(p["norm1"], x)).reshape(b, n, 3 * spec.heads, -1), 3, axis=2)
    x = x + _dense(p["proj"], jax.nn.dot_product_attention(q, k, v).reshape(b, n, d))
    return x + _dense(p["fc2"], jax.nn.gelu(_dense(p["fc1"], _norm(p["norm2"], x)), approximate=False))


def _logits(spec: Naive, p: Any, views: list[jax.Array]) -> jax.Array:
    tokens = []
    for patches in views:
        b, v, n, _ = patches.shape
        x = _dense(p["embed"], patches.reshape(b * v, n, -1))
        x = jnp.concatenate([jnp.broadcast_to(p["cls"].astype(x.dtype), (b * v, 1, spec.width)), x], 1)
        x = x + p["pos"][:, : n + 1].astype(x.dtype)
        for i in range(spec.depth):
            x = _block(spec, p["blocks"][str(i)], x)
        tokens.append(_norm(p["norm"], x)[:, 0].reshape(b, v, -1))
    x = jnp.concatenate(tokens, 1)
    x = jax.nn.gelu(_dense(p["head0"], x), approximate=False)
    x = _dense(p["head2"], jax.nn.gelu(_dense(p["head1"], x), approximate=False)).astype(jnp.float32)
    x = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
    last = p["last"] / jnp.linalg.norm(p["last"], axis=0, keepdims=True)
    return (x.astype(jnp.bfloat16) @ last.astype(jnp.bfloat16)).astype(jnp.float32)


def init(spec: Naive) -> Any:
    """Parameters (zeros: only shapes matter to a compiler)."""

    def dense(a: int, b: int) -> dict[str, jax.Array]:
        return {"kernel": jnp.zeros((a, b)), "bias": jnp.zeros((b,))}

    d = spec.width
    norm = {"scale": jnp.ones((d,)), "bias": jnp.zeros((d,))}
    block = {
        "norm1": norm, "norm2": norm, "qkv": dense(d, 3 * d), "proj": dense(d, d), "fc1": dense(d, 4 * d),
        "fc2": dense(4 * d, d),
    }  # fmt: skip
    return {
        "embed": dense(spec.pixels, d), "cls": jnp.zeros((1, 1, d)), "pos": jnp.zeros((1, 197, d)), "norm": norm,
        "blocks": {str(i): block for i in range(spec.depth)}, "head0": dense(d, 2048), "head1": dense(2048, 2048),
        "head2": dense(2048, 256), "last": jnp.zeros((256, spec.prototypes)),
    }  # fmt: skip


def lower(spec: Naive, mesh: Mesh, images_per_chip: int) -> jax.stages.Lowered:
    """The step lowered for a mesh with one axis ``data``."""
    optimizer = optax.adamw(1e-4)
    replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))

    def step(state: Any, views: list[jax.Array]) -> tuple[Any, jax.Array]:
        params, teacher, moments, center = state
        target = jax.nn.softmax((_logits(spec, teacher, views[:1]) - center) / 0.04, axis=-1)

        def loss(p: Any) -> jax.Array:
            student = jax.nn.log_softmax(_logits(spec, p, views) / 0.1, axis=-1)
            pairs = -jnp.einsum("bgk,bvk->bgv", target, student)
            off = 1.0 - jnp.eye(pairs.shape[1], pairs.shape[2])[None]
            return (pairs * off).sum((1, 2)).mean() / off.sum()

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        teacher = jax.tree.map(lambda t, p: 0.996 * t + 0.004 * p, teacher, params)
        return (params, teacher, moments, 0.9 * center + 0.1 * target.mean((0, 1))), value

    params = jax.eval_shape(lambda: init(spec))
    moments = jax.eval_shape(optimizer.init, params)
    center = jax.ShapeDtypeStruct((spec.prototypes,), jnp.float32)
    state = (params, params, moments, center)
    batch = images_per_chip * mesh.size
    views = [jax.ShapeDtypeStruct((batch, v, n, spec.pixels), jnp.bfloat16) for v, n in spec.views]
    jitted = jax.jit(step, in_shardings=(replicated, split), out_shardings=(replicated, replicated), donate_argnums=0)
    with jax.numpy_rank_promotion("allow"):
        return jitted.lower(state, views)
