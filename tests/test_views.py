"""make_views as a whole: shapes, determinism, sharding without communication, errors."""

from __future__ import annotations

import re

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from views_fake import STATS, as_columns, fake_batch, jitted_views, views_of

from terrafm_jax.sensors import SENSOR_KEYS
from terrafm_jax.ssl.views import ViewSpec, make_views

SPEC = ViewSpec(globals=2, locals=3, global_size=32, local_size=16, patch=8)
COLLECTIVES = (
    r"= .*? ((?:all-reduce|all-gather|all-to-all|ragged-all-to-all|collective-permute|collective-broadcast|"
    r"reduce-scatter|send|recv)(?:-start)?)\("
)


def compiled(spec: ViewSpec, batch: dict, sharding: NamedSharding | None = None):
    placed = jax.device_put(batch, sharding) if sharding else batch
    shards = {"in_shardings": (sharding, None), "out_shardings": sharding} if sharding else {}
    run = jax.jit(lambda b, k: make_views(spec, STATS, b, k), **shards).lower(placed, jax.random.key(0)).compile()
    return run, placed


def over(axes: dict[str, int]) -> NamedSharding:
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
    return NamedSharding(mesh, PartitionSpec(tuple(axes)))


def test_shapes_and_dtypes() -> None:
    for dtype in ("float32", "bfloat16"):
        spec = ViewSpec(**{**SPEC.__dict__, "dtype": dtype})
        sets = jax.eval_shape(lambda b, spec=spec: make_views(spec, STATS, b, jax.random.key(0)), fake_batch(4, 60))
        for views, count, side in zip(sets, (2, 3), (4, 2), strict=True):
            for key in SENSOR_KEYS:
                bands = 2 if key == "s1" else 12
                assert views.patches[key].shape == (4, count, side, side, 64 * bands)
                assert views.patches[key].dtype == dtype
            assert views.student.shape == views.teacher.shape == (4, count, 3)
            assert views.boxes.shape == (4, count, 4)
            assert views.flips.shape == (4, count, 2)


def test_batch_of_unequal_canvases_and_sensor_subset() -> None:
    """Fewer sensors than the batch has columns for, and a canvas that is not square."""
    spec = ViewSpec(**{**SPEC.__dict__, "sensors": ("s1", "s2_l2a")})
    batch = fake_batch(2, 60)
    wide = batch["s1"]["10m"]
    wide["dn"] = np.pad(wide["dn"], ((0, 0), (0, 0), (0, 12), (0, 0)))
    wide["valid"] = np.pad(wide["valid"], ((0, 0), (0, 0), (0, 1)))
    views, _ = views_of(spec, batch)
    assert set(views.patches) == {"s1", "s2_l2a"}
    assert views.student.shape == (2, 2, 2)


def test_no_local_views() -> None:
    spec = ViewSpec(**{**SPEC.__dict__, "locals": 0})
    views, none = views_of(spec, fake_batch(2, 60))
    assert views.patches["s1"].shape[1] == 2
    assert none.patches["s2_l2a"].shape == (2, 0, 2, 2, 768)
    assert none.student.shape == (2, 0, 3)


def test_a_key_gives_the_same_views_and_another_key_others() -> None:
    batch = fake_batch(2, 60)
    one, same, other = (views_of(SPEC, batch, seed) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert np.abs(one[0].boxes - other[0].boxes).min() > 0
    every = np.concatenate([one[0].boxes, one[1].boxes], axis=1).reshape(-1, 4)
    assert np.unique(every, axis=0).shape[0] == 10  # every sample and view has its own


@pytest.mark.parametrize(
    ("axes", "group"),
    [({"data": 8}, 0), ({"data": 2, "fsdp": 2, "tensor": 2}, 0), ({"data": 8}, 8)],
    ids=["data8", "mesh222", "data8, groups across devices"],
)
def test_sharded_over_eight_devices_without_communication(axes: dict[str, int], group: int) -> None:
    spec = ViewSpec(**{**SPEC.__dict__, "sensors": ("s1", "s2_l2a"), "modality_group": group})
    batch = fake_batch(16, 60, sensors=spec.sensors, shift=0.5, hole=0.2)
    sharding = over(axes)
    if "tensor" in axes:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(("data", "fsdp")))
    many, placed = compiled(spec, batch, sharding)
    found = re.findall(COLLECTIVES, many.as_text())
    assert not found, f"view-making communicates: {sorted(set(found))}"
    one, _ = compiled(spec, batch)
    for sharded, single in zip(many(placed, jax.random.key(7)), one(batch, jax.random.key(7)), strict=True):
        for name in ("student", "teacher", "flips"):
            np.testing.assert_array_equal(getattr(sharded, name), getattr(single, name))
        np.testing.assert_allclose(sharded.boxes, single.boxes, atol=1e-6)
        for key in spec.sensors:
            np.testing.assert_allclose(sharded.patches[key], single.patches[key], atol=2e-4)
            assert not sharded.patches[key].sharding.is_fully_replicated


def test_the_collective_check_sees_one() -> None:
    """The pattern used above finds a collective in a program that has one."""
    sharding = over({"data": 8})
    text = (
        jax.jit(lambda x: x - x.mean(), in_shardings=sharding).lower(np.zeros((8, 4), np.float32)).compile().as_text()
    )
    assert re.findall(COLLECTIVES, text)


def test_no_loop_over_the_batch() -> None:
    program = str(jax.make_jaxpr(lambda b: make_views(SPEC, STATS, b, jax.random.key(0)))(fake_batch(4, 60)))
    assert "dot_general" in program
    assert "scan[" not in program
    assert "while[" not in program


def test_products_state_their_precision() -> None:
    text = jax.jit(lambda b: make_views(SPEC, STATS, b, jax.random.key(0))).lower(fake_batch(2, 60)).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in dots)


def test_spec_names_all_faults_at_once() -> None:
    with pytest.raises(ValueError) as error:
        ViewSpec(
            sensors=("s2_l2a", "s1"), global_size=100, local_scale=(0.5, 0.1), modality_rule="none", dtype="int8",
            box_tries=0, globals=0,
        )  # fmt: skip
    for word in ("sensors", "global_size 100", "local_scale", "modality_rule 'none'", "dtype", "box_tries", "globals"):
        assert word in str(error.value)
    with pytest.raises(ValueError, match="never draws"):
        ViewSpec(modality_threshold=0.0)


def test_a_batch_with_wrong_columns_is_named() -> None:
    batch = fake_batch(2, 60)
    batch["present"] = batch["present"][:, :1]
    with pytest.raises(ValueError, match="batch present: 1 columns, expected 3"):
        make_views(SPEC, STATS, batch, jax.random.key(0))


def test_columns_are_the_same_values_in_another_order() -> None:
    batch, key = fake_batch(2, 60, hole=0.1), jax.random.key(3)
    for locals_ in (3, 0):
        spec = ViewSpec(**{**SPEC.__dict__, "locals": locals_})
        ordered = jax.jit(lambda b, spec=spec: make_views(spec, STATS, b, key, layout="columns"))(batch)
        for plain, columns in zip(jitted_views(spec, batch, key), ordered, strict=True):
            for name, x in plain.patches.items():
                np.testing.assert_allclose(columns.patches[name], as_columns(x, 8), rtol=1e-5, atol=2e-5)
