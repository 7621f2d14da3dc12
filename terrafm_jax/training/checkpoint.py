"""Checkpoints: one atomic, asynchronous Orbax commit for everything that resuming needs.

A checkpoint holds the train state and, as JSON, the step, the example index, the skipped records, the
resolved config and the sensor statistics. Both are items of one Orbax composite, hence one commit: a
killed process leaves either the whole checkpoint or a temporary folder that the next start removes.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Mapping
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from terrafm_jax.paths import is_remote, write_atomically


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says which, and which one is still usable."""


class Checkpointer:
    """Saves and restores (state, meta) under ``WORKDIR/checkpoints/STEP``.

    Args:
      workdir: local or gs:// folder, seen by all processes.
      keep_last: how many of the newest to keep.
      keep_every: steps; checkpoints at its multiples stay forever (0: none).
    """

    def __init__(self, workdir: str, keep_last: int = 2, keep_every: int = 0):
        folder = epath.Path(workdir)
        # absolute() would prefix a bucket's path with the working directory
        self.folder = (folder if is_remote(workdir) else folder.absolute()) / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_names=("state", "meta"),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=max(1, keep_last),
                keep_period=keep_every or None,
                create=True,
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
            ),
        )

    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> None:
        """Starts an asynchronous save (waits for the previous one). Raises CheckpointError."""
        self._guard(
            lambda: self._manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(dict(meta))),
                force=True,
            )
        )

    def amend(self, step: int, fields: Mapping[str, Any]) -> None:
        """Changes some of what a complete checkpoint says of itself; its state stays as it is. For one process to call.

        Raises CheckpointError where the disk is full; the checkpoint is as it was then.
        """
        record = self.folder / str(step) / "meta" / "metadata"
        text = json.dumps(json.loads(record.read_text()) | dict(fields))
        self._guard(lambda: write_atomically(record, text.encode()))

    def wait(self) -> None:
        """Waits until the last save is committed. Raises CheckpointError."""
        self._guard(self._manager.wait_until_finished)

    def restore(self, abstract: Any, step: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Reads a checkpoint straight into the shardings of ``abstract``; the newest by default.

        Raises CheckpointError naming the folder when it does not fit the state of this config.
        """
        step = self.latest() if step is None else step
        try:
            found = self._manager.restore(
                step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
            )
        except OSError as e:
            raise CheckpointError(f"{self.folder / str(step)}: cannot be read: {e}{self._before(step)}") from e
        except Exception as e:
            reason = " ".join(str(e).split())[:300] or type(e).__name__  # TensorStore adds pages of its settings
            raise CheckpointError(
                f"{self.folder / str(step)}: does not restore into the state of this config: {reason}. "
                "Was the workdir written by another model or recipe? Give a new --workdir, or init_from=PATH "
                f"to take its weights alone{self._before(step)}"
            ) from e
        return found["state"], found["meta"]

    def _before(self, step: int | None) -> str:
        """What to do about a damaged checkpoint: the words that end an error."""
        older = [s for s in self._manager.all_steps() if step is not None and s < step]
        rest = f"go on from step {max(older)}" if older else "begin anew"
        return f". If its files are damaged, move that folder elsewhere to {rest}"

    def close(self) -> None:
        """Waits for what is being written and stops. Raises CheckpointError."""
        self._guard(self._manager.close)

    def _guard(self, action: Callable[[], object]) -> None:
        """Runs the action. Explains a full disk, the one failure that users can fix themselves; other errors pass."""
        try:
            action()
        except Exception as e:
            if not _disk_full(e):
                raise
            last = self.latest()
            there = "There is no earlier one" if last is None else f"The checkpoint of step {last} is complete"
            raise CheckpointError(
                f"{self.folder}: the disk is full; the checkpoint was not written. {there}: free some space and start "
                "again"
            ) from e


def _disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it was raised from, comes from a full disk.

    Orbax writes in threads and through TensorStore, so the error may be wrapped, or keep only its text.
    """
    seen = 0
    while error is not None and seen < 10:  # causes may form a cycle
        text = str(error).lower()
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        if "no space left" in text or "resource_exhausted" in text or "file too large" in text:
            return True
        error, seen = error.__cause__ or error.__context__, seen + 1
    return False
