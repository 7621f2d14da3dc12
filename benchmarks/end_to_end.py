"""The train step fed from records on disk, against the same step on a batch that is already on the device.

    python -m benchmarks.end_to_end --size b --batch 64 [--data DIR | --tiles 512] [--echo 4] [--workers 8]

Both take turns of a few steps in one process. ``from_disk`` reads, checks, decodes, batches, transfers and steps as
``main`` does, reading the metrics of one step while the next one runs; ``resident`` repeats the last batch. The last
line is JSON: images per second of both, their ratio (goal: 0.97), the share of the time spent on waiting for tiles
and transferring them (goal: under 0.02), and the bytes read from disk and sent to the device per image. Needs
the project's data dependencies, like training. One process; tiles that fit into memory come from the page cache.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from etils import epath

from benchmarks import input_pipeline, timing, train_step
from terrafm_jax.data.pipeline import make_loader, make_order
from terrafm_jax.data.sampling import SamplingSpec
from terrafm_jax.data.source import open_split
from terrafm_jax.training.sharding import make_batch, make_mesh
from terrafm_jax.training.step import TrainSpec, init_state, make_step


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = train_step.step_parser(__doc__)
    parser.add_argument("--steps", type=int, default=8, help="per turn; a multiple of --echo, so that turns are alike")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each; the medians count")
    parser.add_argument("--data", default="", help="prepared data set; default: one is written for the occasion")
    parser.add_argument("--tiles", type=int, default=128, help="records of the one that is written")
    parser.add_argument("--side", type=int, default=534, help="their pixels at 10 m, a multiple of 6")
    parser.add_argument("--compression", default="uncompressed", help="of their shards: zstd:1, brotli:1")
    parser.add_argument("--echo", type=int, default=1, help="data.echo: steps that share a batch of tiles")
    parser.add_argument("--workers", type=int, default=0, help="data.workers")
    args = parser.parse_args(argv)
    if args.steps % args.echo:
        parser.error(f"--steps {args.steps} is not a multiple of --echo {args.echo}")
    return args


class Fed:
    """The compiled step, its state, and tiles from disk."""

    def __init__(self, spec: TrainSpec, args: argparse.Namespace, data: str):
        data_mesh, fsdp, tensor = map(int, args.mesh.split(","))
        self.mesh = make_mesh(data=data_mesh, fsdp=fsdp, tensor=tensor)
        order = make_order(data, "train", SamplingSpec("uniform"), batch_size=args.batch, seed=0,
                           sensors=spec.model.sensors, canvases=1)  # fmt: skip
        self.loader = make_loader(data, "train", order, sensors=spec.model.sensors, canvases=1, workers=args.workers,
                                  echo=args.echo)  # fmt: skip
        self.feeding = 0.0  # seconds spent on waiting for tiles and transferring them
        self._tiles = self._arrays = None
        self._feed()
        self.shipped = sum(x.nbytes for x in jax.tree.leaves(self._tiles)) / args.batch / args.echo
        self.state = init_state(spec, self.mesh)
        self.step = make_step(spec, self.mesh).lower(self.state, self._arrays).compile()
        self.from_disk(2 * args.echo - 1)  # starts prefetching, and stops just before a fresh batch
        self.feeding = 0.0

    def _feed(self) -> Any:
        begun = time.perf_counter()
        tiles = next(self.loader)
        if tiles is not self._tiles:
            self._tiles, self._arrays = tiles, make_batch(self.mesh, tiles)
        self.feeding += time.perf_counter() - begun
        return self._arrays

    def from_disk(self, steps: int) -> None:
        """Steps as the training loop takes them."""
        metrics = None
        for _ in range(steps):
            arrays, last = self._feed(), metrics
            self.state, metrics = self.step(self.state, arrays)
            jax.device_get(last)
        jax.block_until_ready((self.state, metrics))

    def resident(self, steps: int) -> None:
        """The same steps on the batch that is on the device."""
        metrics = None
        for _ in range(steps):
            last = metrics
            self.state, metrics = self.step(self.state, self._arrays)
            jax.device_get(last)
        jax.block_until_ready((self.state, metrics))


def measure(spec: TrainSpec, args: argparse.Namespace, data: str) -> dict[str, Any]:
    fed = Fed(spec, args, data)
    turns: dict[str, list[timing.Turn]] = {"resident": [], "from_disk": []}
    for _ in range(args.rounds):
        for name, taken in turns.items():
            taken += timing.repeat(getattr(fed, name), args.steps, 1)
    fed.loader.close()
    found = {name: timing.summary(taken, args.batch) for name, taken in turns.items()}
    split = open_split(data, "train")
    stored = sum((epath.Path(split.directory) / name).stat().length for name in split.files) / len(split)
    device = jax.devices()[0]
    return {
        "benchmark": "end_to_end",
        **vars(args),
        "model": dataclasses.asdict(spec.model),
        "hardware": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cpu_count": os.cpu_count(),
        **timing.circumstances("benchmarks.end_to_end", *train_step.PACKAGES, "grain", "array_record"),
        "images_per_second": {name: summary["images_per_second"] for name, summary in found.items()},
        "from_disk_over_resident": found["from_disk"]["images_per_second"] / found["resident"]["images_per_second"],
        "feeding_share": fed.feeding / sum(t.wall * args.steps for t in turns["from_disk"]),
        "bytes_read_per_image": stored / args.echo,
        "bytes_shipped_per_image": fed.shipped,
        "records": len(split),
        "turns": found,
    }


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    spec = train_step.make_spec(args)
    with tempfile.TemporaryDirectory(prefix="terrafm_bench_") as scratch:
        if not args.data:
            input_pipeline.write_records(Path(scratch), args.tiles, args.side, args.compression)
        result = measure(spec, args, args.data or scratch)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
