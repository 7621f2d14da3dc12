"""Reckoning of compiled programs: against hand counts, hand-written schedules, and scanned against unrolled."""

from __future__ import annotations

import numpy as np
import pytest

from terrafm_jax.ahead import chips, client, cost, hlo, network, reckon

V5E = chips.Topology.parse("v5e:2x2")


def net(text: str) -> network.Network:
    topology = chips.Topology.parse(text)
    grid = [(s, *c) for s in range(topology.slices) for c in np.ndindex(*topology.shape)]
    return network.Network(topology, tuple(grid))


def program(*lines: str, others: str = "") -> hlo.Module:
    """A module whose ENTRY holds ``lines`` (after one HBM parameter %p)."""
    body = "\n".join(f"  {line}" for line in ("%p = f32[1024,1024]{1,0:T(8,128)} parameter(0)", *lines))
    return hlo.parse(f"HloModule toy\n{others}\nENTRY %main (p: f32[1024,1024]) -> f32[] {{\n{body}\n}}\n")


def fusion(name: str, cycles: int) -> str:
    return (
        f"%{name} = f32[8,128]{{1,0:T(8,128)S(1)}} fusion(%p), kind=kLoop, calls=%none, "
        f'backend_config={{"window_config":{{"estimated_cycles":"{cycles}"}}}}'
    )


def test_chip_table_is_consistent():
    """Peak = clock x FLOPs per cycle of the matrix units."""
    for name, per_cycle in {"v4": 2 * 131072, "v5e": 131072, "v5p": 2 * 131072, "v6e": 4 * 131072}.items():
        chip = chips.CHIPS[name]
        assert chip.flops == pytest.approx(chip.clock * per_cycle, rel=0.01), name
        assert chip.hbm > 15e9
        assert 150 < chip.flops / chip.bandwidth < 600  # FLOPs per byte at the ridge


@pytest.mark.parametrize(
    ("text", "devices", "rings"),
    [
        ("v5e:4x4", 16, (False, False)),
        ("v5e:16x16", 256, (True, True)),
        ("v5e:8x16", 128, (False, True)),
        ("v5p:2x2x2", 8, (False,) * 3),
        ("v5p:4x4x8", 128, (True,) * 3),
        ("2*v5e:4x4", 32, (False, False)),
    ],
)
def test_topology(text, devices, rings):
    topology = chips.Topology.parse(text)
    assert topology.chips == devices
    assert tuple(topology.wraps(i) for i in range(topology.chip.axes)) == rings
    assert chips.Topology.parse(topology.name) == topology


@pytest.mark.parametrize("text", ["v5e", "v9:2x2", "v5e:2x2x2", "v5p:4x4", "0*v5e:2x2", "v5e:2xa"])
def test_topology_errors_name_the_flag(text):
    with pytest.raises(ValueError, match=r"--topology="):
        chips.Topology.parse(text)


def test_parser_reads_nested_types_and_attributes():
    module = program(
        "%s = ((f32[8,8]{1,0:T(8,128)}), f32[2,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) "
        "slice-start(%p), slice={[0:2], [0:8]}",
        "%d = f32[2,8]{1,0:T(8,128)S(1)} slice-done(%s)",
        'ROOT %r = (f32[2,8]{1,0}, /*index=1*/bf16[]) tuple(%d, %d), metadata={op_name="jit(f)/views/mul"}',
    )
    start, done, root = module.entry.instructions[1:]
    assert [s.dims for s in start.shapes] == [(8, 8), (2, 8), ()]
    assert [s.in_hbm for s in start.shapes] == [True, False, False]
    assert start.attribute("slice") == "{[0:2], [0:8]}"
    assert done.operands == ("s",)
    assert module.entry.root is root
    assert root.op_name == "jit(f)/views/mul"
    assert sum(s.bytes for s in root.shapes) == 2 * 8 * 4 + 2


def test_text_without_entry_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("HloModule empty\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{{0,2},{1,3}}", (0, 2)),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", (0, 1)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'a'}", (0, 1, 2, 3)),
        ("mesh['a'=4,'b'=1,'c'=2], device_ids=([2,4]T(1,0)) {'c','b'}", (0, 4)),
        ("mesh['a'=8] {'a':(2)4}", (0, 1, 2, 3)),
        ("mesh['a'=8] {'a':(1)2}", (0, 4)),
        ("", tuple(range(8))),
    ],
)
def test_replica_groups(text, expected):
    assert network.first_group(text, 8) == expected
    line = f"%g = bf16[8]{{0}} all-gather(%p), replica_groups={text}, dimensions={{0}}, use_global_device_ids=true"
    module = hlo.parse(f"ENTRY %main (p: bf16[1]) -> bf16[8] {{\n  {line}\n}}\n")
    found = module.entry.instructions[-1].attribute("replica_groups")
    assert network.first_group(found, 8) == expected


