"""Views as two Pallas kernels for TPU: stored bands to planes, planes to patches.

The same function as in ``resample``. XLA turns bands, masks and results round in memory, for its products and again for
the patches, which takes longer than the products themselves. Here nothing leaves on-chip memory between the stored
values and the planes, nor between the planes and the patches.

The filter's weights are computed in the kernel from the edges of the boxes. In the first product, which makes lines,
the planes are the fixed operand and the weights of all views pass through them; in the second, the weights of a view
are, and the lines of all bands pass.

On other platforms the kernels are interpreted, with the same result by test. Where arrays are sharded, the mesh must be
in context (``models.tpu.kernel_calls``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from terrafm_jax import sensors
from terrafm_jax.models.layers import precision
from terrafm_jax.models.stems import LANES, column_shape
from terrafm_jax.models.tpu.kernel_calls import over_batch, run
from terrafm_jax.ssl.boxes import to_pixels
from terrafm_jax.ssl.resample import FILL, MIN_WEIGHT, REACH

ROWS = 8  # of a vector register; a row holds two of bfloat16
MEMORY = 15 << 20  # bytes of on-chip memory for a kernel: 16 MiB on v4, less what the compiler needs for itself

_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # [m, c] x [n, c] -> [m, n]
_TRANSPOSED = (((0,), (0,)), ((), ()))  # [c, m] x [c, n] -> [m, n]

Shape = tuple[int, ...]


def resample_sensor(
    key: str,
    entry: Mapping[str, Mapping[str, Array]],
    stats: tuple[np.ndarray, np.ndarray],
    offset: Array,
    views: Sequence[tuple[Array, Array, int]],
    patch: int,
    dtype: Any,
) -> list[Array]:
    """As ``resample.resample_sensor`` with the column layout. Raises ValueError where :func:`faults` finds any."""
    sensor = sensors.SENSORS[key]
    if found := faults(key, entry, [(boxes.shape[1], out) for boxes, _, out in views], patch, dtype):
        raise ValueError(f"views: kernel 'pallas' cannot cut {key}: " + "; ".join(found) + ". Use kernel 'xla'")
    mean, std = (np.asarray(a, np.float32) for a in stats)
    planes = []
    for group, names in sensor.groups.items():
        bands = list(sensor.indices(names))
        planes.append(_planes(entry[group], sensor.scale, mean[bands], std[bands], offset, jnp.dtype(dtype)))
    groups = [entry[group] for group in sensor.groups]
    return [
        _patches(planes, [_places(group, boxes, flips) for group in groups], sensor.group_order, out, patch)
        for boxes, flips, out in views
    ]


def faults(
    key: str, entry: Mapping[str, Mapping[str, Any]], kinds: Sequence[tuple[int, int]], patch: int, dtype: Any
) -> list[str]:
    """Why the kernels cannot cut a sensor's views; empty where they can.

    Args:
      entry: the sensor's groups in the batch, arrays or shapes.
      kinds: number of views, and pixels per side, of either size of views.
    """
    sensor, found = sensors.SENSORS[key], []
    shapes = {group: entry[group]["dn"].shape for group in sensor.groups}
    found += [f"{group} has {shape[3]} bands, not pairs" for group, shape in shapes.items() if shape[3] % 2]
    stored_as = {jnp.dtype(entry[group]["dn"].dtype) for group in shapes}
    found += [f"bands are stored as {kind}, not in 16 bits" for kind in stored_as if kind.itemsize != 2]
    deep = ROWS * 4 // jnp.dtype(dtype).itemsize
    found += [f"views of {out} pixels, no multiple of {deep}" for _, out in kinds if out % deep]
    for _, *sides, bands in shapes.values():
        stored = _bytes(np.uint16, sides[0] * bands, sides[1]), _bytes(dtype, bands + 1, *sides)
        if 2 * sum(stored) > MEMORY:
            found.append(f"{bands} bands of {sides[0]} x {sides[1]} pixels do not fit on-chip memory")
    planes = [(shape[3] + 1, *shape[1:3]) for shape in shapes.values()]
    if not found and not all(_at_once(planes, *kind, patch, len(sensor.bands), dtype)[0] for kind in kinds):
        found.append(f"tiles of {planes[0][1]} x {planes[0][2]} pixels do not fit on-chip memory")
    return found


def _bytes(dtype: Any, *shape: int) -> int:
    """Size of an array in on-chip memory, where the last two axes are padded to whole registers."""
    *outer, rows, columns = shape
    size = jnp.dtype(dtype).itemsize
    deep = ROWS * 4 // size
    return size * math.prod(outer) * -(-rows // deep) * deep * -(-columns // LANES) * LANES


def _record(x: Array | jax.ShapeDtypeStruct, mode: Any = None) -> pl.BlockSpec:
    """A block that is one record of ``x``, whichever other axes the grid has."""
    return pl.BlockSpec((1, *x.shape[1:]), lambda i, *_: (i, *[0] * (len(x.shape) - 1)), pipeline_mode=mode)


# --- planes -------------------------------------------------------------------------------------


def _planes(
    entry: Mapping[str, Array], scale: float, mean: np.ndarray, std: np.ndarray, offset: Array, dtype: Any
) -> Array:
    """[B, bands + 1, H, W]: normalized values minus FILL, zero where nodata; the last plane is the mask.

    Arguments are those of ``resample.masked_planes``.
    """
    _, height, width, bands = entry["dn"].shape
    kernel = functools.partial(_planes_kernel, scale=scale, mean=mean, std=std)
    # A TPU stores columns of pixels as lanes of its registers and a few bands as their rows: this moves nothing there.
    dn, valid = entry["dn"].transpose(0, 1, 3, 2), entry["valid"].transpose(0, 2, 1)

    def call(offset: Array, dn: Array, valid: Array) -> Array:
        result = jax.ShapeDtypeStruct((dn.shape[0], bands + 1, height, width), dtype)
        build = functools.partial(
            pl.pallas_call,
            kernel,
            grid=(dn.shape[0],),
            in_specs=[
                pl.BlockSpec((1, 1, 1), lambda i: (i, 0, 0), memory_space=pltpu.SMEM),
                _record(dn),
                _record(valid),
            ],
            out_specs=_record(result),
            out_shape=result,
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
            name="view_planes",
        )
        return run(build, offset, dn, valid)

    return over_batch(call, [offset[:, None, None], dn, valid])


def _planes_kernel(
    offset: pl.Ref, dn: pl.Ref, packed: pl.Ref, out: pl.Ref, *, scale: float, mean: np.ndarray, std: np.ndarray
) -> None:
    """One record: dn [1, H, bands, W], packed [1, bytes, H] -> out [1, bands + 1, H, W]."""
    _, height, bands, width = dn.shape
    signed = jnp.issubdtype(dn.dtype, jnp.signedinteger)
    shift_right = lax.shift_right_arithmetic if signed else lax.shift_right_logical
    pairs = dn.bitcast(jnp.int32)  # a word holds two bands of a pixel, the first one low
    for start in range(0, height, LANES):  # rows of pixels are lanes in ``packed``
        rows = slice(start, min(start + LANES, height))
        valid = _unpacked(packed[0, :, rows], width, out.dtype)
        out[0, bands, rows] = valid.astype(jnp.float32).astype(out.dtype)
        for band in range(bands):
            word = pairs[0, rows, band // 2, :]
            word = lax.shift_left(word, 16) if band % 2 == 0 else word
            values = shift_right(word, 16).astype(jnp.float32) * scale
            values = sensors.normalize(values, mean[band], std[band], offset[0, 0, 0]) - FILL
            out[0, band, rows] = jnp.where(valid, values, 0.0).astype(out.dtype)


def _unpacked(packed: Array, width: int, dtype: Any) -> Array:
    """uint8 [bytes, H] -> bool [H, W]: a product in ``dtype``, exact below 256, repeats every byte over its columns."""
    count, height = packed.shape
    byte, column = (lax.broadcasted_iota(jnp.int32, (count, width), axis) for axis in (0, 1))
    spread = (lax.shift_right_logical(column, 3) == byte).astype(jnp.float32).astype(dtype)
    packed = packed.astype(jnp.int32).astype(jnp.float32).astype(dtype)
    found = _dot(packed, spread, _TRANSPOSED).astype(jnp.int32)
    place = 7 - (lax.broadcasted_iota(jnp.int32, (height, width), 1) & 7)
    return (lax.shift_right_logical(found, place) & 1) == 1


# --- patches ------------------------------------------------------------------------------------


def _places(entry: Mapping[str, Array], boxes: Array, flips: Array) -> Array:
    """float32 [B, V, 8]: of every view top, bottom, left and right edge, both flips, and rows and columns stored."""
    extent = jnp.broadcast_to(entry["extent"][:, None].astype(jnp.float32), flips.shape)
    edges = jnp.stack(to_pixels(entry["geometry"], boxes), axis=-1)
    return jnp.concatenate([edges, flips.astype(jnp.float32), extent], axis=-1)


def _patches(planes: Sequence[Array], places: Sequence[Array], order: Sequence[int], out: int, patch: int) -> Array:
    """[B, V, h, patch / m, w, m * C * patch], the column layout of ``models.stems``, of one size of views.

    Args:
      planes, places: of each group.
      order: for each band in canonical order its number among the bands of all groups.
      out: output pixels per side; patch: pixels per side of a patch.
    """
    places = jnp.stack(places, axis=1)
    shapes, dtype = [x.shape[1:] for x in planes], planes[0].dtype
    views, side = places.shape[2], out // patch
    rows, width = _row_shape(out, patch, len(order))
    each, mode = _at_once(shapes, views, out, patch, len(order), dtype)

    def call(places: Array, *planes: Array) -> Array:
        result = jax.ShapeDtypeStruct((places.shape[0], views, side, rows, width), dtype)
        build = functools.partial(
            pl.pallas_call,
            functools.partial(_patches_kernel, order=order, patch=patch),
            grid=(places.shape[0], views // each),
            in_specs=[
                pl.BlockSpec((1, *places.shape[1:]), lambda i, _: (i, 0, 0, 0), memory_space=pltpu.SMEM),
                *(_record(x, mode) for x in planes),
            ],
            out_specs=pl.BlockSpec((1, each, side, rows, width), lambda i, j: (i, j, 0, 0, 0)),
            out_shape=result,
            scratch_shapes=[pltpu.VMEM(shape, dtype) for shape in _scratch(shapes, each, out, len(order))],
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=_cost(planes, views, out, result),
            name="view_patches",
        )
        return run(build, places, *planes)

    return over_batch(call, [places, *planes]).reshape(-1, views, side, rows // side, side, width)


def _row_shape(out: int, patch: int, bands: int) -> tuple[int, int]:
    """A row of patches as the kernel writes it: [p / m * w, m * C * p], the column layout of ``models.stems``."""
    columns, values = column_shape(bands * patch**2, patch)
    return columns * (out // patch), values


def _at_once(shapes: Sequence[Shape], views: int, out: int, patch: int, bands: int, dtype: Any) -> tuple[int, Any]:
    """How many views a step of the grid cuts (0: not one fits), and how planes are transferred.

    Where on-chip memory holds the planes of two records, the next ones arrive while these are cut.
    """
    planes = sum(_bytes(dtype, *shape) for shape in shapes)
    product = _bytes(np.float32, max(shape[0] for shape in shapes) * out, out)
    for copies, mode in ((2, None), (1, pl.Buffered(1))):
        for each in range(views, 0, -1):
            scratch = sum(_bytes(dtype, *shape) for shape in _scratch(shapes, each, out, bands))
            results = 2 * each * _bytes(dtype, out // patch, *_row_shape(out, patch, bands))
            if views % each == 0 and copies * planes + scratch + results + product <= MEMORY:
                return each, mode
    return 0, None


def _scratch(shapes: Sequence[Shape], each: int, out: int, bands: int) -> list[Shape]:
    """Lines of a group's planes, views of all bands, weights across, weights down."""
    planes, height, width = (max(sizes) for sizes in zip(*shapes, strict=True))
    rows = each * out
    return [(planes, rows, height), (bands, rows, out), (rows, width), (rows, height)]


