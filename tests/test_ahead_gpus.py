"""The train step compiled for a GPU that is not there, and what its kernels cost at least."""

from __future__ import annotations

import dataclasses

import pytest

from terrafm_jax.ahead import cost, gpus, hlo, reckon, step
from terrafm_jax.ahead.chips import Topology
from terrafm_jax.ahead.gpus import GPUS, Hosts, Links

NODE = Hosts(GPUS["h100"], 8)


def test_topologies_are_read_and_written():
    assert Hosts.parse("4*h100:8") == Hosts(GPUS["h100"], 8, 4)
    for text in ("h200:1", "4*h100:8", "a100:2"):
        assert step.parse_topology(text).name == text
    assert isinstance(step.parse_topology("v5e:2x2"), Topology)


@pytest.mark.parametrize("text", ["h100", "h100:0", "0*h100:8", "h100:2x4", "v100:8", "gpu:8"])
def test_wrong_topologies_are_named_with_what_is_known(text):
    with pytest.raises(ValueError, match=rf"--topology={text.replace('*', '.')}: expected .*h200:8.*'h200'"):
        step.parse_topology(text)


def test_collectives_by_hand():
    """8 GPUs: each sends 7/8 of the array twice over NVLink. Two hosts of 8: half of its eighth crosses, twice."""
    one = Links(NODE, (0,) * 8)
    assert one.seconds("all-reduce", 8e9, range(8)) == pytest.approx(2 * 7e9 / 450e9 + gpus.LATENCY)
    assert one.seconds("all-gather", 8e9, range(8)) == pytest.approx(7e9 / 450e9 + gpus.LATENCY)
    assert one.seconds("all-reduce", 8e9, [3]) == 0.0
    two = Links(dataclasses.replace(NODE, hosts=2), (0,) * 8 + (1,) * 8)
    assert two.seconds("all-reduce", 8e9, range(16)) == pytest.approx(2 * 7e9 / 450e9 + 1e9 / 50e9 + gpus.LATENCY)
    assert two.seconds("all-reduce", 8e9, [0, 8]) == pytest.approx(8e9 / 50e9 + gpus.LATENCY)


# As XLA prints calls of libraries, shortened: a product of [4096, 768] with [768, 3072], and attention of 2 x 12 heads.
CALLS = """
HloModule calls, is_scheduled=true

%fused (p.0: f32[4096,3072]) -> bf16[4096,3072] {
  %p.0 = f32[4096,3072]{1,0} parameter(0)
  ROOT %c.0 = bf16[4096,3072]{1,0} convert(%p.0)
}

ENTRY %main (x: bf16[4096,768], w: bf16[768,3072], q: bf16[2,198,12,64], n: s32[2]) -> bf16[4096,3072] {
  %x = bf16[4096,768]{1,0} parameter(0)
  %w = bf16[768,3072]{1,0} parameter(1)
  %q = bf16[2,198,12,64]{3,2,1,0} parameter(2)
  %n = s32[2]{0} parameter(3)
  %gemm = (f32[4096,3072]{1,0}, s8[4194304]{0}) custom-call(%x, %w), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/jvp(student)/dot_general"}, backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}
  %y = f32[4096,3072]{1,0} get-tuple-element(%gemm), index=0
  %mix = (bf16[2,12,198,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %n, %n), custom_call_target="__cudnn$fmhaSoftmax"
  %back = (bf16[2,12,198,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %q, %q, %n, %n), custom_call_target="__cudnn$fmhaSoftmaxBackward"
  ROOT %out = bf16[4096,3072]{1,0} fusion(%y), kind=kLoop, calls=%fused, metadata={op_name="jit(step)/views/convert"}
}
"""  # noqa: E501


def test_library_calls_cost_their_products_or_their_bytes():
    module = hlo.parse(CALLS)
    calls = module.entry.by_name
    pairs = 2 * 12 * 198 * 198 * 64
    for name, flops in (("gemm", 2.0 * 4096 * 768 * 3072), ("mix", 4.0 * pairs), ("back", 10.0 * pairs)):
        assert cost.matrix_flops(module, module.entry, calls[name]) == flops
    moved = 2 * 4096 * 768 + 2 * 768 * 3072 + 4 * 4096 * 3072  # without cuBLAS' space to work in
    assert cost.hbm_bytes(module, module.entry, calls["gemm"]) == moved
    found = reckon.reckon(module, Links(NODE, (0,)))
    chip = NODE.chip
    gemm, mix, back, last = found.items
    assert [i.kind for i in found.items] == ["product", "attention", "attention", "pass"]
    assert gemm.seconds == pytest.approx(max(gemm.flops / chip.flops, moved / chip.bandwidth))
    assert last.seconds == pytest.approx(6 * 4096 * 3072 / chip.bandwidth)
    assert found.by_scope(step.SCOPES)["views"] == last.seconds
    assert mix.flops + back.flops == 14.0 * pairs


