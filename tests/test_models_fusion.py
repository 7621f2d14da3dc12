"""Fusion and its folded form: equality with the written-out path, the pinning property, masks."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terrafm_jax import weights
from terrafm_jax.models import ModelSpec, encode, init_params
from terrafm_jax.models.terrafm import encode_cls
from terrafm_jax.sensors import NORMALIZED_MEAN

SPEC = ModelSpec(width=32, depth=1, heads=2, patch=4, grid=4, fusion_heads=8, prototypes=8, head_hidden=8)
forward = jax.jit(encode, static_argnums=0)
RNG = np.random.default_rng(0)


def noisy_backbone(dtype: str = "float32") -> dict:
    """Every parameter off its initial value, so that no term of the algebra vanishes."""
    backbone = init_params(SPEC, jax.random.key(0))["backbone"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: (np.asarray(x) + rng.normal(0, 0.1, x.shape)).astype(dtype), backbone)


def patches(batch: int, dtype: str = "float32") -> dict[str, np.ndarray]:
    return {s: RNG.normal(0.5, 0.3, (batch, 3, 2, SPEC.patch_features(s))).astype(dtype) for s in SPEC.sensors}


PRESENT = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 1, 0], [1, 0, 0]], bool)


def values_and_gradients(spec: ModelSpec, backbone: dict, x: dict, probe: np.ndarray) -> tuple:
    def objective(backbone):
        out = encode(spec, backbone, x, jnp.asarray(PRESENT)).patches
        return (out * probe).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(backbone)
    return np.asarray(out), {k: np.asarray(v) for k, v in weights.flatten(gradients).items()}


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
@pytest.mark.parametrize(("dtype", "close"), [("float32", 2e-5), ("float64", 1e-12)])
def test_folded_equals_written_out_in_values_and_gradients(dtype, close, platform):
    with jax.enable_x64(dtype == "float64"):
        backbone, x = noisy_backbone(dtype), patches(len(PRESENT), dtype)
        probe = RNG.normal(size=(len(PRESENT), 3, 2, SPEC.width)).astype(dtype)
        spec = dataclasses.replace(SPEC, dtype=dtype, platform=platform)
        runs = [
            values_and_gradients(dataclasses.replace(spec, folded=folded), backbone, x, probe)
            for folded in (True, False)
        ]
    (ours, gradients), (plain, expected) = runs
    assert ours.dtype == dtype
    assert np.abs(ours - plain).max() <= close * np.abs(plain).max()
    reached = {k for k, v in expected.items() if np.abs(v).max() > 0}
    assert {k for k in expected if "fusion" in k or "conv2d" in k or "projection" in k} <= reached
    for name, value in gradients.items():
        assert np.abs(value - expected[name]).max() <= 10 * close * max(np.abs(expected[name]).max(), 1e-2), name


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("sensor", SPEC.sensors)
def test_one_sensor_present_equals_the_plain_path(folded, sensor):
    spec = dataclasses.replace(SPEC, folded=folded)
    backbone, x = noisy_backbone(), patches(2)
    only = np.zeros((2, 3), bool)
    only[:, spec.sensors.index(sensor)] = True
    fused = forward(spec, backbone, x, jnp.asarray(only))
    plain = forward(dataclasses.replace(spec, fusion=False), without_fusion(backbone), {sensor: x[sensor]})
    for a, b in ((fused.cls, plain.cls), (fused.patches, plain.patches)):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(np.abs(b).max()))


def without_fusion(backbone: dict) -> dict:
    embed = {k: v for k, v in backbone["patch_embed"].items() if k != "fusion"}
    return {**backbone, "patch_embed": embed}


@pytest.mark.parametrize("folded", [True, False])
def test_absent_sensors_change_nothing(folded):
    spec = dataclasses.replace(SPEC, folded=folded)
    backbone, x = noisy_backbone(), patches(1)
    present = jnp.asarray([[True, False, True]])
    other = {**x, "s2_l1c": x["s2_l1c"] + 7.0}
    np.testing.assert_array_equal(forward(spec, backbone, x, present).cls, forward(spec, backbone, other, present).cls)
    two = {s: x[s] for s in ("s1", "s2_l2a")}
    np.testing.assert_allclose(
        forward(spec, backbone, x, present).cls, forward(spec, backbone, two).cls, rtol=0, atol=2e-6
    )


def test_the_mean_image_starts_without_a_response():
    params = init_params(SPEC, jax.random.key(3))["backbone"]["patch_embed"]
    for sensor in SPEC.sensors:
        stem = params[f"conv2d_{sensor}"]
        response = np.full(len(stem["kernel"]), NORMALIZED_MEAN) @ np.asarray(stem["kernel"], np.float64) + stem["bias"]
        np.testing.assert_allclose(response, 0, atol=1e-5)
        assert np.abs(stem["bias"]).max() > 0.1


def test_order_of_the_dict_does_not_matter():
    backbone, x = noisy_backbone(), patches(1)
    turned = dict(reversed(x.items()))
    np.testing.assert_array_equal(forward(SPEC, backbone, x).cls, forward(SPEC, backbone, turned).cls)


@pytest.mark.parametrize("folded", [True, False])
def test_a_view_without_any_sensor_stays_finite(folded):
    spec = dataclasses.replace(SPEC, folded=folded)
    backbone, x = noisy_backbone(), patches(2)
    none = jnp.zeros((2, 3), bool)
    gradients = jax.jit(jax.grad(lambda b: encode(spec, b, x, none).cls.sum()))(backbone)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("folded", [True, False])
def test_constant_and_zero_patches_stay_finite(folded):
    """Zero canvases of absent records give values without variance."""
    spec = dataclasses.replace(SPEC, folded=folded)
    x = {s: np.zeros_like(v) for s, v in patches(1).items()}
    backbone = jax.tree.map(jnp.zeros_like, noisy_backbone())
    gradients = jax.jit(jax.grad(lambda b: encode(spec, b, x).cls.sum()))(backbone)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_several_sets_of_views_together_equal_each_alone():
    """One pass over the layers with weight products formed once: features and gradients of separate calls."""
    backbone, x = noisy_backbone(), patches(2)
    sets = [(x, jnp.asarray(PRESENT[1:3])), ({"s1": x["s1"][:, :2, :1]}, None)]

    def together(backbone):
        return encode_cls(SPEC, backbone, sets, keep=[None] * len(sets))

    def alone(backbone):
        return [encode(SPEC, backbone, *each).cls for each in sets]

    def loss(encode_all, backbone):
        found = encode_all(backbone)
        return sum(cls.std() for cls in found), found

    found, expected = (
        jax.jit(jax.grad(lambda b, run=run: loss(run, b), has_aux=True))(backbone) for run in (together, alone)
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_folding_forms_no_vector_per_query():
    """The point of the algebra: nothing of the size [tokens, queries, 3d] exists in the program."""

    def sizes(folded: bool) -> set[int]:
        spec = dataclasses.replace(SPEC, folded=folded)
        jaxpr = jax.make_jaxpr(lambda b, x: encode(spec, b, x))(noisy_backbone(), patches(7))
        return {v.aval.size for eqn in jaxpr.jaxpr.eqns for v in eqn.outvars}

    per_query = 7 * 3 * 2 * SPEC.queries * SPEC.stem_width
    assert per_query in sizes(folded=False)
    assert per_query not in sizes(folded=True)
