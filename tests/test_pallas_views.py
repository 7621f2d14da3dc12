"""TPU's view kernels, interpreted: against the products of ``resample``, and over several devices."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from views_fake import CASES, STATS, fake_batch

from terrafm_jax.sensors import SENSOR_KEYS
from terrafm_jax.ssl import view_kernels
from terrafm_jax.ssl.views import ViewSet, ViewSpec, make_views
from terrafm_jax.training.batches import TILE_METERS, batch_shapes

SPEC = ViewSpec(globals=2, locals=3, global_size=32, local_size=16, patch=8)


def cut(batch: dict[str, Any], spec: ViewSpec, kernel: str) -> tuple[ViewSet, ViewSet]:
    """The views of a batch in the column layout, from one key."""
    spec = dataclasses.replace(spec, kernel=kernel)
    return make_views(spec, STATS, batch, jax.random.key(3), layout="columns")


jitted = jax.jit(cut, static_argnums=(1, 2))


def extreme(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with the smallest and largest values that can be stored at its corners."""
    for key in SENSOR_KEYS:
        for entry in batch[key].values():
            limits = np.iinfo(entry["dn"].dtype)
            entry["dn"][:, :9, :9], entry["dn"][:, -9:, -9:] = limits.min, limits.max
    return batch


@pytest.mark.parametrize("case", CASES)
def test_views_are_those_of_the_products(case):
    batch = extreme(fake_batch(2, 60, **CASES[case]))
    expected, found = jitted(batch, SPEC, "xla"), jitted(batch, SPEC, "pallas")
    assert np.std(expected[0].patches["s1"]) > 0.1
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5, err_msg=str(path))


@pytest.mark.parametrize("side", [140, 170])
def test_lines_beyond_whole_registers(side):
    """12 more than 128: those of all bands are cut together. 42 more: of Sentinel-2's 10 m bands too many for that."""
    batch = fake_batch(1, side, shift=0.58)
    expected, found = jitted(batch, SPEC, "xla"), jitted(batch, SPEC, "pallas")
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def test_one_sensor_and_no_local_views():
    batch, spec = fake_batch(2, 60, sensors=("s1",)), dataclasses.replace(SPEC, sensors=("s1",), locals=0)
    (expected, _), (found, none) = jitted(batch, spec, "xla"), jitted(batch, spec, "pallas")
    np.testing.assert_allclose(found.patches["s1"], expected.patches["s1"], atol=2e-5)
    assert none.patches["s1"].shape[:2] == (2, 0)


def test_bfloat16_is_as_close_to_float32_as_the_products_are():
    batch, spec = fake_batch(2, 60, shift=0.58, hole=0.2), dataclasses.replace(SPEC, dtype="bfloat16")
    exact = jitted(batch, SPEC, "xla")[0].patches
    off = {}
    for kernel in ("xla", "pallas"):
        patches = jitted(batch, spec, kernel)[0].patches
        assert {x.dtype.name for x in patches.values()} == {"bfloat16"}
        off[kernel] = np.mean([np.abs(patches[key].astype(np.float32) - exact[key]).mean() for key in exact])
    assert 0 < off["pallas"] < 1.1 * off["xla"] < 0.02


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1)])
def test_devices_cut_their_own_records(shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    batch, split = fake_batch(8, 60, hole=0.2), NamedSharding(mesh, P(("data", "fsdp")))

    def on_mesh(batch: dict[str, Any]) -> tuple[ViewSet, ViewSet]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return cut(batch, SPEC, "pallas")

    program = jax.jit(on_mesh, in_shardings=split, out_shardings=split).lower(batch).compile()
    for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert word not in program.as_text()
    expected = jitted(batch, SPEC, "pallas")
    for a, b in zip(jax.tree.leaves(program(jax.device_put(batch, split))), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


def kernels_in(spec: ViewSpec, batch: dict[str, Any], layout: str) -> int:
    program = jax.make_jaxpr(lambda b: make_views(spec, STATS, b, jax.random.key(0), layout=layout))(batch)
    return str(program).count("name=view_patches")


def test_auto_takes_the_kernels_for_columns_with_a_mesh_in_context():
    batch = fake_batch(2, 60)
    assert kernels_in(SPEC, batch, "columns") == 0
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",))):
        assert kernels_in(SPEC, batch, "columns") > 0
        assert kernels_in(SPEC, batch, "patches") == 0
        assert kernels_in(dataclasses.replace(SPEC, kernel="xla"), batch, "columns") == 0
        assert kernels_in(dataclasses.replace(SPEC, local_size=24, dtype="bfloat16"), batch, "columns") == 0


def test_what_the_kernels_cannot_cut_is_named():
    spec = dataclasses.replace(SPEC, local_size=24, dtype="bfloat16", kernel="pallas")
    with pytest.raises(ValueError, match=r"s1: views of 24 pixels, no multiple of 16. Use .*'xla'"):
        make_views(spec, STATS, fake_batch(2, 60), jax.random.key(0), layout="columns")


def test_bands_that_are_not_pairs_of_sixteen_bits_are_named():
    entry = fake_batch(2, 60)["s1"]
    entry["10m"]["dn"] = entry["10m"]["dn"].astype(np.float32)[..., :1]
    found = view_kernels.faults("s1", entry, [(1, 32)], 8, "float32")
    assert found == ["10m has 1 bands, not pairs", "bands are stored as float32, not in 16 bits"]


def test_tiles_of_the_usual_size_fit_on_chip_memory_in_bfloat16_and_twice_the_size_does_not():
    kinds = [(2, 224), (8, 96)]
    for key in SENSOR_KEYS:
        entries = [batch_shapes(SENSOR_KEYS, 4, meters, None)[key] for meters in (TILE_METERS, 2 * TILE_METERS)]
        usual, large = (view_kernels.faults(key, entry, kinds, 16, "bfloat16") for entry in entries)
        assert usual == []
        assert any("do not fit on-chip memory" in fault for fault in large)
