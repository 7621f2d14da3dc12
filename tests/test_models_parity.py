"""Layer by layer against the PyTorch reference: a failing test names the layer."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terrafm_jax import weights
from terrafm_jax.models import ModelSpec, encode, init_params, patchify, project
from terrafm_jax.models.layers import with_parameters
from terrafm_jax.models.patch_embed import PatchEmbed
from terrafm_jax.models.position import interpolate
from terrafm_jax.models.vit import apply_block

torch = pytest.importorskip("torch")
import torch_reference as reference  # noqa: E402

SPEC = ModelSpec(width=64, depth=3, heads=4, prototypes=512, head_hidden=96, head_bottleneck=32)
SIZES = [(64, 64), (96, 96), (128, 128), (224, 224), (320, 320), (224, 320)]
TOLERANCE = 1e-4  # relative to the largest value, float32


def lively(spec: ModelSpec, seed: int = 0) -> dict:
    """Parameters without the zeros and ones of initialization, which would hide a wrong bias or scale."""
    params = jax.jit(init_params, static_argnums=0)(spec, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.05, x.shape).astype(np.float32), params)


def images(size: tuple[int, int], batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {s: rng.normal(0.5, 0.3, (batch, *size, c)).astype(np.float32) for s, c in reference.CHANNELS.items()}


def chw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def assert_close(ours, theirs, tolerance: float = TOLERANCE) -> None:
    ours, theirs = np.asarray(ours), theirs.detach().numpy()
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.fixture(scope="module")
def params() -> dict:
    return lively(SPEC)


@pytest.fixture(scope="module")
def net(params):
    module = reference.TerraFM(SPEC.width, SPEC.depth, SPEC.heads, SPEC.queries, SPEC.fusion_heads)
    return reference.load(module, jax.tree.map(np.asarray, weights.flatten(params["backbone"])))


@pytest.mark.parametrize("sensor", SPEC.sensors)
def test_stem(params, net, sensor):
    x = images((48, 32))[sensor]
    embed = with_parameters(PatchEmbed, SPEC, params["backbone"]["patch_embed"])
    kernel, bias = embed.stem(sensor)
    ours = patchify(jnp.asarray(x), 16) @ kernel + bias[None, None, None]
    assert_close(ours.reshape(2, 6, -1), net.patch_embed.stem(sensor, chw(x)))


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("sensors", [("s1",), ("s2_l2a",), ("s1", "s2_l2a"), SPEC.sensors])
def test_projection_and_fusion(params, net, sensors, folded):
    x = {s: images((48, 32))[s] for s in sensors}
    spec = dataclasses.replace(SPEC, folded=folded)
    mask = np.array([[True] * len(sensors), [True] + [False] * (len(sensors) - 1)])
    embed = with_parameters(PatchEmbed, spec, params["backbone"]["patch_embed"])
    patches = {s: patchify(jnp.asarray(v), 16) for s, v in x.items()}
    if folded:
        from terrafm_jax.models import folding

        ours = folding.embed(spec, embed.fold(), patches, jnp.asarray(mask))
    else:
        ours = embed(patches, jnp.asarray(mask))
    theirs = net.patch_embed({s: chw(v) for s, v in x.items()}, torch.from_numpy(mask))
    assert_close(ours.reshape(2, 6, -1), theirs)


@pytest.mark.parametrize("size", SIZES)
def test_positions(params, net, size):
    pos = params["backbone"]["pos_embed"]
    ours = interpolate(pos[0, 1:], size[0] // 16, size[1] // 16, SPEC.grid)
    assert_close(ours.reshape(-1, SPEC.width), net.positions(*size)[0, 1:])


def test_positions_of_as_many_tokens_in_another_shape_are_interpolated(params, net):
    ours = interpolate(params["backbone"]["pos_embed"][0, 1:], 7, 28, SPEC.grid)
    assert_close(ours.reshape(-1, SPEC.width), net.positions(7 * 16, 28 * 16)[0, 1:])


@pytest.mark.parametrize("attention", ["xla", "head_major"])
def test_block(params, net, attention):
    x = np.random.default_rng(0).normal(size=(2, 13, SPEC.width)).astype(np.float32)
    spec = dataclasses.replace(SPEC, attention=attention)
    assert_close(apply_block(spec, params["backbone"]["blocks"]["1"], jnp.asarray(x)), net.blocks[1](torch.tensor(x)))


@pytest.mark.parametrize("size", SIZES)
def test_features(params, net, size):
    x = images(size, batch=1)
    layers = (0, SPEC.depth - 1)
    run = jax.jit(encode, static_argnums=0, static_argnames="layers")
    ours = run(SPEC, params["backbone"], {s: patchify(jnp.asarray(v), 16) for s, v in x.items()}, layers=layers)
    theirs, tapped = net({s: chw(v) for s, v in x.items()}, layers=layers)
    for (cls, patches), expected in zip([ours[:2], *ours.layers], [theirs, *tapped], strict=True):
        assert_close(cls, expected[:, 0])
        assert_close(patches.reshape(1, -1, SPEC.width), expected[:, 1:])


def test_features_with_absent_sensors(params, net):
    x = images((64, 48), batch=4)
    present = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 0, 1]], bool)
    patches = {s: patchify(jnp.asarray(v), 16) for s, v in x.items()}
    ours = jax.jit(encode, static_argnums=0)(SPEC, params["backbone"], patches, jnp.asarray(present))
    theirs, _ = net({s: chw(v) for s, v in x.items()}, torch.from_numpy(present))
    assert_close(ours.cls, theirs[:, 0])
    assert_close(ours.patches.reshape(4, -1, SPEC.width), theirs[:, 1:])


def test_head(params):
    head = reference.DinoHead(SPEC.width, SPEC.head_hidden, SPEC.head_bottleneck, SPEC.prototypes)
    reference.load(head, jax.tree.map(np.asarray, weights.flatten(params["head"])))
    x = np.random.default_rng(0).normal(size=(5, SPEC.width)).astype(np.float32)
    assert_close(project(SPEC, params["head"], jnp.asarray(x)), head(torch.tensor(x)))


def test_gradients_equal_those_of_torch(params, net):
    x = images((48, 32))
    present = np.array([[1, 1, 1], [1, 0, 1]], bool)
    probe = np.random.default_rng(1).normal(size=(2, SPEC.width)).astype(np.float32)
    patches = {s: patchify(jnp.asarray(v), 16) for s, v in x.items()}

    def loss(backbone):
        return (encode(SPEC, backbone, patches, jnp.asarray(present)).cls * probe).sum()

    ours = weights.flatten(jax.jit(jax.grad(loss))(params["backbone"]))
    net.zero_grad()
    (
        net({s: chw(v) for s, v in x.items()}, torch.from_numpy(present))[0][:, 0] * torch.from_numpy(probe)
    ).sum().backward()
    theirs = reference.load(
        reference.TerraFM(SPEC.width, SPEC.depth, SPEC.heads, SPEC.queries), jax.tree.map(np.asarray, ours)
    )
    expected = dict(net.named_parameters())
    for name, value in theirs.named_parameters():
        assert_close(value.detach(), expected[name].grad, 5e-4)


@pytest.mark.parametrize(("size", "count"), [("b", 112_951_296), ("l", 345_010_176)])
def test_parameter_counts_of_the_released_path(size, count):
    spec = ModelSpec.of_size(size, fusion=False)
    shapes = jax.eval_shape(lambda key: init_params(spec, key), jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(shapes["backbone"])) == count
    with torch.device("meta"):
        module = reference.TerraFM(spec.width, spec.depth, spec.heads)
    assert sum(p.numel() for p in module.parameters()) == count
