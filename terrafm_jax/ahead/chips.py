"""The table of TPU chips: peak, memory, links and clock, per JAX device (one whole chip each).

Sources: the public system-architecture pages of Cloud TPU for peak, memory and ports; "How to Scale
Your Model" (Austin et al. 2025) for the link bandwidths that transfers reach, which lie about ten
per cent below the nominal ones. Clocks follow from peak / (FLOPs per cycle of the matrix units)
and are what turns the compiler's ``estimated_cycles`` into seconds.
"""

from __future__ import annotations

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One TPU generation.

    Attributes:
      flops: peak bf16 FLOP/s.
      hbm: bytes of memory; ``bandwidth`` its bytes/s.
      ici: bytes/s of one link in one direction; a chip has two links per torus axis.
      axes: torus axes of the interconnect (2 or 3).
      wrap: an axis closes to a ring if its size is a multiple of this.
      dcn: bytes/s in one direction of a chip's share of the data center network.
      clock: Hz of ``estimated_cycles``.
      host_chips: chips of the largest slice that is one host (VM).
      config: libtpu's name of the chip configuration in which one device is a whole chip.
    """

    name: str
    flops: float
    hbm: float
    bandwidth: float
    ici: float
    axes: int
    wrap: int
    dcn: float
    clock: float
    host_chips: int
    config: str = "default"


CHIPS: dict[str, Chip] = {
    c.name: c
    for c in (
        Chip("v4", 275e12, 32 * GIB, 1.228e12, 45e9, 3, 4, 6.25e9, 1.05e9, 4, "megacore"),
        Chip("v5e", 197e12, 16 * GIB, 8.19e11, 45e9, 2, 16, 3.125e9, 1.5e9, 8),
        Chip("v5p", 459e12, 95 * GIB, 2.765e12, 90e9, 3, 4, 6.25e9, 1.75e9, 4),
        Chip("v6e", 918e12, 32 * GIB, 1.64e12, 90e9, 2, 16, 12.5e9, 1.75e9, 8),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """``slices`` equal slices of one chip type, each a grid of ``shape`` chips."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1
    platform = "tpu"
    package = "libtpu"  # that brings the compiler

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Reads ``v5e:4x4``, ``v5p:2x2x2`` or ``2*v5e:16x16`` (two slices). Raises ValueError."""
        found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+(?:x\d+)*)", text.strip())
        if not found or found.group(2) not in CHIPS:
            raise ValueError(
                f"--topology={text}: expected [SLICES*]CHIP:AxB[xC], for example v5e:4x4 or 2*v5p:4x4x4, "
                f"with CHIP one of {list(CHIPS)}"
            )
        chip, shape = CHIPS[found.group(2)], tuple(int(n) for n in found.group(3).split("x"))
        slices = int(found.group(1) or 1)
        if len(shape) != chip.axes or min(shape) < 1 or slices < 1:
            raise ValueError(
                f"--topology={text}: {chip.name} slices have {chip.axes} axes, found {len(shape)}: {shape}"
            )
        return cls(chip, shape, slices)

    @property
    def chips(self) -> int:
        """Number of chips over all slices."""
        return self.slices * math.prod(self.shape)

    @property
    def hosts(self) -> int:
        """Number of hosts (VMs) over all slices: four chips each, but up to ``host_chips`` in a slice of one host."""
        per_slice = math.prod(self.shape)
        return self.slices * (1 if per_slice <= self.chip.host_chips else math.ceil(per_slice / 4))

    @property
    def name(self) -> str:
        """The spelling that :meth:`parse` reads."""
        grid = "x".join(map(str, self.shape))
        return f"{f'{self.slices}*' if self.slices > 1 else ''}{self.chip.name}:{grid}"

    def wraps(self, axis: int) -> bool:
        """Whether the chips along ``axis`` form a ring rather than a line."""
        if self.chip.axes == 3:  # wired from whole 4x4x4 cubes; smaller slices keep open ends on every axis
            return all(n % self.chip.wrap == 0 for n in self.shape)
        return self.shape[axis] % self.chip.wrap == 0
