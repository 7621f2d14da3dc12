"""Stems for the views that see a sensor: as the masked form, no view leaves its device, how much room there is."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_step import assert_states_close, one_device, run, tiny

from terrafm_jax.models import ModelSpec, drawn, init_params
from terrafm_jax.models.terrafm import encode_cls
from terrafm_jax.ssl.views import ViewSpec, modality_group, views_seen_at_most
from terrafm_jax.training.sharding import make_mesh

SPEC = ModelSpec(width=32, depth=1, heads=2, patch=4, grid=4, fusion_heads=8, prototypes=8, head_hidden=8)
VIEWS = 16
SEEN = {  # views 0..7 lie on the first of two devices
    "all fit": np.array([[1, 0, 0], [0, 1, 1], [0, 1, 0], [1, 0, 1]] * 4, bool),
    "s1 overflows on one device": np.array([[1, 1, 0]] * 7 + [[0, 0, 1], [0, 1, 0]] * 4 + [[0, 0, 1]], bool),
    "nothing fits": np.ones((VIEWS, 3), bool),
}
PLACES = (4, 5, 5)


def network(fusion: bool = True) -> tuple[ModelSpec, dict]:
    spec = dataclasses.replace(SPEC, fusion=fusion)
    backbone = init_params(spec, jax.random.key(0))["backbone"]
    rng = np.random.default_rng(1)
    return spec, jax.tree.map(lambda x: np.asarray(x) + rng.normal(0, 0.1, x.shape).astype(np.float32), backbone)


def patches(columns: bool = False) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    shapes = {s: SPEC.patch_features(s) for s in SPEC.sensors}
    if columns:  # [B, h, p, w, C * p]
        return {s: rng.normal(0.5, 0.3, (VIEWS, 3, 4, 2, n // 4)).astype(np.float32) for s, n in shapes.items()}
    return {s: rng.normal(0.5, 0.3, (VIEWS, 3, 2, n)).astype(np.float32) for s, n in shapes.items()}


def loss_and_gradients(spec: ModelSpec, x: dict, seen: np.ndarray, places: tuple[int, ...] | None):
    def loss(backbone: dict, x: dict, seen: jax.Array) -> jax.Array:
        (tokens,) = encode_cls(spec, backbone, [(x, seen)], keep=[None], places=[places])
        return jnp.square(tokens).sum() + (tokens * jnp.arange(32.0)[None]).sum()

    return jax.jit(jax.value_and_grad(loss)), (x, jnp.asarray(seen))


def assert_same(found: tuple, expected: tuple) -> None:
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(found[1])[0], jax.tree.leaves(expected[1]), strict=True
    ):
        limit = 2e-5 * max(np.abs(b).max(), 1e-2)
        np.testing.assert_allclose(a, b, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("columns", [False, True], ids=["patches", "columns"])
@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_equals_stems_of_all_views(seen, columns):
    (spec, backbone), x = network(), patches(columns)
    step, arguments = loss_and_gradients(spec, x, seen, None)
    expected = step(backbone, *arguments)
    step, arguments = loss_and_gradients(spec, x, seen, (8, 10, 10))
    assert_same(step(backbone, *arguments), expected)
    for name in SPEC.sensors:
        assert np.abs(expected[1]["patch_embed"][f"conv2d_{name}"]["kernel"]).max() > 0


@pytest.mark.parametrize("one", [np.eye(3, dtype=bool)[[0, 1, 2, 1] * 4], np.eye(3, dtype=bool)[[2] * VIEWS]])
def test_without_fusion(one):
    (spec, backbone), x = network(fusion=False), patches()
    step, arguments = loss_and_gradients(spec, x, one, None)
    expected = step(backbone, *arguments)
    step, arguments = loss_and_gradients(spec, x, one, (5, 9, 4))
    assert_same(step(backbone, *arguments), expected)


@pytest.mark.parametrize("seen", SEEN.values(), ids=SEEN)
def test_on_two_devices_no_view_leaves_its_own(seen):
    """All that travels are sums: of the loss, of weights' gradients, of how many views there was no room for."""
    (spec, backbone), x = network(), patches()
    step, arguments = loss_and_gradients(spec, x, seen, None)
    expected = step(backbone, *arguments)
    mesh = make_mesh(data=2, devices=jax.devices()[:2])
    put = lambda tree, spec: jax.device_put(tree, NamedSharding(mesh, spec))  # noqa: E731
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        assert drawn.parts() == 2
        step, arguments = loss_and_gradients(spec, x, seen, PLACES)
        compiled = step.lower(put(backbone, P()), *put(arguments, P("data"))).compile()
    found = compiled(put(backbone, P()), *put(arguments, P("data")))
    assert_same(jax.device_get(found), expected)
    text = compiled.as_text()
    assert "all-reduce" in text
    assert not re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    # Of all-reduces in a branch, XLA on CPU makes deadlocks (drawn.products).
    branches = re.findall(r"branch_computations=\{([^}]*)\}", text)
    names = [name for found in branches for name in found.split(", ")]
    assert len(names) == 2 * 2 * len(SPEC.sensors)  # forward and backward
    bodies = {body.split(" ", 1)[0]: body for body in text.split("\n\n")}
    assert not [name for name in names if "all-reduce" in bodies[name]]


