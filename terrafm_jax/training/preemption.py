"""Stopping on request: SIGTERM and SIGINT become "save after this step", agreed between all processes."""

from __future__ import annotations

import signal
import types

import jax


class StopRequest:
    """Turns signals into a flag that every process reads the same at the same step.

    One process: SIGTERM and SIGINT set the flag; a second SIGINT interrupts at once. Several
    processes: the preemption service of ``jax.distributed`` catches SIGTERM on any of them and lets
    all agree on a step; SIGINT is passed on to it as SIGTERM.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._several = jax.process_count() > 1
        self._before: dict[signal.Signals, object] = {}
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._caught)

    def _caught(self, number: int, _frame: types.FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    def reached(self, step: int) -> bool:
        """True once all processes have agreed to stop at ``step``; every process must ask at every step."""
        if not self._several:
            return self.signal is not None
        from jax.experimental import multihost_utils

        if multihost_utils.reached_preemption_sync_point(step):
            self.signal = self.signal or signal.SIGTERM
            return True
        return False

    @property
    def by_person(self) -> bool:
        return self.signal == signal.SIGINT

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
