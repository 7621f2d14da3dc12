"""FLOPs and HBM bytes of single HLO instructions; XLA's own totals are no use, as they count a loop's body once."""

from __future__ import annotations

import math
import re

import numpy as np

from terrafm_jax.ahead.hlo import Computation, Instruction, Module, Shape

CUBLAS, CUDNN_ATTENTION = "__cublas$", "__cudnn$fmha"
_VIEWS = ("bitcast", "get-tuple-element", "reshape", "transpose", "copy", "convert")


def matrix_flops(module: Module, computation: Computation, instruction: Instruction) -> float:
    """FLOPs (2 x multiply-adds) of the products in an instruction, fused ones included."""
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "dot":
        return _dot_flops(computation, instruction)
    if instruction.target.startswith(CUBLAS):
        return _cublas_flops(computation, instruction)
    if instruction.target.startswith(CUDNN_ATTENTION):
        return _attention_flops(computation, instruction)
    if instruction.is_kernel:  # what its author declared (pl.CostEstimate)
        declared = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
        return float(declared.group(1)) if declared else 0.0
    called = module.computations.get(instruction.called("calls") or "") if instruction.opcode == "fusion" else None
    if called is None:
        return 0.0
    return sum(matrix_flops(module, called, inner) for inner in called.instructions)


def _operand_shape(computation: Computation, instruction: Instruction, index: int) -> Shape:
    return computation.by_name[instruction.operands[index]].shapes[0]


def _dot_flops(computation: Computation, instruction: Instruction) -> float:
    left = _operand_shape(computation, instruction, 0)
    listed = instruction.attribute("lhs_contracting_dims") or "{}"
    contracted = math.prod(left.dims[int(i)] for i in re.findall(r"\d+", listed))
    return 2.0 * instruction.shapes[0].elements * contracted


def _cublas_flops(computation: Computation, instruction: Instruction) -> float:
    left = _operand_shape(computation, instruction, 0)
    listed = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', instruction.attributes)
    contracted = math.prod(left.dims[int(i)] for i in re.findall(r"\d+", listed.group(1) if listed else ""))
    return 2.0 * instruction.shapes[0].elements * contracted


def _attention_flops(computation: Computation, instruction: Instruction) -> float:
    """cuDNN's: two products of a head's queries and keys forward, five backward; operands [B, N, heads, head]."""
    batch, queries, heads, head = _operand_shape(computation, instruction, 0).dims
    keys = _operand_shape(computation, instruction, 1).dims[1]
    products = 5 if "Backward" in instruction.target else 2
    return 2.0 * products * batch * heads * queries * keys * head


def _convolution_flops(computation: Computation, instruction: Instruction) -> float:
    """The compiler writes batched products as convolutions over padded, dilated windows: only taps inside count."""
    left, right = (_operand_shape(computation, instruction, i) for i in (0, 1))
    labels = re.match(r"(\w+)_(\w+)->(\w+)", instruction.attribute("dim_labels") or "bf_io->bf")
    left_at, right_at, out_at = (_positions(labels.group(i)) for i in (1, 2, 3))
    out = instruction.shapes[0]
    window = _window(instruction.attribute("window") or "", sum(k.isdigit() for k in left_at))
    pairs = 1.0
    for axis, (stride, low, left_dilation, right_dilation) in enumerate(window):
        name = str(axis)
        pairs *= _valid_taps(
            out.dims[out_at[name]], right.dims[right_at[name]], left.dims[left_at[name]],
            stride, low, left_dilation, right_dilation,
        )  # fmt: skip
    batch, features = out.dims[out_at["b"]], out.dims[out_at["f"]]
    batch_groups = int(instruction.attribute("batch_group_count") or 1)
    return 2.0 * batch * features * right.dims[right_at["i"]] * pairs / (batch_groups if batch_groups > 1 else 1)


def _positions(labels: str) -> dict[str, int]:
    return {label: at for at, label in enumerate(labels)}


