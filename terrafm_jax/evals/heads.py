"""Task heads on top of encoder features, as pure functions: linear, linear per patch, UPerNet with an auxiliary FCN.

A head is ``init(key) -> (params, state)`` and ``apply(params, state, features, train, key) -> (outputs, state)``;
``state`` holds running statistics of batch norms. ``outputs`` is a tuple: the logits, then auxiliary logits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

MOMENTUM, EPS = 0.1, 1e-5  # of batch norm, as PyTorch has them
AUXILIARY_WEIGHT = 0.4


class Features(NamedTuple):
    """cls [B, d] and, for dense heads, maps: one [B, h, w, d] per chosen layer, shallow to deep."""

    cls: Array
    maps: tuple[Array, ...] = ()


Applied = tuple[tuple[Array, ...], dict]  # outputs, new state


class Head(NamedTuple):
    init: Callable[[Array], tuple[dict, dict]]
    apply: Callable[..., Applied]


def exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, to be traced with full precision in its products and their gradients.

    TPU and GPU round the operands of float32 products by default (bf16, TF32), and numbers of a probe are compared
    between machines. Fine-tuning computes its heads without it: UPerNet costs more than the encoder before it.
    """

    @functools.wraps(function)
    def traced(*args: Any, **options: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return function(*args, **options)

    return traced


# --- layers ---------------------------------------------------------------------------------------------------


def _dense_init(key: Array, inputs: int, outputs: int) -> dict[str, Array]:
    """As torch.nn.Linear leaves it: uniform within 1 / sqrt(inputs)."""
    a, b = jax.random.split(key)
    bound = inputs**-0.5
    return {
        "kernel": jax.random.uniform(a, (inputs, outputs), minval=-bound, maxval=bound),
        "bias": jax.random.uniform(b, (outputs,), minval=-bound, maxval=bound),
    }


def _dense(p: dict[str, Array], x: Array) -> Array:
    out = jnp.matmul(x, p["kernel"], preferred_element_type=jnp.float32)
    return out + p["bias"].reshape((1,) * (out.ndim - 1) + (-1,))


def _conv_init(key: Array, size: int, inputs: int, outputs: int) -> dict[str, Array]:
    scale = (2.0 / (size * size * inputs)) ** 0.5
    return {"kernel": scale * jax.random.normal(key, (size, size, inputs, outputs))}


def _conv(p: dict[str, Array], x: Array) -> Array:
    return jax.lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def norm_init(width: int, affine: bool = True) -> tuple[dict[str, Array], dict[str, Array]]:
    params = {"scale": jnp.ones(width), "bias": jnp.zeros(width)} if affine else {}
    return params, {"mean": jnp.zeros(width), "var": jnp.ones(width)}


def batch_norm(params: dict, state: dict, x: Array, train: bool) -> tuple[Array, dict]:
    """Over all axes but the last. Inside a jit over global arrays the batch is the global one (synchronized)."""
    axes = tuple(range(x.ndim - 1))
    row = (1,) * (x.ndim - 1) + (-1,)
    mean, var = state["mean"], state["var"]
    if train:
        count = np.prod([x.shape[a] for a in axes])
        mean, var = x.mean(axes), x.var(axes)
        unbiased = var * count / max(count - 1, 1)
        state = {
            "mean": (1 - MOMENTUM) * state["mean"] + MOMENTUM * mean,
            "var": (1 - MOMENTUM) * state["var"] + MOMENTUM * unbiased,
        }
    x = (x - mean.reshape(row)) * jax.lax.rsqrt(var.reshape(row) + EPS)
    if params:
        x = x * params["scale"].reshape(row) + params["bias"].reshape(row)
    return x, state


def resize(x: Array, size: Sequence[int]) -> Array:
    """[B, H, W, C] -> [B, *size, C], bilinear, half-pixel centers, no antialias (as segmentation heads do)."""
    if x.shape[1:3] == tuple(size):
        return x
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)


# --- heads ----------------------------------------------------------------------------------------------------


