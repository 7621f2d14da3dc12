"""The step-time model on paper, against hand arithmetic and what the TPU compiler made of the step."""

from __future__ import annotations

import pytest

from benchmarks import tpu_matrix
from terrafm_jax.ahead import scaling
from terrafm_jax.ahead.chips import CHIPS
from terrafm_jax.ahead.network import DCN_SECONDS

B, L = scaling.paper_recipes()


def test_recipes_are_the_papers():
    assert (B.batch, B.epochs, L.batch, L.epochs) == (1024, 150, 2048, 200)
    assert 130e6 < B.parameters < 160e6
    assert L.parameters > 2.5 * B.parameters
    assert B.images == 150 * 1_530_000


def test_tile_bytes_by_hand():
    """Two S2 levels (4 bands at 10 m, 6 at 20, 2 at 60) and two S1 bands, 2 bytes each, plus one bit of mask."""
    bands = 2 * 2 * (4 * 534**2 + 6 * 267**2 + 2 * 89**2) + 2 * 2 * 534**2
    masks = 3 * 534 * 67 + 2 * 267 * 34 + 2 * 89 * 12
    assert scaling.tile_bytes() == pytest.approx(bands + masks, abs=400)


def test_a_pod_stays_under_half_a_gigabyte_a_host():
    """Four v5e chips at 55 % of 197 TF/s and 455 GFLOP an image ask for 952 tiles of 7.6 MB a second."""
    images, whole, echo = scaling.echo_needed(B, CHIPS["v5e"])
    assert images == pytest.approx(4 * 0.55 * 197e12 / 455e9, rel=0.01)
    assert whole == images * scaling.tile_bytes()
    assert echo == 16
    for recipe in (B, L):
        for chip in CHIPS.values():
            _, whole, echo = scaling.echo_needed(recipe, chip)
            assert whole / echo <= scaling.HOST_BYTES
            assert echo == 1 or 2 * whole / echo > scaling.HOST_BYTES
    assert scaling.input_table().count("\n") == 9


@pytest.mark.parametrize("chip", list(CHIPS))
def test_every_size_has_a_slice(chip):
    for chips in scaling.SIZES:
        assert scaling.standard_topology(chip, chips).chips == chips
    with pytest.raises(ValueError, match="no slice of 6 chips"):
        scaling.standard_topology(chip, 6)


def test_step_time_by_hand():
    """Gradients go around rings of 16 on both axes, two networks in bfloat16 around one, which holds a whole state."""
    found = scaling.step_time(B, scaling.standard_topology("v5e", 256), 16, efficiency=0.6, hidden=0.8)
    assert found.compute == pytest.approx(16 * B.flops / (197e12 * 0.6))
    assert found.update == pytest.approx(9 * 4 * B.parameters / 16 / 8.19e11)
    sums = 2 * (4 * B.parameters * 255 / 256 / 180e9 + 16e-6)
    gathers = 2 * (2 * B.parameters * 15 / 16 / 90e9 + 8e-6)
    assert found.ici == pytest.approx(sums + gathers)
    assert found.dcn == 0.0
    assert found.shown == pytest.approx(0.2 * found.ici)
    assert found.total == found.compute + found.update + found.shown
    assert found.mfu < 0.6
    assert found.images_per_second == pytest.approx(256 * 16 / found.total)


@pytest.mark.parametrize(
    ("chip", "chips", "images", "close"),
    [("v5e", 16, 16, 0.1), ("v5p", 8, 32, 0.1), ("v4", 64, 16, 0.2), ("v6e", 64, 16, 0.2)],
)
def test_model_agrees_with_the_compiler(chip, chips, images, close):
    """Traffic is reckoned independently of the compiled program; efficiency and overlap are taken from it."""
    topology = scaling.standard_topology(chip, chips)
    compiled = tpu_matrix.load()[f"B | {topology.name} | {images}"]
    found = scaling.step_time(B, topology, images)
    traffic = sum(c["hidden_seconds"] + c["exposed_seconds"] for c in compiled["collectives"])
    assert found.ici == pytest.approx(traffic, rel=close)  # some 180 collectives, each with its latency
    assert found.total == pytest.approx(compiled["step_seconds"], rel=0.02 if images == 32 or chip == "v5e" else 0.03)


def test_several_slices_pay_the_data_center_network():
    found = scaling.step_time(B, scaling.standard_topology("v5e", 1024), 16)
    share = 4 * B.parameters / 256
    assert found.topology.slices == 4
    assert found.dcn == pytest.approx(2 * share * 3 / 4 / 3.125e9 + DCN_SECONDS)


