"""Self-attention for TPU as two Pallas kernels, forward and backward: logits never leave on-chip memory.

A view has few tokens, so a kernel holds all of a view's queries, keys and values; nothing is tiled over
keys. Heads are 64 wide, vector registers 128: the heads that share a register are loaded together (a
"cut"), and one of them is selected by zeroing the columns of the others, which moves no data. Contracting
over the zeros is free, because the matrix unit is as deep as a register is wide.

Rows from ``valid`` on are padding up to whole registers. They take part as queries, whose results nobody
reads, but never as keys.

On other platforms the kernels are interpreted, with the same result by test (``kernel_calls``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from terrafm_jax.models.layers import precision
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.tpu.kernel_calls import over_batch, run

LANES, ROWS = 128, 8  # of a vector register
LONGEST = 640  # most tokens whose logits fit into on-chip memory beside everything else
SAVED = "attention"  # name by which jax.checkpoint saves the result

_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # [m, c] x [n, c] -> [m, n]
_PLAIN = (((1,), (0,)), ((), ()))  # [m, n] x [n, c] -> [m, c]
_TRANSPOSED = (((0,), (0,)), ((), ()))  # [n, m] x [n, c] -> [m, c]
_BLOCK_ROWS = 400  # tokens per grid step: enough compute to hide the transfers of the next one


def cut(spec: ModelSpec) -> int:
    """Columns loaded together: those of the heads that share a register."""
    return math.gcd(spec.width, LANES)


def fits(spec: ModelSpec, tokens: int) -> bool:
    """Whether the kernels support this number of tokens and head size. On TPU, cuts must be LANES columns, too."""
    return cut(spec) % (spec.width // spec.heads) == 0 and tokens <= LONGEST


def padded(tokens: int) -> int:
    """``tokens`` rounded up to rows of whole registers."""
    return -(-tokens // ROWS) * ROWS


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attend(qkv: Array, spec: ModelSpec, valid: int) -> Array:
    """Softmax attention of packed ``[B, N, 3 * d]`` (3, heads, head_dim) -> ``[B, N, d]``.

    Args:
      qkv: N a multiple of ROWS.
      valid: number of tokens; the rows after them are padding.
    """
    return _forward(qkv, spec, valid)


def _attend_fwd(qkv: Array, spec: ModelSpec, valid: int) -> tuple[Array, tuple[Array, Array]]:
    out = checkpoint_name(attend(qkv, spec, valid), SAVED)
    return out, (qkv, out)


def _attend_bwd(spec: ModelSpec, valid: int, saved: tuple[Array, Array], g: Array) -> tuple[Array]:
    return (_backward(*saved, g, spec, valid),)


attend.defvjp(_attend_fwd, _attend_bwd)


# --- calls ------------------------------------------------------------------------------------


def _forward(qkv: Array, spec: ModelSpec, valid: int) -> Array:
    kernel = functools.partial(_forward_kernel, spec=spec, valid=valid)
    return over_batch(functools.partial(_call, kernel, "attention_forward", spec.width, 2, spec), [qkv])


def _backward(qkv: Array, out: Array, g: Array, spec: ModelSpec, valid: int) -> Array:
    kernel = functools.partial(_backward_kernel, spec=spec, valid=valid)
    call = functools.partial(_call, kernel, "attention_backward", 3 * spec.width, 5, spec)
    return over_batch(call, [qkv, out, g])


def _call(
    kernel: Callable[..., None], name: str, columns: int, products: int, spec: ModelSpec, *arrays: Array
) -> Array:
    """Runs a kernel over blocks of views. ``products``: of [N, N] with head_dim per head, for the cost estimate."""
    batch, rows, _ = arrays[0].shape
    pairs = batch * rows * rows
    cost = pl.CostEstimate(
        flops=2 * products * pairs * spec.width,
        transcendentals=pairs * spec.heads,
        bytes_accessed=(sum(x.size for x in arrays) + batch * rows * columns) * arrays[0].dtype.itemsize,
    )
    views = max(i for i in range(1, batch + 1) if batch % i == 0 and (i == 1 or i * rows <= _BLOCK_ROWS))

    def block(width: int) -> pl.BlockSpec:
        return pl.BlockSpec((views, rows, width), lambda i: (i, 0, 0))

    build = functools.partial(
        pl.pallas_call,
        kernel,
        grid=(batch // views,),
        in_specs=[block(x.shape[2]) for x in arrays],
        out_specs=block(columns),
        out_shape=jax.ShapeDtypeStruct((batch, rows, columns), arrays[0].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=cost,
        name=name,
    )
    return run(build, *arrays)


def _each_cut(views: int, rows: int, spec: ModelSpec, work: Callable[[Array, Callable[[int], pl.Slice]], None]) -> None:
    """Calls ``work(view, columns)`` for every view and cut; ``columns(0)`` slices its queries, 1 keys, 2 values."""
    size = cut(spec)
    count = spec.width // size

    def one(index: Array, _: None) -> None:
        view, at = lax.div(index, count), lax.rem(index, count)
        work(view, lambda third: pl.ds(pl.multiple_of(third * spec.width + at * size, size), size))

    # Short views leave the matrix unit idle between dependent products, so unrolling interleaves several of them.
    most = 8 if rows <= LANES // 2 else 3
    together = max(n for n in range(1, most + 1) if views * count % n == 0)
    lax.fori_loop(0, views * count, one, None, unroll=together)


# --- kernels ----------------------------------------------------------------------------------


def _forward_kernel(qkv: pl.Ref, out: pl.Ref, *, spec: ModelSpec, valid: int) -> None:
    """One block: qkv [views, N, 3 * d] -> out [views, N, d]."""
    heads, head = cut(spec) * spec.heads // spec.width, spec.width // spec.heads

    def work(view: Array, columns: Callable[[int], pl.Slice]) -> None:
        q, k, v = (qkv[view, :, columns(i)] for i in range(3))
        q, k = q * jnp.asarray(head**-0.5, q.dtype), _repeat_first(k, valid)
        mixed, totals = [], []
        for i in range(heads):
            logits = _dot(_only_head(q, i, head), k, _ROWS_BY_ROWS, spec)
            powers = jnp.exp(logits - logits.max(-1, keepdims=True)).astype(q.dtype)
            # With ones in the columns of the other heads, the same product also gives the softmax's denominator.
            values = _zero_after(_only_head(v, i, head, jnp.ones_like(v)), valid)
            mixed.append(_dot(powers, values, _PLAIN, spec))
            if heads == 1:
                totals.append(_dot(powers, _zero_after(jnp.ones_like(v), valid), _PLAIN, spec))
        if heads > 1:  # the denominator of head i is read in the columns of head i - 1 and rolled to those of head i
            totals.append(pltpu.roll(_side_by_side(mixed[1:] + mixed[:1], head), head, 1))
        out[view, :, columns(0)] = (_side_by_side(mixed, head) / totals[0]).astype(out.dtype)

    _each_cut(*qkv.shape[:2], spec, work)


def _backward_kernel(qkv: pl.Ref, out: pl.Ref, g: pl.Ref, dqkv: pl.Ref, *, spec: ModelSpec, valid: int) -> None:
    """One block: from ``g``, the gradient of ``out`` [views, N, d], to ``dqkv``, that of ``qkv`` [views, N, 3 * d].

    Logits are transposed here, [keys, queries]: statistics of the queries are rows, and of the three
    gradients only one needs a transposition.
    """
    heads, head = cut(spec) * spec.heads // spec.width, spec.width // spec.heads

    def work(view: Array, columns: Callable[[int], pl.Slice]) -> None:
        q, k, v = (qkv[view, :, columns(i)] for i in range(3))
        do = g[view, :, columns(0)]
        scale = jnp.asarray(head**-0.5, q.dtype)
        q, filled, k = q * scale, _repeat_first(k, valid), _zero_after(k, valid) * scale
        products = out[view, :, columns(0)] * do
        parts: tuple[list[Array], ...] = ([], [], [])
        for i in range(heads):
            logits = _dot(_only_head(filled, i, head), q, _ROWS_BY_ROWS, spec)
            powers = jnp.exp(logits - logits.max(0, keepdims=True))
            weights = powers * (1.0 / _sum_of_first(powers, valid))
            ones = _only_head(jnp.ones((2 * ROWS, products.shape[1]), spec.stat_dtype), i, head).astype(q.dtype)
            shift = _dot(ones, products, _ROWS_BY_ROWS, spec)[:1]
            dlogits = (weights * (_dot(_only_head(v, i, head), do, _ROWS_BY_ROWS, spec) - shift)).astype(q.dtype)
            parts[0].append(_dot(dlogits, k, _TRANSPOSED, spec))
            parts[1].append(_dot(dlogits, q, _PLAIN, spec))
            parts[2].append(_dot(weights.astype(q.dtype), do, _PLAIN, spec))
        for third, part in enumerate(parts):
            grad = _side_by_side(part, head)
            dqkv[view, :, columns(third)] = (_zero_after(grad, valid) if third else grad).astype(dqkv.dtype)

    _each_cut(*qkv.shape[:2], spec, work)


def _dot(a: Array, b: Array, dims: tuple, spec: ModelSpec) -> Array:
    return lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=spec.stat_dtype)


def _columns(x: Array, i: int, head: int) -> Array:
    """Which elements of [N, cut] lie in the columns of head ``i``."""
    at = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return (at >= i * head) & (at < (i + 1) * head)


def _only_head(x: Array, i: int, head: int, others: Array | None = None) -> Array:
    """``x`` in the columns of head ``i``, zeros or ``others`` in those of the other heads."""
    return jnp.where(_columns(x, i, head), x, jnp.zeros_like(x) if others is None else others)


def _side_by_side(parts: Sequence[Array], head: int) -> Array:
    """[N, cut] with the columns of head i taken from part i."""
    merged = parts[0]
    for i, part in enumerate(parts[1:], 1):
        merged = jnp.where(_columns(part, i, head), part, merged)
    return merged


def _first_rows(x: Array, valid: int) -> Array:
    return lax.broadcasted_iota(jnp.int32, x.shape, 0) < valid


def _zero_after(x: Array, valid: int) -> Array:
    return x if x.shape[0] == valid else jnp.where(_first_rows(x, valid), x, jnp.zeros_like(x))


def _repeat_first(x: Array, valid: int) -> Array:
    """Padding rows become copies of row 0: as keys they leave the maximum over keys as it is."""
    return x if x.shape[0] == valid else jnp.where(_first_rows(x, valid), x, x[:1])


def _sum_of_first(x: Array, valid: int) -> Array:
    """[N, M] -> [1, M], the sum over the first ``valid`` rows."""
    whole = valid // ROWS * ROWS
    parts = [x[:whole]] if whole else []
    if x.shape[0] > whole:
        parts.append(_zero_after(x[whole:], valid - whole))
    return sum((part.sum(0, keepdims=True) for part in parts[1:]), parts[0].sum(0, keepdims=True))
