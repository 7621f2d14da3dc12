"""Our train step and the PyTorch peer in one run on the same device, taking turns.

    python -m benchmarks.compare --size s --batch 4 --dtype float32 --steps 2 --rounds 5

Contenders: ``ours``; ``peer`` implements the recipe as published; ``peer_folded`` is the same peer given
our weight products. Each peer runs compiled and eager and the faster one counts, so that the comparison
does not hang on torch.compile. The last line is JSON: images per second of all, and our ratio to each
from the medians of the turns. One process after the other takes a turn of a few steps, so that whatever
else loads the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.timing import Contender, Turn


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("s", "b", "l"), default="b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--steps", type=int, default=10, help="per turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--locals", type=int, default=8)
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--meters", type=int, default=5340, help="side of our tiles; the peer gets views ready-made")
    parser.add_argument("--peers", nargs="*", default=["peer", "peer_eager", "peer_folded", "peer_folded_eager"])
    parser.add_argument("--set", nargs="*", default=[], help="fields for our side, see benchmarks.train_step")
    parser.add_argument("--out", default="", help="also write the JSON here")
    return parser.parse_args(argv)


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Starts the processes one after the other, so that compilations do not disturb each other."""
    shared = ["--size", args.size, "--batch", str(args.batch), "--dtype", args.dtype]
    fields = [f"locals={args.locals}", f"prototypes={args.prototypes}", *args.set]
    # Several processes share one GPU: none of them may reserve most of its memory.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    ours = [*shared, "--meters", str(args.meters), "--set", *fields]
    started = [Contender("ours", "benchmarks.train_step", ours, env)]
    for name in args.peers:
        words = [*shared, "--locals", str(args.locals), "--prototypes", str(args.prototypes)]
        words += ["--compile", "off" if name.endswith("_eager") else "on"]
        words += ["--folded"] if "folded" in name else []
        try:
            started.append(Contender(name, "benchmarks.peer_torch", words, env))
        except RuntimeError as error:  # a peer that cannot compile here must not cost the others
            print(f"left out: {error}", flush=True)
    return started


def ratios(turns: dict[str, list[Turn]]) -> dict[str, float]:
    """How many times as many images per second we make as each kind of peer in its faster form.

    From the median and the best turn; and from processor time, which counts where others use the CPU too.
    """
    found = {}
    for kind in ("peer", "peer_folded"):
        forms = [turns[name] for name in (kind, f"{kind}_eager") if name in turns]
        if not forms:
            continue
        for label, pick in (
            ("", lambda t: statistics.median(x.wall for x in t)),
            ("_best_turns", lambda t: min(x.wall for x in t)),
            ("_cpu_time", lambda t: statistics.median(x.cpu for x in t)),
        ):
            found[f"ours_over_{kind}{label}"] = min(map(pick, forms)) / pick(turns["ours"])
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    running = contenders(args)
    for number in range(args.rounds):
        for c in running:
            turn = c.turn(args.steps)
            print(f"round {number} {c.name}: {args.batch / turn.wall:.3f} images/s", flush=True)
    turns = {c.name: c.turns for c in running}
    results = {c.name: c.finish() for c in running}
    summary = {
        "benchmark": "compare",
        **{k: v for k, v in vars(args).items() if k != "out"},
        "images_per_second": {name: r["images_per_second"] for name, r in results.items()},
        **ratios(turns),
        "results": results,
    }
    print(json.dumps(summary))
    if args.out:
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)
    return summary


if __name__ == "__main__":
    main()
