"""The real train step compiled for absent TPUs or GPUs, and a report of what the compiler made of it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from terrafm_jax import config as config_lib
from terrafm_jax import landcover
from terrafm_jax.ahead import client, gpus
from terrafm_jax.ahead.chips import CHIPS, Topology
from terrafm_jax.ahead.gpus import GPUS, Hosts, Links
from terrafm_jax.ahead.hlo import Shape
from terrafm_jax.ahead.network import Network
from terrafm_jax.ahead.reckon import Item, Reckoning, reckon
from terrafm_jax.ahead.scaling import TILES
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import Statistics
from terrafm_jax.training.batches import TILE_METERS, batch_shapes
from terrafm_jax.training.compiler import compiler_options
from terrafm_jax.training.flops import step_flops
from terrafm_jax.training.sharding import batch_sharding, batch_shards, bytes_per_device, make_mesh
from terrafm_jax.training.step import TrainSpec, abstract_state, make_step

# Parts of the step by JAX's name stack, first match wins.
SCOPES = (
    ("views", r"(^|/)views(/|$)"),
    ("teacher", r"(^|/)teacher(/|$)"),
    ("student backward", r"transpose\(jvp\(student"),
    ("student forward", r"student"),
    ("loss", r"loss"),
    ("update", r"(^|/)update(/|$)"),
)


def parse_topology(text: str) -> Topology | Hosts:
    """``v5e:16x16``, ``2*v5p:4x4x4`` (slices), ``h200:8`` or ``4*h100:8`` (hosts). Raises ValueError."""
    if any(name in text for name in GPUS):
        return Hosts.parse(text)
    if any(name in text for name in CHIPS):
        return Topology.parse(text)
    raise ValueError(
        f"--topology={text}: expected [SLICES*]TPU:AxB[xC], for example v5e:4x4, or [HOSTS*]GPU:N, for example h200:8, "
        f"with TPU one of {list(CHIPS)} and GPU one of {list(GPUS)}"
    )


def build(config: ConfigDict, topology: Topology | Hosts) -> tuple[TrainSpec, Mesh]:
    """Spec and mesh of a config on a topology, as ``main`` would make them there.

    Statistics are the published ones, epoch and frequent classes the paper's, since no data set is opened.

    Raises:
      ConfigError: the config is faulty. ShardingError: the mesh does not fit.
    """
    config_lib.check(config)
    shares = [2.0 if name in landcover.PAPER_FREQUENT else 1.0 for name in landcover.NAMES]
    steps = config_lib.durations(config, TILES)
    spec = config_lib.train_spec(config, steps, Statistics.published(), shares)
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, platform=topology.platform))
    devices = _compiler(topology).compile_only_devices(topology)
    return spec, make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices=devices)


def _compiler(topology: Topology | Hosts) -> Any:
    return {"tpu": client, "gpu": gpus}[topology.platform]


def compile_step(
    spec: TrainSpec,
    mesh: Mesh,
    topology: Topology | Hosts,
    *,
    meters: int = TILE_METERS,
    options: Mapping | None = None,
) -> dict[str, Any]:
    """Compiles the step and reports.

    Args:
      meters: side of the square tiles in the batch.
      options: XLA options by name, on top of those that training uses.

    Returns:
      JSON-able report (see ``render``), with the optimized HLO under ``"hlo"``.

    Raises:
      ReckoningError: the estimate is above 85 % MFU.
    """
    options = dict(options or {})
    state = abstract_state(spec, mesh)
    batch = batch_shapes(spec.model.sensors, spec.optim.batch_size, meters, batch_sharding(mesh))
    begun = time.monotonic()
    # Named, as JAX would look for a GPU that is there to learn which kind of GPU is meant.
    platforms = ({"gpu": "cuda"}.get(topology.platform, topology.platform),)
    lowered = make_step(spec, mesh).trace(state, batch).lower(lowering_platforms=platforms)
    lowered_at = time.monotonic()
    compiled, module = _compiler(topology).compile_only(lowered, options)
    compiled_at = time.monotonic()
    network = {"tpu": Network, "gpu": Links}[topology.platform].of(topology, list(mesh.devices.flat))
    found = reckon(module, network, spec.model.depth)
    report = _header(spec, mesh, topology, options)
    report |= {"seconds_to_lower": lowered_at - begun, "seconds_to_compile": compiled_at - lowered_at}
    report |= _memory(compiled, state, batch, topology)
    report |= _time(spec, mesh, found)
    report |= _communication(spec, state, mesh, found)
    report["costliest"] = [_item(i) for i in found.costliest(10)]
    return report | {"hlo": compiled.as_text()}


def _header(spec: TrainSpec, mesh: Mesh, topology: Topology | Hosts, options: Mapping) -> dict[str, Any]:
    return {
        "topology": topology.name,
        "platform": topology.platform,
        "chips": topology.chips,
        "mesh": dict(mesh.shape),
        "batch_size": spec.optim.batch_size,
        "images_per_chip": spec.optim.batch_size / topology.chips,
        "microbatches": spec.microbatches,
        "model": {"width": spec.model.width, "depth": spec.model.depth, "scan": spec.model.scan},
        "remat": spec.model.remat,
        "dtype": spec.model.dtype,
        "compiler_options": {
            **(compiler_options(mesh, topology.platform, spec.overlap) or {}),
            **(gpus.OPTIONS if topology.platform == "gpu" else {}),
            **options,
        },
        "versions": {name: _version(name) for name in ("jax", topology.package)},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _memory(compiled: Any, state: Any, batch: Any, topology: Topology | Hosts) -> dict[str, Any]:
    """Bytes per chip. The peak is the compiler's, or arguments + outputs not aliased + temporaries + code."""
    m = compiled.memory_analysis()
    total = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    total += m.temp_size_in_bytes + m.generated_code_size_in_bytes
    return {
        "memory": {
            "arguments": m.argument_size_in_bytes,
            "state": bytes_per_device(state),
            "batch": bytes_per_device(batch),
            "temporaries": m.temp_size_in_bytes,
            "peak": total,
            "hbm": topology.chip.hbm,
        },
        "fits": total <= topology.chip.hbm,
    }


