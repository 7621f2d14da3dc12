"""The costliest kernels of a profiler trace, as a table.

    python -m benchmarks.kernels TRACE_FOLDER [--steps 3] [--rows 60]

Reads ``*.trace.json.gz``, which ``jax.profiler`` writes beside its protocol buffers: names, durations and operations of
what ran on the streams of the devices.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.timing import TRACED


class Kernel(NamedTuple):
    """All runs of one kernel."""

    name: str
    operation: str  # where in the program it comes from, as far as the trace says
    count: int
    milliseconds: float  # of all runs


def read(folder: Path) -> list[Kernel]:
    """Costliest first. Empty where no device was traced. Raises FileNotFoundError where there is no trace."""
    files = sorted(folder.rglob("*.trace.json.gz"))
    if not files:
        raise FileNotFoundError(f"{folder}: no *.trace.json.gz of jax.profiler")
    with gzip.open(files[-1], "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    streams = _streams(events)
    found: dict[str, tuple[str, int, float]] = {}
    for e in events:
        if e.get("ph") == "X" and (e["pid"], e.get("tid")) in streams:
            operation, count, spent = found.get(e["name"], ("", 0, 0.0))
            found[e["name"]] = (operation or _operation(e.get("args", {})), count + 1, spent + e.get("dur", 0.0))
    rows = [Kernel(name, operation, count, spent / 1000) for name, (operation, count, spent) in found.items()]
    return sorted(rows, key=lambda k: -k.milliseconds)


def _streams(events: Sequence[dict[str, Any]]) -> set[tuple[int, int]]:
    """(process, thread) of the devices' streams. Their other lines (modules, operations) repeat the same time."""
    names = {(e["pid"], e.get("tid"), e["name"]): e["args"].get("name", "") for e in events if e.get("ph") == "M"}
    devices = {pid for (pid, _, kind), name in names.items() if kind == "process_name" and "/device:" in name}
    return {
        (pid, tid)
        for (pid, tid, kind), name in names.items()
        if kind == "thread_name" and pid in devices and name.startswith("Stream")
    }


def _operation(args: dict[str, Any]) -> str:
    """The operation of the compiled program and the line of our code that it comes from, as far as known."""
    return " ".join(str(args[key]) for key in ("hlo_op", "tf_op", "name") if args.get(key))


def table(kernels: Sequence[Kernel], steps: int, rows: int = 60) -> str:
    """Markdown: milliseconds a step, share of all kernels' time, runs a step."""
    total = sum(k.milliseconds for k in kernels)
    if not total:
        return "No kernel of a device is in the trace.\n"
    lines = [f"All kernels: {total / steps:.2f} ms a step, {len(kernels)} names.", ""]
    lines += ["| ms a step | share | runs a step | kernel | operation |", "|---|---|---|---|---|"]
    for k in kernels[:rows]:
        name, operation = (text.replace("|", "/")[:120] for text in (k.name, k.operation))
        figures = f"{k.milliseconds / steps:.3f} | {k.milliseconds / total:.1%} | {k.count / steps:.1f}"
        lines.append(f"| {figures} | {name} | {operation} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=TRACED, help="that the trace holds")
    parser.add_argument("--rows", type=int, default=60)
    args = parser.parse_args(argv)
    print(table(read(args.folder), args.steps, args.rows))


if __name__ == "__main__":
    main()
