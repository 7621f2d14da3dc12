"""Timing shared by the benchmarks: repeats in one process, or turns taken between processes that compete.

In a comparison every contender is a process of its own that stays warm and runs a few steps when asked,
in turns with the others. Whatever else slows the machine down then slows all of them alike.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

READY, TURN = "ready", "turn"


def repeat(run: Callable[[int], None], steps: int, repeats: int) -> list[float]:
    """Seconds per step of ``repeats`` runs; ``run(steps)`` returns when the device has finished them."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        run(steps)
        seconds.append((time.perf_counter() - begun) / steps)
    return seconds


def take_turns(run: Callable[[int], None]) -> list[float]:
    """Serves a comparison: announces itself, then runs as many steps as each line of stdin says, until it ends."""
    seconds: list[float] = []
    print(json.dumps({READY: True}), flush=True)
    for line in sys.stdin:
        seconds += repeat(run, int(line), 1)
        print(json.dumps({TURN: seconds[-1]}), flush=True)
    return seconds


def summary(seconds: Sequence[float], batch: int) -> dict[str, Any]:
    """Images per second at the median and at the best repeat."""
    median = sorted(seconds)[len(seconds) // 2]
    return {
        "images_per_second": batch / median,
        "images_per_second_best": batch / min(seconds),
        "seconds_per_step": list(seconds),
    }


class Contender:
    """A benchmark running in a process of its own, which takes turns."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], env: dict[str, str] | None = None):
        self.name, self.seconds = name, []
        command = [sys.executable, "-m", module, *arguments, "--turns"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self._read(READY)

    def _read(self, key: str) -> Any:
        """The value of ``key`` in the next JSON line that has it; other output is passed over."""
        for line in self._process.stdout:
            if line.startswith("{") and key in (found := json.loads(line)):
                return found[key]
        raise RuntimeError(f"{self.name}: ended with exit code {self._process.wait()} before it said {key!r}")

    def turn(self, steps: int) -> float:
        """Seconds per step of this turn."""
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        self.seconds.append(self._read(TURN))
        return self.seconds[-1]

    def finish(self) -> dict[str, Any]:
        """Ends the process; its last line is the result."""
        self._process.stdin.close()
        lines = [line for line in self._process.stdout if line.startswith("{")]
        if self._process.wait() or not lines:
            raise RuntimeError(f"{self.name}: ended with exit code {self._process.returncode}")
        return json.loads(lines[-1])
