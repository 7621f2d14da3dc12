"""Our train step and the PyTorch peer in one run on the same device, taking turns.

    python -m benchmarks.compare --size s --batch 4 --dtype float32 --steps 2 --rounds 5

Contenders: ``ours``; ``peer`` implements the recipe as published; ``peer_folded`` is the same peer given
our weight products. Each peer runs compiled and eager and the faster one counts, so that the comparison
does not depend on torch.compile. The last line is JSON: images per second of all, and our ratio to each
from the medians of the turns. One process after the other takes a turn of a few steps, so that whatever
else loads the machine slows all of them alike. A contender that fails, for example for lack of memory, is left
out and the JSON says why. With ``--out`` the JSON is also written after every round, so that a time limit costs
only the rounds that it cuts off.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import timing
from benchmarks.timing import Contender, ContenderFailed, Turn
from terrafm_jax.paths import write_atomically

# Cores per contender for compiling all of them at once; with fewer they are started one after the other.
CORES_EACH = 4


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
    parser.add_argument("--out", default="", help="also write the JSON here, after each round and at the end")
    return parser.parse_args(argv)


def starters(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Callable[[], Contender]]:
    """Per name a function that starts the process of this contender."""
    shared = ["--size", args.size, "--batch", str(args.batch), "--dtype", args.dtype]
    fields = [f"locals={args.locals}", f"prototypes={args.prototypes}", *args.set]
    # Several processes share one GPU: none of them may reserve most of its memory.
    env = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found = {}
    for name in names:
        if name == "ours":
            module, words = "benchmarks.train_step", ["--meters", str(args.meters), "--set", *fields]
        else:
            module = "benchmarks.peer_torch"
            words = ["--locals", str(args.locals), "--prototypes", str(args.prototypes)]
            words += ["--compile", "off" if name.endswith("_eager") else "on"]
            words += ["--folded"] if "folded" in name else []
        found[name] = functools.partial(Contender, name, module, [*shared, *words], env)
    return found


class Field:
    """The contenders that are still running, and why others were left out."""

    def __init__(self) -> None:
        self.left_out: dict[str, str] = {}
        self.running: dict[str, Contender] = {}

    def start(self, starters: dict[str, Callable[[], Contender]]) -> None:
        """Starts contenders, all at once if there are enough cores, so that compiling takes as long as the slowest."""
        together = (os.cpu_count() or 1) >= CORES_EACH * len(starters)
        for name, start in starters.items():
            self.running[name] = start()
            if not together:
                self._each(self._ready, [name])
        if together:
            self._each(self._ready, list(starters))

    @staticmethod
    def _ready(contender: Contender) -> None:
        begun = time.monotonic()
        contender.ready()
        print(f"{contender.name}: ready, waited {time.monotonic() - begun:.0f} s for it", flush=True)

    def _each(self, act: Callable[[Contender], Any], names: Sequence[str]) -> dict[str, Any]:
        """The results of ``act`` by name; a contender that fails is left out from then on."""
        found = {}
        for name in names:
            try:
                found[name] = act(self.running[name])
            except ContenderFailed as error:
                self.left_out[name] = str(error)
                self.running.pop(name).stop()
                print(f"left out: {error}", flush=True)
        return found

    def round(self, steps: int) -> dict[str, Turn]:
        return self._each(lambda c: c.turn(steps), list(self.running))

    def finish(self) -> dict[str, dict[str, Any]]:
        return self._each(Contender.finish, list(self.running))

    def turns(self) -> dict[str, list[Turn]]:
        return {name: c.turns for name, c in self.running.items() if c.turns}

    def stop(self) -> None:
        for contender in self.running.values():
            contender.stop()


def ratios(turns: dict[str, list[Turn]]) -> dict[str, float]:
    """Our images per second over those of each kind of peer, of whose forms that ran the faster one counts.

    From the median turn, the best turn, and from processor time, which is steadier where others use the CPU, too.
    """
    found = {}
    for kind in ("peer", "peer_folded") if "ours" in turns else ():
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


def summary(args: argparse.Namespace, field: Field, rounds: int, results: dict[str, Any]) -> dict[str, Any]:
    """The JSON after ``rounds`` rounds; ``results``: the contenders' own results, known only at the end."""
    turns = field.turns()
    return {
        "benchmark": "compare",
        **{k: v for k, v in vars(args).items() if k != "out"},
        **timing.circumstances("benchmarks.compare", "jax", "jaxlib", "torch"),
        "rounds_done": rounds,
        "left_out": field.left_out,
        "images_per_second": {n: timing.summary(t, args.batch)["images_per_second"] for n, t in turns.items()},
        "seconds_per_step": {name: [t.wall for t in taken] for name, taken in turns.items()},
        **ratios(turns),
        "results": results,
    }


def write(path: str, found: dict[str, Any]) -> None:
    """Whoever ends this process finds the JSON of the last complete round."""
    if path:
        write_atomically(Path(path), json.dumps(found, indent=1).encode())


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    field = Field()
    try:
        field.start(starters(args, ["ours", *args.peers]))
        # Where torch.compile fails for a peer, its eager form takes part instead.
        eager = [f"{name}_eager" for name in field.left_out if name in ("peer", "peer_folded")]
        field.start(starters(args, [name for name in eager if name not in args.peers]))
        for number in range(args.rounds):
            for name, turn in field.round(args.steps).items():
                print(f"round {number} {name}: {args.batch / turn.wall:.3f} images/s", flush=True)
            write(args.out, summary(args, field, number + 1, {}))
        found = summary(args, field, args.rounds, field.finish())
    finally:
        field.stop()
    write(args.out, found)
    print(json.dumps(found))
    if not field.running:
        raise SystemExit("no contender is left: " + "; ".join(field.left_out.values()))
    return found


if __name__ == "__main__":
    main()
