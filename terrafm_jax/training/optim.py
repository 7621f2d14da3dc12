"""DINO's optimizer: AdamW with scheduled decay, per-tensor clipping and a rule for every parameter.

Rules are an ordered list of (regular expression, :class:`Rule`); the first that matches the whole path
of a parameter ("backbone/blocks/0/attn/qkv/kernel") decides, and a parameter without a rule is an error.

Schedules, bias correction and the freeze of the last layer are functions of the step, so the optimizer's
state is nothing but the two moments. Sources: AdamW arXiv 1711.05101, recipe arXiv 2104.14294.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from terrafm_jax.ssl import schedules

Params = Any  # nested dicts of arrays


class RuleError(ValueError):
    """No rule covers a parameter."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """How one parameter is updated.

    Attributes:
      decay: whether weight decay applies.
      lr: multiplier of the learning rate.
      frozen_steps: the parameter has no gradient before this step, as if torch's ``grad`` were None: neither
        its moments nor its weight decay nor its bias correction advance.
    """

    decay: bool = True
    lr: float = 1.0
    frozen_steps: int = 0


Rules = Sequence[tuple[str, Rule]]


@dataclasses.dataclass(frozen=True)
class OptimSpec:
    """Hyper-parameters of the optimizer; durations in steps. Defaults are DINO's.

    Attributes:
      batch_size: of the global batch; ``base_lr`` is per 256 samples.
      total_steps: length of the run, where the schedules end (learning rate, decay, the teacher's momentum).
    """

    batch_size: int
    total_steps: int
    warmup_steps: int = 0
    base_lr: float = 5e-4
    min_lr: float = 1e-6
    decay_start: float = 0.04
    decay_end: float = 0.4
    clip: float = 3.0  # per tensor, not global; 0 switches it off
    freeze_last_steps: int = 0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        faults = []
        for name, low in (("batch_size", 1), ("total_steps", 1), ("warmup_steps", 0), ("freeze_last_steps", 0)):
            if getattr(self, name) < low:
                faults.append(f"{name} = {getattr(self, name)}, expected >= {low}")
        for name in ("base_lr", "min_lr", "decay_start", "decay_end", "clip", "eps"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name} = {getattr(self, name)}, expected >= 0")
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                faults.append(f"{name} = {getattr(self, name)}, expected 0 <= value < 1")
        if faults:
            raise ValueError("optim: " + "; ".join(faults))

    def learning_rate(self, step: jax.Array | int) -> jax.Array:
        return schedules.learning_rate(
            step,
            base_lr=self.base_lr,
            batch_size=self.batch_size,
            warmup_steps=self.warmup_steps,
            min_lr=self.min_lr,
            total_steps=self.total_steps,
        )

    def weight_decay(self, step: jax.Array | int) -> jax.Array:
        return schedules.cosine(step, self.decay_start, self.decay_end, self.total_steps)


def dino_rules(freeze_last_steps: int = 0) -> Rules:
    """DINO's groups: no decay for biases, norms and other vectors; the last layer starts frozen.

    Class token, position and modality embeddings have more than one axis and are decayed, as upstream.
    """
    return (
        (r"head/last_layer/.*", Rule(decay=True, frozen_steps=freeze_last_steps)),
        (r".*/(bias|scale)", Rule(decay=False)),
        (r".*/fusion/pool", Rule(decay=False)),  # one axis only: DINO's criterion
        (r".*/(kernel|cls_token|pos_embed|[a-z0-9_]+_embed|queries)", Rule(decay=True)),
    )


def paths(tree: Params) -> list[str]:
    """Paths of the leaves of a nested dict, in the order of ``jax.tree.leaves``."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in found]


def match(rules: Sequence[tuple[str, Any]], tree: Params, kind: str = "optimizer") -> Any:
    """Tree of the first matching rule per parameter. Raises RuleError naming every parameter without one."""
    compiled = [(re.compile(pattern), rule) for pattern, rule in rules]
    found, missing = [], []
    for path in paths(tree):
        rule = next((rule for pattern, rule in compiled if pattern.fullmatch(path)), None)
        found.append(rule)
        if rule is None:
            missing.append(path)
    if missing:
        raise RuleError(f"no {kind} rule for {missing}; rules are {[pattern for pattern, _ in rules]}")
    return jax.tree.unflatten(jax.tree.structure(tree), found)


class Moments(NamedTuple):
    """State of the optimizer: first and second moments, shaped like the parameters, fp32."""

    mu: Params
    nu: Params


class Optimizer(NamedTuple):
    """``init(params) -> Moments`` and ``update(grads, moments, params, step) -> (params, moments, metrics)``."""

    init: Callable[[Params], Moments]
    update: Callable[[Params, Moments, Params, jax.Array], tuple[Params, Moments, dict[str, jax.Array]]]
    rules: Any  # tree of Rule


def clip_factor(norm: jax.Array, limit: float) -> jax.Array:
    """DINO's factor for one tensor: ``limit / (norm + 1e-6)``, at most 1."""
    return jnp.minimum(1.0, limit / (norm + 1e-6))


def _adamw_leaf(
    spec: OptimSpec, rule: Rule, step: jax.Array, grad: jax.Array, mu: jax.Array, nu: jax.Array, param: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One parameter: (param, mu, nu, norm of the unclipped gradient), in torch.optim.AdamW's order of operations."""
    grad = grad.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(grad)))
    if spec.clip:
        grad = grad * clip_factor(norm, spec.clip)
    lr = spec.learning_rate(step) * rule.lr
    count = jnp.maximum(step + 1 - rule.frozen_steps, 1).astype(jnp.float32)
    new_mu = spec.b1 * mu + (1.0 - spec.b1) * grad
    new_nu = spec.b2 * nu + (1.0 - spec.b2) * jnp.square(grad)
    denominator = jnp.sqrt(new_nu) / jnp.sqrt(1.0 - spec.b2**count) + spec.eps
    decayed = param * (1.0 - lr * spec.weight_decay(step)) if rule.decay else param
    new_param = decayed - (lr / (1.0 - spec.b1**count)) * new_mu / denominator
    if rule.frozen_steps:
        active = step >= rule.frozen_steps
        new_param, new_mu, new_nu = (
            jnp.where(active, new, old) for new, old in ((new_param, param), (new_mu, mu), (new_nu, nu))
        )
    return new_param, new_mu, new_nu, norm


