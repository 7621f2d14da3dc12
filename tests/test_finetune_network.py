"""The parts of a fine-tuning step: what trains in which mode, layer-wise rates, LoRA, AdamW, mixup and flips."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terrafm_jax import weights
from terrafm_jax.evals import encoders
from terrafm_jax.finetuning import network
from terrafm_jax.finetuning.network import Adam, TuneSpec
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import Statistics

TINY = ModelSpec(
    width=32, depth=2, heads=2, grid=2, prototypes=16, head_hidden=16, head_bottleneck=8, fusion_heads=4, drop_path=0.1
)
SPEC = TuneSpec(TINY, ("s2_l2a",), "classification", 3, "linear", image_size=32)


@pytest.mark.parametrize(
    ("mode", "trained"),
    [("frozen", {"head"}), ("last", {"head", "backbone/blocks/1", "backbone/norm"}), ("lora", {"head", "lora"})],
)
def test_modes_train_what_they_say(mode, trained):
    spec = dataclasses.replace(SPEC, mode=mode, last_blocks=1)
    backbone = encoders.random_encoder(TINY, 0, 32, Statistics.published()).params
    trainable, frozen, _ = network.init(spec, backbone, jax.random.key(0))
    for path in trainable:
        assert any(path.startswith(t + "/") for t in trained), path
    assert not set(trainable) & set(frozen)
    assert set(weights.flatten({"backbone": backbone})) <= set(trainable) | set(frozen)
    whole, none, _ = network.init(SPEC, backbone, jax.random.key(0))
    assert not none
    assert set(whole) == {k for k in (*trainable, *frozen) if not k.startswith("lora/")}


def test_lora_starts_as_the_pretrained_network_and_folds_in():
    spec = dataclasses.replace(SPEC, mode="lora", lora_rank=2)
    backbone = encoders.random_encoder(TINY, 0, 32, Statistics.published()).params
    trainable, frozen, _ = network.init(spec, backbone, jax.random.key(0))
    assert sum(k.endswith("/a") for k in trainable) == 4 * TINY.depth
    start = weights.flatten(network.merged(spec, trainable, frozen)["backbone"])
    np.testing.assert_array_equal(start["blocks/0/attn/qkv/kernel"], backbone["blocks"]["0"]["attn"]["qkv"]["kernel"])
    name = "lora/blocks/1/mlp/fc1"
    trainable[f"{name}/b"] = jnp.ones_like(trainable[f"{name}/b"])
    after = weights.flatten(network.merged(spec, trainable, frozen)["backbone"])
    expected = frozen["backbone/blocks/1/mlp/fc1/kernel"] + 8.0 * trainable[f"{name}/a"].sum(1, keepdims=True)
    np.testing.assert_allclose(after["blocks/1/mlp/fc1/kernel"], jnp.broadcast_to(expected, (32, 128)), atol=1e-5)


def test_layer_wise_rates_and_decay():
    scales = {p: network.layer_scale(SPEC, p, 0.5) for p in (
        "head/linear/kernel", "backbone/norm/scale", "backbone/blocks/1/attn/qkv/kernel",
        "backbone/blocks/0/mlp/fc1/bias", "backbone/pos_embed", "backbone/patch_embed/projection/proj1/kernel",
    )}  # fmt: skip
    assert list(scales.values()) == [1, 1, 0.5, 0.25, 0.125, 0.125]
    assert network.decays("backbone/blocks/0/mlp/fc1/kernel", (4, 4))
    assert not network.decays("backbone/blocks/0/mlp/fc1/bias", (4,))
    assert not network.decays("backbone/pos_embed", (1, 5, 4))


def test_adam_equals_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    values = {"head/linear/kernel": rng.normal(size=(4, 3)), "backbone/blocks/0/norm1/scale": rng.normal(size=4)}
    params = {k: jnp.asarray(v, jnp.float32) for k, v in values.items()}
    theirs = {k: torch.nn.Parameter(torch.tensor(v, dtype=torch.float32)) for k, v in values.items()}
    adam = Adam(20, 4, 1e-6, 0.1, 1.0, layer_decay=0.5)
    groups = [
        {"params": [theirs["head/linear/kernel"]], "weight_decay": 0.1, "scale": 1.0},
        {"params": [theirs["backbone/blocks/0/norm1/scale"]], "weight_decay": 0.0, "scale": 0.25},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    mu = nu = {k: jnp.zeros_like(v) for k, v in params.items()}
    for step in range(8):
        grads = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in values.items()}
        params, mu, nu, _ = adam.update(
            SPEC, params, {k: jnp.asarray(g) for k, g in grads.items()}, mu, nu, jnp.int32(step), 1e-2
        )
        for k, p in theirs.items():
            p.grad = torch.tensor(grads[k])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = float(adam.learning_rate(step, 1e-2)) * group["scale"]
        optimizer.step()
    for k in params:
        np.testing.assert_allclose(params[k], theirs[k].detach().numpy(), atol=2e-5)
    assert float(adam.learning_rate(0, 1e-2)) == pytest.approx(2.5e-3)
    assert float(adam.learning_rate(20, 1e-2)) == pytest.approx(1e-6)


def test_mixup_and_flips():
    rng = np.random.default_rng(0)
    batch = {
        "images": {"s1": jnp.asarray(rng.normal(size=(4, 6, 6, 2)), jnp.float32)},
        "offset": {"s1": jnp.array([0.0, 1.0, 0.0, 1.0])},
    }
    mixed, soft = network.mixup(jax.random.key(0), batch, jnp.arange(4) % 3, 0.5, 3)
    np.testing.assert_allclose(soft.sum(1), 1, atol=1e-6)
    raw = batch["images"]["s1"] - batch["offset"]["s1"][:, None, None, None]
    np.testing.assert_allclose(mixed["images"]["s1"].sum(), raw.sum(), rtol=1e-4)  # a mixture of all, all used
    assert not mixed["offset"]["s1"].any()
    masks = jnp.arange(36).reshape(1, 6, 6).repeat(4, 0)
    images = {"s1": jnp.stack([masks, masks], -1).astype(jnp.float32)}
    flipped, labels = network.flip(jax.random.key(1), {**batch, "images": images}, masks)
    np.testing.assert_array_equal(flipped["images"]["s1"][..., 0], labels)
    assert len({int(x) for x in labels[:, 0, 0]} | {0, 5, 30, 35}) == 4
    assert (labels != masks).any()
