"""TPU's fusion kernels, interpreted: against the same function in XLA, with masks, and over several devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from terrafm_jax.models import ModelSpec, encode, init_params
from terrafm_jax.models.stems import stem_product, stem_products
from terrafm_jax.models.tpu import fusion_kernels

SPEC = ModelSpec(width=128, depth=1, heads=2, patch=4, grid=3, fusion_heads=8, prototypes=8, head_hidden=8)
PRESENT = np.array([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 1], [1, 1, 1]], bool)
KERNEL = dataclasses.replace(SPEC, fusion_kernel="pallas")


def noisy_backbone(dtype: str = "float32") -> dict[str, Any]:
    """Every parameter off its initial value, so that no term of the algebra vanishes."""
    rng = np.random.default_rng(1)
    backbone = init_params(SPEC, jax.random.key(0))["backbone"]
    return jax.tree.map(lambda x: (np.asarray(x) + rng.normal(0, 0.05, x.shape)).astype(dtype), backbone)


def columns(sensors: tuple[str, ...], batch: int, grid: tuple[int, int], dtype: str = "float32") -> dict[str, Any]:
    """Patches [B, h, p, w, C * p], the layout that views have on TPU."""
    rng = np.random.default_rng(2)
    shapes = {s: (batch, grid[0], SPEC.patch, grid[1], SPEC.patch_features(s) // SPEC.patch) for s in sensors}
    return {s: rng.normal(0.5, 0.3, shape).astype(dtype) for s, shape in shapes.items()}


def run(spec: ModelSpec, backbone: dict, patches: dict, present: np.ndarray) -> tuple[np.ndarray, dict]:
    """Patch features [B, h, w, d], and the parameters' gradients of a function of them."""

    def objective(backbone: dict) -> tuple[jax.Array, jax.Array]:
        out = encode(spec, backbone, patches, jnp.asarray(present)).patches
        return (out.astype(jnp.float32) ** 3).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(backbone)
    return np.asarray(out), gradients


def assert_close(found: Any, expected: Any, close: float) -> None:
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=close * max(1.0, float(np.abs(b).max())), err_msg=str(path))


@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-4), ("float64", 1e-11)])
@pytest.mark.parametrize("sensors", [SPEC.sensors, SPEC.sensors[1:]])
def test_values_and_gradients_equal_those_of_xla(sensors, dtype, close):
    """Eight views of 2 x 3 patches: 48 rows, whole registers."""
    with jax.enable_x64(dtype == "float64"):
        backbone, patches = noisy_backbone(dtype), columns(sensors, 8, (2, 3), dtype)
        present = PRESENT.copy()
        present[:, 1] |= ~present[:, [SPEC.sensors.index(s) for s in sensors]].any(1)
        found, expected = (
            run(dataclasses.replace(SPEC, fusion_kernel=how, dtype=dtype), backbone, patches, present)
            for how in ("pallas", "xla")
        )
    assert found[0].dtype == dtype
    assert_close(found, expected, close)
    assert np.abs(np.asarray(found[1]["patch_embed"]["fusion"]["pool"])).max() > 0


def test_rows_that_fill_no_register_are_padded():
    """Five views of 3 x 3 patches: 45 rows."""
    backbone, patches = noisy_backbone(), columns(SPEC.sensors, 5, (3, 3))
    found, expected = (run(spec, backbone, patches, PRESENT[:5]) for spec in (KERNEL, SPEC))
    assert_close(found, expected, 1e-4)


def test_an_absent_sensor_changes_nothing_and_gets_no_gradient():
    backbone, patches = noisy_backbone(), columns(SPEC.sensors, 8, (2, 2))
    present = np.tile(np.array([[True, False, True]]), (8, 1))
    found, gradient = run(KERNEL, backbone, patches, present)
    other, _ = run(KERNEL, backbone, patches | {SPEC.sensors[1]: patches[SPEC.sensors[1]] * -50.0}, present)
    np.testing.assert_array_equal(found, other)
    assert not np.asarray(gradient["patch_embed"][f"conv2d_{SPEC.sensors[1]}"]["kernel"]).any()
    assert np.asarray(gradient["patch_embed"][f"conv2d_{SPEC.sensors[2]}"]["kernel"]).any()


