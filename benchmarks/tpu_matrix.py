"""The matrix of docs/scaling.md: the train step compiled for every chip type, model and size, no TPU needed.

    python -m benchmarks.tpu_matrix [--only REGEX] [--force]      # compiles what the JSON lacks
    python -m benchmarks.tpu_matrix --table                       # prints the JSON as markdown tables
    python -m benchmarks.tpu_matrix --history                     # the same of earlier states of the step

Each entry runs in a process of its own and is written to benchmarks/results/tpu_matrix.json at once, so the
script may be stopped and started at will. An entry takes minutes to half an hour of one core; --minutes limits
the whole call.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "tpu_matrix.json"


@dataclasses.dataclass(frozen=True)
class Entry:
    """One compilation; ``config`` holds extra ``--config.*`` flags. ``naive`` is benchmarks.naive_step."""

    name: str
    topology: str
    images: int
    model: str = "vitb"
    config: tuple[str, ...] = ()


def entries() -> list[Entry]:
    """The comparison with the naive step first, then the paper's batches (1024 for B, 2048 for L), by importance.

    "B" and "L" are as configured: unrolled layers, nothing recomputed. With scanned layers, the step compiles several
    times faster but runs slower.
    """
    found = []
    for topology, images in (("v5e:4x4", 16), ("v5p:2x2x2", 32)):
        found += [Entry("B", topology, images), Entry("naive", topology, images, "naive")]
    found += [Entry("B", "v5e:16x16", 4), Entry("B", "2*v5e:8x8", 8)]
    found += [Entry("B", "v5e:4x4", 64)]  # the paper's batch on few chips
    found += [Entry("B", t, 16) for t in ("v6e:8x8", "v4:4x4x4")]
    found += [Entry("L", t, 16, "vitl") for t in ("v5p:4x4x8", "v6e:8x16", "v4:4x4x8", "2*v5p:4x4x4")]
    found += [Entry("L, block", "v5e:8x16", 16, "vitl", ("--config.compute.remat=block",))]
    found += [Entry("B", t, 16) for t in ("v5e:8x8", "v5p:4x4x4", "v4:2x2x2", "v5e:2x4", "v6e:2x4")]
    found += [Entry("B", "2*v5p:4x4x4", 8), *(Entry("B", t, 4) for t in ("v6e:16x16", "v5p:4x8x8", "v4:4x8x8"))]
    return [*found, Entry("B scan", "v5e:4x4", 16, "vitb", ("--config.compute.scan=True",))]


def key(entry: Entry) -> str:
    return f"{entry.name} | {entry.topology} | {entry.images}"


def compile_entry(entry: Entry, limit: float) -> dict[str, Any]:
    """The report of one entry; {"error": ...} where compiling failed or took longer than ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        if entry.model == "naive":
            command = [sys.executable, "-m", "benchmarks.tpu_matrix", "--naive", entry.topology, str(entry.images), out]
        else:
            command = [
                sys.executable, "-m", "terrafm_jax.aot", f"--config=configs/{entry.model}.py", f"--json={out}",
                f"--topology={entry.topology}", f"--images_per_chip={entry.images}", *entry.config,
            ]  # fmt: skip
        try:
            done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            return {"error": f"not compiled within {limit:.0f} s"}
        if not out.exists():
            return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:500]}
        return json.loads(out.read_text())


def compile_naive(topology_text: str, images: int) -> dict[str, Any]:
    """The same figures for the naive step."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from benchmarks import naive_step
    from terrafm_jax.ahead import client, network, reckon
    from terrafm_jax.ahead.chips import Topology

    topology, spec = Topology.parse(topology_text), naive_step.Naive()
    devices = client.compile_only_devices(topology)
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    _, module = client.compile_only(naive_step.lower(spec, mesh, images))
    found = reckon.reckon(module, network.Network.of(topology, devices))
    useful = spec.flops() * images
    return {
        "topology": topology.name,
        "chips": topology.chips,
        "images_per_chip": images,
        "step_seconds": found.seconds,
        "floor_seconds": found.floor_seconds,
        "mfu": found.mfu(useful),
        "flops": {"formula": useful, "program": found.flops},
        "seconds_by_kind": found.by_kind(),
        "plain_sum_mfu": useful / (_plain_seconds(module, topology.chip.clock) * topology.chip.flops),
    }


def _plain_seconds(module: Any, clock: float) -> float:
    """The sum of ENTRY's estimated cycles, without communication: an optimistic figure."""
    return sum(i.cycles or 0.0 for i in module.entry.instructions) / clock


def load(path: Path = RESULTS) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def earlier(name: str) -> bool:
    """Whether an entry is of an earlier state of the step, which its key names in brackets."""
    return "(" in name.split(" | ")[0]


def speedup(results: dict[str, Any], name: str) -> float | None:
    """MFU over that of the naive step on the same topology with as many images; None if that was not compiled."""
    _, topology, images = name.split(" | ")
    naive = results.get(f"naive | {topology} | {images}", {})
    return results[name]["mfu"] / naive["mfu"] if "mfu" in naive else None


