"""Shared by the benchmarks: repeats in one process, turns between processes, and what results are read with.

In a comparison every contender is a process of its own that stays warm and runs a few steps when asked,
in turns with the others. Whatever else slows the machine down then slows all of them alike.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

READY, TURN = "ready", "turn"


def versions(*packages: str) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def circumstances(module: str, *packages: str) -> dict[str, Any]:
    """What a result of a benchmark on processors is read with: command, date, machine, versions."""
    return {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions(*packages),
    }


class Turn(NamedTuple):
    """Seconds per step on the clock, and of processor time of all threads of this process.

    On a CPU that others use as well the second is the steadier one.
    """

    wall: float
    cpu: float


def repeat(run: Callable[[int], None], steps: int, repeats: int) -> list[Turn]:
    """``repeats`` timed runs; ``run(steps)`` returns when the device has finished them."""
    turns = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        run(steps)
        turns.append(Turn((time.perf_counter() - wall) / steps, (time.process_time() - cpu) / steps))
    return turns


def take_turns(run: Callable[[int], None]) -> list[Turn]:
    """Serves a comparison: announces itself, then runs as many steps as each line of stdin says, until it ends."""
    turns: list[Turn] = []
    print(json.dumps({READY: True}), flush=True)
    for line in sys.stdin:
        turns += repeat(run, int(line), 1)
        print(json.dumps({TURN: turns[-1]}), flush=True)
    return turns


def summary(turns: Sequence[Turn], batch: int) -> dict[str, Any]:
    """Images per second at the median and at the best turn, and the seconds themselves."""
    return {
        "images_per_second": batch / statistics.median(t.wall for t in turns),
        "images_per_second_best": batch / min(t.wall for t in turns),
        "seconds_per_step": [t.wall for t in turns],
        "cpu_seconds_per_step": [t.cpu for t in turns],
    }


class Contender:
    """A benchmark running in a process of its own, which takes turns."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], env: dict[str, str] | None = None):
        self.name = name
        self.turns: list[Turn] = []
        command = [sys.executable, "-m", module, *arguments, "--turns"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._read(READY)

    def _read(self, key: str) -> Any:
        """The value of ``key`` in the next JSON line that has it; other output is passed over."""
        for line in self._process.stdout:
            if line.startswith("{") and key in (found := json.loads(line)):
                return found[key]
        raise RuntimeError(f"{self.name}: ended with exit code {self._process.wait()} before it said {key!r}")

    def turn(self, steps: int) -> Turn:
        """Has the process run ``steps`` steps."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.turns.append(Turn(*self._read(TURN)))
        return self.turns[-1]

    def finish(self) -> dict[str, Any]:
        """Ends the process; its last line is the result."""
        self._process.stdin.close()
        lines = [line for line in self._process.stdout if line.startswith("{")]
        if self._process.wait() or not lines:
            raise RuntimeError(f"{self.name}: ended with exit code {self._process.returncode}")
        return json.loads(lines[-1])
