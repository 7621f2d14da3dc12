"""Progress of long work: a bar on a terminal, a line now and then elsewhere (batch jobs, notebooks)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

PAUSE_S = 30.0  # between two lines


def bar(text: str) -> Callable[[int, int], None]:
    """A function (done, total) that shows the state of one piece of work on stderr."""
    if not sys.stderr.isatty():
        return _lines(text)
    from tqdm import tqdm

    shown = tqdm(desc=text, total=0, leave=False)

    def update(done: int, total: int) -> None:
        shown.total = total
        shown.update(done - shown.n)
        if done >= total:
            shown.close()

    return update


def _lines(text: str) -> Callable[[int, int], None]:
    last = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PAUSE_S:
            last = now
            print(f"{text}: {done} of {total}", file=sys.stderr, flush=True)

    return update
