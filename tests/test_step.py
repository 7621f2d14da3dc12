"""The whole step on a tiny model: meshes, donation, determinism, compilation count, monitors."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiles_fake import fake_record, write_dataset

from terrafm_jax import landcover
from terrafm_jax.data.pipeline import make_loader, make_order
from terrafm_jax.data.sampling import SamplingSpec
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import Statistics
from terrafm_jax.ssl.objective import ObjectiveSpec
from terrafm_jax.ssl.views import ViewSpec
from terrafm_jax.training.batches import batch_shapes, random_batch
from terrafm_jax.training.optim import OptimSpec
from terrafm_jax.training.sharding import ShardingError, batch_sharding, bytes_per_device, make_batch, make_mesh
from terrafm_jax.training.state import TrainState
from terrafm_jax.training.step import TrainSpec, abstract_state, init_state, make_step, parameter_table

BATCH = 8
METERS = 480


def tiny(sensors: tuple[str, ...] = ("s1",), **fields: object) -> TrainSpec:
    model = ModelSpec(
        width=32, depth=1, heads=2, grid=2, sensors=sensors, fusion=len(sensors) > 1, queries=2, fusion_heads=4,
        prototypes=64, head_hidden=32, head_bottleneck=16, drop_path=0.2,
    )  # fmt: skip
    views = ViewSpec(sensors=sensors, locals=2, global_size=32, local_size=16)
    # The gradient of a key's bias is nothing but rounding; a larger eps keeps Adam from blowing it up to the rate.
    optim = OptimSpec(batch_size=BATCH, total_steps=20, warmup_steps=2, freeze_last_steps=1, base_lr=1e-2, eps=1e-5)
    objective = ObjectiveSpec(teacher_temp_warmup_steps=4)
    frequent = tuple(name in landcover.PAPER_FREQUENT for name in landcover.NAMES)
    spec = TrainSpec(model, views, optim, objective, Statistics.published(), frequent, seed=3)
    return dataclasses.replace(spec, **fields)


def batches(spec: TrainSpec, count: int) -> list[dict]:
    return [random_batch(spec.model.sensors, BATCH, METERS, seed, complete=False) for seed in range(count)]


_STEPS: dict = {}


def run(spec: TrainSpec, mesh: jax.sharding.Mesh, steps: int, state: TrainState | None = None, start: int = 0):
    """(state, metrics) after steps start .. start + steps, and the compiled function."""
    step = _STEPS.setdefault((spec, mesh), make_step(spec, mesh))
    state = init_state(spec, mesh) if state is None else state
    metrics = {}
    for batch in batches(spec, start + steps)[start:]:
        state, metrics = step(state, make_batch(mesh, batch))
    return state, metrics, step


def one_device() -> jax.sharding.Mesh:
    return make_mesh(devices=jax.devices()[:1])


def assert_states_close(a: TrainState, b: TrainState, rtol: float = 1e-3, floor: float = 1e-6) -> None:
    """Equal within fp32 rounding: relative to the largest value of each tensor (at least ``floor``), ``rtol``."""
    for (path, x), y in zip(jax.tree_util.tree_flatten_with_path(a)[0], jax.tree.leaves(b), strict=True):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        scale = max(np.abs(x).max(), floor)
        assert np.abs(x - y).max() <= rtol * scale, (jax.tree_util.keystr(path), np.abs(x - y).max(), scale)


@pytest.fixture(scope="module")
def reference():
    state, metrics, _ = run(tiny(), one_device(), 3)
    return jax.device_get(state), jax.device_get(metrics)


MESHES = [
    {"data": 8},
    {"data": 1, "fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 4, "fsdp": 2, "slices": 2},
    {"data": 2, "fsdp": 2, "tensor": 2, "slices": 2},
]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_three_steps_are_equal_on_every_mesh(reference, shape: dict[str, int]) -> None:
    expected, expected_metrics = reference
    state, metrics, step = run(tiny(), make_mesh(**shape), 3)
    assert_states_close(jax.device_get(state), expected)
    assert metrics.keys() == expected_metrics.keys()
    for name, value in expected_metrics.items():  # global means, whatever the mesh
        np.testing.assert_allclose(metrics[name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert step._cache_size() == 1, "compiled again after the first step"


def test_fsdp_gathers_weights_and_never_activations() -> None:
    """Everything that an all-gather of the compiled step makes has the shape of a weight or of a row of one."""
    spec, mesh = tiny(), make_mesh(data=1, fsdp=8)
    state = abstract_state(spec, mesh)
    batch = batch_shapes(spec.model.sensors, BATCH, METERS, batch_sharding(mesh))
    text = make_step(spec, mesh).lower(state, batch).compile().as_text()
    gathered = {tuple(map(int, dims.split(","))) for dims in re.findall(r"= f32\[([\d,]+)\]\S* all-gather", text)}
    weights = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    assert (32, 128) in gathered, "the MLP's weights"
    assert {shape for shape in gathered if len(shape) > 1 and shape[0] > 1} <= weights


def run_fused(mesh: jax.sharding.Mesh, whole: bool = False) -> TrainState:
    """Three steps from fusion weights thirty times as large: as drawn, attention is so even that their gradients are
    rounding (seen: 1e-10 for the pool), in which nothing could be compared.
    """
    spec = summing(tiny(("s1", "s2_l2a")), whole)
    state = init_state(spec, mesh)
    for weights in (state.params, state.teacher):
        embed = weights["backbone"]["patch_embed"]
        embed["fusion"] = jax.tree.map(lambda x: jax.device_put(30 * x, x.sharding), embed["fusion"])
    return jax.device_get(run(spec, mesh, 3, state)[0])


@pytest.fixture(scope="module")
def fused_reference() -> TrainState:
    return run_fused(one_device())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "whole"), [*((shape, False) for shape in MESHES[:3]), (MESHES[2], True)],
    ids=lambda value: ("summed whole" if value else "summed in groups") if isinstance(value, bool) else str(value),
)  # fmt: skip
def test_three_steps_with_fusion_are_equal_on_every_mesh(fused_reference, shape: dict[str, int], whole: bool) -> None:
    """Parameters, teacher, moments and centers in fp32, each within 2e-4 of its own largest value (seen: 4e-5)."""
    for x in jax.tree.leaves(fused_reference.opt_state.mu["backbone"]["patch_embed"]["fusion"]):
        assert np.abs(x).max() > 1e-6, "nothing of fusion learns"
    assert_states_close(run_fused(make_mesh(**shape), whole), fused_reference, rtol=2e-4, floor=1e-30)


def summing(spec: TrainSpec, whole: bool) -> TrainSpec:
    return dataclasses.replace(spec, model=dataclasses.replace(spec.model, sum_whole=whole))


@pytest.mark.parametrize("whole", [False, True], ids=["in groups", "whole"])
def test_gradients_are_summed_in_groups_or_whole(whole: bool) -> None:
    """The gradient of a kernel [32, 128]: within the four that share it and then part by part, or all of it at once."""
    spec, mesh = summing(tiny(), whole), make_mesh(data=2, fsdp=4)
    batch = batch_shapes(spec.model.sensors, BATCH, METERS, batch_sharding(mesh))
    text = make_step(spec, mesh).lower(abstract_state(spec, mesh), batch).compile().as_text()
    sums = " ".join(re.findall(r"= (.*) (?:all-reduce|reduce-scatter)(?:-start)?\(", text))
    assert set(re.findall(r"f32\[(\d+),128\]", sums)) == ({"32"} if whole else {"8", "32"})


def test_training_moves_everything(reference) -> None:
    state, metrics = reference
    start = jax.device_get(init_state(tiny(), one_device()))
    assert int(state.step) == 3
    for (path, before), after in zip(
        jax.tree_util.tree_flatten_with_path(start.params)[0], jax.tree.leaves(state.params), strict=True
    ):
        assert np.any(before != after), jax.tree_util.keystr(path)
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (start.teacher, state.teacher)), strict=True))
    for a, b in zip(*map(jax.tree.leaves, (state.teacher, state.params)), strict=True):
        assert a.dtype == b.dtype == np.float32
    assert np.isfinite(metrics["loss"])


def test_teacher_starts_as_the_student() -> None:
    state = init_state(tiny(), one_device())
    for a, b in zip(*map(jax.tree.leaves, (state.params, state.teacher)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.unsafe_buffer_pointer() != b.unsafe_buffer_pointer(), "shared memory cannot be donated"


def test_four_steps_are_two_plus_two_bitwise() -> None:
    spec, mesh = tiny(), one_device()
    whole, metrics, _ = run(spec, mesh, 4)
    half, *_ = run(spec, mesh, 2)
    held = jax.device_get(half)  # as if through a checkpoint
    restored = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), held, abstract_state(spec, mesh))
    resumed, resumed_metrics, _ = run(spec, mesh, 2, restored, start=2)
    for a, b in zip(*map(jax.tree.leaves, (whole, resumed)), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(metrics["loss"], resumed_metrics["loss"])


def test_old_state_is_donated() -> None:
    spec, mesh = tiny(), one_device()
    state = init_state(spec, mesh)
    new, *_ = run(spec, mesh, 1, state)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.teacher, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new))


def test_step_and_seed_decide_the_draws() -> None:
    spec, mesh = tiny(), one_device()
    batch = make_batch(mesh, batches(spec, 1)[0])
    step = run(spec, mesh, 0)[2]

    def loss(at: int) -> float:
        state = init_state(spec, mesh)
        return float(step(state.replace(step=jax.device_put(jnp.int32(at), state.step.sharding)), batch)[1]["loss"])

    assert loss(0) == loss(0)
    assert loss(0) != loss(1)


def test_step_that_is_not_finite_changes_nothing() -> None:
    spec, mesh = tiny(), one_device()
    step = run(spec, mesh, 0)[2]
    state = init_state(spec, mesh)
    before = jax.device_get(state)
    batch = batches(spec, 1)[0]
    batch["offset"][3] = np.nan
    after, metrics = step(state, make_batch(mesh, batch))
    assert not np.isfinite(metrics["loss"])
    assert metrics["update_skipped"] == 1
    assert int(after.step) == 1
    for a, b in zip(*map(jax.tree.leaves, (before.replace(step=0), after.replace(step=0))), strict=True):
        np.testing.assert_array_equal(a, b)


def test_metrics_are_complete(reference) -> None:
    _, metrics = reference
    wanted = {
        "loss", "kl", "teacher_entropy", "marginal_entropy", "feature_std", "center_norm", "center_frequent_norm",
        "center_distance", "grad_norm", "grad_norm_backbone", "grad_norm_head", "grad_norm_max", "grad_clipped", "lr",
        "weight_decay", "momentum", "teacher_temp",
    }  # fmt: skip
    assert wanted <= metrics.keys()
    shares = {name: metrics[f"class_share/{name}"] for name in landcover.NAMES}
    np.testing.assert_allclose(sum(shares.values()), 1.0, rtol=1e-6)
    entropies = {name: metrics[f"class_entropy/{name}"] for name in landcover.NAMES}
    assert all(np.isnan(entropies[name]) == (share == 0) for name, share in shares.items())
    mean = sum(share * entropies[name] for name, share in shares.items() if share > 0)
    np.testing.assert_allclose(mean, metrics["teacher_entropy"], rtol=1e-5)
    assert all(np.ndim(value) == 0 for value in metrics.values())


@pytest.mark.slow
def test_microbatches_without_randomness_equal_the_whole_batch() -> None:
    """With nothing left to draw, two parts give the gradient of the whole."""
    spec = tiny()
    fixed = dataclasses.replace(
        spec,
        model=dataclasses.replace(spec.model, drop_path=0.0),
        views=dataclasses.replace(
            spec.views, flips=False, global_scale=(1.0, 1.0), local_scale=(1.0, 1.0), aspect=(1.0, 1.0)
        ),
    )
    whole, metrics, _ = run(fixed, one_device(), 2)
    parts, part_metrics, _ = run(
        dataclasses.replace(fixed, microbatches=2), make_mesh(data=4, devices=jax.devices()[:4]), 2
    )
    # Adam divides a gradient by its own size, so where it is near zero few digits survive (seen: 1.3e-3).
    assert_states_close(jax.device_get(whole), jax.device_get(parts), rtol=5e-3)
    for name in ("loss", "teacher_entropy", "grad_norm", "class_share/tree"):
        np.testing.assert_allclose(metrics[name], part_metrics[name], rtol=1e-4, err_msg=name)


def test_memory_of_the_state_falls_with_fsdp() -> None:
    """Params, teacher and both moments; vectors stay replicated (here a larger share than in real models)."""
    spec = dataclasses.replace(tiny(), model=ModelSpec.of_size("b"), views=ViewSpec(), optim=OptimSpec(8, 20))
    held = {n: bytes_per_device(abstract_state(spec, make_mesh(data=8 // n, fsdp=n))) for n in (1, 2, 8)}
    assert held[1] / held[2] > 1.98
    assert held[1] / held[8] > 7.7


def test_state_is_sharded_at_birth() -> None:
    mesh = make_mesh(data=1, fsdp=8)
    state = init_state(tiny(), mesh)
    for leaf, want in zip(*map(jax.tree.leaves, (state, abstract_state(tiny(), mesh))), strict=True):
        assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
    kernel = state.opt_state.mu["backbone"]["blocks"]["0"]["attn"]["qkv"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 96)


def test_every_parameter_of_every_size_is_in_the_table() -> None:
    for size in ("s", "b", "l"):
        spec = dataclasses.replace(tiny(), model=ModelSpec.of_size(size), views=ViewSpec())
        table = parameter_table(spec, make_mesh(data=2, fsdp=2, tensor=2))
        assert "backbone/blocks/0/mlp/fc1/kernel" in table
        assert len(table.splitlines()) == 3 + len(jax.tree.leaves(abstract_state(spec, make_mesh()).params))


def test_indivisible_batches_and_widths_are_refused() -> None:
    spec = tiny()
    with pytest.raises(ShardingError, match=r"batch_size = 12 .*8 x 1 x 1 = 8"):
        make_step(dataclasses.replace(spec, optim=OptimSpec(12, 20)), make_mesh(data=8))
    narrow = dataclasses.replace(spec, model=dataclasses.replace(spec.model, width=36, fusion_heads=2))
    with pytest.raises(ShardingError, match=r"qkv/kernel axis 0 is 36, not a multiple of fsdp = 8"):
        abstract_state(narrow, make_mesh(data=1, fsdp=8))


@pytest.mark.parametrize("rule", ["bernoulli", "fuse_or_one", "all"])
def test_views_of_several_sensors_need_fusion(rule: str) -> None:
    spec = tiny(("s1", "s2_l2a"))
    plain = dataclasses.replace(spec.model, fusion=False)
    views = dataclasses.replace(spec.views, modality_rule=rule)
    with pytest.raises(ValueError, match=rf"model\.fusion False needs views\.modality_rule 'one' .*, found '{rule}'"):
        dataclasses.replace(spec, model=plain, views=views)
    dataclasses.replace(spec, model=plain, views=dataclasses.replace(views, modality_rule="one"))
    dataclasses.replace(tiny(), views=dataclasses.replace(tiny().views, modality_rule=rule))


def test_spec_refuses_parts_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"views\.sensors.*frequent has 2 entries.*microbatches 0"):
        dataclasses.replace(tiny(), views=ViewSpec(), frequent=(True, False), microbatches=0)
    assert len({tiny(), tiny()}) == 1


def test_a_batch_without_data_has_the_arrays_of_a_real_one(tmp_path: Path) -> None:
    """With the columns of the configured sensors alone: what is compiled ahead of time is what training compiles."""
    sensors = ("s1", "s2_l2a")
    folder = write_dataset(tmp_path, [fake_record(i) for i in range(4)])
    order = make_order(folder, "train", SamplingSpec("uniform"), batch_size=2, seed=0, sensors=sensors, canvases=1)
    loader = make_loader(folder, "train", order, sensors=sensors, canvases=1, prefetch=0)
    real, shapes = next(loader), batch_shapes(sensors, 2, METERS)
    loader.close()
    assert jax.tree.structure(real) == jax.tree.structure(shapes)
    for (path, x), s in zip(jax.tree.leaves_with_path(real), jax.tree.leaves(shapes), strict=True):
        sized = path[-1].key in ("dn", "valid")  # whose sides are the tile's
        assert (x.dtype, x.ndim) == (s.dtype, s.ndim)
        assert sized or x.shape == s.shape, path


def test_abstract_batch_matches_a_random_one() -> None:
    shapes = batch_shapes(("s1", "s2_l2a"), 2, METERS)
    batch = random_batch(("s1", "s2_l2a"), 2, METERS)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), batch)
