"""Fusion of the sensors' values as two Pallas kernels for TPU, forward and backward.

The same function as in ``folding`` (its docstring has the derivation), but each block of patches is loaded into on-chip
memory only once: XLA makes some twenty passes over the values of every sensor, each of which costs as much as the
matrix products around them.

Weights and statistics of a patch are one row of ``queries * heads`` lanes, query-major; no axis of queries or heads
exists. The columns of the values interleave the heads (:func:`interleaved`), so that lane i of every register belongs
to head ``i % heads``: summing over a head's columns is adding registers, then halves of the last one onto each other,
and the weights of a patch fit all registers of its row as they are.

On other platforms the kernels are interpreted, with the same result by test. Where arrays are sharded, the mesh must be
in context (``kernel_calls``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from terrafm_jax.models.fusion import masked
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.tpu.fusion_rows import Sums, entry, mixture, mixture_gradient, pairs
from terrafm_jax.models.tpu.kernel_calls import over_batch, run, wanted

LANES, ROWS = 128, 16  # of a vector register of bfloat16
# Most patches of a grid step, and most values of one sensor in it: more do not fit a kernel's 16 MiB on v4 and v5p.
BLOCK_ROWS, BLOCK_VALUES = 128, 128 * 2304
CORES = 2  # TensorCores of a v4 or v5p chip, each of which runs half of the grid; elsewhere one core runs both halves


def resolve(spec: ModelSpec) -> bool:
    """Whether fusion runs as kernels. "auto": on TPU, with a mesh in context, if stems and heads fill whole registers.

    Raises ValueError where kernels are asked for and they do not.
    """
    lanes = spec.queries * spec.fusion_heads
    fits = spec.stem_width % LANES == 0 and LANES % spec.fusion_heads == 0 and lanes <= LANES
    if spec.fusion_kernel == "pallas" and not fits:
        raise ValueError(
            f"model: fusion_kernel 'pallas' needs a stem width (3 x width) that is a multiple of {LANES}, "
            f"fusion_heads that divide {LANES} and at most {LANES} queries x heads; found {spec.stem_width}, "
            f"{spec.fusion_heads} and {lanes}. Use fusion_kernel='xla'"
        )
    return spec.fusion_kernel == "pallas" or (spec.fusion_kernel == "auto" and fits and wanted(spec))


def interleaved(x: Array, spec: ModelSpec, axis: int) -> Array:
    """``x`` with an axis of D columns, given head by head, in the kernels' order: first every head's first column."""
    axis %= x.ndim
    split = x.reshape(*x.shape[:axis], spec.fusion_heads, -1, *x.shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1).reshape(x.shape)


class Tables(NamedTuple):
    """What every block needs; J = queries * heads.

    group: [J, J], 1 where two lanes belong to the same query.
    pool: [1, D], interleaved. Both in ``stat_dtype``.
    """

    group: Array
    pool: Array


def tables(pool: Array, spec: ModelSpec) -> Tables:
    """The tables of one step. ``pool``: [D], interleaved."""
    group = np.kron(np.eye(spec.queries), np.ones((spec.fusion_heads,) * 2))
    return Tables(jnp.asarray(group, spec.stat_dtype), pool.astype(spec.stat_dtype)[None])


# --- kernels ------------------------------------------------------------------------------------


def _over_lanes(x: Array, spec: ModelSpec) -> Array:
    """[R, LANES] -> [R, LANES]: in every lane of a head the sum over all of them."""
    shift = LANES // 2
    while shift >= spec.fusion_heads:
        x = x + pltpu.roll(x, shift, 1)
        shift //= 2
    return x


def _to_lanes(x: Array, spec: ModelSpec) -> Array:
    """[R, n * heads] -> [R, LANES]: the sum over n (queries), repeated for every register of a patch."""
    rest = LANES - x.shape[1]
    return _over_lanes(jnp.concatenate([x, jnp.zeros((x.shape[0], rest), x.dtype)], axis=1) if rest else x, spec)


def _each_rows(block: int, work: Callable[[pl.Slice], None]) -> None:
    """Calls ``work(rows)`` for every ROWS patches of a block: as many as leave their sums in registers."""

    def one(index: Array, _: None) -> None:
        work(pl.ds(pl.multiple_of(index * ROWS, ROWS), ROWS))

    lax.fori_loop(0, block // ROWS, one, None)


def _registers(spec: ModelSpec) -> list[slice]:
    return [slice(i, i + LANES) for i in range(0, spec.stem_width, LANES)]


class Scratch(NamedTuple):
    """What one pass over a block leaves for the next.

    sums: [slots, R, J]: per sensor the sum of values, then of values times the pooling vector; per pair of sensors of
      products of values; in the backward pass per sensor of values with the result's gradient.
    factors: [slots, R, LANES], by which the next pass multiplies values.
    """

    sums: pl.Ref
    factors: pl.Ref


def _sum_columns(values: Sequence[pl.Ref], g: pl.Ref | None, pool: pl.Ref, to: pl.Ref, spec: ModelSpec) -> None:
    """Fills ``Scratch.sums``. ``g``: the result's gradient [R, D] in the backward pass."""
    wide = spec.stat_dtype

    def work(rows: pl.Slice) -> None:
        sums: list[Array] = []
        for at in _registers(spec):
            parts = [value[rows, at].astype(wide) for value in values]
            found = [*parts, *(part * pool[:, at] for part in parts)]
            found += [parts[m] * parts[n] for m, n in pairs(len(parts))]
            if g is not None:
                there = g[rows, at].astype(wide)
                found += [part * there for part in parts]
            sums = [x + y for x, y in zip(sums, found, strict=True)] if sums else found
        for slot, x in enumerate(sums):
            to[slot, rows, :] = _over_lanes(x, spec)[:, : to.shape[2]]

    _each_rows(to.shape[1], work)


