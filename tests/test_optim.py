"""The optimizer against torch.optim.AdamW driven as DINO drives it (clip per tensor, groups, frozen last layer)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terrafm_jax.ssl import schedules
from terrafm_jax.training.optim import (
    Moments,
    OptimSpec,
    Rule,
    RuleError,
    dino_rules,
    ema,
    make_optimizer,
    match,
    paths,
)

torch = pytest.importorskip("torch")

SPEC = OptimSpec(batch_size=256, total_steps=10, warmup_steps=2, base_lr=1e-2, freeze_last_steps=2)
SHAPES = {
    "backbone/cls_token": (1, 1, 4),
    "backbone/patch_embed/s1_embed": (1, 12),
    "backbone/blocks/0/attn/qkv/kernel": (4, 12),
    "backbone/blocks/0/attn/qkv/bias": (12,),
    "backbone/blocks/0/norm1/scale": (4,),
    "backbone/patch_embed/fusion/pool": (12,),
    "backbone/patch_embed/fusion/queries": (5, 12),
    "head/mlp/0/kernel": (4, 6),
    "head/mlp/0/bias": (6,),
    "head/last_layer/kernel": (6, 8),
}
UNDECAYED = {p for p in SHAPES if p.endswith(("bias", "scale", "pool"))}


def nested(flat: dict) -> dict:
    tree: dict = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return tree


def arrays(seed: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {p: (scale * rng.normal(size=s)).astype(np.float32) for p, s in SHAPES.items()}


UPDATE = jax.jit(make_optimizer(SPEC, nested({p: np.zeros(s, np.float32) for p, s in SHAPES.items()})).update)


def first_update(params: dict, gradients: dict[str, np.ndarray], step: int = 0) -> tuple:
    zeros = jax.tree.map(np.zeros_like, params)
    return UPDATE(nested(gradients), Moments(zeros, zeros), params, np.int32(step))


def torch_run(start: dict, gradients: list[dict], frozen: int) -> tuple[dict, torch.optim.AdamW, dict]:
    params = {p: torch.nn.Parameter(torch.tensor(v)) for p, v in start.items()}
    groups = [
        {"params": [v for p, v in params.items() if p not in UNDECAYED]},
        {"params": [v for p, v in params.items() if p in UNDECAYED], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups)
    for step, grads in enumerate(gradients):
        optimizer.param_groups[0]["weight_decay"] = float(schedules.cosine(step, 0.04, 0.4, 10))
        for group in optimizer.param_groups:
            group["lr"] = float(SPEC.learning_rate(step))
        for path, p in params.items():
            p.grad = torch.tensor(grads[path])
            norm = p.grad.norm()
            if 3.0 / (norm + 1e-6) < 1:
                p.grad *= 3.0 / (norm + 1e-6)
            if "last_layer" in path and step < frozen:
                p.grad = None
        optimizer.step()
    return params, optimizer, params


def test_five_steps_equal_torch() -> None:
    """Parameters and moments, with large gradients (clipped) and small ones, the last layer frozen for two steps."""
    start = arrays(0)
    gradients = [arrays(10 + i, scale=3.0 if i % 2 else 0.1) for i in range(5)]
    expected, reference, _ = torch_run(start, gradients, frozen=2)
    params = nested({p: jnp.asarray(v) for p, v in start.items()})
    state = Moments(*(jax.tree.map(jnp.zeros_like, params) for _ in range(2)))
    for step, grads in enumerate(gradients):
        params, state, _ = UPDATE(nested(grads), state, params, jnp.int32(step))
    for path, value, mu, nu in zip(paths(params), *map(jax.tree.leaves, (params, state.mu, state.nu)), strict=True):
        want = expected[path]
        np.testing.assert_allclose(value, want.detach().numpy(), rtol=2e-5, atol=1e-6, err_msg=path)
        np.testing.assert_allclose(mu, reference.state[want]["exp_avg"].numpy(), rtol=1e-5, atol=1e-7, err_msg=path)
        np.testing.assert_allclose(nu, reference.state[want]["exp_avg_sq"].numpy(), rtol=1e-5, atol=1e-8, err_msg=path)
    assert int(reference.state[expected["head/last_layer/kernel"]]["step"]) == 3


def test_frozen_parameter_does_not_move_at_all() -> None:
    params = nested(arrays(0))
    new, state, _ = first_update(params, arrays(1), step=1)
    np.testing.assert_array_equal(new["head"]["last_layer"]["kernel"], params["head"]["last_layer"]["kernel"])
    assert not np.any(state.mu["head"]["last_layer"]["kernel"])
    assert np.any(new["head"]["mlp"]["0"]["kernel"] != params["head"]["mlp"]["0"]["kernel"])


def test_clip_is_per_tensor() -> None:
    """A huge gradient in one tensor leaves the update of the others as it was."""
    params = nested(arrays(0))
    small, large = arrays(1, 0.1), arrays(1, 0.1)
    large["head/mlp/0/kernel"] = 1e4 * large["head/mlp/0/kernel"]
    results = [first_update(params, g) for g in (small, large)]
    moments = [dict(zip(paths(params), jax.tree.leaves(r[1].mu), strict=True)) for r in results]
    for path in SHAPES:
        same = np.array_equal(moments[0][path], moments[1][path])
        assert same == (path != "head/mlp/0/kernel"), path
    np.testing.assert_allclose(np.linalg.norm(moments[1]["head/mlp/0/kernel"]), 0.1 * 3.0, rtol=1e-5)
    assert results[0][2]["grad_clipped"] == 0.0
    np.testing.assert_allclose(results[1][2]["grad_clipped"], 1 / len(SHAPES))


def test_norm_metrics_are_of_the_unclipped_gradient() -> None:
    params, grads = nested(arrays(0)), arrays(1, 5.0)
    metrics = first_update(params, grads)[2]
    norms = {p: np.linalg.norm(g) for p, g in grads.items()}
    np.testing.assert_allclose(metrics["grad_norm"], np.sqrt(sum(n**2 for n in norms.values())), rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm_max"], max(norms.values()), rtol=1e-5)
    head = np.sqrt(sum(n**2 for p, n in norms.items() if p.startswith("head/")))
    np.testing.assert_allclose(metrics["grad_norm_head"], head, rtol=1e-5)


def test_rules_decide_decay_and_multiplier_in_order() -> None:
    params = nested(arrays(0))
    rules = ((r"backbone/.*", Rule(decay=False, lr=0.0)), *dino_rules())
    optimizer = make_optimizer(SPEC, params, rules)
    new = jax.jit(optimizer.update)(nested(arrays(1)), optimizer.init(params), params, jnp.int32(0))[0]
    before, after = (dict(zip(paths(t), jax.tree.leaves(t), strict=True)) for t in (params, new))
    for path in SHAPES:
        assert np.array_equal(before[path], after[path]) == path.startswith("backbone/"), path


def test_dino_groups() -> None:
    rules = match(dino_rules(7), nested(arrays(0)))
    found = dict(zip(paths(nested(arrays(0))), jax.tree.leaves(rules), strict=True))
    assert {p for p, r in found.items() if not r.decay} == UNDECAYED
    assert {p: r.frozen_steps for p, r in found.items() if r.frozen_steps} == {"head/last_layer/kernel": 7}


def test_parameters_without_a_rule_are_all_named() -> None:
    params = nested({**arrays(0), "backbone/blocks/0/gamma": np.ones(4), "head/temperature": np.ones(())})
    with pytest.raises(RuleError, match=r"backbone/blocks/0/gamma.*head/temperature"):
        make_optimizer(SPEC, params)


def test_ema_is_float32_and_keeps_the_ends() -> None:
    average, params = {"w": jnp.ones(3)}, {"w": jnp.asarray([1.0, 2.0, 5.0])}
    np.testing.assert_allclose(ema(average, params, jnp.float32(0.004))["w"], [1.0, 1.004, 1.016], rtol=1e-7)
    np.testing.assert_array_equal(ema(average, params, jnp.float32(0.0))["w"], average["w"])


def test_spec_names_all_faults() -> None:
    with pytest.raises(ValueError, match=r"batch_size = 0.*clip = -1.*b1 = 1\.0"):
        OptimSpec(batch_size=0, total_steps=10, clip=-1, b1=1.0)