def _time(spec: TrainSpec, mesh: Mesh, found: Reckoning) -> dict[str, Any]:
    chip, chips = found.network.topology.chip, mesh.size
    useful = step_flops(spec) * spec.optim.batch_size / chips
    scopes = found.by_scope(SCOPES)
    return {
        "flops": {"formula": useful, "program": found.flops, "ratio": found.flops / useful},
        "hbm_bytes": found.hbm,
        "kernels": sum(i.count for i in found.items),
        "step_seconds": found.seconds,
        "floor_seconds": found.floor_seconds,
        "mfu": found.mfu(useful),
        "hardware_utilization": found.flops / (found.seconds * chip.flops),
        "images_per_second_per_chip": spec.optim.batch_size / chips / found.seconds,
        "seconds_by_kind": found.by_kind(),
        "seconds_by_scope": scopes,
        "views_share": scopes["views"] / found.seconds,
    }


def _communication(spec: TrainSpec, state: Any, mesh: Mesh, found: Reckoning) -> dict[str, Any]:
    """Collectives by type, beside the least that data parallelism needs: one fp32 all-reduce of all gradients."""
    groups: dict[tuple, dict[str, Any]] = {}
    for item in found.collectives():
        key = (item.opcode, item.dtype, item.group, item.asynchronous)
        entry = groups.setdefault(
            key,
            {"opcode": item.opcode, "dtype": item.dtype, "chips": item.group, "asynchronous": item.asynchronous,
             "count": 0, "bytes": 0.0, "exposed_seconds": 0.0, "hidden_seconds": 0.0},
        )  # fmt: skip
        entry["count"] += item.count
        entry["bytes"] += item.wire
        entry["exposed_seconds"] += item.seconds
        entry["hidden_seconds"] += item.hidden
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(state.params))
    shards = batch_shards(mesh)
    rows = sorted(groups.values(), key=lambda e: -e["bytes"])
    return {
        "collectives": rows,
        "gradient_bytes": 4 * parameters * (shards > 1),
        "reduced_bytes": sum(r["bytes"] for r in rows if r["opcode"] in ("all-reduce", "reduce-scatter")),
        "foreign_all_gathers": gathers_of_activations(found.items, state.params, spec.model, mesh.shape["fsdp"]),
    }


