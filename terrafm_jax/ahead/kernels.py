"""Cycles of Pallas kernels, from the instruction bundles that the TPU compiler scheduled for them.

The optimized HLO says nothing about the cost of a kernel. But libtpu can dump each kernel's final bundles
(the very long instruction words of which a core issues one per cycle), with the loops around them and their
bounds. Bundles times trip counts are the kernel's cycles, provided that its transfers are hidden; stalls at
run time are not counted. None of this is a measurement.

The loop over a kernel's grid is a pipeline: it makes a trip more than the grid has steps for each stage before and
after the computation, and branches over the computation in those trips.
"""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

from terrafm_jax.ahead.hlo import Instruction, Module

FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles"

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+([A-Z]{2})?\s*: ")
_STEP = re.compile(r"%(\w+) = sadd\.s32 (\d+), ")
_EXIT = re.compile(r"%(\w+) = scmp\.ge\.s32\.totalorder %(\w+), (\d+) /\* loop exit test")
_BACK = re.compile(r"sbr\.rel \(!%(\w+)\) target")
_OVER = re.compile(r"sbr\.rel \(%\w+\) target = \$region(\d+)")
_STAGES = "iteration index, stage = "
_GRID = re.compile(r"^iteration_bounds: \(([\d, ]+)\)", re.MULTILINE)
_FILE = re.compile(r"^\d+-(.+)-\d+-final_bundles\.txt$")


@dataclasses.dataclass
class _Loop:
    """A loop (or the straight code around all loops).

    Attributes:
      cycles: of one iteration, without what a pipeline branches over.
      guarded: of what it branches over.
      trips: how often it runs.
      test: its exit test.
      steps: of the grid, where the loop is its pipeline; else 0.
      until: number of the region at which the code that is branched over ends; "" outside of such code.
    """

    cycles: float = 0.0
    guarded: float = 0.0
    trips: int = 1
    test: str = ""
    steps: int = 0
    until: str = ""

    def add(self, cycles: float) -> None:
        if self.until:
            self.guarded += cycles
        else:
            self.cycles += cycles

    def total(self) -> float:
        return self.cycles * self.trips + self.guarded * min(self.trips, self.steps or self.trips)


def cycles(text: str) -> float:
    """Bundles of one final_bundles file, those in loops times their trip counts.

    Both branches of a condition count. Raises ValueError on text without bundles, or with a loop of unknown bound.
    """
    by = {name: int(step) for name, step in _STEP.findall(text)}
    grid = _GRID.search(text)
    steps = math.prod(map(int, grid.group(1).split(","))) if grid else 0
    bundles = [(found.group(1), line) for line in text.splitlines() if (found := _BUNDLE.match(line))]
    if not bundles:
        raise ValueError("kernel: no instruction bundles in the compiler's output")
    around = [_Loop()]
    for mark, line in bundles:
        if mark == "LB":
            around.append(_Loop(steps=steps if _STAGES in line else 0))
        loop = around[-1]
        if loop.until and re.search(rf"region {loop.until}\b", line):
            loop.until = ""
        loop.add(1)
        if found := _EXIT.search(line):
            loop.test, counter, bound = found.groups()
            loop.trips = -(-int(bound) // by.get(counter, 1))
        if loop.steps and not loop.until and (found := _OVER.search(line)):
            loop.until = found.group(1)
        if len(around) > 1 and loop.test in _BACK.findall(line):
            around.pop()
            around[-1].add(loop.total())
    if len(around) > 1:
        raise ValueError("kernel: a loop without an exit test; cannot tell how often it runs")
    return around[0].total()


def fill(module: Module, folder: Path) -> None:
    """Sets ``cycles`` of every kernel in ``module`` from the files that libtpu dumped with FLAGS.

    libtpu compiles and dumps identical kernels once: one file serves all kernels that have the same shapes and,
    up to its number, the same name. Of several compilations, the last one's files count.
    """
    files = {
        found.group(1): path for path in sorted(folder.glob("*-final_bundles.txt")) if (found := _FILE.match(path.name))
    }
    alike: dict[tuple, list[Instruction]] = {}
    for computation, instruction in module.walk():
        if instruction.is_kernel:
            shapes = tuple(computation.by_name[name].shapes for name in instruction.operands)
            alike.setdefault((instruction.name.rsplit(".", 1)[0], instruction.shapes, shapes), []).append(instruction)
    for group in alike.values():
        path = next((files[i.name] for i in group if i.name in files), None)
        for instruction in group if path is not None else ():
            instruction.cycles = cycles(path.read_text())
