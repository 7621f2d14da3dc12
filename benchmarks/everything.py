"""All speed figures of a device in one call: peers, switches, sizes, a profile; few files in one folder.

    python -m benchmarks.everything --out RESULTS [--minutes 8.5] [--batch 64] [--only NAME ...] [--rehearse]

Runs the entries of :func:`plan`, the most important first, until the time is used up, and lists those left out.
Every entry is a process of its own with a time limit, so that a failure costs no other entry; one that runs out of
memory is run again with half the batch. Needs jax, flax, optax and, for the peers, torch; ``b_end_to_end`` also needs
the data dependencies of training. ``--rehearse`` runs every entry at a tiny size, to see that the call works.

Writes to RESULTS, anew after every entry: ``everything.json``, ``logs.tar.gz``, and from the profile ``kernels.md``
(the costliest kernels) and ``trace.tar.gz``. Compiled programs are kept for the next entry and the next call in
JAX_COMPILATION_CACHE_DIR, by default a folder in the system's temporary one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import kernels, timing
from terrafm_jax.paths import write_atomically

LARGEST = 15 * 2**20  # bytes of an archive, since some machines return small files only
SHORTEST = 45  # seconds that must be left for another entry to start
NO_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OutOfMemory", re.IGNORECASE)
TINY = ("width=48", "depth=1", "heads=3", "fusion_heads=4", "prototypes=64", "locals=1", "global_size=32",
        "local_size=16")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Entry:
    """One benchmark: module and arguments, and the seconds after which it is given up."""

    name: str
    module: str
    batch: int
    arguments: tuple[str, ...]
    limit: int = 240

    def command(self) -> list[str]:
        return ["-m", self.module, "--batch", str(self.batch), *self.arguments]


def plan(batch: int, scratch: Path, compare_batch: int | None = None) -> list[Entry]:
    """What to run, the most important first.

    Args:
      batch: of B; L takes half of it.
      scratch: folder for the files that entries write.
      compare_batch: of the comparisons, in which three contenders share the device's memory; default half of ``batch``.
    """
    half = max(1, batch // 2)
    shared = compare_batch or half

    def ours(name: str, size: str, *words: str, each: int = batch, limit: int = 240) -> Entry:
        return Entry(name, "benchmarks.train_step", each, ("--size", size, *words), limit)

    def against(name: str, size: str, each: int) -> Entry:
        # Compiled peers only: eager ones are slower and would take memory from the others.
        words = ("--size", size, "--out", str(scratch / f"{name}.json"), "--peers", "peer", "peer_folded")
        return Entry(name, "benchmarks.compare", each, words, 300)

    xla = ("--set", "attention=xla")
    return [
        ours("b", "b"),  # alone on the device, so that the compiler's own measurements are not disturbed
        against("compare_b", "b", shared),
        ours("b_profile", "b", "--repeats", "1", "--trace", str(scratch / "trace"), limit=150),  # compiled by now
        ours("l", "l", each=half),
        ours("b_xla", "b", *xla),
        ours("l_xla", "l", *xla, each=half),
        Entry("b_end_to_end", "benchmarks.end_to_end", batch, ("--size", "b", "--workers", "8")),
        ours("b_twice_the_batch", "b", each=2 * batch),
        ours("b_scan", "b", "--set", "scan=true"),
        ours("b_as_written", "b", "--set", "folded=false"),
        ours("b_drawn_stems", "b", "--set", "stems=drawn", "modality_group=8"),
        against("compare_l", "l", max(1, shared // 2)),
        ours("b_float32", "b", "--dtype", "float32", each=half),
        ours("s", "s"),
    ]


def rehearsed(entry: Entry) -> Entry:
    """The same entry at a tiny size, for any device: one layer, a batch of 2, eager peers."""
    words = list(entry.arguments)
    fields = []
    if "--set" in words:  # always the last option
        fields = words[words.index("--set") + 1 :]
        del words[words.index("--set") :]
    if entry.module == "benchmarks.compare":  # peers exist in three sizes only
        words = [{"peer": "peer_eager", "peer_folded": "peer_folded_eager"}.get(w, w) for w in words]
        words[words.index("--size") + 1] = "s"
        words += ["--dtype", "float32", "--locals", "1", "--prototypes", "64", "--meters", "960"]
        words += ["--steps", "1", "--rounds", "1", "--set", "depth=1"]
    elif entry.module == "benchmarks.end_to_end":
        words += ["--tiles", "16", "--side", "48", "--steps", "2", "--rounds", "1", "--set", *TINY]
    else:
        words += ["--meters", "960", "--steps", "1", "--repeats", "1", "--set", *TINY]
    return dataclasses.replace(entry, batch=2, arguments=(*words, *fields), limit=600)


def run(entry: Entry, scratch: Path, limit: float, env: dict[str, str]) -> dict[str, Any]:
    """Runs an entry. Returns the JSON of its last line; if it fails, the error and the JSON that it had written so far.

    The whole output goes to ``logs/NAME.log``. All processes that the entry started are ended with it: an orphan would
    keep the device's memory.
    """
    begun = time.monotonic()
    log = scratch / "logs" / f"{entry.name}.log"
    log.parent.mkdir(exist_ok=True)
    partial = scratch / f"{entry.name}.json"
    partial.unlink(missing_ok=True)
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, *entry.command()]
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        try:
            ended = f"exit code {process.wait(limit)}"
        except subprocess.TimeoutExpired:
            ended = f"given up after {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    head = {"command": " ".join(["python", *entry.command()]), "wall_seconds": time.monotonic() - begun}
    lines = [line for line in text.splitlines() if line.startswith('{"benchmark"')]
    if lines:
        found = json.loads(lines[-1])
        lacked = any(NO_MEMORY.search(why) for why in found.get("left_out", {}).values())
        return {**found, **head, "no_memory": lacked}
    failure = {"error": ended, "no_memory": bool(NO_MEMORY.search(text)), "tail": text[-2000:]}
    return {**(json.loads(partial.read_text(encoding="utf-8")) if partial.exists() else {}), **head, **failure}


def headline(name: str, result: dict[str, Any]) -> str:
    """One line for people."""
    kind = result.get("benchmark")
    words = [f"failed ({result['error']})"] if "error" in result else []
    if kind == "compare":
        words += [f"{k} {v:.2f}" for k, v in result.items() if k.startswith("ours_over")]
        words += [f"{k} left out" for k in result["left_out"]]
    speed = result.get("images_per_second", {})
    speeds = speed if isinstance(speed, dict) else {"": speed}
    words += [f"{which} {each:.2f} images/s".strip() for which, each in speeds.items()]
    if kind == "end_to_end":
        words += [f"from disk {result['from_disk_over_resident']:.1%}, feeding {result['feeding_share']:.1%}"]
    if result.get("mfu") is not None:
        words += [f"MFU {result['mfu']:.1%}"]
    if result.get("peak_memory_bytes"):
        words += [f"peak {result['peak_memory_bytes'] / 2**30:.1f} GiB"]
    if kind:
        words += [f"batch {result['batch']}"]
    return f"{name}: {', '.join(words)}"


class Results:
    """The folder of results, complete after every entry."""

    def __init__(self, out: Path, scratch: Path):
        self.out, self.scratch = out, scratch
        out.mkdir(parents=True, exist_ok=True)
        self.entries: dict[str, Any] = {}
        self._traced = False
        self._about = {"benchmark": "everything", **timing.circumstances("benchmarks.everything", "jax", "torch")}

    def add(self, name: str, result: dict[str, Any]) -> None:
        """Adds the result of an entry; an older one of that name is kept under another name."""
        if name in self.entries:
            self.entries[f"{name}_before"] = self.entries.pop(name)
        self.entries[name] = result
        text = json.dumps({**self._about, "entries": self.entries}, indent=1)
        write_atomically(self.out / "everything.json", text.encode())
        self._pack("logs")
        if (self.scratch / "trace").exists() and not self._traced:
            self._traced = True
            self._pack("trace")
            self._kernels(result)

    def _pack(self, folder: str) -> None:
        """Archives a folder; if too large, without its largest file and under another name."""
        files = sorted((p for p in (self.scratch / folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
        for name in (f"{folder}.tar.gz", f"{folder}_in_part.tar.gz"):
            half = self.out / f".{name}"
            with tarfile.open(half, "w:gz") as archive:
                for path in files:
                    archive.add(path, path.relative_to(self.scratch))
            if half.stat().st_size <= LARGEST:
                half.replace(self.out / name)
                return
            half.unlink()
            files = files[:-1]

    def _kernels(self, result: dict[str, Any]) -> None:
        try:
            text = kernels.table(kernels.read(self.scratch / "trace"), timing.TRACED)
        except (OSError, ValueError, KeyError) as error:  # a truncated trace must not end the other entries
            text = f"No table: {error}\n"
        head = f"`{result['command']}`, {result.get('hardware', 'unknown device')}, {self._about['date']}\n\n"
        (self.out / "kernels.md").write_text(head + text, encoding="utf-8")


def environment() -> dict[str, str]:
    """Environment of the entries: they share compiled programs, and each may take nearly all of the device's memory."""
    found = {"JAX_COMPILATION_CACHE_DIR": str(Path(tempfile.gettempdir()) / "terrafm_jax_bench_cache"), **os.environ}
    if not any(name.endswith("CLIENT_MEM_FRACTION") for name in found):  # jaxlib refuses both of its two spellings
        found["XLA_CLIENT_MEM_FRACTION"] = "0.9"
    return found