def table(results: dict[str, Any], *, history: bool = False) -> str:
    """Markdown: the entries of today's step, or those of earlier ones."""
    lines = [
        "| step | topology | images a chip | HBM GiB | step ms | floor ms | views | wire MB (least) "
        "| wire ms shown, hidden | program / formula FLOPs | MFU | over naive | images/s a chip |",
        "| --- | --- |" + " ---: |" * 11,
    ]
    for name, r in results.items():
        if earlier(name) != history:
            continue
        title, topology, images = name.split(" | ")
        if "error" in r:
            lines.append(f"| {title} | {topology} | {images} | {r['error'][:80]} |" + " |" * 9)
            continue
        memory = f"{r['memory']['peak'] / 2**30:.1f} of {r['memory']['hbm'] / 2**30:.0f}" if "memory" in r else ""
        memory += "" if r.get("fits", True) else " (does not fit)"
        views = f"{r['views_share']:.1%}" if "views_share" in r else ""
        wire = shown = ""
        if "collectives" in r:
            total = sum(c["bytes"] for c in r["collectives"])
            wire = f"{total / 1e6:.0f} ({r['gradient_bytes'] / 1e6:.0f})"
            seconds = [1e3 * sum(c[f"{k}_seconds"] for c in r["collectives"]) for k in ("exposed", "hidden")]
            shown = f"{seconds[0]:.1f}, {seconds[1]:.1f}"
        ratio = speedup(results, name)
        lines.append(
            f"| {title} | {topology} | {images} | {memory} | {r['step_seconds'] * 1e3:.1f} | "
            f"{r['floor_seconds'] * 1e3:.1f} | {views} | {wire} | {shown} | "
            f"{r['flops']['program'] / r['flops']['formula']:.2f} | {r['mfu']:.1%} | "
            f"{f'{ratio:.2f}' if ratio else ''} | {r['images_per_chip'] / r['step_seconds']:.0f} |"
        )
    return "\n".join(lines)


def parts(results: dict[str, Any], *, history: bool = False) -> str:
    """Markdown: where the time of each step goes, in per cent, by part of the step and by kind of work."""
    found = {name: r for name, r in results.items() if "seconds_by_scope" in r and earlier(name) == history}
    scopes, kinds = (
        list(dict.fromkeys(k for r in found.values() for k in r[f"seconds_by_{what}"])) for what in ("scope", "kind")
    )
    lines = ["| step | " + " | ".join([*scopes, *kinds]) + " |", "| --- |" + " ---: |" * (len(scopes) + len(kinds))]
    for name, r in found.items():
        shares = [r["seconds_by_scope"].get(k, 0.0) for k in scopes] + [r["seconds_by_kind"].get(k, 0.0) for k in kinds]
        cells = [f"{s / r['step_seconds']:.1%}" for s in shares]
        lines.append(f"| {name.replace(' | ', ', ')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def chip_hours(results: dict[str, Any]) -> str:
    """Markdown: the paper's recipes at each estimate of B and L (150 and 200 epochs of 1.53 million tiles)."""
    from terrafm_jax.ahead.scaling import paper_recipes

    recipes = {r.name: r for r in paper_recipes()}
    lines = ["| step | chips | chip-hours | days |", "| --- | ---: | ---: | ---: |"]
    for name, r in results.items():
        recipe = recipes.get(name.split(" ")[0])
        if recipe is None or "error" in r or earlier(name):
            continue
        hours = recipe.images / (r["images_per_chip"] / r["step_seconds"]) / 3600
        title = name.replace(" | ", ", ")
        lines.append(f"| {title} | {r['chips']} | {hours:,.0f} | {hours / r['chips'] / 24:.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on 'name | topology | images'")
    parser.add_argument("--force", action="store_true", help="compile entries again")
    parser.add_argument("--minutes", type=float, default=24 * 60, help="stop after so long")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--naive", nargs=3, metavar=("TOPOLOGY", "IMAGES", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--history", action="store_true", help="print the tables of earlier steps and stop")
    a = parser.parse_args()
    if a.naive:
        Path(a.naive[2]).write_text(json.dumps(compile_naive(a.naive[0], int(a.naive[1]))))
        return
    results, end = load(), time.monotonic() + 60 * a.minutes
    for entry in () if a.table or a.history else entries():
        name = key(entry)
        if not re.search(a.only, name) or (name in results and "error" not in results[name] and not a.force):
            continue
        if end - time.monotonic() < 30:
            break
        print(f"{name} ...", file=sys.stderr, flush=True)
        results = {**load(), name: compile_entry(entry, end - time.monotonic())}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    if a.history:
        print("\n\n".join((table(results, history=True), parts(results, history=True))))
    else:
        print("\n\n".join((table(results), parts(results), chip_hours(results))))


if __name__ == "__main__":
    main()
