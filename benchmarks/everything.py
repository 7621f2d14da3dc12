"""All speed figures of a device in one call: peers, switches, sizes, a profile; JSON into a folder.

    python -m benchmarks.everything --out RESULTS [--minutes 25] [--batch 64] [--only NAME ...]

Runs the entries of :func:`plan` in order of their worth until the time is used up; what was left out is
listed. Every entry is a process of its own with a time limit, so that one failure costs only itself. Needs
jax, flax, optax and, for the peers, torch; ``b_end_to_end`` also what training reads its data with.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Entry:
    """One benchmark: module and arguments, and the seconds after which it is given up."""

    name: str
    module: str
    arguments: tuple[str, ...]
    limit: int = 600


def plan(batch: int, out: Path) -> list[Entry]:
    """What to run, most telling first."""

    def ours(name: str, size: str, *words: str, each: int = batch) -> Entry:
        return Entry(name, "benchmarks.train_step", ("--size", size, "--batch", str(each), *words))

    half = max(1, batch // 2)
    return [
        ours("b", "b"),
        Entry("compare_b", "benchmarks.compare", ("--size", "b", "--batch", str(batch)), 900),
        ours("b_cudnn", "b", "--set", "attention=cudnn"),
        ours("b_profile", "b", "--repeats", "1", "--trace", str(out / "trace_b")),
        ours("l", "l", each=half),
        ours("l_cudnn", "l", "--set", "attention=cudnn", each=half),
        Entry("b_end_to_end", "benchmarks.end_to_end", ("--size", "b", "--batch", str(batch), "--workers", "8"), 900),
        ours("b_twice_the_batch", "b", each=2 * batch),
        ours("b_scan", "b", "--set", "scan=true"),
        ours("b_as_written", "b", "--set", "folded=false"),
        Entry("compare_l", "benchmarks.compare", ("--size", "l", "--batch", str(half)), 900),
        ours("b_float32", "b", "--dtype", "float32", each=half),
        ours("s", "s"),
    ]


def run(entry: Entry, out: Path, limit: float) -> dict[str, Any]:
    """The JSON of an entry's last line, or what went wrong; the whole output goes to ``NAME.log``."""
    command = [sys.executable, "-m", entry.module, *entry.arguments]
    begun = time.monotonic()
    log = out / f"{entry.name}.log"
    with open(log, "w", encoding="utf-8") as file:
        try:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, timeout=limit, check=False).returncode
        except subprocess.TimeoutExpired:
            code = f"given up after {limit:.0f} s"
    lines = [line for line in log.read_text(encoding="utf-8").splitlines() if line.startswith('{"benchmark"')]
    result = json.loads(lines[-1]) if lines else {"error": code, "tail": log.read_text(encoding="utf-8")[-2000:]}
    return {"command": " ".join(command[1:]), "wall_seconds": time.monotonic() - begun, **result}


def headline(name: str, result: dict[str, Any]) -> str:
    """One line for people."""
    if "error" in result:
        return f"{name}: failed ({result['error']})"
    if result["benchmark"] == "compare":
        wins = ", ".join(f"{k} {v:.2f}" for k, v in result.items() if k.startswith("ours_over"))
        return f"{name}: {wins}"
    share = "" if result.get("mfu") is None else f", MFU {result['mfu']:.1%}"
    peak = (result["peak_memory_bytes"] or 0) / 2**30
    return f"{name}: {result['images_per_second']:.2f} images/s{share}, peak {peak:.1f} GiB"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=[], help="names of entries")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    entries = [e for e in plan(args.batch, args.out) if not args.only or e.name in args.only]
    end = time.monotonic() + 60 * args.minutes
    results: dict[str, Any] = {}
    for entry in entries:
        left = end - time.monotonic()
        if left < 60:
            results[entry.name] = {"error": "no time left"}
        else:
            results[entry.name] = run(entry, args.out, min(left, entry.limit))
        print(headline(entry.name, results[entry.name]), flush=True)
        (args.out / "everything.json").write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
