"""Mesh, rules and their error messages."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from terrafm_jax.ahead.chips import CHIPS
from terrafm_jax.ahead.scaling import SIZES, standard_topology
from terrafm_jax.training.optim import RuleError
from terrafm_jax.training.sharding import (
    ShardingError,
    batch_sharding,
    check_batch,
    local_rows,
    make_batch,
    make_mesh,
    param_shardings,
    param_specs,
    sums_whole,
)


def shapes(**leaves: tuple[int, ...]) -> dict:
    return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in leaves.items()}


def test_mesh_takes_what_is_left_and_is_auto() -> None:
    mesh = make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, "data=3 x fsdp=1 x tensor=1 does not fit 8 devices"),
        ({"data": -1, "fsdp": 3}, "fsdp=3 x tensor=1 does not fit 8 devices"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "sizes >= 1"),
    ],
)
def test_impossible_meshes_say_so(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ShardingError, match=message):
        make_mesh(**sizes)


@dataclasses.dataclass(frozen=True)
class FakeTpu:
    """What mesh_utils reads of a device of a TPU slice."""

    id: int
    slice_index: int
    coords: tuple[int, int, int]
    core_on_chip: int = 0
    process_index: int = 0
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"


def slices(count: int) -> list[FakeTpu]:
    grid = [(x, y, 0) for y in range(2) for x in range(2)]
    return [FakeTpu(4 * s + i, s, xyz) for s in range(count) for i, xyz in enumerate(grid)]


def test_data_axis_is_hybrid_over_slices() -> None:
    """fsdp stays within a slice; walking along data crosses the slices in the outer part only."""
    mesh = make_mesh(data=-1, fsdp=2, devices=slices(2))
    assert dict(mesh.shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    index = np.vectorize(lambda d: d.slice_index)(mesh.devices)[..., 0]
    np.testing.assert_array_equal(index, [[[0, 0], [0, 0]], [[1, 1], [1, 1]]])


def test_fsdp_of_zero_splits_the_state_over_the_chips_of_a_slice_on_tpu_only() -> None:
    assert dict(make_mesh(fsdp=0, devices=slices(2)).shape) == {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1}
    assert dict(make_mesh(fsdp=0, tensor=2, devices=slices(2)).shape) == {"slice": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(data=4, fsdp=0, devices=slices(2)).shape) == {"slice": 2, "data": 2, "fsdp": 2, "tensor": 1}
    assert dict(make_mesh(fsdp=0).shape) == {"data": 8, "fsdp": 1, "tensor": 1}


@pytest.mark.parametrize("chip", list(CHIPS))
@pytest.mark.parametrize("chips", SIZES)
def test_every_slice_that_is_sold_has_a_default_mesh(chip: str, chips: int) -> None:
    """The chips that share a state lie close together: in a block of the torus, at most a ring of 16 long."""
    topology = standard_topology(chip, chips)
    kind = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5p", "v6e": "TPU v6 lite"}[chip]
    places = [(*at, 0)[:3] for at in np.ndindex(*topology.shape)]
    devices = [
        FakeTpu(s * len(places) + i, s, at, device_kind=kind)
        for s in range(topology.slices)
        for i, at in enumerate(places)
    ]
    mesh = make_mesh(fsdp=0, devices=devices)
    share = min(16, len(places))
    slices = {"slice": topology.slices} if topology.slices > 1 else {}
    assert dict(mesh.shape) == {**slices, "data": len(places) // share, "fsdp": share, "tensor": 1}
    assert {d.id for d in mesh.devices.flat} == set(range(chips))
    for group in mesh.devices.reshape(-1, share)[::7]:
        spans = np.ptp([d.coords for d in group], axis=0) + 1
        assert np.prod(spans) == share
        assert len({d.slice_index for d in group}) == 1


def test_gradients_are_summed_whole_within_a_slice_of_a_tpu_only() -> None:
    assert sums_whole(make_mesh(data=2, fsdp=2, devices=slices(1)))
    assert not sums_whole(make_mesh(data=1, fsdp=4, devices=slices(1)))
    assert sums_whole(make_mesh(data=4, fsdp=2, devices=slices(2)))
    assert not sums_whole(make_mesh(data=2, fsdp=4, devices=slices(2)))
    assert not sums_whole(make_mesh(data=2, fsdp=4))


def test_slices_must_divide_data() -> None:
    with pytest.raises(ShardingError, match="data = 1 must be a multiple of the 2 slices"):
        make_mesh(data=1, fsdp=8, devices=slices(2))


def test_first_matching_rule_wins() -> None:
    tree = {"backbone": {"blocks": {"0": {"mlp": {"fc1": shapes(kernel=(8, 16), bias=(16,))}}}}}
    specs = param_specs(tree)["backbone"]["blocks"]["0"]["mlp"]["fc1"]
    assert specs == {"kernel": P("fsdp", "tensor"), "bias": P("tensor")}


def test_parameters_without_a_rule_are_all_named() -> None:
    with pytest.raises(RuleError, match=r"no sharding rule for \['backbone/gamma', 'head/temperature'\]"):
        param_specs({"backbone": shapes(gamma=(4,)), "head": shapes(temperature=())})


def test_indivisible_parameters_are_all_named_with_numbers() -> None:
    tree = {"backbone": {"a": shapes(kernel=(12, 4)), "b": shapes(kernel=(10, 4)), "c": shapes(kernel=(16, 4))}}
    with pytest.raises(ShardingError) as error:
        param_shardings(make_mesh(data=1, fsdp=8), tree)
    assert "backbone/a/kernel axis 0 is 12, not a multiple of fsdp = 8" in str(error.value)
    assert "backbone/b/kernel axis 0 is 10" in str(error.value)
    assert "backbone/c" not in str(error.value)


def test_batch_is_split_over_data_and_fsdp() -> None:
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    array = make_batch(mesh, {"x": np.arange(8, dtype=np.float32).reshape(8, 1)})["x"]
    assert array.sharding == batch_sharding(mesh)
    assert {s.data.shape for s in array.addressable_shards} == {(2, 1)}
    np.testing.assert_array_equal(array, np.arange(8)[:, None])


def hosts(grid: np.ndarray) -> list[FakeTpu]:
    """Devices of a 4 x 4 slice, each 2 x 2 block of which is a host's, as on a v5e pod."""
    places = [(x, y) for y in range(4) for x in range(4)]
    return [FakeTpu(i, 0, (x, y, 0), process_index=int(grid[y // 2, x // 2])) for i, (x, y) in enumerate(places)]


def test_each_process_reads_the_rows_of_its_devices() -> None:
    """All rows are read once, although the mesh, which follows the torus, interleaves the hosts."""
    mesh = make_mesh(fsdp=0, devices=hosts(np.array([[0, 1], [2, 3]])))
    owner = [d.process_index for d in mesh.devices.flat]
    assert owner != sorted(owner), "contiguous parts would do"
    rows = [local_rows(mesh, 32, p) for p in range(4)]
    assert sorted(np.concatenate(rows)) == list(range(32))
    for p in range(4):
        assert [owner[row // 2] for row in rows[p]] == [p] * 8
    check_batch(mesh, 32)


def test_processes_that_split_the_parameters_read_the_same_rows() -> None:
    devices = [FakeTpu(i, 0, (i % 2, i // 2, 0), process_index=i // 2) for i in range(4)]
    mesh = Mesh(np.array(devices).reshape(1, 1, 4), ("data", "fsdp", "tensor"))
    np.testing.assert_array_equal(local_rows(mesh, 4, 0), local_rows(mesh, 4, 1))
    check_batch(mesh, 4)
    devices = [FakeTpu(i, 0, (i % 2, i // 2, 0), process_index=i // 3) for i in range(4)]
    crossed = Mesh(np.array(devices).reshape(2, 1, 2), ("data", "fsdp", "tensor"))
    with pytest.raises(ShardingError, match="share some rows of the batch and not others"):
        check_batch(crossed, 4)


def test_batch_must_divide() -> None:
    mesh = make_mesh(data=4, fsdp=2)
    check_batch(mesh, 16, 2)
    with pytest.raises(ShardingError, match=r"batch_size = 24 is not a multiple .* 4 x 2 x 2 = 16"):
        check_batch(mesh, 24, 2)
    with pytest.raises(ShardingError, match=r"not a multiple .* 4 x 2 x 0 = 0"):
        check_batch(mesh, 16, 0)
