"""Cycles of Pallas kernels from the compiler's bundles: hand-written ones, and a kernel that is really compiled."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from terrafm_jax.ahead import chips, client, hlo, kernels, network, reckon
from terrafm_jax.models import ModelSpec

# Two bundles around a loop of 3 + inner loop of 2 bundles; the outer runs to 4, the inner to 48 by twos.
NESTED = """
= control target key start
LB: loop body
     0   :  { %s0 = inlined_call_operand.hbm [shape: bf16[8]] }
   0x1 LB: > { %s5_s1 = sphi %s0_s1, %s9_s1 }
   0x2 LB: >> { %s7_s2 = sphi %s0_s2, %s8_s2  ;;  %s8_s2 = sadd.s32 2, %s7_s2 /* copy for cssa */ }
   0x3   : > { %p1_p1 = scmp.ge.s32.totalorder %s8_s2, 48 /* loop exit test */ ;; %9 = sbr.rel (!%p1_p1) target = $r1 }
   0x4   : > { %s9_s1 = sadd.s32 1, %s5_s1  ;;  %p2_p2 = scmp.ge.s32.totalorder %s9_s1, 4 /* loop exit test */ }
   0x5   : > { %12 = sbr.rel (!%p2_p2) target = $region2 }
   0x6   :  { %v1 = vld [vmem:[%s1]] }
"""


def test_loops_are_multiplied():
    assert kernels.cycles(NESTED) == 2 + 4 * (3 + 24 * 2)


# A grid of 4 steps as a pipeline of 6 trips, of which the first and the last branch over the inner loop.
PIPELINE = """
   0x1 LB: > { %s3_s1 = sadd.s32 4294967295, %s5_s1 /* iteration index, stage = 1 */ }
iteration_bounds: (2, 2)
   0x2   : > { %7 = sbr.rel (%p3_p3) target = $region24 } /* Start region 2 */
   0x3   : > { %s8_s2 = sadd.s32 1, %s7_s2 } /* End region 2 :: Start region 23 */
   0x4 LB: >> { %p1_p1 = scmp.ge.s32.totalorder %s8_s2, 10 /* loop exit test */ ;; %9 = sbr.rel (!%p1_p1) target = $r1 }
   0x5 PF: > { %s9_s1 = sadd.s32 1, %s5_s1 } /* Start/End empty region 24 :: Start region 3 */
   0x6   : > { %p2_p2 = scmp.ge.s32.totalorder %s9_s1, 6 /* loop exit test */ ;; %12 = sbr.rel (!%p2_p2) target = $r2 }
