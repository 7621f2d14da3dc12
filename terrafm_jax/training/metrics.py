"""Where a run writes what it measures: ``metrics.jsonl`` always, TensorBoard and W&B if asked, a line or a bar."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import sys
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from tqdm import tqdm

from terrafm_jax.paths import append_line, is_remote

log = logging.getLogger(__name__)

# Object stores cannot append, so there the whole file is written anew: at most every PAUSE seconds and, as it grows, at
# no more than RATE bytes a second on average, so that a long run does not pay for its length at every line.
PAUSE, RATE = 30.0, 200_000


class MetricWriter:
    """Writes the first process's scalars; on the other processes it does nothing.

    On a disk every row is written at once. In a bucket rows may wait a minute or two (``PAUSE``, ``RATE``), or until
    :meth:`flush`, which the program calls before each checkpoint and before it reads them: a process that is killed
    loses only rows of steps that the next start repeats.

    Args:
      workdir: ``metrics.jsonl`` is appended to here, one JSON object a line with ``step`` and ``time``.
      enabled: False on every process but the first.
      tensorboard: event files under ``WORKDIR/tensorboard``.
      wandb_project: W&B project, empty for none; warns where wandb is not installed.
    """

    def __init__(self, workdir: str, enabled: bool, tensorboard: bool = True, wandb_project: str = ""):
        self.enabled = enabled
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._remote = is_remote(workdir)
        self._lines: list[str] = []
        self._waiting, self._due = False, 0.0
        self._board: Any = None
        self._wandb: Any = None
        if not enabled:
            return
        if self._remote and self._path.exists():
            self._lines = self._path.read_text().splitlines()
        if tensorboard:
            self._board = _board(str(epath.Path(workdir) / "tensorboard"))
        if wandb_project:
            try:
                import wandb
            except ImportError:
                log.warning("config.log.wandb = %r, but wandb is not installed: not logging there", wandb_project)
            else:
                self._wandb = wandb.init(project=wandb_project, id=_run_id(workdir), resume="allow", dir=str(workdir))

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends scalars (NaN and infinities as strings, JSON has none); text and lists go to the file alone."""
        if not self.enabled:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **plain})
        if self._remote:
            self._lines.append(line)
            self._waiting = True
            if time.monotonic() >= self._due:
                self.flush()
        else:
            append_line(self._path, line)
        numbers = {k: v for k, v in plain.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def flush(self) -> None:
        """Makes every row readable by others."""
        if not self._waiting:
            return
        text = "\n".join(self._lines) + "\n"
        self._path.write_text(text)
        self._waiting, self._due = False, time.monotonic() + max(PAUSE, len(text) / RATE)

    def close(self) -> None:
        self.flush()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def _run_id(workdir: str) -> str:
    """The W&B id that makes all starts of a workdir one run there; kept in ``WORKDIR/wandb_id``."""
    path = epath.Path(workdir) / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex[:12])
    return path.read_text().strip()


def _board(folder: str) -> Any:
    from tensorboardX import SummaryWriter

    try:  # files are named by the second: without the suffix a quick second start replaces the first one's
        return SummaryWriter(folder, filename_suffix=f".{uuid.uuid4().hex[:8]}")
    except Exception as error:
        if "://" not in folder:
            raise
        log.warning("%s: TensorBoard's writer cannot write there (%s): metrics.jsonl alone", folder, error)
        return None


def _plain(value: Any) -> Any:
    """``value`` as JSON can hold it: arrays as lists, NaN and infinities as strings."""
    if isinstance(value, str | bool | dict) or value is None:
        return value
    array = np.asarray(value)
    if array.ndim:
        return [_plain(v) for v in array.tolist()]
    number = array.item()
    if isinstance(number, float) and not math.isfinite(number):
        return str(number)
    return number


class Progress:
    """A bar on a terminal, plain lines elsewhere; both with an ETA.

    Use ``update`` each step and ``line`` for what must stay readable in a log. The bar appears with the first update.
    """

    def __init__(self, start: int, total: int, unit: str = "step", enabled: bool = True):
        self.start, self.total, self.enabled = start, total, enabled
        self._begun, self._from = 0.0, start  # the pace counts from the first step on, after compiling
        self._done, self._unit = start, unit
        self._bar: tqdm | None = None

    def resume(self, start: int) -> None:
        """Sets the step from which work continues; call it before the first update."""
        self.start = self._from = self._done = start

    def update(self, done: int, note: str = "") -> None:
        if self._bar is None and self.enabled and sys.stderr.isatty():
            self._bar = tqdm(total=self.total, initial=self.start, unit=self._unit, dynamic_ncols=True)
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done - self._done)
        if not self._begun:
            self._begun, self._from = time.monotonic(), done
        self._done = done

    def line(self, text: str) -> None:
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.write(text)
        else:
            log.info("%s", text)

    def eta(self) -> str:
        """Time left at the pace since the first step of this process, as h:mm:ss."""
        done = self._done - self._from
        if done <= 0:
            return "?"
        return clock((time.monotonic() - self._begun) / done * (self.total - self._done))

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """1234.5 -> "0:20:34"."""
    seconds = round(max(seconds, 0))
    return f"{seconds // 3600}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}"


@contextlib.contextmanager
def timed(into: dict[str, float], name: str) -> Any:
    """Adds the seconds spent inside to ``into[name]``."""
    begun = time.monotonic()
    try:
        yield
    finally:
        into[name] = into.get(name, 0.0) + time.monotonic() - begun
