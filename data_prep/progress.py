"""Progress of a long job: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts cells, the rejected ones too (the closing report tells them apart); shows rate and remaining time.

    Args:
      total: cells of the whole job.
      done: cells that an earlier run finished.
      every: seconds between two lines in a log.
    """

    def __init__(self, total: int, done: int = 0, every: float = 15.0):
        self.total, self.done, self._start_done = total, done, done
        self._every, self._start = every, time.monotonic()
        self._next = self._start + min(2.0, every)
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(
                total=total, initial=done, unit="cell", desc="preparing", dynamic_ncols=True, file=sys.stderr
            )
        if self._bar is None and done:
            self.say(f"{done} of {total} cells were finished before")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.total:
            self._line()

    def step(self) -> None:
        """One more cell is done."""
        self.set(self.done + 1)

    def set(self, done: int) -> None:
        """Cells done so far."""
        done = min(done, self.total)
        if self._bar is not None:
            self._bar.update(done - self.done)
        self.done = done
        if self._bar is None and time.monotonic() >= self._next:
            self._next = time.monotonic() + self._every
            self._line()

    def say(self, text: str) -> None:
        """A message that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)

    def _line(self) -> None:
        elapsed = time.monotonic() - self._start
        rate = (self.done - self._start_done) / elapsed if elapsed > 0 else 0.0
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = f"{left / 60:.1f} min" if left < 1e7 else "unknown"
        self.say(f"{self.done}/{self.total} cells looked at, {rate:.2f} cells/s, {eta} left")