"""


def test_what_a_pipeline_branches_over_runs_once_for_each_step_of_the_grid():
    assert kernels.cycles(PIPELINE) == 6 * 4 + 4 * (1 + 10)
    assert kernels.cycles(PIPELINE.replace("iteration_bounds: (2, 2)", "")) == 6 * (4 + 1 + 10)


def test_without_bundles_or_bound_it_is_an_error():
    with pytest.raises(ValueError, match="no instruction bundles"):
        kernels.cycles("nothing")
    with pytest.raises(ValueError, match="loop without an exit test"):
        kernels.cycles(NESTED.replace("4 /* loop exit test */", "%s3"))


def kernel(cycles: float | None, *names: str) -> hlo.Module:
    """A program of kernels that read 4 MiB and write as much."""
    calls = "".join(
        f'  {name} = f32[1024,1024]{{1,0:T(8,128)}} custom-call(%p), custom_call_target="tpu_custom_call", '
        'backend_config={"custom_call_config":{"cost_estimate":{"flops":"5000"}}}\n'
        for name in names or ("%k",)
    )
    module = hlo.parse(
        "HloModule toy\n\nENTRY %main (p: f32[1024,1024]) -> f32[1024,1024] {\n"
        f"  %p = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)\n{calls}}}\n"
    )
    for instruction in module.entry.instructions:
        if instruction.is_kernel:
            instruction.cycles = cycles
    return module


def test_one_file_speaks_for_all_that_are_alike_and_the_last_compilation_counts(tmp_path):
    for stamp, text in (("100", NESTED), ("200", "   0x1   :  { nop }\n")):
        (tmp_path / f"{stamp}-k.3-07-final_bundles.txt").write_text(text)
    (tmp_path / "300-other.2-07-final_bundles.txt").write_text("not bundles")
    module = kernel(None, "%k.1", "%k.3", "%unlike.3")
    kernels.fill(module, tmp_path)
    assert [module.entry.by_name[name].cycles for name in ("k.1", "k.3", "unlike.3")] == [1, 1, None]


@pytest.mark.parametrize(("cycles", "seconds"), [(3e6, 3e6 / 1.5e9), (1.0, 8 * 2**20 / 8.19e11)])
def test_a_kernel_costs_its_bundles_or_its_traffic(cycles, seconds):
    topology = chips.Topology.parse("v5e:2x2")
    grid = network.Network(topology, tuple((0, i, j) for i in range(2) for j in range(2)))
    (item,) = reckon.reckon(kernel(cycles), grid).items
    assert (item.kind, item.flops) == ("kernel", 5000)
    assert item.seconds == pytest.approx(seconds)
    with pytest.raises(reckon.ReckoningError, match="k: a kernel whose bundles"):
        reckon.reckon(kernel(None), grid)


@pytest.mark.slow
def test_compiled_attention_is_reckoned_from_its_bundles():
    if not client.available():
        pytest.skip("libtpu is not installed")
    from terrafm_jax.models.tpu import attention_kernels

    device = client.compile_only_devices(chips.Topology.parse("v5e:2x2"))[0]
    spec = ModelSpec(width=128, heads=2, dtype="bfloat16", fusion_heads=8)
    found = {}
    for views in (4, 8):
        shape = (views * 10, 40, 384)
        qkv = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(device))
        _, module = client.compile_only(jax.jit(lambda x: attention_kernels.attend(x, spec, 37)).lower(qkv))
        (found[views],) = [i.cycles for _, i in module.walk() if i.is_kernel]
    assert found[8] == pytest.approx(2 * found[4], rel=0.3)
    assert found[8] > 80 * 2 * 37 * 37 * 64 * 4 / 131072  # cycles that the matrix units alone take


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "size"), [("v5e:2x2", "s"), ("v5e:2x2", "l"), ("v6e:2x2", "b"), ("v5p:2x2x1", "l"), ("v4:2x2x1", "l")]
)
def test_fusion_compiles_for_every_size_and_is_reckoned_in_full(topology, size):
    """No kernel is said to take fewer cycles than its additions and multiplications of values, four a cycle."""
    if not client.available():
        pytest.skip("libtpu is not installed")
    spec = ModelSpec.of_size(size, dtype="bfloat16")
    found = _fusion_cycles(topology, spec)
    assert set(found) == {"fusion_forward", "fusion_backward"}
    registers = 36 * 32 * spec.stem_width / 1024  # of one sensor's values
    cores = 2 if topology[:3] in ("v4:", "v5p") else 1
    assert found["fusion_forward"] > registers * (3 + 6 + 12 + 6) / 4 / cores
    assert found["fusion_backward"] > registers * (3 + 6 + 12 + 6 + 30 + 6) / 4 / cores


@pytest.mark.slow
def test_both_cores_of_a_chip_share_the_fusion():
    if not client.available():
        pytest.skip("libtpu is not installed")
    spec = ModelSpec.of_size("s", dtype="bfloat16")
    one, two = (_fusion_cycles(topology, spec) for topology in ("v5e:2x2", "v5p:2x2x1"))
    for kernel, cycles in one.items():
        assert 0.4 * cycles < two[kernel] < 0.6 * cycles


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1"])
def test_views_of_usual_tiles_compile_and_take_longer_than_their_products(topology):
    if not client.available():
        pytest.skip("libtpu is not installed")
    from terrafm_jax.sensors import SENSORS
    from terrafm_jax.ssl import view_kernels
    from terrafm_jax.training.batches import TILE_METERS, batch_shapes

    chip = chips.Topology.parse(topology)
    where = jax.sharding.SingleDeviceSharding(client.compile_only_devices(chip)[0])
    entry = batch_shapes(("s2_l2a",), 4, TILE_METERS, where)["s2_l2a"]

    def run(entry, offset, *views):
        stats = SENSORS["s2_l2a"].mean, SENSORS["s2_l2a"].std
        return view_kernels.resample_sensor("s2_l2a", entry, stats, offset, [(*views, 96)], 16, "bfloat16")

    shapes = ((4,), jnp.float32), ((4, 8, 4), jnp.float32), ((4, 8, 2), jnp.bool_)
    arguments = [jax.ShapeDtypeStruct(*shape, sharding=where) for shape in shapes]
    _, module = client.compile_only(jax.jit(run).trace(entry, *arguments).lower(lowering_platforms=("tpu",)))
    found = {}
    for _, i in module.walk():
        if i.is_kernel:
            name = i.name.split(".")[0]
            found[name] = found.get(name, 0) + i.cycles
    assert set(found) == {"view_planes", "view_patches"}
    sides = {group: entry[group]["dn"].shape[1] for group in entry}
    planes = {group: len(names) + 1 for group, names in SENSORS["s2_l2a"].groups.items()}
    products = sum(planes[g] * 8 * 96 * side * (side + 96) for g, side in sides.items()) * 4
    assert found["view_patches"] > 2 * products / (chip.chip.flops / chip.chip.clock)


def _fusion_cycles(topology: str, spec: ModelSpec) -> dict[str, float]:
    """Cycles of either direction for 32 local views."""
    from terrafm_jax.models.tpu import fusion_kernels

    device = client.compile_only_devices(chips.Topology.parse(topology))[0]

    def shape(columns: int, dtype: jnp.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((6, 6, 32, columns), dtype, sharding=jax.sharding.SingleDeviceSharding(device))

    def both_directions(values, scores, pool, g):
        def mix(*arrays):
            return fusion_kernels.mix(
                *jax.tree.map(lambda x: x.transpose(2, 0, 1, 3), arrays[:2]), None, arrays[2], spec
            )

        out, pull = jax.vjp(mix, values, scores, pool)
        return out, pull(g.transpose(2, 0, 1, 3))

    values, scores = ([shape(n, t)] * 3 for n, t in ((spec.stem_width, jnp.bfloat16), (80, jnp.float32)))
    pool = jax.ShapeDtypeStruct((spec.stem_width,), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    arguments = (values, scores, pool, shape(spec.stem_width, jnp.bfloat16))
    _, module = client.compile_only(jax.jit(both_directions).lower(*arguments))
    return {i.name.split(".")[0]: i.cycles for _, i in module.walk() if i.is_kernel}
