"""A checkpoint of one topology is restored on another: same values, the other one's shardings."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from test_step import one_device, tiny

from terrafm_jax.training.checkpoint import Checkpointer, CheckpointError
from terrafm_jax.training.sharding import make_mesh
from terrafm_jax.training.state import TrainState
from terrafm_jax.training.step import abstract_state, init_state


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """Written by eight devices, parameters split over all of them."""
    folder = tmp_path_factory.mktemp("run")
    state = init_state(tiny(), make_mesh(data=1, fsdp=8))
    checkpoints = Checkpointer(str(folder))
    checkpoints.save(7, state, {"example": 56})
    checkpoints.close()
    return folder, jax.device_get(state)


@pytest.mark.parametrize("shape", [{"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, None], ids=str)
def test_another_topology_restores_it(saved: tuple[Path, TrainState], shape: dict[str, int] | None) -> None:
    folder, expected = saved
    like = abstract_state(tiny(), make_mesh(**shape) if shape else one_device())
    checkpoints = Checkpointer(str(folder))
    assert checkpoints.latest() == 7
    state, meta = checkpoints.restore(like)
    checkpoints.close()
    assert meta == {"example": 56}
    for value, want, place in zip(*map(jax.tree.leaves, (state, expected, like)), strict=True):
        np.testing.assert_array_equal(value, want)
        assert value.sharding.is_equivalent_to(place.sharding, value.ndim)


def test_another_model_is_refused_with_the_folder(saved: tuple[Path, TrainState]) -> None:
    folder, _ = saved
    checkpoints = Checkpointer(str(folder))
    with pytest.raises(CheckpointError, match=r"(?s)checkpoints/7: does not restore .* init_from=PATH"):
        checkpoints.restore(abstract_state(tiny(("s1", "s2_l2a")), one_device()))
    checkpoints.close()


def test_a_damaged_checkpoint_names_the_one_before(tmp_path: Path) -> None:
    """A disk that lost files of the newest one: the error is one line and says how to go on, and so it goes."""
    spec = tiny()
    like = abstract_state(spec, one_device())
    checkpoints = Checkpointer(str(tmp_path))
    for step in (3, 7):
        checkpoints.save(step, init_state(spec, one_device()), {"example": step})
    checkpoints.wait()
    for file in (tmp_path / "checkpoints/7/state").rglob("ocdbt.process_0/d/*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"7: .* damaged, move that folder elsewhere .* step 3$") as told:
        checkpoints.restore(like)
    assert "\n" not in str(told.value)
    assert len(str(told.value)) < 900
    checkpoints.close()
    (tmp_path / "checkpoints/7").rename(tmp_path / "moved")
    checkpoints = Checkpointer(str(tmp_path))
    assert checkpoints.restore(like)[1] == {"example": 3}
    checkpoints.close()
