"""The step-time model on paper, against hand arithmetic."""

from __future__ import annotations

import pytest

from terrafm_jax.tpu import scaling
from terrafm_jax.tpu.chips import CHIPS
from terrafm_jax.tpu.network import DCN_SECONDS

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
    assert scaling.tile_bytes(compression=2) == scaling.tile_bytes() / 2


@pytest.mark.parametrize("chip", list(CHIPS))
def test_every_size_has_a_slice(chip):
    for chips in scaling.SIZES:
        assert scaling.standard_topology(chip, chips).chips == chips
    with pytest.raises(ValueError, match="no slice of 6 chips"):
        scaling.standard_topology(chip, 6)


def test_step_time_by_hand():
    found = scaling.step_time(B, scaling.standard_topology("v5e", 256), 16, efficiency=0.6)
    assert found.compute == pytest.approx(16 * B.flops / (197e12 * 0.6))
    assert found.update == pytest.approx(9 * 4 * B.parameters / 8.19e11)
    assert found.ici == pytest.approx(2 * (4 * B.parameters * 255 / 256 / 180e9 + 16e-6))
    assert found.dcn == 0.0
    assert found.mfu < 0.6
    assert found.images_per_second == pytest.approx(256 * 16 / found.total)


def test_several_slices_pay_the_data_center_network():
    found = scaling.step_time(B, scaling.standard_topology("v5e", 1024), 16)
    share = 4 * B.parameters / 256
    assert found.topology.slices == 4
    assert found.dcn == pytest.approx(2 * share * 3 / 4 / 3.125e9 + DCN_SECONDS)


def test_what_helps_where():
    """bf16 sums halve the ICI term, overlap hides it, a sharded update divides the HBM term."""
    topology = scaling.standard_topology("v5p", 64)
    plain = scaling.step_time(B, topology, 8)
    half = scaling.step_time(B, topology, 8, reduce_bytes=2)
    assert half.ici == pytest.approx(plain.ici / 2, rel=0.01)
    assert scaling.step_time(B, topology, 8, overlap=1.0).ici == 0.0
    assert scaling.step_time(B, topology, 8, sharded_update=True).update == pytest.approx(plain.update / 64)
    assert scaling.step_time(B, topology, 8, view_sets=4).host_bytes_per_second == pytest.approx(
        plain.host_bytes_per_second / 4
    )


def test_strong_scaling_ends_at_one_image_a_chip():
    rows = scaling.strong_scaling(B, "v5p")
    assert [r.images * r.topology.chips for r in rows] == [1024] * len(rows)
    assert rows[-1].images == 1
    mfu = [r.mfu for r in rows]
    assert mfu[-1] < mfu[0] / 2  # the update and the sums do not shrink with the batch
    assert {r.limit for r in rows if r.topology.chips >= 256} <= {"HBM", "ICI"}


def test_chip_hours():
    hours = scaling.chip_hours(B, CHIPS["v5e"], 0.55)
    assert hours == pytest.approx(B.images * B.flops / (197e12 * 0.55) / 3600)
    assert 100 < hours < 1000


def test_table_has_one_line_a_size():
    rows = scaling.weak_scaling(B, "v6e", 16)
    assert len(scaling.table(rows).splitlines()) == len(rows) + 2
