"""A profiler trace of some steps of a run, for TensorBoard or Perfetto."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath


class Trace:
    """Traces steps ``fields.start`` to ``fields.stop`` (exclusive) into ``WORKDIR/profile``.

    A run that resumes within this range traces the rest of it; one that ends within it keeps the trace so far.
    """

    def __init__(self, fields: Any, workdir: str):
        self._steps = range(fields.start, fields.stop)
        self._folder = str(epath.Path(workdir) / "profile")
        self._running = False

    def before(self, step: int, state: Any) -> None:
        """Starts or stops the trace if it is due before ``step``, which is about to run on ``state``.

        Steps are dispatched asynchronously, so the device has to catch up first: else the trace holds other steps.
        """
        if (step in self._steps) != self._running:
            jax.block_until_ready(state)
        if step in self._steps and not self._running:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif step not in self._steps:
            self.close()

    def close(self) -> None:
        """Writes the trace if one is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