def linear_head(width: int, outputs: int, *, norm: bool = True, affine: bool = True) -> Head:
    """(BatchNorm and) one linear layer on the class token; logits [B, outputs]."""

    def init(key: Array) -> tuple[dict, dict]:
        params: dict[str, Any] = {"linear": _dense_init(key, width, outputs)}
        state: dict[str, Any] = {}
        if norm:
            params["norm"], state["norm"] = norm_init(width, affine)
        return params, state

    def apply(params: dict, state: dict, features: Features, train: bool = False, key: Array | None = None) -> Applied:
        x = features.cls.astype(jnp.float32)
        if norm:
            x, found = batch_norm(params["norm"], state["norm"], x, train)
            state = {**state, "norm": found}
        return (_dense(params["linear"], x),), state

    return Head(init, apply)


def patch_linear_head(width: int, classes: int, patch: int) -> Head:
    """Linear to classes x patch x patch from every patch token of the last map; logits [B, h * patch, w * patch, C].

    The "linear" segmentation protocol of Galileo: no batch norm, logits are resized to the label afterwards.
    """

    def init(key: Array) -> tuple[dict, dict]:
        return {"linear": _dense_init(key, width, classes * patch * patch)}, {}

    def apply(params: dict, state: dict, features: Features, train: bool = False, key: Array | None = None) -> Applied:
        x = _dense(params["linear"], features.maps[-1].astype(jnp.float32))
        batch, h, w, _ = x.shape
        x = x.reshape(batch, h, w, patch, patch, classes).transpose(0, 1, 3, 2, 4, 5)
        return (x.reshape(batch, h * patch, w * patch, classes),), state

    return Head(init, apply)


def pooling_matrix(size: int, bins: int) -> np.ndarray:
    """float32 [bins, size]: averages of torch's adaptive pooling (bins may overlap)."""
    matrix = np.zeros((bins, size), np.float32)
    for i in range(bins):
        lo, hi = (i * size) // bins, -((-(i + 1) * size) // bins)
        matrix[i, lo:hi] = 1.0 / (hi - lo)
    return matrix


POOLS = (1, 2, 3, 6)


class _Scope:
    """Runs the layers of a UPerNet either to create or to use their parameters, so that the network stands once."""

    def __init__(self, params: dict | None, state: dict, key: Array | None, train: bool):
        self.creating = params is None
        self.params: dict = {} if params is None else params
        self.state, self.new, self.key, self.train = state, {}, key, train

    def _next(self) -> Array:
        self.key, key = jax.random.split(self.key)
        return key

    def block(self, name: str, x: Array, size: int, outputs: int) -> Array:
        """Convolution, batch norm, ReLU."""
        if self.creating:
            self.params[name] = _conv_init(self._next(), size, x.shape[-1], outputs)
        return jax.nn.relu(self.norm(name + "_norm", _conv(self.params[name], x)))

    def norm(self, name: str, x: Array) -> Array:
        if self.creating:
            self.params[name], self.state[name] = norm_init(x.shape[-1])
        x, self.new[name] = batch_norm(self.params[name], self.state[name], x, self.train)
        return x

    def double(self, name: str, x: Array) -> Array:
        """Transposed 2x2 convolution of stride 2."""
        batch, h, w, c = x.shape
        if self.creating:
            made = _dense_init(self._next(), c, 4 * c)
            self.params[name] = {"kernel": made["kernel"], "bias": made["bias"][:c]}
        p = self.params[name]
        x = jnp.matmul(x, p["kernel"]).reshape(batch, h, w, 2, 2, c) + p["bias"].reshape(1, 1, 1, 1, 1, c)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, 2 * h, 2 * w, c)

    def classify(self, name: str, x: Array, classes: int) -> Array:
        if self.creating:
            self.params[name] = _dense_init(self._next(), x.shape[-1], classes)
        elif self.train and self.key is not None:
            keep = jax.random.bernoulli(self._next(), 0.9, (x.shape[0], 1, 1, x.shape[-1]))
            x = jnp.where(keep, x / 0.9, 0.0)  # whole channels, dropout 0.1
        return _dense(self.params[name], x)