def test_unknown_replica_groups_are_an_error():
    for text in ("something else", "mesh['a'=4,'b'=2]"):
        with pytest.raises(ValueError, match="replica_groups"):
            network.first_group(text, 8)


def test_collective_seconds_by_hand():
    """4 chips in a 2x2 square send on one link per axis: 2 N 3/4 over 2 links, 2 hops there and back."""
    n = net("v5e:2x2")
    assert n.seconds("all-reduce", 90e6, range(4)) == pytest.approx(2 * 90e6 * 0.75 / 90e9 + 4e-6)
    assert n.seconds("all-gather", 90e6, range(4)) == pytest.approx(90e6 * 0.75 / 90e9 + 2e-6)
    assert n.seconds("all-reduce", 90e6, [0]) == 0.0
    ring = net("v5e:16x16")
    assert ring.seconds("all-reduce", 90e6, range(256)) == pytest.approx(2 * (90e6 * 255 / 256 / 180e9 + 16e-6))
    # Every second chip of a line: the transfers of two groups share each link.
    line = net("v5e:4x4")
    assert line.bandwidth([0, 8]) == pytest.approx(45e9 / 2)
    assert line.bandwidth([0, 4, 8, 12]) == pytest.approx(45e9)


def test_exchange_between_slices():
    n = net("2*v5e:4x4")
    assert n.seconds("all-reduce", 1e6, [0, 16]) == pytest.approx(1e6 / 3.125e9 + network.DCN_SECONDS)
    assert net("v5e:4x4").exchange_seconds(1e6) == 0.0


def test_synchronous_collective_adds_all_of_its_time():
    module = program(
        fusion("f", 1500),
        "%r = f32[1024,1024]{1,0:T(8,128)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add",
    )
    found = reckon.reckon(module, net("v5e:2x2"))
    wire = 1024 * 1024 * 4
    assert found.by_kind()["compute"] == pytest.approx(1e-6)
    assert found.seconds == pytest.approx(1e-6 + 2 * wire * 0.75 / 90e9 + 4e-6)
    assert found.collectives()[0].dtype == "f32"
    assert not found.collectives()[0].asynchronous


@pytest.mark.parametrize(("cycles", "exposed_share"), [(15_000_000, 0.0), (0, 1.0), (53_000, None)])
def test_asynchronous_collective_adds_what_compute_does_not_cover(cycles, exposed_share):
    module = program(
        "%s = (f32[1024,1024]{1,0:T(8,128)}, f32[1024,1024]{1,0:T(8,128)}) all-reduce-start(%p), "
        "replica_groups={{0,1,2,3}}, to_apply=%add",
        fusion("f", cycles),
        "%d = f32[1024,1024]{1,0:T(8,128)} all-reduce-done(%s)",
    )
    found = reckon.reckon(module, net("v5e:2x2"))
    whole = 2 * 4 * 1024**2 * 0.75 / 90e9 + 4e-6
    compute = cycles / 1.5e9
    expected = max(0.0, whole - compute) if exposed_share is None else exposed_share * whole
    (item,) = found.collectives()
    assert item.asynchronous
    assert item.seconds == pytest.approx(expected, abs=1e-12)
    assert item.seconds + item.hidden == pytest.approx(whole)
    assert found.seconds == pytest.approx(max(whole, compute))


def test_two_asynchronous_collectives_share_the_links():
    lines = []
    for i in range(2):
        lines.append(
            f"%s{i} = (f32[1024,1024]{{1,0:T(8,128)}}, f32[1024,1024]{{1,0:T(8,128)}}) all-reduce-start(%p), "
            "replica_groups={{0,1,2,3}}, to_apply=%add"
        )
    lines += [f"%d{i} = f32[1024,1024]{{1,0:T(8,128)}} all-reduce-done(%s{i})" for i in range(2)]
    found = reckon.reckon(program(*lines), net("v5e:2x2"))
    assert found.seconds == pytest.approx(2 * (2 * 4 * 1024**2 * 0.75 / 90e9 + 4e-6))