def _read_sums(scratch: pl.Ref, count: int) -> tuple[Sums, list[Array]]:
    """The sums, and those of values times the result's gradient (none in the forward pass)."""
    slots = [scratch[i] for i in range(scratch.shape[0])]
    first, asked, rest = slots[:count], slots[count : 2 * count], slots[2 * count :]
    gram = dict(zip(pairs(count), rest, strict=False))
    return Sums(first, asked, gram), rest[len(gram) :]


def _forward_kernel(*refs: pl.Ref, spec: ModelSpec, count: int) -> None:
    """values and scores of every sensor, tables -> the mixed values [R, D]."""
    values, scores, rest = refs[:count], refs[count : 2 * count], refs[2 * count :]
    table, out, scratch = Tables(*rest[:2]), rest[2], Scratch(*rest[3:])
    _sum_columns(values, None, table.pool, scratch.sums, spec)
    sums, _ = _read_sums(scratch.sums, count)
    mixing = mixture([score[...] for score in scores], sums, table.group[...], table.pool[...].sum(), spec)
    part = mixing.share * mixing.inverse
    shift = (part * mixing.mean).sum(-1, keepdims=True) / spec.fusion_heads
    for slot, weight in enumerate(mixing.weights):
        scratch.factors[slot] = _to_lanes(part * weight, spec)
    scratch.factors[count] = jnp.broadcast_to(shift, scratch.factors.shape[1:])

    def work(rows: pl.Slice) -> None:
        *weights, shift = (scratch.factors[i, rows, :] for i in range(count + 1))
        for at in _registers(spec):
            mixed = sum(x * value[rows, at].astype(spec.stat_dtype) for x, value in zip(weights, values, strict=True))
            out[rows, at] = (mixed - shift).astype(out.dtype)

    _each_rows(out.shape[0], work)


def _backward_kernel(*refs: pl.Ref, spec: ModelSpec, count: int) -> None:
    """Forward's inputs and the result's gradient -> per sensor [R, D + J] (value, score), and of pool [8, D] a core."""
    values, scores, rest = refs[:count], refs[count : 2 * count], refs[2 * count :]
    g, table, rest = rest[0], Tables(*rest[1:3]), rest[3:]
    grads, dpool, scratch = rest[:count], rest[count], Scratch(*rest[count + 1 :])
    wide = spec.stat_dtype

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        dpool[...] = jnp.zeros(dpool.shape, dpool.dtype)

    _sum_columns(values, g, table.pool, scratch.sums, spec)
    sums, products = _read_sums(scratch.sums, count)
    total_pool, group = table.pool[...].sum(), table.group[...]
    mixing = mixture([score[...] for score in scores], sums, group, total_pool, spec)
    back = mixture_gradient(mixing, sums, products, g[...].astype(wide).sum(-1, keepdims=True), group, total_pool, spec)
    for grad, score in zip(grads, back.scores, strict=True):
        grad[:, spec.stem_width :] = score.astype(grad.dtype)
    # The gradient of the pooling vector's sum is that of each of its entries.
    dpool[:1, :] += jnp.broadcast_to(back.total_pool.sum() / spec.fusion_heads, (1, spec.stem_width))
    part = mixing.share * mixing.inverse
    weights = [part * weight for weight in mixing.weights]
    for slot, x in enumerate((*weights, *back.first, *back.asked, *back.gram.values())):
        scratch.factors[slot] = _to_lanes(x, spec)

    def work(rows: pl.Slice) -> None:
        factors = [scratch.factors[i, rows, :] for i in range(scratch.factors.shape[0])]
        weights, first, asked = (factors[i * count : (i + 1) * count] for i in range(3))
        gram = dict(zip(pairs(count), factors[3 * count :], strict=True))
        for at in _registers(spec):
            there, pool = g[rows, at].astype(wide), table.pool[:, at]
            upcast = [value[rows, at].astype(wide) for value in values]
            for m, grad in enumerate(grads):
                found = weights[m] * there + first[m] + asked[m] * pool
                found += sum(entry(gram, m, n) * upcast[n] for n in range(count))
                grad[rows, at] = found.astype(grad.dtype)
            by_row = sum(x * value for x, value in zip(asked, upcast, strict=True))
            dpool[:, at] += by_row.reshape(-1, dpool.shape[0], LANES).sum(0)

    _each_rows(g.shape[0], work)


# --- calls --------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mix(values: list[Array], scores: list[Array], present: Array | None, pool: Array, spec: ModelSpec) -> Array:
    """The weighted sum of values to which fusion reduces (``folding``).

    Args:
      values: per sensor [B, h, w, D] in the compute dtype.
      scores: per sensor [B, h, w, J] in ``stat_dtype``.
      present: bool [B, M], the sensors each sample sees, or None.
      pool: [D], the pooling vector times the LayerNorm's scale.

    The columns D of values, pool and result are :func:`interleaved`.

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
      products: sums of products with the result's gradient (``Scratch.sums``); 0 in the forward pass.
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

    many = len(pairs(count))
    scratch = Scratch(
        sums=pltpu.VMEM((2 * count + many + products, block, spec.queries * spec.fusion_heads), spec.stat_dtype),
        factors=pltpu.VMEM((3 * count + many if products else count + 1, block, LANES), spec.stat_dtype),
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