def test_fits_asks_every_device():
    with jax.sharding.use_abstract_mesh(make_mesh(data=2, devices=jax.devices()[:2]).abstract_mesh):
        found = {name: np.asarray(drawn.fits(jnp.asarray(seen), PLACES)).tolist() for name, seen in SEEN.items()}
    assert found["all fit"] == [True, True, True]
    assert found["s1 overflows on one device"] == [False, False, True]
    assert found["nothing fits"] == [False, False, False]


def test_room_is_counted_on_whole_groups_only():
    spec = ViewSpec(modality_group=8)
    assert views_seen_at_most(ViewSpec(), 4, 8, 1) is None
    assert [modality_group(spec, batch) for batch in (1, 4, 6, 12, 20, 1024, 1031)] == [1, 4, 6, 6, 5, 8, 1]
    assert views_seen_at_most(spec, 4, 8, 1) == (19, 19, 19)  # 32 views, of which 18.3 see a sensor on average
    assert views_seen_at_most(spec, 64, 8, 8) == (37, 37, 37)
    assert views_seen_at_most(spec, 64, 8, 16) is None  # four samples on a device, eight in a group
    assert views_seen_at_most(dataclasses.replace(spec, modality_rule="one"), 8, 3, 1) == (8, 8, 8)
    assert views_seen_at_most(dataclasses.replace(spec, modality_rule="all"), 8, 3, 1) is None


def test_what_it_needs_is_named():
    with pytest.raises(ValueError, match="stems 'drawn' needs folded"):
        dataclasses.replace(SPEC, stems="drawn", folded=False)
    with pytest.raises(ValueError, match=r"model.stems 'drawn' needs views.modality_group .* found 0"):
        dataclasses.replace(tiny(), model=dataclasses.replace(tiny().model, stems="drawn"))


@pytest.mark.slow
@pytest.mark.parametrize("shape", [{"data": 1}, {"data": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_two_steps_equal_those_with_all_stems(shape):
    """The draws do not depend on it. Records that lack sensors are in the batches: some stems have too little room."""
    spec = tiny(("s1", "s2_l2a"))
    spec = dataclasses.replace(spec, views=dataclasses.replace(spec.views, modality_group=2))
    expected, metrics, _ = run(spec, one_device(), 2)
    assert "stems_over" not in metrics
    mesh = make_mesh(**shape, devices=jax.devices()[: math.prod(shape.values())])
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, stems="drawn"))
    state, metrics, _ = run(spec, mesh, 2)
    assert_states_close(jax.device_get(state), jax.device_get(expected))
    assert 0 < float(metrics["stems_over"]) < 1