def measure(entries: Sequence[Entry], results: Results, end: float) -> None:
    """Runs the entries until ``end`` (of the monotonic clock); writes each result before it prints it."""
    waiting = list(entries)
    while waiting:
        entry = waiting.pop(0)
        left = end - time.monotonic()
        if left < SHORTEST:
            result: dict[str, Any] = {"error": "no time left"}
        else:
            result = run(entry, results.scratch, min(left, entry.limit), environment())
        results.add(entry.name, result)
        print(headline(entry.name, result), flush=True)
        if result.get("no_memory") and entry.batch > 1:
            waiting.insert(0, dataclasses.replace(entry, batch=entry.batch // 2))


def roomy(about: dict[str, Any] | None) -> bool:
    """Whether the first GPU has memory for three contenders at the batch of a single one (an H200, not an H100)."""
    found = re.match(r"(\d+) MiB", about["devices"][0].get("memory.total", "")) if about and about["devices"] else None
    return bool(found) and int(found.group(1)) > 100 * 1024


def _terminated(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)  # unwinds through run(), which ends the running entry


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--only", nargs="*", default=[], help="names of entries")
    parser.add_argument("--rehearse", action="store_true", help="every entry in small: measures nothing")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    signal.signal(signal.SIGTERM, _terminated)
    with tempfile.TemporaryDirectory(prefix="terrafm_everything_") as folder:
        results = Results(args.out, Path(folder))
        entries = plan(args.batch, Path(folder), args.batch if roomy(timing.gpu()) else None)
        if unknown := set(args.only) - {e.name for e in entries}:
            parser.error(f"--only: no entries {sorted(unknown)}; there are {[e.name for e in entries]}")
        entries = [rehearsed(e) if args.rehearse else e for e in entries if not args.only or e.name in args.only]
        measure(entries, results, end)


if __name__ == "__main__":
    main()
