"""A progress bar on a terminal, one line at the end elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable


def bar(text: str) -> Callable[[int, int], None]:
    """A function (done, total) that draws the state of one piece of work."""
    from tqdm import tqdm

    shown = tqdm(desc=text, total=0, disable=not sys.stderr.isatty(), leave=False)

    def update(done: int, total: int) -> None:
        shown.total = total
        shown.update(done - shown.n)
        if done >= total:
            shown.close()

    return update
