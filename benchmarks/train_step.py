"""Speed of the train step that ``main`` runs, on any device, with tiles of noise that are already on it.

    python -m benchmarks.train_step --size b --batch 64 --steps 20
    python -m benchmarks.train_step --config configs/vitb.py[:argument] --batch 64

The step is the whole one: views from raw uint16 tiles, student, teacher, loss, clip, AdamW, EMA, centers,
metrics. Needs jax, flax and optax only, unless ``--config`` is given. The last line is JSON; ``mfu`` is
None where the device's peak is not known, and ``images_per_second`` is the headline. The FLOPs counted
are those of the cheapest algorithm we know (``terrafm_jax/training/flops.py``).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import time
from collections.abc import Sequence
from typing import Any

import jax

from benchmarks import timing
from terrafm_jax import landcover
from terrafm_jax.models import attention
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import Statistics
from terrafm_jax.ssl.views import ViewSpec
from terrafm_jax.training import flops
from terrafm_jax.training.batches import TILE_METERS, random_batch
from terrafm_jax.training.sharding import make_batch, make_mesh
from terrafm_jax.training.step import ObjectiveSpec, OptimSpec, TrainSpec, init_state, make_step

# JAX's event for a program found in JAX_COMPILATION_CACHE_DIR: then ``compile_seconds`` are not those of compiling.
_CACHE_HIT = "/jax/compilation_cache/cache_hits"
TOTAL = 100_000  # steps of the schedules, more than any benchmark runs


def step_parser(description: str) -> argparse.ArgumentParser:
    """The options that say which step is measured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("s", "b", "l"), default="b")
    parser.add_argument("--config", default="", help="configs/X.py[:argument] instead of --size")
    parser.add_argument("--batch", type=int, default=64, help="global batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--mesh", default="-1,1,1", help="data,fsdp,tensor")
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE",
                        help="fields of ModelSpec or ViewSpec, such as attention=cudnn scan=true locals=4")  # fmt: skip
    return parser


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = step_parser(__doc__)
    parser.add_argument("--steps", type=int, default=10, help="per repeat")
    parser.add_argument("--repeats", type=int, default=3, help="the median counts")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--meters", type=int, default=TILE_METERS, help="side of the tiles on the ground")
    parser.add_argument("--trace", default="", help=f"folder for a profiler trace of {timing.TRACED} steps")
    parser.add_argument("--turns", action="store_true", help="take turns with others (benchmarks.compare)")
    return parser.parse_args(argv)


def overrides(words: Sequence[str]) -> dict[str, Any]:
    """``["scan=true", "locals=4"]`` -> {"scan": True, "locals": 4}; values that are not JSON are strings."""
    found = {}
    for word in words:
        name, _, text = word.partition("=")
        try:
            found[name] = json.loads(text)
        except json.JSONDecodeError:
            found[name] = text
        if isinstance(found[name], list):
            found[name] = tuple(found[name])
    return found


def with_fields(spec: Any, fields: dict[str, Any]) -> Any:
    names = {f.name for f in dataclasses.fields(spec)}
    return dataclasses.replace(spec, **{k: v for k, v in fields.items() if k in names})


def make_spec(args: argparse.Namespace) -> TrainSpec:
    """The spec of a size or of a config file, with the fields of ``--set``. Raises ValueError on an unknown field."""
    if args.config:
        spec = _from_config(args.config, args.batch)
    else:
        spec = TrainSpec(
            model=ModelSpec.of_size(args.size, dtype=args.dtype),
            views=ViewSpec(dtype=args.dtype),
            optim=OptimSpec(batch_size=args.batch, total_steps=TOTAL, warmup_steps=1000),
            objective=ObjectiveSpec(teacher_temp_warmup_steps=1000),
            stats=Statistics.published(),
            frequent=tuple(name in landcover.PAPER_FREQUENT for name in landcover.NAMES),
        )
    fields = overrides(args.set)
    known = {f.name for f in (*dataclasses.fields(ModelSpec), *dataclasses.fields(ViewSpec))}
    if fields.keys() - known:
        raise ValueError(f"--set: unknown fields {sorted(fields.keys() - known)}")
    model, views = with_fields(spec.model, fields), with_fields(spec.views, fields)
    return dataclasses.replace(spec, model=model, views=views, microbatches=args.microbatches)