def _cost(planes: Sequence[Array], views: int, out: int, result: jax.ShapeDtypeStruct) -> pl.CostEstimate:
    products = sum(math.prod(x.shape[:2]) * views * out * x.shape[2] * (x.shape[3] + out) for x in planes)
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in (*planes, result))
    return pl.CostEstimate(flops=2 * products, transcendentals=0, bytes_accessed=moved)


def _patches_kernel(places: pl.Ref, *refs: pl.Ref, order: Sequence[int], patch: int) -> None:
    """Some views of a record: places [1, groups, V, 8] and planes [1, bands + 1, H, W] of each group ->
    patches [1, views, h, out / m, m * C * patch]; then the scratch."""
    *stored, patches, lines, cut, across, down = refs
    _, each, side, columns, _ = patches.shape
    out = side * patch
    grid = (side, columns // side, out // columns)
    views = [slice(i * out, (i + 1) * out) for i in range(each)]
    done = 0
    for group, planes in enumerate(stored):
        _, count, height, width = planes.shape
        for i, rows in enumerate(views):
            view = pl.program_id(1) * each + i
            top, bottom, left, right, upside, mirrored, high, wide = (places[0, group, view, n] for n in range(8))
            across[rows, :width] = _weights(left, right, mirrored, wide, (out, width), grid).astype(across.dtype)
            down[rows, :height] = _weights(top, bottom, upside, high, (out, height)).astype(down.dtype)
        _make_lines(lines, across[:, :width], planes)
        for rows in views:
            every = jnp.concatenate([lines[band, rows, :height] for band in range(count)])
            *values, weight = jnp.split(_dot(every, down[rows, :height]), count)
            share = jnp.where(weight > MIN_WEIGHT, 1.0 / jnp.maximum(weight, MIN_WEIGHT), 0.0)
            for band, value in enumerate(values):
                cut[done + band, rows] = (value * share + FILL).astype(cut.dtype)
        done += count - 1
    for i, rows in enumerate(views):
        neighbors = [slice(start, start + columns) for start in range(rows.start, rows.stop, columns)]
        for line in range(side):
            inside = slice(line * patch, (line + 1) * patch)
            pieces = [cut[band, neighbor, inside] for neighbor in neighbors for band in order]
            patches[0, i, line] = jnp.concatenate(pieces, axis=1)


def _make_lines(lines: pl.Ref, across: Array, planes: pl.Ref) -> None:
    """First product: across [rows, W] and planes [1, bands, H, W] -> lines [bands, rows, H].

    The matrix units hold 128 lines of a plane at a time. Usual tiles have a few more than a multiple of it (534 and
    267): these last ones are taken from all planes together.
    """
    _, count, height, _ = planes.shape
    rest = height % LANES
    shared = 0 < rest < height and count * rest <= LANES  # one pass for the rest of all planes
    whole = height - rest if shared else height
    if shared:  # before the rest: otherwise the compiler spills megabytes of registers
        ends = _dot(across, jnp.concatenate([planes[0, band, whole:] for band in range(count)])).astype(lines.dtype)
    for band in range(count):
        made = _dot(across, planes[0, band, :whole]).astype(lines.dtype)
        if shared:
            made = jnp.concatenate([made, ends[:, band * rest : (band + 1) * rest]], axis=1)
        lines[band, :, :height] = made


def _dot(a: Array, b: Array, dims: tuple = _ROWS_BY_ROWS) -> Array:
    return lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _weights(
    start: Array,
    stop: Array,
    flip: Array,
    extent: Array,
    shape: tuple[int, int],
    grid: tuple[int, int, int] | None = None,
) -> Array:
    """``resample.triangle_weights`` of one view, [out, size], from scalars.

    With ``grid`` = (patches, p / m, m) of the column layout, rows are ordered (which of m neighbors, p / m, patch).
    """
    out, number = shape[0], lax.broadcasted_iota(jnp.int32, shape, 0)
    if grid:
        side, groups, m = grid
        column, place = lax.div(number, side), lax.rem(number, side)
        number = (place * groups + lax.rem(column, groups)) * m + lax.div(column, groups)
    position = (number.astype(jnp.float32) + 0.5) / out
    position = jnp.where(flip > 0, 1.0 - position, position)
    center = start + (stop - start) * position
    inside = jnp.clip(center, 0.0, extent)
    center = jnp.where(jnp.abs(inside - center) <= REACH, inside, center)
    support = jnp.maximum((stop - start) / out, 1.0)
    pixel = lax.broadcasted_iota(jnp.int32, shape, 1).astype(jnp.float32)
    distance = jnp.abs(pixel + 0.5 - center) / support
    return jnp.where((distance < 1.0) & (pixel < extent), (1.0 - distance) / support, 0.0)