def test_constant_patches_stay_finite():
    """Their vectors have no variance, whose rounded estimate may fall below zero."""
    rows = [jnp.ones((1, 4, 4, SPEC.stem_width)) * i for i in range(3)]
    scores = [jnp.zeros((1, 4, 4, SPEC.queries * SPEC.fusion_heads))] * 3
    pool = jnp.ones(SPEC.stem_width)
    out, pull = jax.vjp(lambda v, s, p: fusion_kernels.mix(v, s, None, p, SPEC), rows, scores, pool)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, pull(out + 1.0))))


def test_bfloat16_is_as_close_to_the_exact_result_as_xla():
    backbone, patches = noisy_backbone(), columns(SPEC.sensors, 8, (2, 3))
    exact = run(SPEC, backbone, patches, PRESENT)
    kernel, xla = (
        run(dataclasses.replace(SPEC, fusion_kernel=how, dtype="bfloat16"), backbone, patches, PRESENT)
        for how in ("pallas", "xla")
    )
    for found, other, truth in zip(*map(jax.tree.leaves, (kernel, xla, exact)), strict=True):
        distance, allowed = (np.linalg.norm(np.asarray(x, np.float64) - truth) for x in (found, other))
        assert distance < 1.5 * allowed + 0.01 * np.linalg.norm(truth)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_devices_work_on_their_own_part_of_the_batch(shape):
    """One device and eight give the same; the program moves no activation."""
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    backbone, patches = noisy_backbone(), columns(SPEC.sensors, 8, (2, 2))

    def gradient(backbone: dict, patches: dict) -> dict:
        return jax.grad(lambda b: (encode(KERNEL, b, patches, jnp.asarray(PRESENT)).cls ** 3).sum())(backbone)

    def on_mesh(backbone: dict, patches: dict) -> dict:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradient(backbone, patches)

    whole = NamedSharding(mesh, P())
    step = jax.jit(on_mesh, in_shardings=(whole, NamedSharding(mesh, P(("data", "fsdp")))), out_shardings=whole)
    assert_close(step(backbone, patches), jax.jit(gradient)(backbone, patches), 1e-5)


def test_gradients_of_several_parts_are_one_product():
    (x,) = columns(("s1",), 3, (2, 2)).values()
    spec = dataclasses.replace(SPEC, platform="gpu")  # elsewhere the bias' gradient is a product, too
    layer = (jax.random.normal(jax.random.key(0), (32, 9)), jax.random.normal(jax.random.key(1), (9,)))

    def separate(kernel: jax.Array, bias: jax.Array) -> list[jax.Array]:
        return [stem_product(x, kernel[:, part], bias[part], spec) for part in (slice(0, 6), slice(6, 9))]

    def together(kernel: jax.Array, bias: jax.Array) -> list[jax.Array]:
        return stem_products(x, kernel, bias, (6, 3), (jnp.float32, jnp.float32), spec)

    found, expected = (jax.vjp(f, *layer) for f in (together, separate))
    assert_close(found[0], expected[0], 1e-6)
    assert_close(found[1](expected[0]), expected[1](expected[0]), 1e-5)
    text = jax.jit(lambda y: found[1](y)).lower(expected[0]).as_text()
    assert text.count("stablehlo.dot_general") == 1


def test_auto_takes_the_kernels_only_on_tpu_with_a_mesh_in_context():
    spec = ModelSpec(platform="tpu")
    assert not fusion_kernels.resolve(spec)
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",))):
        assert fusion_kernels.resolve(spec)
        assert not fusion_kernels.resolve(dataclasses.replace(spec, platform="gpu"))
        assert not fusion_kernels.resolve(dataclasses.replace(spec, width=96, heads=2))
        assert not fusion_kernels.resolve(dataclasses.replace(spec, fusion_kernel="xla"))


def test_a_width_that_fills_no_registers_is_named():
    with pytest.raises(ValueError, match=r"multiple of 128.*found 288, 16 and 80. Use fusion_kernel='xla'"):
        fusion_kernels.resolve(ModelSpec(width=96, heads=2, fusion_kernel="pallas"))
