"""What the commands of evaluation and fine-tuning have in common: a quiet start, and errors of one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from absl import app

from terrafm_jax.xla import cache_compilations


def begin(argv: Sequence[str]) -> None:
    """Refuses stray arguments (UsageError), logs from warnings on, keeps compiled programs."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {list(argv[1:])}")
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", force=True)
    logging.getLogger("absl").setLevel(logging.ERROR)
    cache_compilations()


@contextmanager
def one_line(*known: type[Exception]) -> Iterator[None]:
    """Errors that say what to do end in that line and exit code 1; all others keep their traceback."""
    try:
        yield
    except known as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
