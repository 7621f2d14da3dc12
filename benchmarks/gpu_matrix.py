"""What the train step costs on GPUs at least, by the compiled program: the table of docs/performance.md, no GPU needed.

    python -m benchmarks.gpu_matrix [--only REGEX] [--force]      # compiles what the JSON lacks
    python -m benchmarks.gpu_matrix --table                       # prints the JSON as a markdown table

Works like ``benchmarks.tpu_matrix``, on JAX's CUDA plugin (``pip install terrafm_jax[cuda]``). An entry takes one to
four minutes. Each kernel counts at the peak of FLOPs or of bandwidth, so no run can be faster than the table says.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.tpu_matrix import Entry, compile_entry, key, load

RESULTS = Path(__file__).parent / "results" / "gpu_matrix.json"


def entries() -> list[Entry]:
    """B, L and S on one GPU and on a host of eight; B with XLA's attention, and with its state sharded."""
    one, sharded, xla = "--config.mesh.fsdp=1", "--config.mesh.fsdp=8", "--config.compute.attention=xla"
    return [
        Entry("B", "h200:1", 64),
        Entry("B, attention xla", "h200:1", 64, config=(xla,)),
        Entry("L", "h200:1", 32, "vitl", (one,)),
        Entry("S", "h200:1", 128, "vits"),
        Entry("B", "h200:8", 64),
        Entry("B, fsdp 8", "h200:8", 64, config=(sharded,)),
        Entry("L", "h200:8", 32, "vitl"),
        Entry("B", "h100:8", 32),
        Entry("B", "a100:8", 32),
        Entry("B", "2*h100:8", 32),
    ]


def table(results: dict[str, Any]) -> str:
    """Markdown, one row per entry."""
    lines = [
        "| step | GPUs | images a GPU | memory GiB | kernels | GB moved | ms at least | products, passes, attention, "
        "collectives | views | MFU at most | images/s a GPU at most |",
        "| --- | --- |" + " ---: |" * 9,
    ]
    for name, r in results.items():
        if "error" in r:
            lines.append(f"| {name.replace(' | ', ', ')} | {r['error']} |" + " |" * 9)
            continue
        ms = [1e3 * r["seconds_by_kind"].get(kind, 0.0) for kind in ("product", "pass", "attention", "collective")]
        cells = [
            *name.split(" | "),
            f"{r['memory']['peak'] / 2**30:.1f}" + ("" if r["fits"] else f" of {r['memory']['hbm'] / 2**30:.0f}"),
            f"{r['kernels']:,}",
            f"{r['hbm_bytes'] / 1e9:.0f}",
            f"{r['step_seconds'] * 1e3:.1f}",
            ", ".join(f"{x:.1f}" for x in ms),
            f"{r['views_share']:.1%}",
            f"{r['mfu']:.1%}",
            f"{r['images_per_second_per_chip']:,.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the committed results and stop")
    parser.add_argument("--only", default="", help="regular expression of entries")
    parser.add_argument("--force", action="store_true", help="compile entries again that the JSON has")
    parser.add_argument("--limit", type=float, default=1800.0, help="seconds after which an entry is given up")
    args = parser.parse_args(argv)
    results = load(RESULTS)
    if args.table:
        print(table(results))
        return
    for entry in entries():
        name = key(entry)
        known = name in results and "error" not in results[name] and not args.force
        if known or not re.search(args.only, name):
            continue
        print(f"{name} ...", flush=True)
        results[name] = compile_entry(entry, args.limit)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(table({name: results[name]}).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