def _window(text: str, axes: int) -> list[tuple[int, int, int, int]]:
    """(stride, low padding, left dilation, right dilation) per spatial axis of ``{size=3x3 pad=1_1x0_0}``."""
    fields = dict(re.findall(r"(\w+)=([\w\-x]+)", text))

    def numbers(key: str, default: int) -> list[int]:
        if key not in fields:
            return [default] * axes
        return [int(part.split("_")[0]) for part in fields[key].split("x")]

    keys = (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    return list(zip(*(numbers(key, default) for key, default in keys), strict=True))


def _valid_taps(out: int, kernel: int, size: int, stride: int, low: int, left: int, right: int) -> int:
    """Number of (output, kernel tap) pairs that meet a real input element."""
    at = np.arange(out)[:, None] * stride + np.arange(kernel)[None, :] * right - low
    return int(np.sum((at >= 0) & (at <= (size - 1) * left) & (at % left == 0)))


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes an instruction reads from and writes to HBM.

    Of an operand that is only sliced, the slices count; of an output that is updated in place, the update.
    Otherwise a loop over stacked layers would be charged with the whole stack in every iteration.
    """
    called = module.computations.get(instruction.called("calls") or "") if instruction.opcode == "fusion" else None
    if called is None:
        return _plain_bytes(computation, instruction)
    total = sum(_written(called, shape, i) for i, shape in enumerate(instruction.shapes) if shape.in_hbm)
    for index, name in enumerate(instruction.operands):
        source = computation.by_name.get(name)
        if source is None or not source.shapes or not source.shapes[0].in_hbm:
            continue
        parameter = called.parameters.get(index)
        total += _read(module, called, parameter) if parameter is not None else source.shapes[0].bytes
    return total


def _plain_bytes(computation: Computation, instruction: Instruction) -> float:
    shapes = instruction.shapes
    if instruction.target.startswith((CUBLAS, CUDNN_ATTENTION)):  # the last result is space to work in
        shapes = shapes[:-1] if len(shapes) > 1 and shapes[-1].dtype in ("s8", "u8") else shapes
    written = sum(s.bytes for s in shapes if s.in_hbm)
    if instruction.opcode in ("slice", "dynamic-slice", "gather"):
        return 2.0 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2.0 * _operand_shape(computation, instruction, 1).bytes
    if instruction.opcode == "custom-call" and '"AllocateBuffer"' in instruction.attributes:
        return 0.0
    if instruction.opcode == "custom-call" and '"ConcatBitcast"' in instruction.attributes:
        return 0.0
    sources = (computation.by_name.get(name) for name in instruction.operands)
    return written + sum(s.bytes for i in sources if i is not None for s in i.shapes if s.in_hbm)


def _read(module: Module, computation: Computation, source: Instruction) -> float:
    """Bytes that a fused computation reads of one parameter."""
    users = computation.users.get(source.name, [])
    whole = source.shapes[0].bytes
    total = 0.0
    for user in users:
        if user.opcode in ("dynamic-slice", "slice", "gather"):
            total += user.shapes[0].bytes
        elif user.opcode == "dynamic-update-slice" and user.operands[0] == source.name:
            continue
        elif user.opcode == "bitcast":
            total += _read(module, computation, user)
        elif user.opcode == "fusion":
            called = module.computations.get(user.called("calls") or "")
            at = user.operands.index(source.name)
            if called is None or at not in called.parameters:
                return whole
            total += _read(module, called, called.parameters[at])
        else:
            return whole
    return min(total, whole)


def _written(called: Computation, shape: Shape, index: int) -> float:
    """Bytes written to output ``index``; of a dynamic-update-slice only the update counts."""
    root = called.root
    if root.opcode == "tuple" and index < len(root.operands):
        root = called.by_name.get(root.operands[index], root)
    while root.opcode in _VIEWS and root.operands and root.operands[0] in called.by_name:
        root = called.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        update = called.by_name.get(root.operands[1])
        if update is not None and update.shapes:
            return update.shapes[0].bytes
    return shape.bytes
