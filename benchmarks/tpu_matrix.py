"""The matrix of docs/scaling.md: the train step compiled for every chip type, model and size, no TPU needed.

    python -m benchmarks.tpu_matrix [--only REGEX] [--force]      # compiles what the JSON lacks
    python -m benchmarks.tpu_matrix --table                       # prints the JSON as markdown

Each entry runs in a process of its own and is written to benchmarks/results/tpu_matrix.json at once, so the
script may be stopped and started at will. An entry takes minutes to half an hour of one core.
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
    """The comparison points of the naive step first, then models, sizes and slices."""
    scan = ("--config.compute.scan=True",)
    found = []
    for topology, images in (("v5e:4x4", 16), ("v5p:2x2x2", 32)):
        found += [Entry("naive", topology, images, "naive"), Entry("B", topology, images)]
    for topology in ("v4:2x2x2", "v6e:4x4"):
        found.append(Entry("B", topology, 16))
    for topology, images in (("v4:4x4x4", 16), ("v5e:8x8", 16), ("v5p:4x4x4", 16), ("v6e:8x8", 16)):
        found.append(Entry("B scan", topology, images, "vitb", scan))
    for topology in ("v5e:16x16", "v6e:16x16", "v5p:4x8x8", "v4:4x8x8", "2*v5e:8x8", "2*v5p:4x4x4"):
        found.append(Entry("B scan", topology, 8, "vitb", scan))
    for topology in ("v4:4x4x4", "v5p:4x4x4", "v6e:8x8", "v5p:4x8x8", "2*v5p:4x4x4"):
        found.append(Entry("L scan", topology, 16, "vitl", scan))
    found.append(Entry("L scan, remat", "v5e:16x16", 8, "vitl", (*scan, "--config.compute.remat=block")))
    return found


def key(entry: Entry) -> str:
    return f"{entry.name} | {entry.topology} | {entry.images}"


def compile_entry(entry: Entry) -> dict[str, Any]:
    """The report of one entry; {"error": ...} where compiling failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        if entry.model == "naive":
            command = [sys.executable, "-m", "benchmarks.tpu_matrix", "--naive", entry.topology, str(entry.images), out]
        else:
            command = [
                sys.executable, "-m", "terrafm_jax.aot", f"--config=configs/{entry.model}.py", f"--json={out}",
                f"--topology={entry.topology}", f"--images_per_chip={entry.images}", *entry.config,
            ]  # fmt: skip
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        if not out.exists():
            return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:500]}
        return json.loads(out.read_text())


def compile_naive(topology_text: str, images: int) -> dict[str, Any]:
    """The same figures for the naive step."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    import numpy as np
    from jax.sharding import AxisType, Mesh

    from benchmarks import naive_step
    from terrafm_jax.tpu import client, hlo, network, reckon
    from terrafm_jax.tpu.chips import Topology

    topology, spec = Topology.parse(topology_text), naive_step.Naive()
    devices = topology.devices()
    mesh = Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))
    module = hlo.parse(client.compile_only(naive_step.lower(spec, mesh, images)).as_text())
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
    """Estimated cycles of ENTRY added up, without communication: the figure that flatters."""
    return sum(i.cycles or 0.0 for i in module.entry.instructions) / clock


def load() -> dict[str, Any]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        "| step | topology | images a chip | GiB of HBM | step ms | communication ms (exposed) | views"
        " | program / formula FLOPs | MFU | images/s a chip |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, r in results.items():
        title, topology, images = name.split(" | ")
        if "error" in r:
            lines.append(f"| {title} | {topology} | {images} | {r['error'][:80]} |" + " |" * 6)
            continue
        kinds = r["seconds_by_kind"]
        wire = (kinds.get("collective", 0) + kinds.get("dcn", 0)) * 1e3
        memory = f"{r['memory']['peak'] / 2**30:.1f} of {r['memory']['hbm'] / 2**30:.0f}" if "memory" in r else ""
        views = f"{r['views_share']:.1%}" if "views_share" in r else ""
        ratio = r["flops"]["program"] / r["flops"]["formula"]
        speed = r["images_per_chip"] / r["step_seconds"]
        lines.append(
            f"| {title} | {topology} | {images} | {memory} | {r['step_seconds'] * 1e3:.1f} | {wire:.1f} | {views} | "
            f"{ratio:.2f} | {r['mfu']:.1%} | {speed:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression on 'name | topology | images'")
    parser.add_argument("--force", action="store_true", help="compile entries again")
    parser.add_argument("--table", action="store_true", help="print the table and stop")
    parser.add_argument("--naive", nargs=3, metavar=("TOPOLOGY", "IMAGES", "FILE"), help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.naive:
        Path(a.naive[2]).write_text(json.dumps(compile_naive(a.naive[0], int(a.naive[1]))))
        return
    results = load()
    for entry in () if a.table else entries():
        name = key(entry)
        if not re.search(a.only, name) or (name in results and "error" not in results[name] and not a.force):
            continue
        print(f"{name} ...", file=sys.stderr, flush=True)
        results = {**load(), name: compile_entry(entry)}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
