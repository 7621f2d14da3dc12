"""Shared by the benchmarks: timed repeats, contenders that take turns, and the circumstances of a result.

In a comparison every contender is a process of its own that stays warm and runs a few steps when asked,
in turns with the others, so that whatever else loads the machine slows all of them alike.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

READY, TURN, FAILED = "ready", "turn", "failed"
TRACED = 3  # steps in a profiler trace of the train step


def versions(*packages: str) -> dict[str, str]:
    """Versions of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# Packages with the CUDA libraries on which a GPU's figures depend.
_CUDA = re.compile(r"jax-cuda\d+|nvidia-(cudnn|cublas|cuda-runtime|nccl)|(pytorch-)?triton", re.IGNORECASE)
_SMI = ("name", "driver_version", "memory.total", "memory.used", "clocks.sm", "clocks.max.sm", "power.limit",
        "temperature.gpu", "utilization.gpu", "mig.mode.current")  # fmt: skip


def circumstances(module: str, *packages: str) -> dict[str, Any]:
    """The circumstances of a result: command, date, machine, versions; of a GPU also driver, clocks, CUDA libraries."""
    return {
        "command": " ".join(["python", "-m", module, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": versions(*packages),
        "gpu": gpu(),
    }


def gpu() -> dict[str, Any] | None:
    """nvidia-smi's answer (a row per GPU) and the CUDA packages installed; None without nvidia-smi."""
    try:
        ask = ["nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader"]
        rows = subprocess.run(ask, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()
        # Only its table tells the CUDA version of the driver.
        table = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    cuda = re.search(r"CUDA Version:\s*(\S+)", table)
    return {
        "devices": [dict(zip(_SMI, re.split(r",\s*", row.strip()), strict=False)) for row in rows],
        "driver_cuda": cuda and cuda.group(1),
        "packages": {
            name: d.version for d in importlib.metadata.distributions() if _CUDA.match(name := d.metadata["Name"] or "")
        },
    }


class Turn(NamedTuple):
    """Seconds per step: wall-clock time, and processor time summed over the threads of this process.

    On a CPU that others use, too, processor time varies less.
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
    """The contender's side of a comparison: prints READY, then runs as many steps as each line of stdin says."""
    turns: list[Turn] = []
    print(json.dumps({READY: True}), flush=True)
    for line in sys.stdin:
        turns += repeat(run, int(line), 1)
        print(json.dumps({TURN: turns[-1]}), flush=True)
    return turns


@contextlib.contextmanager
def failure_reported(enabled: bool) -> Iterator[None]:
    """Tells a comparison in one line why this contender fails, before it does."""
    try:
        yield
    except Exception as error:
        if enabled:
            first = (str(error).strip().splitlines() or [""])[0][:300]
            print(json.dumps({FAILED: f"{type(error).__name__}: {first}"}), flush=True)
        raise


def summary(turns: Sequence[Turn], batch: int) -> dict[str, Any]:
    """Images per second of the median and of the best turn, and the seconds of all turns."""
    return {
        "images_per_second": batch / statistics.median(t.wall for t in turns),
        "images_per_second_best": batch / min(t.wall for t in turns),
        "seconds_per_step": [t.wall for t in turns],
        "cpu_seconds_per_step": [t.cpu for t in turns],
    }


class ContenderFailed(RuntimeError):
    """A contender ended early; the message says which and why."""


class Contender:
    """A benchmark in a process of its own that takes turns; call :meth:`ready` before the first turn."""

    def __init__(self, name: str, module: str, arguments: Sequence[str], env: dict[str, str] | None = None):
        self.name = name
        self.turns: list[Turn] = []
        command = [sys.executable, "-m", module, *arguments, "--turns"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def ready(self) -> None:
        """Waits until it has compiled and warmed up."""
        self._read(READY)

    def _read(self, key: str) -> Any:
        """The value of ``key`` in the next JSON line that has it; skips other output."""
        for line in self._process.stdout:
            found = json.loads(line) if line.startswith("{") else {}
            if FAILED in found:
                self._process.wait()  # so that its memory is free for the others
                raise ContenderFailed(f"{self.name}: {found[FAILED]}")
            if key in found:
                return found[key]
        raise ContenderFailed(f"{self.name}: ended with exit code {self._process.wait()} before it said {key!r}")

    def turn(self, steps: int) -> Turn:
        """Has the process run ``steps`` steps."""
        with contextlib.suppress(BrokenPipeError):  # it has ended; _read raises with what it said last
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        self.turns.append(Turn(*self._read(TURN)))
        return self.turns[-1]

    def finish(self) -> dict[str, Any]:
        """Ends the process and returns its result, the JSON of its last line."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        lines = [line for line in self._process.stdout if line.startswith("{")]
        if self._process.wait() or not lines:
            raise ContenderFailed(f"{self.name}: ended with exit code {self._process.returncode}")
        return json.loads(lines[-1])

    def stop(self) -> None:
        """Ends the process at once, whatever it is doing."""
        self._process.kill()
        self._process.wait()