def test_collective_fused_with_compute_is_asynchronous():
    """The compiler's "async collective fusion": start and done are custom fusions, compute between them carries it."""
    others = "\n".join(
        f"%{name} (a: f32[8]) -> f32[8] {{\n  %a.{name} = f32[1024,1024]{{1,0:T(8,128)}} parameter(0)\n"
        f"  ROOT %r.{name} = f32[1024,1024]{{1,0:T(8,128)}} all-reduce(%a.{name}), replica_groups={{{{0,1,2,3}}}}\n}}"
        for name in ("begin", "async_collective_fusion.1", "finish")
    )
    module = program(
        "%async-collective-start = (f32[1024,1024]{1,0:T(8,128)}, u32[]) fusion(%p), kind=kCustom, calls=%begin",
        "%g = f32[1024,1024]{1,0:T(8,128)} get-tuple-element(%async-collective-start), index=0",
        fusion("x", 0)
        .replace("fusion(%p)", "fusion(%g)")
        .replace("%none", "%async_collective_fusion.1")
        .replace('"0"', '"15000000"'),
        "%h = f32[1024,1024]{1,0:T(8,128)} get-tuple-element(%x), index=0",
        "%async-collective-done = f32[1024,1024]{1,0:T(8,128)} fusion(%h), kind=kCustom, calls=%finish",
        others=others,
    )
    found = reckon.reckon(module, net("v5e:2x2"))
    assert len(found.collectives()) == 1
    assert found.collectives()[0].seconds == 0.0
    assert found.seconds == pytest.approx(0.01)


LOOP = """%body (t: (s32[])) -> (s32[]) {{
  %t = (s32[]) parameter(0)
  %p = f32[8]{{0}} parameter(1)
  {fusion}
  ROOT %o = (s32[]) tuple(%t)
}}
%cond (u: (s32[])) -> pred[] {{
  %u = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%u), index=0
  %n = s32[] {limit}
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}"""


def loop_program(limit: str, start: int = 0, config: str = "") -> hlo.Module:
    return program(
        f"%zero = s32[] constant({start})",
        "%init = (s32[]) tuple(%zero)",
        f"ROOT %w = (s32[]) while(%init), condition=%cond, body=%body{config}",
        others=LOOP.format(fusion=fusion("f", 1500), limit=limit),
    )


@pytest.mark.parametrize(
    ("module", "default", "trips"),
    [
        (loop_program("constant(12)"), None, 12),
        (loop_program("constant(12)", start=2), None, 10),
        (loop_program("parameter(1)", config=', backend_config={"known_trip_count":{"n":"7"}}'), None, 7),
        (loop_program("parameter(1)"), 24, 24),
    ],
)
def test_loops_are_multiplied(module, default, trips):
    found = reckon.reckon(module, net("v5e:2x2"), default)
    assert found.seconds == pytest.approx(trips * 1e-6)
    assert found.items[0].count == trips


def test_loop_without_trip_count_is_an_error():
    with pytest.raises(ValueError, match="trip count"):
        reckon.reckon(loop_program("parameter(1)"), net("v5e:2x2"))


def test_more_than_85_percent_mfu_is_an_error():
    found = reckon.reckon(program(fusion("f", 1500)), net("v5e:2x2"))
    assert found.mfu(0.5 * 197e12 * 1e-6) == pytest.approx(0.5)
    with pytest.raises(reckon.ReckoningError, match="missing"):
        found.mfu(0.9 * 197e12 * 1e-6)


@pytest.mark.parametrize(
    ("line", "flops"),
    [
        ("convolution(%a, %b), dim_labels=bf_io->bf", 2 * 8 * 16 * 4),
        # A product batched over 4: one tap of the window meets each output, thanks to stride and dilation.
        (
            "convolution(%c, %d), window={size=4 stride=3 pad=0_0 lhs_dilate=4}, dim_labels=0bf_0io->0bf",
            2 * 4 * 8 * 16 * 32,
        ),
        ("dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}", 2 * 8 * 16 * 4),
    ],
)
def test_matrix_flops_by_hand(line, flops):
    shape = "f32[4,8,32]" if "0bf" in line else "f32[8,4]"
    module = program(
        "%a = f32[8,16]{1,0} parameter(1)",
        "%b = f32[16,4]{1,0} parameter(2)",
        "%c = f32[4,8,16]{2,1,0} parameter(3)",
        "%d = f32[4,16,32]{2,1,0} parameter(4)",
        f"ROOT %r = {shape}{{1,0}} {line}",
    )
    assert cost.matrix_flops(module, module.entry, module.entry.root) == flops