def test_short_compute_hides_no_more_than_it_lasts():
    found = scaling.step_time(B, scaling.standard_topology("v5e", 1024), 1)
    assert found.shown == pytest.approx(found.ici + found.dcn - found.compute)
    assert found.shown > (1 - scaling.HIDDEN["v5e"]) * (found.ici + found.dcn)


def test_what_helps_where():
    """bf16 sums halve their traffic, a state that is whole spares the gathers and pays for its update."""
    topology = scaling.standard_topology("v5p", 64)
    plain = scaling.step_time(B, topology, 8)
    whole = scaling.step_time(B, topology, 8, split=1)
    half = scaling.step_time(B, topology, 8, split=1, reduce_bytes=2)
    assert half.ici == pytest.approx(whole.ici / 2, rel=0.01)
    assert whole.ici < plain.ici
    assert plain.update == pytest.approx(whole.update / 16)
    assert scaling.step_time(B, topology, 8, hidden=1.0).shown == 0.0
    assert scaling.step_time(B, topology, 8, view_sets=4).host_bytes_per_second == pytest.approx(
        plain.host_bytes_per_second / 4
    )


def test_strong_scaling_ends_at_one_image_a_chip():
    rows = scaling.strong_scaling(B, "v5p")
    assert [r.images * r.topology.chips for r in rows] == [1024] * len(rows)
    assert rows[-1].images == 1
    assert rows[-1].mfu < 0.8 * rows[0].mfu  # traffic does not shrink with the batch


def test_hours_of_a_recipe_are_its_steps_one_after_the_other():
    row = next(line for line in scaling.hours_table(L).splitlines() if "v5e" in line)
    step = scaling.step_time(L, scaling.standard_topology("v5e", 256), 8)
    hours = 200 * 1_530_000 / 2048 * step.total * 256 / 3600
    assert row == f"| L, v5e:16x16, 8 | 256 | {hours:,.0f} | {hours / 256 / 24:.1f} |"


def test_table_has_one_line_a_size():
    rows = scaling.weak_scaling(B, "v6e", 16)
    assert len(scaling.table(rows).splitlines()) == len(rows) + 2


def test_matrix_tables_compare_with_the_naive_step():
    """Two entries on one topology, and one that failed."""

    def entry(mfu, **more):
        return {
            "mfu": mfu, "chips": 16, "images_per_chip": 16, "step_seconds": 0.08, "floor_seconds": 0.05,
            "flops": {"program": 2.0, "formula": 1.6}, **more,
        }  # fmt: skip

    whole = entry(
        0.5, memory={"peak": 2**33, "hbm": 2**34}, fits=True, views_share=0.04, gradient_bytes=5e8,
        collectives=[{"bytes": 6e8, "exposed_seconds": 2e-3, "hidden_seconds": 1e-3}],
        seconds_by_scope={"views": 0.0032, "rest": 0.0768}, seconds_by_kind={"compute": 0.078, "collective": 0.002},
    )  # fmt: skip
    results = {
        "B scan | v5e:4x4 | 16": whole, "naive | v5e:4x4 | 16": entry(0.4), "L scan | v4:4x4x8 | 16": {"error": "x"},
        "B (unfused) | v5e:4x4 | 16": {**whole, "mfu": 0.2},
    }  # fmt: skip
    assert tpu_matrix.speedup(results, "B scan | v5e:4x4 | 16") == pytest.approx(1.25)
    table = tpu_matrix.table(results).splitlines()
    row = "| 8.0 of 16 | 80.0 | 50.0 | 4.0% | 600 (500) | 2.0, 1.0 | 1.25 | 50.0% | 1.25 | 200 |"
    assert table[2] == f"| B scan | v5e:4x4 | 16 {row}"
    assert len({line.count("|") for line in table}) == 1
    assert len(table) == 5
    assert "| B (unfused) | v5e:4x4 |" in tpu_matrix.table(results, history=True).splitlines()[2]
    assert tpu_matrix.parts(results).splitlines()[2] == "| B scan, v5e:4x4, 16 | 4.0% | 96.0% | 97.5% | 2.5% |"
    (hours,) = tpu_matrix.chip_hours(results).splitlines()[2:]
    assert hours == f"| B scan, v5e:4x4, 16 | 16 | {150 * 1_530_000 / 200 / 3600:,.0f} | 0.8 |"
