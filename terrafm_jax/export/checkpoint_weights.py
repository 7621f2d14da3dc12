"""Teacher or student out of an Orbax checkpoint, on any topology, without the rest of the state."""

from __future__ import annotations

from typing import Any

import numpy as np

from terrafm_jax.paths import is_remote
from terrafm_jax.weights import WeightsError

_STATE, _META = "state", "meta"
COMMITTED = "commit_success.txt"  # Orbax writes it last on gs://, where folders cannot be renamed; nowhere else
_FIELD = {"teacher": "teacher", "student": "params"}  # fields of training.state.TrainState


def find_checkpoint(path: Any) -> Any | None:
    """The step folder that ``path`` is or, for a workdir or its ``checkpoints``, the newest complete one.

    Raises WeightsError where there are steps in a bucket, but none is known to be complete.
    """
    if (path / _STATE).is_dir() and (path / _META).is_dir():
        return path
    for root in (path / "checkpoints", path):
        if root.is_dir():
            steps = [c for c in root.iterdir() if c.name.isdigit() and (c / _STATE).is_dir() and (c / _META).is_dir()]
            complete = [c for c in steps if not _marked(c) or (c / COMMITTED).exists()]
            if complete:
                return max(complete, key=lambda c: int(c.name))
            if steps:
                raise WeightsError(
                    f"{root}: found the steps {', '.join(sorted((c.name for c in steps), key=int))}, none with "
                    f"{COMMITTED}, so none is known to be complete; if you copied one from a disk, give its folder"
                )
    return None


def _marked(step: Any) -> bool:
    return str(step).startswith("gs://")


def read_checkpoint(step: Any, which: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters as float32 NumPy arrays and the checkpoint's meta. Raises WeightsError."""
    import jax
    import orbax.checkpoint as ocp

    place = step if is_remote(step) else step.absolute()  # Orbax reads no relative path
    try:
        handler = ocp.PyTreeCheckpointHandler()
        tree = handler.metadata(place / _STATE).tree  # a Checkpointer would warn that it finds none of the whole step
        with ocp.Checkpointer(handler) as reader:
            wanted = {_FIELD[which]: jax.tree.map(lambda _: np.zeros(()), tree[_FIELD[which]])}
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float32), wanted)
            found = reader.restore(
                place / _STATE, args=ocp.args.PyTreeRestore(wanted, restore_args=as_numpy, partial_restore=True)
            )
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
            meta = reader.restore(place / _META, args=ocp.args.JsonRestore())
    except Exception as error:  # orbax and tensorstore raise many kinds
        reason = str(error).strip().split("\n")[0][:200]
        raise WeightsError(f"{step}: the checkpoint cannot be read ({reason}); use an older step of the run") from error
    return found[_FIELD[which]], meta
