"""What the loop measures: the compiled step with its memory, and the metrics read one step late."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from terrafm_jax.training import flops
from terrafm_jax.training.metrics import Progress, timed
from terrafm_jax.training.plan import Plan
from terrafm_jax.training.sharding import batch_sharding
from terrafm_jax.training.state import TrainState
from terrafm_jax.training.step import abstract_state, make_step
from terrafm_jax.training.tools import REMEDY, Tools, TrainingError
from terrafm_jax.training.watch import Watch


def due(step: int, every: int, always: bool = False) -> bool:
    """True at every multiple of ``every`` (0: never), or where ``always`` says so."""
    return always or (every > 0 and step % every == 0)


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


class Meter:
    """Reads the metrics of step n while n + 1 runs, logs at intervals, and counts non-finite steps."""

    def __init__(self, tools: Tools):
        self.seconds: dict[str, float] = {}
        self.nonfinite = 0
        plan = tools.plan
        self._plan, self._tools = plan, tools
        self._pending: tuple[int, Any] | None = None
        self._flops = flops.step_flops(plan.spec) * plan.config.batch_size
        self._peak = flops.peak_flops(jax.devices()[0].device_kind, plan.spec.model.dtype) * jax.device_count()
        self._mark, self._mark_step = time.monotonic(), None
        self._watch, self._first, self._pace = Watch(plan.mesh), True, ""

    def push(self, step: int, metrics: Mapping[str, jax.Array]) -> None:
        self.flush()
        self._pending = (step, metrics)

    def flush(self, log: bool = False) -> None:
        """Waits for the pending metrics; ``log`` has them logged in any case.

        Raises:
          TrainingError: too many non-finite steps in a row.
        """
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        with timed(self.seconds, "device"):
            values = jax.device_get(metrics)
        finite = all(math.isfinite(float(values[k])) for k in ("loss", "grad_norm"))
        self.nonfinite = 0 if finite else self.nonfinite + 1
        # The first step of every start is logged: until then time counts as starting up.
        if log or not finite or due(step, self._plan.steps["log.every"], self._first or step == self._plan.stop):
            self._log(step, values)
        self._first = False
        self._tools.progress.update(step, f"loss {float(values['loss']):.3f}{self._pace}")
        if not finite and self.nonfinite >= self._plan.config.max_nonfinite:
            raise TrainingError(
                f"step {step}: loss {float(values['loss'])}, gradient norm {float(values['grad_norm'])}: not finite "
                f"for {self.nonfinite} steps in a row (config.max_nonfinite). {self._tools.last_good()}; {REMEDY}"
            )

    def _log(self, step: int, values: Mapping[str, Any]) -> None:
        now, spent = time.monotonic(), self.seconds
        self.seconds = {}
        row: dict[str, Any] = dict(values)
        warnings: list[str] = []
        if self._mark_step is not None and step > self._mark_step:
            elapsed, count = now - self._mark, step - self._mark_step
            row["seconds_per_step"] = elapsed / count
            row["images_per_second"] = count * self._plan.config.batch_size / elapsed
            row["tflops_per_second"] = count * self._flops / elapsed / 1e12
            if self._peak:
                row["mfu"] = count * self._flops / elapsed / self._peak
            row |= {f"{name}_share": seconds / elapsed for name, seconds in spent.items()}
            with timed(self.seconds, "device"):  # it gathers from all processes, which may block like any step
                warnings = self._watch.interval(elapsed, count, spent)
            row |= {"warnings": warnings} if warnings else {}
        row["skipped"] = sum(self._tools.loader.skipped.values())
        self._tools.writer.write(step, row)
        self._pace = _pace(row)
        self._tools.progress.line(
            f"step {step}/{self._plan.total} loss {float(values['loss']):.4f} "
            f"entropy {float(values['teacher_entropy']):.2f} grad {float(values['grad_norm']):.3f}{self._pace}"
            f" left {self._tools.progress.eta()}"
        )
        for text in warnings:
            self._tools.progress.line(f"step {step}: {text}")
        self._mark, self._mark_step = now, step


def _pace(row: Mapping[str, Any]) -> str:
    """ " 70.8 img/s, 1.24 TFLOP/s, MFU 41%, data 2%", as far as known."""
    if "images_per_second" not in row:
        return ""
    mfu = f", MFU {row['mfu']:.0%}" if "mfu" in row else ""
    return (
        f" {row['images_per_second']:.1f} img/s, {row['tflops_per_second']:.3g} TFLOP/s{mfu}, "
        f"data {row.get('data_share', 0):.0%}"
    )
