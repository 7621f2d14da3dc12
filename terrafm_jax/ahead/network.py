"""Time of a collective on the links of a slice or on the network between slices.

A bandwidth model: bytes over the links a chip can use, plus a latency per hop. It is deliberately
simple and spelled out, because the compiler gives no estimate for communication at all.

* One chip sends on every used torus axis: on both links where the axis closes to a ring, on one
  where it is a line (the chip at the end of a line has only one).
* all-reduce moves 2 N (n-1)/n bytes per chip, all-gather and reduce-scatter N (n-1)/n, N being the
  bytes of the whole array; an exchange between slices moves 2 N (s-1)/s over the chip's share of
  the data center network.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Sequence

from terrafm_jax.ahead.chips import Topology

HOP_SECONDS = 1e-6  # latency of one hop between neighboring chips
DCN_SECONDS = 50e-6  # latency between slices

_MESH = re.compile(r"mesh\[(?P<axes>[^\]]*)\](?P<rest>.*)", re.DOTALL)
_IOTA = re.compile(r"\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def first_group(text: str, devices: int) -> tuple[int, ...]:
    """Members of the first replica group in any of XLA's three spellings; all devices where none is given.

    Raises ValueError on a spelling it does not know: a wrong group size would silently change the estimate.
    """
    text = (text or "").strip()
    if text in ("", "{}", "{{}}"):
        return tuple(range(devices))
    explicit = re.match(r"\{\{([\d,\s]+)\}", text)
    if explicit:
        return tuple(int(i) for i in explicit.group(1).split(","))
    iota = _IOTA.match(text)
    if iota:
        return _iota_group(iota)
    named = _MESH.match(text)
    if named:
        return _mesh_group(named)
    raise ValueError(f"replica_groups={text[:200]}: unknown spelling")


def _iota_group(found: re.Match) -> tuple[int, ...]:
    import numpy as np

    _, size = int(found.group(1)), int(found.group(2))
    dims = [int(n) for n in found.group(3).split(",")]
    ids = np.arange(math.prod(dims)).reshape(dims)
    if found.group(4):
        ids = ids.transpose([int(n) for n in found.group(4).split(",")])
    return tuple(int(i) for i in ids.reshape(-1)[:size])


def _mesh_group(found: re.Match) -> tuple[int, ...]:
    import numpy as np

    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", found.group("axes"))}
    ids = np.arange(math.prod(sizes.values()))
    listed = re.search(r"device_ids=\(?\[([\d,]+)\](?:T\(([\d,]+)\))?", found.group("rest"))
    if listed:
        dims = [int(n) for n in listed.group(1).split(",")]
        if math.prod(dims) == ids.size:
            ids = ids.reshape(dims)
            if listed.group(2):
                ids = ids.transpose([int(n) for n in listed.group(2).split(",")])
    elif "device_ids" in found.group("rest"):
        raise ValueError(f"replica_groups={found.group(0)[:200]}: unknown order of devices")
    ids = ids.reshape(tuple(sizes.values()))
    group = re.search(r"\{([^{}]*)\}\s*$", found.group("rest").strip())
    if group is None:
        raise ValueError(f"replica_groups={found.group(0)[:200]}: no axes")
    taken = [n.strip() for n in group.group(1).split(",")]
    index = tuple(_axis_part(name, size, taken) for name, size in sizes.items())
    return tuple(int(i) for i in ids[index].reshape(-1))


def _axis_part(name: str, size: int, taken: Sequence[str]) -> slice:
    """Which indices of one mesh axis belong to the first group; ``'x':(2)4`` is the sub-axis after a part of 2."""
    for entry in taken:
        part = re.fullmatch(r"'([^']+)'(?::\((\d+)\)(\d+))?", entry)
        if part and part.group(1) == name:
            if part.group(2) is None:
                return slice(0, size)
            inner = size // (int(part.group(2)) * int(part.group(3)))
            return slice(0, inner * int(part.group(3)), inner)
    return slice(0, 1)


@dataclasses.dataclass(frozen=True)
class Network:
    """Links of a topology, and where on it every partition (device of the mesh, in mesh order) sits."""

    topology: Topology
    coordinates: tuple[tuple[int, ...], ...]  # (slice, x, y[, z]) per partition

    @classmethod
    def of(cls, topology: Topology, devices: Sequence) -> Network:
        """From the devices in mesh order (``mesh.devices.flat``)."""
        axes = len(topology.shape)
        return cls(topology, tuple((getattr(d, "slice_index", None) or 0, *d.coords[:axes]) for d in devices))

    def bandwidth(self, members: Sequence[int]) -> float:
        """Bytes/s that one chip of the group can send within its slice; 0 for a group of one."""
        chip, total = self.topology.chip, 0.0
        for axis, size in enumerate(self.topology.shape):
            used = sorted({self.coordinates[m][axis + 1] for m in members})
            if len(used) < 2:
                continue
            full = len(used) == size and self.topology.wraps(axis)
            # Between members that are not neighbors lie chips of other groups, which send over the same links.
            stride = min(b - a for a, b in itertools.pairwise(used))
            total += (2 if full else 1) * chip.ici / stride
        return total

    def hops(self, members: Sequence[int]) -> int:
        """Longest path between two members, in links."""
        total = 0
        for axis, size in enumerate(self.topology.shape):
            used = {self.coordinates[m][axis + 1] for m in members}
            span = max(used) - min(used)
            total += min(span, size // 2) if self.topology.wraps(axis) else span
        return total

    def seconds(self, opcode: str, size: float, members: Sequence[int]) -> float:
        """Time of one collective.

        Args:
          opcode: HLO opcode without ``-start``.
          size: bytes of the whole array per group (input of all-reduce and reduce-scatter, output of all-gather).
          members: partitions of one group.
        """
        n = len(members)
        if n < 2:
            return 0.0
        if len({self.coordinates[m][0] for m in members}) > 1:
            return self.exchange_seconds(size)
        speed, latency = self.bandwidth(members), self.hops(members) * HOP_SECONDS
        moved = size * (n - 1) / n
        if opcode == "all-reduce":
            return 2 * (moved / speed + latency)
        if opcode in ("all-to-all", "ragged-all-to-all"):
            return moved / speed * max(1.0, self.hops(members) / 2) + latency
        if opcode == "collective-permute":
            return size / self.topology.chip.ici + latency
        return moved / speed + latency

    def exchange_seconds(self, size: float) -> float:
        """Time in which every chip reduces ``size`` bytes with its counterparts in the other slices."""
        s = self.topology.slices
        return 2 * size * (s - 1) / s / self.topology.chip.dcn + DCN_SECONDS if s > 1 else 0.0
