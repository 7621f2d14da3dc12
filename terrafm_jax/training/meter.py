"""What the loop measures: the metrics of each step, read one step late, and where the time goes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax

from terrafm_jax.training import flops
from terrafm_jax.training.metrics import timed
from terrafm_jax.training.tools import REMEDY, Tools, TrainingError
from terrafm_jax.training.watch import Watch


def due(step: int, every: int, always: bool = False) -> bool:
    """True at every multiple of ``every`` (0: never), or where ``always`` says so."""
    return always or (every > 0 and step % every == 0)


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