def make_optimizer(spec: OptimSpec, params: Params, rules: Rules | None = None) -> Optimizer:
    """AdamW by rules for parameters like ``params`` (arrays or ShapeDtypeStructs; only paths are read).

    Args:
      spec: hyper-parameters.
      params: nested dict that the rules must cover.
      rules: ordered rules; :func:`dino_rules` by default.

    Raises:
      RuleError: parameters that no rule covers, all named.
    """
    tree = match(dino_rules(spec.freeze_last_steps) if rules is None else rules, params)
    leaf_rules = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Rule))

    def init(params: Params) -> Moments:
        def zeros() -> Params:
            return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)

        return Moments(zeros(), zeros())

    def update(
        grads: Params, moments: Moments, params: Params, step: jax.Array
    ) -> tuple[Params, Moments, dict[str, jax.Array]]:
        leaves, structure = jax.tree.flatten(params)
        columns = zip(leaf_rules, *(jax.tree.leaves(t) for t in (grads, moments.mu, moments.nu)), leaves, strict=True)
        updated = [_adamw_leaf(spec, rule, step, *column) for rule, *column in columns]
        params, mu, nu, norms = zip(*updated, strict=True)
        metrics = norm_metrics(paths(grads), norms, spec.clip)
        metrics |= {"lr": spec.learning_rate(step), "weight_decay": spec.weight_decay(step)}
        restore = structure.unflatten
        return restore(params), Moments(restore(mu), restore(nu)), metrics

    return Optimizer(init, update, tree)


def norm_metrics(names: Sequence[str], norms: Sequence[jax.Array], clip: float) -> dict[str, jax.Array]:
    """Norms of the unclipped gradients (all, each top-level part, largest tensor) and the share of tensors clipped."""
    stacked = jnp.stack(norms)
    squares = jnp.square(stacked)
    metrics = {"grad_norm": jnp.sqrt(jnp.sum(squares)), "grad_norm_max": jnp.max(stacked)}
    parts = sorted({name.split("/")[0] for name in names})
    for part in parts if len(parts) > 1 else ():
        rows = [i for i, name in enumerate(names) if name.split("/")[0] == part]
        metrics[f"grad_norm_{part}"] = jnp.sqrt(sum(squares[i] for i in rows))
    if clip:
        metrics["grad_clipped"] = jnp.mean((stacked > clip).astype(jnp.float32))
    return metrics


def ema(average: Params, params: Params, rate: jax.Array) -> Params:
    """``average + rate (params - average)`` in fp32: in bf16 a 0.004 update is below half an ulp."""
    return jax.tree.map(
        lambda a, p: (a.astype(jnp.float32) + rate * (p.astype(jnp.float32) - a)).astype(a.dtype), average, params
    )