def gathers_of_activations(items: Iterable[Item], params: Any, spec: ModelSpec, fsdp: int) -> list[str]:
    """All-gathers whose size is no weight's: they move activations, which the sharding should prevent.

    The number of elements of a gathered weight is the product of two sizes that occur in the parameters or in products
    of them; between slices, what is gathered may be the shard that one of ``fsdp`` chips holds. That of tokens is not:
    their rows, images x tokens, are no size of a weight.
    """
    sizes = {1, *(n for x in jax.tree.leaves(params) for n in x.shape)}
    joint = spec.queries * spec.fusion_heads
    sizes |= {spec.stem_width + joint, joint, spec.fusion_heads}  # folded columns, tables of the fusion's heads
    weights = {a * b for a in sizes for b in sizes}
    weights |= {n * spec.depth for n in weights} if spec.scan else set()

    def moves_activations(item: Item) -> bool:
        arrays = item.arrays or (item.wire / max(1, item.count) / Shape(item.dtype, (1,)).bytes,)
        return item.opcode == "all-gather" and not all({n, n * fsdp} & weights for n in arrays)

    return [f"{i.name} {i.op_name}" for i in items if moves_activations(i)]


def _item(item: Item) -> dict[str, Any]:
    return {
        "name": item.name,
        "kind": item.kind,
        "op_name": item.op_name,
        "seconds": item.seconds,
        "count": item.count,
        "flops": item.flops,
        "hbm_bytes": item.hbm,
    }


def render(report: Mapping[str, Any]) -> str:
    """The report as text."""
    memory, flops, gib = report["memory"], report["flops"], 2**30
    split = " x ".join(f"{k}={v}" for k, v in report["mesh"].items())
    lines = [
        f"{report['topology']}: {report['chips']} chips, {split}, batch {report['batch_size']} "
        f"({report['images_per_chip']:g} a chip), {report['dtype']}, {report['versions']}",
        f"lowered in {report['seconds_to_lower']:.0f} s, compiled in {report['seconds_to_compile']:.0f} s",
        "",
        f"memory per chip: {memory['peak'] / gib:.2f} of {memory['hbm'] / gib:.0f} GiB"
        f" (state {memory['state'] / gib:.2f}, batch {memory['batch'] / gib:.2f}, "
        f"temporaries {memory['temporaries'] / gib:.2f})" + ("" if report["fits"] else "  DOES NOT FIT"),
        f"FLOPs per chip and step: formula {flops['formula'] / 1e12:.3f} T, program {flops['program'] / 1e12:.3f} T "
        f"({flops['ratio']:.2f} times)",
        _time_line(report),
        "",
        *_shares("by kind", report["seconds_by_kind"], report["step_seconds"]),
        *_shares("by part", report["seconds_by_scope"], report["step_seconds"]),
        "",
        f"collectives (gradients are {report['gradient_bytes'] / 1e6:.0f} MB, "
        f"summed {report['reduced_bytes'] / 1e6:.0f} MB):",
    ]
    for row in report["collectives"][:12]:
        how = "async" if row["asynchronous"] else "sync"
        lines.append(
            f"  {row['opcode']:<20} {row['dtype']:<8} {how:<5} over {row['chips']:>4} x{row['count']:<4} "
            f"{row['bytes'] / 1e6:>9.2f} MB  exposed {row['exposed_seconds'] * 1e3:>7.3f} ms  "
            f"hidden {row['hidden_seconds'] * 1e3:>7.3f} ms"
        )
    if report["foreign_all_gathers"]:
        lines.append(f"  ALL-GATHERS OF ACTIVATIONS: {report['foreign_all_gathers']}")
    lines += ["", "costliest:"]
    for item in report["costliest"]:
        lines.append(
            f"  {item['seconds'] * 1e3:>8.3f} ms x{item['count']:<4} {item['kind']:<10} {item['name'][:44]:<44} "
            f"{item['op_name'][-70:]}"
        )
    return "\n".join(lines)


def _time_line(report: Mapping[str, Any]) -> str:
    step, floor, rate = report["step_seconds"], report["floor_seconds"], report["images_per_second_per_chip"]
    if report["platform"] == "gpu":
        return (
            f"{report['kernels']} kernels, which move {report['hbm_bytes'] / 1e9:.0f} GB and take at least "
            f"{step * 1e3:.1f} ms, each at the peak of FLOPs or bandwidth: at most {rate:.0f} images/s a GPU, "
            f"MFU {report['mfu']:.1%}"
        )
    return (
        f"estimated step: {step * 1e3:.1f} ms (not below {floor * 1e3:.1f} ms by FLOPs and HBM bytes), "
        f"{rate:.0f} images/s a chip, MFU {report['mfu']:.1%}"
    )


def _shares(title: str, seconds: Mapping[str, float], total: float) -> list[str]:
    rows = sorted(seconds.items(), key=lambda kv: -kv[1])
    return [f"{title}: " + ", ".join(f"{k} {v * 1e3:.1f} ms ({v / total:.0%})" for k, v in rows if v > 0)]
