"""Fusion of the sensors' values as two Pallas kernels for TPU, forward and backward.

The same function as in ``folding`` (its docstring has the derivation), but each block of patches is loaded into on-chip
memory only once: XLA makes some twenty passes over the values of every sensor, each of which costs as much as the
matrix products around them.

Weights and statistics of a patch are one row of ``queries * heads`` lanes, query-major. Sums over the columns of a head
are products with a 0/1 matrix that repeats the heads for every query; its transpose sums over queries and repeats over
columns in one product. So no axis of queries or heads ever exists.

On other platforms the kernels are interpreted, with the same result by test. Where arrays are sharded, the mesh must be
in context (``kernel_calls``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from terrafm_jax.models.fusion import head_columns, masked
from terrafm_jax.models.layers import precision
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.tpu.fusion_rows import Sums, entry, mixture, mixture_gradient, pairs
from terrafm_jax.models.tpu.kernel_calls import over_batch, run, wanted

LANES, ROWS = 128, 16  # of a vector register of bfloat16
# Most patches of a grid step, and most values of one sensor in it: more do not fit a kernel's 16 MiB on v4 and v5p.
BLOCK_ROWS, BLOCK_VALUES = 128, 128 * 2304
CORES = 2  # TensorCores of a v4 or v5p chip, each of which runs half of the grid; elsewhere one core runs both halves
CHUNK, UNROLL = 256, 3  # columns processed at once; chunks unrolled (3 divides their number, a stem being 3 x width)

_PLAIN = (((1,), (0,)), ((), ()))


def resolve(spec: ModelSpec) -> bool:
    """Whether fusion runs as kernels. "auto": on TPU, with a mesh in context, if stems fill whole vector registers.

    Raises ValueError where kernels are asked for and stems do not.
    """
    fits = spec.stem_width % LANES == 0
    if spec.fusion_kernel == "pallas" and not fits:
        raise ValueError(
            f"model: fusion_kernel 'pallas' needs a stem width (3 x width) that is a multiple of {LANES}; found "
            f"{spec.stem_width}. Use fusion_kernel='xla'"
        )
    return spec.fusion_kernel == "pallas" or (spec.fusion_kernel == "auto" and fits and wanted(spec))


class Tables(NamedTuple):
    """Constants and parameters that every block needs; J = queries * heads.

    columns: [D, J], 1 where a column belongs to the head. spread: its transpose.
    both: [D, 2 * heads], ``columns`` of one query, and the same times the pooling vector.
    group: [J, J], 1 where two lanes belong to the same query.
    pool: [1, D] in ``stat_dtype``.
    """

    columns: Array
    spread: Array
    both: Array
    group: Array
    pool: Array


def tables(pool: Array, spec: ModelSpec) -> Tables:
    """The tables of one step. ``pool``: [D]."""
    dtype, heads = spec.compute_dtype, head_columns(spec)
    columns = np.tile(heads, (1, spec.queries))
    group = np.kron(np.eye(spec.queries), np.ones((spec.fusion_heads,) * 2))
    pool = pool.astype(spec.stat_dtype)
    return Tables(
        columns=jnp.asarray(columns, dtype),
        spread=jnp.asarray(columns.T, dtype),
        both=jnp.concatenate([jnp.asarray(heads), heads * pool[:, None]], axis=1).astype(dtype),
        group=jnp.asarray(group, spec.stat_dtype),
        pool=pool[None],
    )


# --- kernels ------------------------------------------------------------------------------------


def _dot(a: Array, b: Array, spec: ModelSpec) -> Array:
    dtype = spec.compute_dtype
    return lax.dot_general(
        a.astype(dtype), b, _PLAIN, precision=precision(dtype), preferred_element_type=spec.stat_dtype
    )


def _chunks(spec: ModelSpec, work: Callable[[pl.Slice], None]) -> None:
    """Calls ``work(columns)`` for every register-wide slice of the stem's columns."""
    size = math.gcd(spec.stem_width, CHUNK)

    def one(index: Array, _: None) -> None:
        work(pl.ds(pl.multiple_of(index * size, size), size))

    lax.fori_loop(0, spec.stem_width // size, one, None, unroll=UNROLL)


def _stacked(parts: Sequence[Array], right: Array, spec: ModelSpec) -> list[Array]:
    """Products of several [R, K] with one matrix, as one product, so that the matrix unit loads the matrix once."""
    rows = parts[0].shape[0]
    found = _dot(jnp.concatenate([x.astype(spec.compute_dtype) for x in parts], axis=0), right, spec)
    return [found[i * rows : (i + 1) * rows] for i in range(len(parts))]


class Scratch(NamedTuple):
    """Accumulators of sums over columns, per head.

    both: [M, R, 2 * heads], sums of values, and of values times the pooling vector.
    products: [slots, R, J], sums of products of values in pairs; in the backward pass also of values with the
      result's gradient.
    """

    both: pl.Ref
    products: pl.Ref


def _sum_columns(values: Sequence[pl.Ref], g: pl.Ref | None, table: Tables, to: Scratch, spec: ModelSpec) -> None:
    """Fills the scratch. ``g``: the result's gradient [R, D] in the backward pass."""
    to.both[...] = jnp.zeros(to.both.shape, to.both.dtype)
    to.products[...] = jnp.zeros(to.products.shape, to.products.dtype)

    def work(at: pl.Slice) -> None:
        parts = [value[:, at] for value in values]
        upcast = [part.astype(spec.stat_dtype) for part in parts]
        products = [upcast[m] * upcast[n] for m, n in pairs(len(parts))]
        if g is not None:
            products += [part * g[:, at].astype(spec.stat_dtype) for part in upcast]
        for slot, x in enumerate(_stacked(parts, table.both[at, :], spec)):
            to.both[slot] += x
        for slot, x in enumerate(_stacked(products, table.columns[at, :], spec)):
            to.products[slot] += x

    _chunks(spec, work)


def _read_sums(scratch: Scratch, spec: ModelSpec) -> tuple[Sums, list[Array]]:
    """The sums, and those of values times the result's gradient (none in the forward pass)."""
    count, heads = scratch.both.shape[0], spec.fusion_heads
    slots = [scratch.products[i] for i in range(scratch.products.shape[0])]
    gram = dict(zip(pairs(count), slots, strict=False))
    first, asked = (
        [
            jnp.concatenate([scratch.both[m][:, i * heads : (i + 1) * heads]] * spec.queries, axis=1)
            for m in range(count)
        ]
        for i in range(2)
    )
    return Sums(first, asked, gram), slots[len(gram) :]


def _forward_kernel(*refs: pl.Ref, spec: ModelSpec, count: int) -> None:
    """values and scores of every sensor, tables -> the mixed values [R, D]."""
    values, scores, rest = refs[:count], refs[count : 2 * count], refs[2 * count :]
    table, out, scratch = Tables(*rest[:5]), rest[5], Scratch(*rest[6:])
    _sum_columns(values, None, table, scratch, spec)
    sums, _ = _read_sums(scratch, spec)
    mixing = mixture([score[...] for score in scores], sums, table.group[...], table.pool[...].sum(), spec)
    part = mixing.share * mixing.inverse
    factors = [part * weight for weight in mixing.weights]
    shift = (part * mixing.mean).sum(-1, keepdims=True) / spec.fusion_heads

    def work(at: pl.Slice) -> None:
        spread = _stacked(factors, table.spread[:, at], spec)
        mixed = sum(x * value[:, at].astype(spec.stat_dtype) for x, value in zip(spread, values, strict=True))
        out[:, at] = (mixed - shift).astype(out.dtype)

    _chunks(spec, work)


def _backward_kernel(*refs: pl.Ref, spec: ModelSpec, count: int) -> None:
    """Forward's inputs and the result's gradient -> per sensor [R, D + J] (value, score), and of pool [8, D] a core."""
    values, scores, rest = refs[:count], refs[count : 2 * count], refs[2 * count :]
    g, table, rest = rest[0], Tables(*rest[1:6]), rest[6:]
    grads, dpool, scratch = rest[:count], rest[count], Scratch(*rest[count + 1 :])
    wide = spec.stat_dtype

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dpool[...] = jnp.zeros(dpool.shape, dpool.dtype)

    _sum_columns(values, g, table, scratch, spec)
    sums, products = _read_sums(scratch, spec)
    total_pool, group = table.pool[...].sum(), table.group[...]
    mixing = mixture([score[...] for score in scores], sums, group, total_pool, spec)
    back = mixture_gradient(mixing, sums, products, g[...].astype(wide).sum(-1, keepdims=True), group, total_pool, spec)
    for grad, score in zip(grads, back.scores, strict=True):
        grad[:, spec.stem_width :] = score.astype(grad.dtype)
    # The gradient of the pooling vector's sum is that of each of its entries.
    per_entry = back.total_pool.sum() / spec.fusion_heads
    part = mixing.share * mixing.inverse
    factors = [*(part * weight for weight in mixing.weights), *back.first, *back.gram.values()]

    def work(at: pl.Slice) -> None:
        spread = _stacked(factors, table.spread[:, at], spec)
        asked = _stacked(back.asked, table.spread[: spec.fusion_heads, at], spec)
        gram = dict(zip(pairs(count), spread[2 * count :], strict=True))
        there, pool = g[:, at].astype(wide), table.pool[:, at]
        upcast = [value[:, at].astype(wide) for value in values]
        for m, grad in enumerate(grads):
            found = spread[m] * there + spread[count + m] + asked[m] * pool
            found += sum(entry(gram, m, n) * upcast[n] for n in range(count))
            grad[:, at] = found.astype(grad.dtype)
        by_row = sum(x * value for x, value in zip(asked, upcast, strict=True))
        dpool[:, at] += by_row.reshape(-1, dpool.shape[0], by_row.shape[1]).sum(0)
        dpool[:1, at] += jnp.broadcast_to(per_entry, (1, by_row.shape[1]))

    _chunks(spec, work)


# --- calls --------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mix(values: list[Array], scores: list[Array], present: Array | None, pool: Array, spec: ModelSpec) -> Array:
    """The weighted sum of values to which fusion reduces (``folding``).

    Args:
      values: per sensor [B, h, w, D] in the compute dtype.
      scores: per sensor [B, h, w, J] in ``stat_dtype``.
      present: bool [B, M], the sensors each sample sees, or None.
      pool: [D], the pooling vector times the LayerNorm's scale.

    Returns:
      [B, h, w, D] in the compute dtype.
    """
    arrays = [*values, *masked(scores, present)]
    return over_batch(functools.partial(_forward, spec=spec), arrays, tables(pool, spec))


def _mix_fwd(values: list[Array], scores: list[Array], present: Array | None, pool: Array, spec: ModelSpec) -> tuple:
    return mix(values, scores, present, pool, spec), (values, scores, present, pool)


def _mix_bwd(spec: ModelSpec, saved: tuple, g: Array) -> tuple[list[Array], list[Array], None, Array]:
    values, scores, present, pool = saved
    arrays = [*values, *masked(scores, present), g]
    *grads, dpool = over_batch(functools.partial(_backward, spec=spec), arrays, tables(pool, spec))
    width = spec.stem_width
    # The scores' gradients need no mask, as the weight of an absent sensor is zero already. Splitting an array here
    # costs nothing, as ``stems.stem_products`` concatenates the two parts again.
    return (
        [x[..., :width] for x in grads],
        [x[..., width:].astype(s.dtype) for x, s in zip(grads, scores, strict=True)],
        None,
        dpool.sum(0).astype(pool.dtype),
    )


mix.defvjp(_mix_fwd, _mix_bwd)


def _rows(x: Array) -> Array:
    """[B, h, w, C] -> [h * w * B, C]: the order in memory of what a TPU's stems return, so no data moves."""
    return x.transpose(1, 2, 0, 3).reshape(-1, x.shape[-1])


def _grid(x: Array, like: Array) -> Array:
    """The inverse of :func:`_rows`, with the batch and grid of ``like``."""
    batch, rows, columns, _ = like.shape
    return x.reshape(rows, columns, batch, x.shape[-1]).transpose(2, 0, 1, 3)


def _forward(*arrays: Array, spec: ModelSpec) -> Array:
    (out,) = _call(_forward_kernel, "fusion_forward", arrays, [spec.stem_width], 0, spec)
    return _grid(out, arrays[0])


def _backward(*arrays: Array, spec: ModelSpec) -> list[Array]:
    count = (len(arrays) - len(Tables._fields)) // 2
    joint = spec.stem_width + spec.queries * spec.fusion_heads
    *grads, dpool = _call(_backward_kernel, "fusion_backward", arrays, [joint] * count, count, spec)
    return [*(_grid(x, arrays[0]) for x in grads), dpool]


def _call(
    kernel: Callable[..., None], name: str, arrays: Sequence[Array], widths: list[int], products: int, spec: ModelSpec
) -> list[Array]:
    """Runs a kernel over blocks of patches.

    Args:
      arrays: [B, h, w, C] each, then the tables.
      widths: columns of the results; in the backward pass the pool's gradient [8 * CORES, D] follows.
      products: sums of products with the result's gradient (``Scratch.products``); 0 in the forward pass.
    """
    split, table = arrays[: -len(Tables._fields)], arrays[-len(Tables._fields) :]
    flat = [_rows(x) for x in split]
    count, rows = len(split) // 2, flat[0].shape[0]
    padded = -(-rows // (CORES * ROWS)) * CORES * ROWS
    flat = [jnp.pad(x, ((0, padded - rows), (0, 0))) for x in flat]
    most = min(BLOCK_ROWS, BLOCK_VALUES // spec.stem_width)
    block = max(i for i in range(ROWS, max(most, ROWS) + 1, ROWS) if padded % (CORES * i) == 0)
    blocks = padded // (CORES * block)  # of a core
    outs = [jax.ShapeDtypeStruct((padded, width), spec.compute_dtype) for width in widths]
    if products:
        outs.append(jax.ShapeDtypeStruct((CORES * 8, spec.stem_width), spec.stat_dtype))

    def by_block(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((block, x.shape[1]), lambda core, i: (core * blocks + i, 0))

    def whole(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec(x.shape, lambda core, i: (0, 0))

    def of_core(x: Any) -> pl.BlockSpec:
        return pl.BlockSpec((x.shape[0] // CORES, x.shape[1]), lambda core, i: (core, 0))

    scratch = Scratch(
        both=pltpu.VMEM((count, block, 2 * spec.fusion_heads), spec.stat_dtype),
        products=pltpu.VMEM((len(pairs(count)) + products, block, spec.queries * spec.fusion_heads), spec.stat_dtype),
    )
    build = functools.partial(
        pl.pallas_call,
        functools.partial(kernel, spec=spec, count=count),
        grid=(CORES, blocks),
        in_specs=[*map(by_block, flat), *map(whole, table)],
        out_specs=[*map(by_block, outs[: len(widths)]), *map(of_core, outs[len(widths) :])],
        out_shape=outs,
        scratch_shapes=list(scratch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=name,
    )
    found = run(build, *flat, *table)
    return [*(x[:rows] for x in found[: len(widths)]), *found[len(widths) :]]
