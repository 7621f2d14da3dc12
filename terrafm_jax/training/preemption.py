"""Stopping on request: SIGTERM and SIGINT become "save after this step", agreed between all processes."""

from __future__ import annotations

import os
import signal
import types

import jax
import numpy as np

_TOLD = b"\nCtrl-C: ends after this step, with a checkpoint; a second Ctrl-C ends at once, without\n"


class Interrupted(Exception):
    """Raised by :meth:`StopRequest.poll` in the middle of work that can be done again."""


class StopRequest:
    """Turns signals into a flag that every process reads the same at the same step.

    One process: SIGTERM and SIGINT set the flag; a second SIGINT interrupts at once. A first SIGINT says so. Several
    processes: the preemption service of ``jax.distributed`` catches SIGTERM on any of them and lets
    all agree on one of the next calls of :meth:`reached`; SIGINT is passed on to it as SIGTERM, and there they also
    tell each other whether a person interrupted any of them: all exit alike. So every process has to make the same
    calls in the same order, at every step and at every batch of an evaluation.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._several, self._speaks = jax.process_count() > 1, jax.process_index() == 0
        self._calls, self._agreed = 0, False
        self._before: dict[signal.Signals, object] = {}
        for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._caught)

    def _caught(self, number: int, _frame: types.FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)
        if number == signal.SIGINT and self._speaks:
            os.write(2, _TOLD)  # print may be what was interrupted, and cannot be entered twice
        if self._several:
            signal.raise_signal(signal.SIGTERM)

    def reached(self) -> bool:
        """True from the call on at which all processes have agreed to stop."""
        if not self._several:
            return self.signal is not None
        if self._agreed:
            return True
        from jax.experimental import multihost_utils

        self._calls += 1
        if multihost_utils.reached_preemption_sync_point(self._calls):
            interrupted = multihost_utils.process_allgather(np.bool_(self.by_person))
            self.signal = signal.SIGINT if interrupted.any() else signal.SIGTERM
            self._agreed = True
        return self._agreed

    def poll(self) -> None:
        """Raises Interrupted once :meth:`reached`; for work that takes longer than a step."""
        if self.reached():
            raise Interrupted

    @property
    def by_person(self) -> bool:
        """Whether it was Ctrl-C: of this process alone until :meth:`reached`, then of any."""
        return self.signal == signal.SIGINT

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