# --- compiled, where JAX's CUDA plugin is installed -------------------------------------------


CASES = {"one": ("h200:1", 1), "host": ("h100:4", 1), "sharded": ("h100:4", 4), "older": ("a100:2", 1)}


@pytest.fixture(scope="module", params=CASES.values(), ids=CASES)
def report(request):
    """Two layers of heads as wide as B's, tokens odd in number as B's."""
    if not gpus.available():
        pytest.skip("JAX's CUDA plugin is not installed")
    from configs import vitb

    name, fsdp = request.param
    config = vitb.get_config("runlocal")
    config.model.width, config.model.heads, config.model.fusion_heads = 128, 2, 4
    config.batch_size, config.views.global_size = 16, 80
    config.mesh.fsdp = fsdp
    topology = step.parse_topology(name)
    spec, mesh = step.build(config, topology)
    assert spec.model.platform == "gpu"
    return step.compile_step(spec, mesh, topology, meters=960)


@pytest.mark.slow
def test_report_of_the_real_step(report):
    assert report["fits"]
    assert report["memory"]["state"] + report["memory"]["batch"] <= report["memory"]["arguments"] * 1.01
    assert 0 < report["mfu"] < 0.85
    assert report["step_seconds"] >= report["floor_seconds"]
    assert sum(report["seconds_by_kind"].values()) == pytest.approx(report["step_seconds"])
    for part in ("views", "teacher", "student forward", "student backward", "loss", "update"):
        assert report["seconds_by_scope"][part] > 0, part
    assert report["flops"]["program"] > report["flops"]["formula"]
    assert "kernels, which move" in step.render(report)


@pytest.mark.slow
def test_cudnn_attends_in_both_directions_on_the_device_s_own_views(report):
    per_device = 16 // report["chips"]
    calls = [i for i in hlo.parse(report["hlo"]).entry.instructions if i.target.startswith(cost.CUDNN_ATTENTION)]
    batches = {i.shapes[0].dims[0] for i in calls}
    assert batches == {2 * per_device}  # of two global views and of two local ones
    assert sum("Backward" in i.target for i in calls) == 4
    assert len(calls) == 4 + 4 + 2  # student forward and backward, teacher


@pytest.mark.slow
def test_only_gradients_are_summed_and_only_weights_are_gathered(report):
    assert report["foreign_all_gathers"] == []
    sums = [row for row in report["collectives"] if row["opcode"] in ("all-reduce", "reduce-scatter")]
    assert {row["dtype"] for row in sums if row["bytes"] > 1e-3 * report["gradient_bytes"]} <= {"f32"}
    # XLA adds the gradients of both sizes of views before or after the all-reduce, as it likes; with B it is before.
    assert report["gradient_bytes"] <= report["reduced_bytes"] <= 2 * report["gradient_bytes"]


@pytest.mark.slow
def test_activations_are_rows_and_stay_in_bfloat16():
    """Two layers as wide as B's: no pass writes float32 as large as the tokens, and none writes them in another order.

    XLA decides by size, so a small network would not do.
    """
    if not gpus.available():
        pytest.skip("JAX's CUDA plugin is not installed")
    from configs import vitb

    config = vitb.get_config()
    config.model.size, config.model.width, config.model.depth, config.model.heads = "", 768, 2, 12
    config.model.prototypes, config.batch_size, width = 1024, 16, 768
    topology = step.parse_topology("h200:1")
    spec, mesh = step.build(config, topology)
    entry = hlo.parse(step.compile_step(spec, mesh, topology, meters=2560)["hlo"]).entry
    tokens = [(16 * views, rows) for views, rows in ((2, 198), (8, 38))]
    passes = [i for i in entry.instructions if i.opcode == "fusion" and "student" in i.op_name]
    written = [shape for i in passes for shape in i.shapes]
    assert any(shape.dtype == "bf16" and shape.dims == (16 * 2 * 198, width) for shape in written)
    for views, rows in tokens:
        assert not [x for x in written if x.dtype == "f32" and x.elements == views * rows * width]
        others = [x for x in written if sorted(x.dims) == sorted((views, rows, width)) and x.dims[-1] != width]
        assert not others