def _from_config(path: str, batch: int) -> TrainSpec:
    from terrafm_jax import config as config_lib

    file, _, argument = path.partition(":")
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    config = module.get_config(argument or None)
    config.batch_size = batch
    steps = config_lib.durations(config, 1000 * batch)
    shares = [1.0 / landcover.NUM_CLASSES] * landcover.NUM_CLASSES + [0.0, 0.0]
    return config_lib.train_spec(config, steps, Statistics.published(), shares)


class Bench:
    """The compiled step with a state and two batches on the device."""

    def __init__(self, spec: TrainSpec, args: argparse.Namespace):
        data, fsdp, tensor = map(int, args.mesh.split(","))
        self.mesh = make_mesh(data=data, fsdp=fsdp, tensor=tensor)
        self.spec = spec
        self.state = init_state(spec, self.mesh)
        self.batches = [
            make_batch(self.mesh, random_batch(spec.model.sensors, args.batch, args.meters, seed)) for seed in (0, 1)
        ]
        hits: list[str] = []
        jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event == _CACHE_HIT else None)
        begun = time.perf_counter()
        lowered = make_step(spec, self.mesh).lower(self.state, self.batches[0])
        self.lower_seconds = time.perf_counter() - begun
        hits.clear()  # hits so far are those of small programs
        self.step = lowered.compile()
        self.compile_seconds, self.compile_cached = time.perf_counter() - begun, bool(hits)
        self.metrics: Any = None

    def run(self, steps: int) -> None:
        """Dispatches the steps without waiting in between, then waits for the last."""
        for i in range(steps):
            self.state, self.metrics = self.step(self.state, self.batches[i % 2])
        jax.block_until_ready((self.state, self.metrics))

    def memory(self) -> dict[str, Any]:
        """Peak bytes by the device's allocator, and the bytes that the step needs by the compiler."""
        analysis = self.step.memory_analysis()
        planned = analysis.argument_size_in_bytes + analysis.temp_size_in_bytes if analysis else None
        stats = jax.devices()[0].memory_stats() or {}
        return {"peak_memory_bytes": stats.get("peak_bytes_in_use", planned), "compiler_memory_bytes": planned}


PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu")


def versions() -> dict[str, str]:
    return timing.versions(*PACKAGES)


def _attention(spec: TrainSpec, mesh: jax.sharding.Mesh) -> str:
    """What "auto" chose for the global views, in the context in which the step is traced."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return attention.resolve(spec.model, (spec.views.global_size // spec.views.patch) ** 2 + 1)


def describe(spec: TrainSpec, args: argparse.Namespace, bench: Bench) -> dict[str, Any]:
    device = jax.devices()[0]
    parts = flops.image_flops(spec.model, spec.views)
    return {
        "benchmark": "train_step",
        **{k: v for k, v in vars(args).items() if k not in ("turns", "trace")},
        "model": dataclasses.asdict(spec.model),
        "views": dataclasses.asdict(spec.views),
        "attention": _attention(spec, bench.mesh),
        "hardware": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "platform_version": device.client.platform_version,  # of a GPU the CUDA that JAX runs on
        "cpu_count": os.cpu_count(),
        **timing.circumstances("benchmarks.train_step", *PACKAGES),
        "gflops_per_image": parts.total / 1e9,
        "gflops_by_part": {k: v / 1e9 for k, v in dataclasses.asdict(parts).items()},
        "compile_seconds": bench.compile_seconds,
        "lower_seconds": bench.lower_seconds,  # part of compile_seconds: tracing, which no cache saves
        "compile_cached": bench.compile_cached,
        **bench.memory(),
        "loss": float(bench.metrics["loss"]),
        "finite": bool(jax.numpy.isfinite(bench.metrics["grad_norm"])),
    }


def speed(spec: TrainSpec, args: argparse.Namespace, turns: Sequence[timing.Turn]) -> dict[str, Any]:
    found = timing.summary(turns, args.batch)
    rate = found["images_per_second"] * flops.step_flops(spec)
    peak = flops.peak_flops(jax.devices()[0].device_kind, spec.model.dtype) * jax.device_count()
    return found | {"tflops_per_second": rate / 1e12, "mfu": rate / peak if peak else None}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    with timing.failure_reported(args.turns):
        spec = make_spec(args)
        bench = Bench(spec, args)
        bench.run(args.warmup)
        if args.trace:
            with jax.profiler.trace(args.trace):
                bench.run(timing.TRACED)
        turns = timing.take_turns(bench.run) if args.turns else timing.repeat(bench.run, args.steps, args.repeats)
    result = describe(spec, args, bench) | speed(spec, args, turns)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
