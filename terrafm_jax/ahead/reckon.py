"""Step time of a compiled program, by simulating its schedule: compute, loops, communication.

Compute comes from the compiler's ``estimated_cycles``. HLO text holds a loop's body once, so its time is
multiplied by the trip count. Collectives and copies carry no estimate: a synchronous one costs its bytes
over the bandwidth (``network``), an asynchronous one only the part that the work between its ``start`` and
``done`` does not hide. Pallas kernels cost their bundles (``kernels``), or their HBM traffic where that is
more. Instructions without any of these, which are all on a GPU, cost their FLOPs at peak or their HBM traffic,
whichever takes longer: what no kernel can beat. None of this is a measurement.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from terrafm_jax.ahead import cost
from terrafm_jax.ahead.gpus import Links
from terrafm_jax.ahead.hlo import Computation, Instruction, Module, trip_count
from terrafm_jax.ahead.network import Network, first_group

MFU_LIMIT = 0.85  # single products are estimated at up to 95 % of peak; a whole step with norms and softmax is below

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_FREE = frozenset(
    (
        "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id", "replica-id",
        "opt-barrier", "add-dependency", "domain", "iota",
    )
)  # fmt: skip


class ReckoningError(ValueError):
    """An estimate that cannot be right."""


@dataclasses.dataclass
class Item:
    """One instruction of the schedule, summed over the iterations of the loops around it.

    Attributes:
      kind: ``compute``, ``kernel`` (Pallas), ``collective``, ``dcn``, ``copy`` or ``other`` (costed by its HBM bytes);
        on a GPU ``product``, ``attention`` and ``pass`` (over arrays in memory) instead of the first and the last.
      seconds: time it adds to the step; ``hidden`` the part of its duration that overlaps with other work.
      flops: of its matrix products; ``hbm`` bytes it moves to and from HBM.
      wire: bytes of a collective's whole arrays, ``arrays`` the elements of each (a compiler may combine several),
        ``dtype`` their element type, ``group`` its chips.
    """

    name: str
    opcode: str
    op_name: str
    kind: str
    seconds: float
    hidden: float = 0.0
    count: int = 1
    flops: float = 0.0
    hbm: float = 0.0
    wire: float = 0.0
    dtype: str = ""
    group: int = 0
    arrays: tuple[int, ...] = ()
    asynchronous: bool = False

    def times(self, n: int) -> Item:
        scaled = {k: getattr(self, k) * n for k in ("seconds", "hidden", "count", "flops", "hbm", "wire")}
        return dataclasses.replace(self, **scaled)


@dataclasses.dataclass
class Reckoning:
    """The estimate of one program on one chip type; seconds per step, bytes and FLOPs per chip."""

    items: list[Item]
    network: Network | Links

    @property
    def seconds(self) -> float:
        """The step: everything in the schedule, in its order."""
        return sum(i.seconds for i in self.items)

    @property
    def flops(self) -> float:
        """FLOPs of the matrix products in the program (recomputation and padding included)."""
        return sum(i.flops for i in self.items)

    @property
    def hbm(self) -> float:
        """HBM bytes of the program."""
        return sum(i.hbm for i in self.items)

    @property
    def floor_seconds(self) -> float:
        """The roofline: max(FLOPs / peak, HBM bytes / bandwidth), a lower bound for any schedule."""
        chip = self.network.topology.chip
        return max(self.flops / chip.flops, self.hbm / chip.bandwidth)

    def mfu(self, useful_flops: float) -> float:
        """Model FLOPs utilization: ``useful_flops`` (per chip and step) over the estimated time, as a share of peak.

        Raises ReckoningError above MFU_LIMIT: then some work was not counted.
        """
        share = useful_flops / (self.seconds * self.network.topology.chip.flops)
        if share > MFU_LIMIT:
            raise ReckoningError(
                f"{share:.0%} MFU in {self.seconds * 1e3:.2f} ms is above {MFU_LIMIT:.0%}: work is missing from the "
                f"estimate (program {self.flops:.3e} FLOPs, formula {useful_flops:.3e})"
            )
        return share

    def by_kind(self) -> dict[str, float]:
        """Seconds per kind of item."""
        found: dict[str, float] = {}
        for item in self.items:
            found[item.kind] = found.get(item.kind, 0.0) + item.seconds
        return found

    def by_scope(self, scopes: Iterable[tuple[str, str]]) -> dict[str, float]:
        """Seconds per named scope: the first (name, regular expression) that the op name matches, else "rest"."""
        rules = [(name, re.compile(pattern)) for name, pattern in scopes]
        found = {name: 0.0 for name, _ in rules} | {"rest": 0.0}
        for item in self.items:
            found[next((n for n, r in rules if r.search(item.op_name)), "rest")] += item.seconds
        return found

    def costliest(self, n: int = 10) -> list[Item]:
        """The ``n`` items that add most time to the step."""
        return sorted(self.items, key=lambda i: -i.seconds)[:n]

    def collectives(self) -> list[Item]:
        """Collectives within and between slices, costliest transfer first."""
        found = [i for i in self.items if i.kind in ("collective", "dcn")]
        return sorted(found, key=lambda i: -(i.seconds + i.hidden))


def reckon(module: Module, network: Network | Links, default_trips: int | None = None) -> Reckoning:
    """Simulates the schedule of ``module``, from its ENTRY computation.

    Args:
      default_trips: iterations of loops whose trip count the program does not tell (the layer count).

    Raises:
      ValueError: a loop without a trip count, an unknown spelling of replica groups.
    """
    simulator = _Simulator(module, network, default_trips)
    return Reckoning(simulator.run(module.entry), network)


@dataclasses.dataclass
class _Pending:
    """An asynchronous transfer that has been started, and the time at which it will be through."""

    item: Item
    end: float


class _Simulator:
    """Executes computations in schedule order: one stream of compute, and one queue per kind of transfer."""

    def __init__(self, module: Module, network: Network | Links, default_trips: int | None):
        self.module, self.network, self.default_trips = module, network, default_trips
        self.clock = network.topology.chip.clock

    def run(self, computation: Computation) -> list[Item]:
        """The items of a computation, whose clock starts at zero and whose transfers all end within it."""
        items: list[Item] = []
        pending: dict[str, _Pending] = {}
        free = {"collective": 0.0, "dcn": 0.0, "copy": 0.0}
        now = 0.0
        for instruction in computation.instructions:
            start = self._start_of(computation, instruction, pending)
            if start is not None:
                now = self._finish(pending.pop(start), now)
            if self._is_start(instruction):
                item = self._transfer(instruction)
                begin = max(now, free[item.kind])
                free[item.kind] = end = begin + item.hidden
                pending[instruction.name] = _Pending(item, end)
                items.append(item)
                continue
            if start is not None and instruction.opcode != "fusion":
                continue
            for item in self._synchronous(computation, instruction):
                if item.kind in free:
                    now = max(now, free[item.kind])
                now += item.seconds
                items.append(item)
        for left in pending.values():
            now = self._finish(left, now)
        return items

    @staticmethod
    def _finish(pending: _Pending, now: float) -> float:
        """Waits for a transfer: what is left of it counts as exposed. Returns the time at which it is through."""
        exposed = max(0.0, pending.end - now)
        exposed = min(exposed, pending.item.hidden)
        pending.item.seconds += exposed
        pending.item.hidden -= exposed
        return now + exposed

    # --- asynchronous pairs -------------------------------------------------------------------

    @staticmethod
    def _is_start(instruction: Instruction) -> bool:
        if instruction.opcode == "fusion":
            return instruction.name.startswith("async-collective-start")
        return instruction.opcode.endswith("-start") or instruction.opcode == "send"

    def _start_of(self, computation: Computation, done: Instruction, pending: dict[str, _Pending]) -> str | None:
        """Name of the pending transfer that ``done`` waits for; None if it waits for none."""
        if done.opcode.endswith("-done") or done.opcode == "async-update":
            return self._trace(computation, done, pending)
        if done.opcode == "fusion" and done.name.startswith("async-collective-done"):
            return self._trace(computation, done, pending)
        return None

    def _trace(self, computation: Computation, done: Instruction, pending: dict[str, _Pending]) -> str | None:
        """Follows the operands of ``done`` back to a pending start."""
        if done.opcode == "recv-done":  # a receive ends with the send of the same exchange, which carries the time
            return self._matching_send(computation, done, pending)
        seen, queue = set(), list(done.operands)
        while queue:
            name = queue.pop(0)
            if name in pending:
                return name
            source = computation.by_name.get(name)
            if name in seen or source is None or len(seen) > 200:
                continue
            seen.add(name)
            through = source.opcode in ("get-tuple-element", "bitcast", "async-update", "tuple")
            if through or "async_collective_fusion" in (source.called("calls") or ""):
                queue.extend(source.operands)
        return None

    @staticmethod
    def _matching_send(computation: Computation, done: Instruction, pending: dict[str, _Pending]) -> str | None:
        exchange = _rendezvous(computation.by_name.get(done.operands[0]))
        for name in pending:
            if exchange and _rendezvous(computation.by_name[name]) == exchange:
                return name
        return None

    def _transfer(self, instruction: Instruction) -> Item:
        """The item of a start; all of its duration counts as hidden until :meth:`_finish` says otherwise."""
        if instruction.opcode == "send":
            size = instruction.shapes[0].bytes
            item = self._item(instruction, "dcn", wire=size, dtype=instruction.shapes[0].dtype)
            item.group, item.hidden = self.network.topology.slices, self.network.exchange_seconds(size)
        elif self._collective_of(instruction) is not None:
            item = self._collective(instruction)
            item.hidden, item.seconds = item.seconds, 0.0
        else:
            moved = max((s.bytes for s in _result_of_start(instruction)), default=0.0)
            item = self._item(instruction, "copy", hbm=moved)
            item.hidden = moved / self.network.topology.chip.bandwidth
        item.asynchronous = True
        return item

    # --- everything else ----------------------------------------------------------------------

    def _synchronous(self, computation: Computation, instruction: Instruction) -> list[Item]:
        """The items of an instruction that blocks until it is done; several for control flow, none if it is free."""
        op = instruction.opcode
        if op in _FREE or op.endswith("-done") or op in ("recv", "async-update"):
            return []
        if op == "while":
            trips = trip_count(self.module, computation, instruction, self.default_trips)
            body = self.module.computations[instruction.called("body")]
            return [i.times(trips) for i in self.run(body)]
        if op == "conditional":
            branches = [self.run(self.module.computations[b]) for b in instruction.branches]
            return max(branches, key=lambda items: sum(i.seconds for i in items), default=[])
        if op == "call":
            return self.run(self.module.computations[instruction.called("to_apply")])
        if instruction.name.startswith("async-collective-done"):
            return []
        if op != "fusion" and op in COLLECTIVES:
            return [self._collective(instruction)]
        inner = self._collective_of(instruction)
        if inner is not None and "async_collective_fusion" not in (instruction.called("calls") or ""):
            return [self._collective(instruction)]
        return [self._compute(computation, instruction)]

    def _compute(self, computation: Computation, instruction: Instruction) -> Item:
        hbm = cost.hbm_bytes(self.module, computation, instruction)
        flops = cost.matrix_flops(self.module, computation, instruction)
        chip = self.network.topology.chip
        if instruction.is_kernel and instruction.cycles is None:
            raise ReckoningError(f"{instruction.name}: a kernel whose bundles the compiler did not dump")
        if instruction.is_kernel:
            seconds = max(instruction.cycles / self.clock, hbm / chip.bandwidth)
            return self._item(instruction, "kernel", seconds, flops=flops, hbm=hbm)
        if instruction.cycles is not None:
            return self._item(instruction, "compute", instruction.cycles / self.clock, flops=flops, hbm=hbm)
        kind = _gpu_kind(instruction, flops) if self.network.topology.platform == "gpu" else "other"
        return self._item(instruction, kind, max(hbm / chip.bandwidth, flops / chip.flops), flops=flops, hbm=hbm)

    def _collective_of(self, instruction: Instruction) -> Instruction | None:
        """The collective that an instruction is, wraps or (a fusion) contains."""
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in COLLECTIVES:
            return instruction
        if opcode not in ("fusion", "async"):
            return None
        called = self.module.computations.get(instruction.called("calls") or "")
        if called is None:
            return None
        return next((i for i in called.instructions if i.opcode.removesuffix("-start") in COLLECTIVES), None)

    def _collective(self, instruction: Instruction) -> Item:
        inner = self._collective_of(instruction)
        opcode = inner.opcode.removesuffix("-start")
        partitions = len(self.network.coordinates)
        members = first_group(inner.attribute("replica_groups") or "", partitions)
        if opcode == "collective-permute":
            members = tuple(int(i) for i in re.findall(r"\d+", inner.attribute("source_target_pairs") or "")[:2])
        shapes = _result_of_start(inner) if inner.opcode.endswith("-start") else inner.shapes
        size = sum(s.bytes for s in shapes)
        if opcode == "reduce-scatter":
            size *= len(members)
        item = self._item(instruction, "collective", self.network.seconds(opcode, size, members))
        item.opcode, item.wire, item.group = opcode, size, len(members)
        item.arrays = tuple(s.elements for s in shapes)
        item.op_name = item.op_name or inner.op_name
        item.dtype = "/".join(sorted({s.dtype for s in shapes if s.elements > 1} or {s.dtype for s in shapes}))
        return item

    @staticmethod
    def _item(instruction: Instruction, kind: str, seconds: float = 0.0, **fields: Any) -> Item:
        return Item(instruction.name, instruction.opcode, instruction.op_name, kind, seconds, **fields)


def _gpu_kind(instruction: Instruction, flops: float) -> str:
    if instruction.target.startswith(cost.CUDNN_ATTENTION):
        return "attention"
    return "product" if flops else "pass"


def _rendezvous(instruction: Instruction | None) -> str | None:
    """Name that the send and the receive of one exchange between slices share."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.attributes) if instruction else None
    return found.group(1) if found else None


def _result_of_start(instruction: Instruction) -> tuple:
    """Arrays that the matching done returns, from the tuple (operands, results, context) of a start."""
    arrays = [s for s in instruction.shapes if s.elements > 1 or s.dtype not in ("u32", "s32")]
    half = len(arrays) // 2
    return tuple(arrays[half:]) if half and len(arrays) % 2 == 0 else tuple(arrays)
