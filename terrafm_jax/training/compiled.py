"""The train step, compiled for the canvases of a run."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from terrafm_jax.training.metrics import Progress
from terrafm_jax.training.plan import Plan
from terrafm_jax.training.sharding import batch_sharding
from terrafm_jax.training.state import TrainState
from terrafm_jax.training.step import abstract_state, make_step

# Milliseconds that one process may take longer than another to compile a step.
_COMPILE_PATIENCE = 3_600_000


def _wait_for_the_others(what: str) -> None:
    """A barrier over all processes.

    A process that starts the step while others still compile gives up on its first collective, with gloo after 30 s,
    which compiling on a busy machine easily exceeds.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=what, timeout_ms=_COMPILE_PATIENCE)


class Compiled:
    """The train step, compiled once for each canvas; prints the memory it will need before it runs.

    Canvases given to :meth:`ahead` are compiled in threads, in parallel with each other and with what the program does
    until it needs them (evaluating the untrained model, reading the first batches).
    """

    def __init__(self, plan: Plan, progress: Progress):
        self._step, self._state = make_step(plan.spec, plan.mesh), abstract_state(plan.spec, plan.mesh)
        self._sharding, self._progress = batch_sharding(plan.mesh), progress
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, "terrafm-compile")
        self._begun: dict[tuple, Future] = {}
        self._by_shape: dict[tuple, Any] = {}

    def ahead(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Starts to compile for batches like these (only shapes and dtypes of the arrays count)."""
        for batch in batches:
            if (shape := _shape(batch)) not in self._begun:
                self._progress.line(f"compiling the step for canvas {len(self._begun) + 1} (about a minute)")
                self._begun[shape] = self._threads.submit(self._compile, batch)

    def wait(self) -> None:
        """Waits for the first program of :meth:`ahead`, so that its memory is logged before a batch is read."""
        if not self._by_shape and self._begun:
            self._take(next(iter(self._begun)))

    def _compile(self, batch: Mapping[str, Any]) -> tuple[Any, float]:
        begun = time.monotonic()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=self._sharding), batch)
        return self._step.lower(self._state, shapes).compile(), time.monotonic() - begun

    def __call__(self, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, dict[str, jax.Array]]:
        shape = _shape(batch)
        if shape not in self._by_shape:
            self.ahead([batch])
            self._take(shape)
        return self._by_shape[shape](state, batch)

    def _take(self, shape: tuple) -> None:
        """Waits until every process has the program for this shape; logs its compile time and memory."""
        compiled, seconds = self._begun[shape].result()
        self._by_shape[shape] = compiled
        memory = compiled.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else 0
        self._progress.line(
            f"compiled step for canvas {len(self._by_shape)} in {seconds:.1f} s; "
            f"arguments and temporaries {needed / 2**30:.2f} GiB a device"
        )
        _wait_for_the_others(f"compiled canvas {len(self._by_shape)}")


def _shape(batch: Mapping[str, Any]) -> tuple:
    return tuple(x.shape for x in jax.tree.leaves(batch))