def upernet_head(width: int, classes: int, channels: int) -> Head:
    """UPerNet on four maps of one grid, with an FCN of half its ``channels`` on the third as auxiliary output.

    Neck 4x, 2x, 1x, 1/2x; pyramid pooling (1, 2, 3, 6) on the last; top-down additions; logits at 4x the grid.
    Source: Xiao et al. 2018 (UPerNet) with the neck for plain ViTs that Copernicus-Bench uses.
    """

    def run(scope: _Scope, maps: Sequence[Array]) -> tuple[Array, Array]:
        a, b, c, d = (m.astype(jnp.float32) for m in maps)
        a = scope.double("neck0b", jax.nn.gelu(scope.norm("neck0_norm", scope.double("neck0a", a)), approximate=False))
        b = scope.double("neck1", b)
        h, w = -(-d.shape[1] // 2), -(-d.shape[2] // 2)
        d = jax.lax.reduce_window(d, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "SAME")
        pooled = [d]
        for bins in POOLS:
            rows, columns = jnp.asarray(pooling_matrix(h, bins)), jnp.asarray(pooling_matrix(w, bins))
            small = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, d)
            pooled.append(resize(scope.block(f"pool{bins}", small, 1, channels), (h, w)))
        levels = [scope.block(f"lateral{i}", x, 1, channels) for i, x in enumerate((a, b, c))]
        levels.append(scope.block("pools", jnp.concatenate(pooled, -1), 3, channels))
        for i in (2, 1, 0):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[1:3])
        outs = [scope.block(f"fpn{i}", levels[i], 3, channels) for i in range(3)] + [levels[3]]
        size = outs[0].shape[1:3]
        fused = scope.block("fuse", jnp.concatenate([resize(x, size) for x in outs], -1), 3, channels)
        logits = scope.classify("classes", fused, classes)
        return logits, scope.classify("aux_classes", scope.block("aux", c, 3, max(1, channels // 2)), classes)

    def init(key: Array) -> tuple[dict, dict]:
        scope = _Scope(None, {}, key, False)
        run(scope, [jnp.zeros((1, 2, 2, width))] * 4)
        return scope.params, scope.state

    def apply(params: dict, state: dict, features: Features, train: bool = False, key: Array | None = None) -> Applied:
        if len(features.maps) != 4:
            raise ValueError(f"upernet: expected maps of 4 layers, found {len(features.maps)}")
        scope = _Scope(params, state, key, train)
        outputs = run(scope, features.maps)
        return outputs, scope.new if train else state

    return Head(init, apply)


def upernet_layers(depth: int) -> tuple[int, int, int, int]:
    """The four blocks whose outputs feed UPerNet: the ends of the quarters (2, 5, 8, 11 of 12)."""
    return tuple(max(0, depth * (i + 1) // 4 - 1) for i in range(4))


# --- losses ---------------------------------------------------------------------------------------------------


def cross_entropy(logits: Array, labels: Array, *, ignore: int = -1, class_weights: Array | None = None) -> Array:
    """Mean over labels that are not ``ignore``; logits [..., C], labels int [...]. 0 when none counts."""
    counted = labels != ignore
    safe = jnp.where(counted, labels, 0)
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), safe[..., None], axis=-1)[..., 0]
    weight = counted.astype(jnp.float32)
    if class_weights is not None:
        weight = weight * class_weights[safe]
    return -(picked * weight).sum() / jnp.maximum(weight.sum(), 1e-9)


def soft_cross_entropy(logits: Array, targets: Array) -> Array:
    """Against probabilities [B, C] (mixup)."""
    return -(targets * jax.nn.log_softmax(logits, axis=-1)).sum(-1).mean()


def binary_cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean over samples and classes; labels in 0..1."""
    return (jnp.maximum(logits, 0) - logits * labels + jnp.log1p(jnp.exp(-jnp.abs(logits)))).mean()


def dense_loss(outputs: tuple[Array, ...], labels: Array, *, ignore: int, class_weights: Array | None = None) -> Array:
    """Cross-entropy at label resolution [B, H, W]; auxiliary outputs count 0.4."""
    total = jnp.zeros(())
    for i, logits in enumerate(outputs):
        part = cross_entropy(resize(logits, labels.shape[1:3]), labels, ignore=ignore, class_weights=class_weights)
        total = total + (AUXILIARY_WEIGHT if i else 1.0) * part
    return total
