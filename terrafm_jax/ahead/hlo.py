"""Reading the optimized, scheduled HLO text of a compiled program.

Only what an estimate of the cost needs: computations, instructions in schedule order, shapes with
their memory space, called computations, trip counts and the compiler's own estimate of cycles.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1, "token": 0, "opaque": 0,
}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_NAME = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_OPERAND = re.compile(r"%([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: element type, dimensions, and whether it lies in HBM (memory space 0)."""

    dtype: str
    dims: tuple[int, ...]
    in_hbm: bool = True

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.elements * _BYTES.get(self.dtype, 4)


@dataclasses.dataclass(eq=False)
class Instruction:
    """One line of a computation; ``attributes`` is the raw text after the operands."""

    name: str
    opcode: str
    type_text: str
    operands: tuple[str, ...]
    operand_text: str
    attributes: str
    is_root: bool

    @functools.cached_property
    def shapes(self) -> tuple[Shape, ...]:
        """The arrays of the result, tuples flattened."""
        return parse_shapes(self.type_text)

    @functools.cached_property
    def cycles(self) -> float | None:
        """The compiler's estimate, None where it gives none (collectives, copies, control flow)."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return float(found.group(1)) if found else None

    @property
    def is_kernel(self) -> bool:
        """Whether this calls a Pallas kernel; if so, ``cycles`` is None until ``kernels.fill`` sets it."""
        return self.opcode == "custom-call" and 'custom_call_target="tpu_custom_call"' in self.attributes

    @functools.cached_property
    def target(self) -> str:
        """Of a custom call, the library function that it calls; else empty."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes) if self.opcode == "custom-call" else None
        return found.group(1) if found else ""

    @functools.cached_property
    def op_name(self) -> str:
        """The JAX name stack, for example ``jit(step)/transpose(jvp(student))/dot_general``."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found.group(1) if found else ""

    def attribute(self, key: str) -> str | None:
        """Value of ``key=...`` up to the next comma outside braces; None if absent.

        The comma before the ``device_ids`` of replica groups given as a mesh does not end the value.
        """
        found = re.search(rf"(?:^|[ ,]){re.escape(key)}=", self.attributes)
        if not found:
            return None
        depth, start = 0, found.end()
        for at in range(start, len(self.attributes)):
            c = self.attributes[at]
            depth += (c in "{[(") - (c in "}])")
            if c == "," and depth == 0 and not self.attributes.startswith(", device_ids=", at):
                return self.attributes[start:at]
        return self.attributes[start:]

    def called(self, key: str) -> str | None:
        """Name of the computation in attribute ``key`` (``calls``, ``body``, ``condition``, ``to_apply``)."""
        value = self.attribute(key)
        return value.lstrip("%") if value else None

    @property
    def branches(self) -> tuple[str, ...]:
        """Computations of a conditional."""
        listed = self.attribute("branch_computations")
        if listed:
            return tuple(_OPERAND.findall(listed))
        pair = [self.called("true_computation"), self.called("false_computation")]
        return tuple(p for p in pair if p)


@dataclasses.dataclass(eq=False)
class Computation:
    """Instructions in schedule order."""

    name: str
    instructions: list[Instruction]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {i.name: i for i in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.operand_text): i for i in self.instructions if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in instruction.operands:
                users.setdefault(operand, []).append(instruction)
        return users


@dataclasses.dataclass(eq=False)
class Module:
    """A parsed program."""

    computations: dict[str, Computation]
    entry: Computation

    def walk(self) -> Iterator[tuple[Computation, Instruction]]:
        for computation in self.computations.values():
            for instruction in computation.instructions:
                yield computation, instruction


def parse_shapes(text: str) -> tuple[Shape, ...]:
    """All arrays of a type text such as ``(f32[8,128]{1,0:T(8,128)S(1)}, u32[])``."""
    found = []
    for dtype, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        found.append(Shape(dtype, sizes, space is None or space.group(1) == "0"))
    return tuple(found)


def parse(text: str) -> Module:
    """Parses ``Compiled.as_text()``. Raises ValueError where no ENTRY computation is found."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in text.splitlines():
        if current is None:
            head = _HEAD.match(line)
            if head:
                current = Computation(head.group(2), [])
                computations[current.name] = current
                entry = current if head.group(1) else entry
        elif line.startswith("}"):
            current = None
        else:
            instruction = _parse_line(line)
            if instruction:
                current.instructions.append(instruction)
    if entry is None:
        raise ValueError(f"no ENTRY computation in {len(text)} characters of HLO text")
    return Module(computations, entry)


def _parse_line(line: str) -> Instruction | None:
    name = _NAME.match(line)
    if not name:
        return None
    start = name.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opcode = _OPCODE.match(line, end)
    if not opcode:
        return None
    close = _closing(line, opcode.end() - 1)
    inside = line[opcode.end() : close]
    return Instruction(
        name=name.group(2),
        opcode=opcode.group(1),
        type_text=line[start:end],
        operands=tuple(_OPERAND.findall(inside)),
        operand_text=inside.strip(),
        attributes=line[close + 1 :].lstrip(", "),
        is_root=bool(name.group(1)),
    )


def _closing(line: str, start: int) -> int:
    """Position of the parenthesis that closes the one at ``start``."""
    depth = 0
    for at in re.finditer(r"[()]", line[start:]):
        depth += 1 if at.group() == "(" else -1
        if depth == 0:
            return start + at.start()
    raise ValueError(f"unbalanced parentheses in HLO line: {line[:200]}")


def trip_count(module: Module, owner: Computation, loop: Instruction, default: int | None = None) -> int:
    """Iterations of a while loop.

    Taken from the compiler's ``known_trip_count``, else from the condition ``i < N`` with the start
    of ``i`` in the loop's initial tuple, else ``default`` (the layer count). Raises ValueError
    where none of them is known.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known.group(1))
    counted = _counted_condition(module, owner, loop)
    if counted is not None:
        return counted
    if default is None:
        raise ValueError(f"while loop {loop.name} ({loop.op_name}): the trip count is neither printed nor i < constant")
    return default


def _counted_condition(module: Module, owner: Computation, loop: Instruction) -> int | None:
    condition = module.computations.get(loop.called("condition") or "")
    if condition is None:
        return None
    compare = condition.root
    if compare.opcode != "compare" or compare.attribute("direction") not in ("LT", "LE") or len(compare.operands) != 2:
        return None
    counter, limit = (condition.by_name.get(name) for name in compare.operands)
    stop = _constant(limit)
    if counter is None or counter.opcode != "get-tuple-element" or stop is None:
        return None
    initial = owner.by_name.get(loop.operands[0])
    start = 0
    if initial is not None and initial.opcode == "tuple":
        start = _constant(_source(owner, initial.operands[int(counter.attribute("index"))])) or 0
    return max(0, stop - start + (compare.attribute("direction") == "LE"))


def _source(computation: Computation, name: str) -> Instruction | None:
    instruction = computation.by_name.get(name)
    while instruction is not None and instruction.opcode in ("copy", "bitcast", "convert"):
        instruction = computation.by_name.get(instruction.operands[0])
    return instruction


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.operand_text) if re.fullmatch(r"-?\d+", instruction.operand_text) else None