def test_slices_of_a_stack_count_with_their_own_bytes():
    others = (
        "%part (s: f32[6,8,128], i: s32[]) -> f32[8,128] {\n"
        "  %s = f32[6,8,128]{2,1,0:T(8,128)} parameter(0)\n  %i = s32[] parameter(1)\n"
        "  ROOT %x = f32[1,8,128]{2,1,0:T(8,128)} dynamic-slice(%s, %i, %i, %i), dynamic_slice_sizes={1,8,128}\n}"
    )
    module = program(
        "%stack = f32[6,8,128]{2,1,0:T(8,128)} parameter(1)",
        "%j = s32[]{:T(128)S(6)} parameter(2)",
        "ROOT %f = f32[8,128]{1,0:T(8,128)S(1)} fusion(%stack, %j), kind=kLoop, calls=%part",
        others=others,
    )
    assert cost.hbm_bytes(module, module.entry, module.entry.root) == 8 * 128 * 4


# --- against the real compiler ----------------------------------------------------------------

LAYERS, ROWS, WIDTH = 4, 1024, 1024


@pytest.fixture(scope="module")
def toys():
    """The same tower of layers, data parallel with gradients, scanned and unrolled, compiled for four v5e chips."""
    if not client.available():
        pytest.skip("libtpu is not installed")
    import jax
    import jax.numpy as jnp
    from jax.sharding import AxisType, Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    devices = client.compile_only_devices(V5E)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))

    def loss(weights, x, scanned):
        def layer(h, w):
            return jnp.tanh(h @ w), None

        if scanned:
            x, _ = jax.lax.scan(layer, x, weights)
        else:
            for i in range(LAYERS):
                x, _ = layer(x, weights[i])
        return jnp.mean(jnp.square(x.astype(jnp.float32)))

    found = {}
    shapes = (
        jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P())),
        jax.ShapeDtypeStruct((4 * ROWS, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, P("data"))),
    )
    for scanned in (False, True):
        step = jax.jit(lambda w, x, scanned=scanned: jax.value_and_grad(loss)(w, x, scanned))
        _, module = client.compile_only(step.lower(*shapes))
        found[scanned] = (module, reckon.reckon(module, network.Network.of(V5E, devices)))
    return found


def test_scanned_and_unrolled_agree_with_a_hand_count(toys):
    """Forward, gradient of the weights, and of the inputs except the first layer's, per chip."""
    product = 2.0 * ROWS * WIDTH * WIDTH
    assert toys[False][1].flops == pytest.approx((3 * LAYERS - 1) * product)
    assert toys[True][1].flops == pytest.approx(3 * LAYERS * product)  # a loop has no special first layer
    for _, found in toys.values():
        reduced = sum(i.wire for i in found.collectives() if i.opcode == "all-reduce")
        assert reduced == pytest.approx(LAYERS * WIDTH * WIDTH * 2, rel=1e-3)
        assert found.floor_seconds <= found.seconds
    # The products take about the same time in both schedules: none was dropped, or counted once or too often.
    unrolled, scanned = (sum(i.seconds for i in toys[s][1].items if i.flops) for s in (False, True))
    assert scanned == pytest.approx(unrolled * 3 * LAYERS / (3 * LAYERS - 1), rel=0.3)


def test_scanned_body_is_counted_once_by_plain_addition(toys):
    """ENTRY once and every loop body LAYERS times, added by hand; plain addition over the text is far below."""
    module, found = toys[True]
    bodies = [i.called("body") for i in module.entry.instructions if i.opcode == "while"]
    assert len(bodies) == 2  # forward and backward
    once = sum(i.cycles or 0 for i in module.entry.instructions)
    inside = sum(i.cycles or 0 for name in bodies for i in module.computations[name].instructions)
    compute = sum(i.seconds for i in found.items if i.kind == "compute")
    assert compute == pytest.approx((once + LAYERS * inside) / V5E.chip.clock)
    assert {i.count for i in found.items if i.flops} == {LAYERS}
