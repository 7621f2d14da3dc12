"""Self-attention for TPU as two Pallas kernels, forward and backward: logits never leave on-chip memory.

A view has few tokens, so a kernel holds all of a view's queries, keys and values; nothing is tiled over
keys. Heads are 64 wide, vector registers 128: the heads that share a register are loaded together (a
"cut"). Their queries are stacked, each with the columns of the other heads zeroed, which moves no data:
one product with the keys then gives the logits of all of them, side by side. Contracting over the zeros is
free, because the matrix unit is as deep as a register is wide.

Logits are transposed throughout, [keys, stacked queries]: statistics of the queries are rows, reduced
without moving data across a register, and short views fill more of its lanes. The backward kernel gets the
logarithm of the softmax's denominator from the forward kernel instead of reducing again (as in
FlashAttention-2, arXiv 2307.08691).

Several cuts go through a kernel's stages together, because each stage waits long for the matrix units'
results: with one cut after the other, the compiler leaves them idle half of the time.

Rows from ``valid`` on are padding up to whole registers. They take part as queries, whose results nobody
reads, but never as keys.

On other platforms the kernels are interpreted, with the same result by test (``kernel_calls``).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

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
LONGEST = 624  # most tokens whose logits fit into on-chip memory (16 MiB on v4) beside everything else, up to L
SAVED = "attention"  # name by which jax.checkpoint saves the result

_ROWS_BY_ROWS = (((1,), (1,)), ((), ()))  # [m, c] x [n, c] -> [m, n]
_PLAIN = (((1,), (0,)), ((), ()))  # [m, n] x [n, c] -> [m, c]
_TRANSPOSED = (((0,), (0,)), ((), ()))  # [n, m] x [n, c] -> [m, c]
_BLOCK = 400 * 768  # tokens times width per grid step: enough compute to hide the transfers of the next one
_LONG = 300_000  # tokens times width of a view from which on nothing is transferred ahead
_TOGETHER, _LOGITS = 16, 1 << 19  # most cuts that go through the stages together, and most logits these may have


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
    return _forward(qkv, spec, valid)[0]


def _attend_fwd(qkv: Array, spec: ModelSpec, valid: int) -> tuple[Array, tuple[Array, Array, Array]]:
    out, norms = (checkpoint_name(x, SAVED) for x in _forward(qkv, spec, valid))
    return out, (qkv, out, norms)


def _attend_bwd(spec: ModelSpec, valid: int, saved: tuple[Array, Array, Array], g: Array) -> tuple[Array]:
    return (_backward(*saved, g, spec, valid),)


attend.defvjp(_attend_fwd, _attend_bwd)


# --- calls ------------------------------------------------------------------------------------


def _forward(qkv: Array, spec: ModelSpec, valid: int) -> tuple[Array, Array]:
    """The result ``[B, N, d]``, and per cut and stacked query the log of the denominator ``[B, cuts, heads * N]``."""
    batch, rows, _ = qkv.shape
    norms = (batch, spec.width // cut(spec), _heads(spec) * rows)
    results = [
        jax.ShapeDtypeStruct((batch, rows, spec.width), qkv.dtype), jax.ShapeDtypeStruct(norms, spec.stat_dtype),
    ]  # fmt: skip
    kernel = functools.partial(_forward_kernel, spec=spec, valid=valid)
    return over_batch(functools.partial(_call, kernel, "attention_forward", 2, spec, results), [qkv])


def _backward(qkv: Array, out: Array, norms: Array, g: Array, spec: ModelSpec, valid: int) -> Array:
    kernel = functools.partial(_backward_kernel, spec=spec, valid=valid)
    call = functools.partial(_call, kernel, "attention_backward", 5, spec, [qkv])
    return over_batch(call, [qkv, out, norms, g])[0]


def _call(
    kernel: Callable[..., None],
    name: str,
    products: int,
    spec: ModelSpec,
    results: Sequence[jax.ShapeDtypeStruct],
    *arrays: Array,
) -> list[Array]:
    """Runs a kernel over blocks of views; ``results`` has the shapes for the whole batch, ``arrays`` may be a shard.

    ``products``: of [N, N] with head_dim per head, for the cost estimate.
    """
    batch, rows, _ = arrays[0].shape
    results = [jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype) for x in results]
    pairs = batch * rows * rows
    cost = pl.CostEstimate(
        flops=2 * products * pairs * spec.width,
        transcendentals=pairs * spec.heads,
        bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*arrays, *results)),
    )
    views = max(i for i in range(1, batch + 1) if batch % i == 0 and (i == 1 or i * rows * spec.width <= _BLOCK))

    def block(x: Array | jax.ShapeDtypeStruct) -> pl.BlockSpec:
        # Two copies of a long view would not fit beside its logits, and its transfers are short against its compute.
        mode = pl.Buffered(1) if rows * spec.width > _LONG else None
        return pl.BlockSpec((views, *x.shape[1:]), lambda i: (i, 0, 0), pipeline_mode=mode)

    build = functools.partial(
        pl.pallas_call,
        kernel,
        grid=(batch // views,),
        in_specs=[block(x) for x in arrays],
        out_specs=[block(x) for x in results],
        out_shape=results,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        cost_estimate=cost,
        name=name,
    )
    return run(build, *arrays)


class _Place(NamedTuple):
    """A cut of a view."""

    view: Array
    cut: Array
    size: int  # columns of a cut
    width: int  # of the model

    def columns(self, third: int = 0) -> tuple[Array, slice, pl.Slice]:
        """Index of its queries (0, or the columns of an array of ``width``), keys (1) or values (2)."""
        start = pl.multiple_of(third * self.width + self.cut * self.size, self.size)
        return self.view, slice(None), pl.ds(start, self.size)

    def norms(self) -> tuple[Array, pl.Slice, slice]:
        return self.view, pl.ds(self.cut, 1), slice(None)


def _each_group(views: int, rows: int, spec: ModelSpec, work: Callable[[list[_Place]], None]) -> None:
    """Calls ``work`` for groups of cuts, which together are all cuts of all views."""
    count = spec.width // cut(spec)
    most = min(_TOGETHER, _LOGITS // (_heads(spec) * rows**2))
    together = max(n for n in range(1, max(most, 1) + 1) if views * count % n == 0)

    def one(index: Array, _: None) -> None:
        places = [index * together + i for i in range(together)]
        work([_Place(lax.div(i, count), lax.rem(i, count), cut(spec), spec.width) for i in places])

    lax.fori_loop(0, views * count // together, one, None)


# --- kernels ----------------------------------------------------------------------------------


def _forward_kernel(qkv: pl.Ref, out: pl.Ref, norms: pl.Ref, *, spec: ModelSpec, valid: int) -> None:
    """One block: qkv [views, N, 3 * d] -> out [views, N, d], norms [views, cuts, heads * N]."""

    def work(places: list[_Place]) -> None:
        logits = []
        for at in places:
            k = _repeat_first(qkv[at.columns(1)], valid)
            logits.append(_dot(k, _stack(_scaled(qkv[at.columns(0)], spec), spec).astype(k.dtype), _ROWS_BY_ROWS, spec))
        weights, found = [], []
        for x in logits:
            top = x.max(0, keepdims=True)
            powers = jnp.exp(x - top)
            total = _sum_of_first(powers, valid)
            weights.append((powers * (1.0 / total)).astype(qkv.dtype))
            found.append(top + jnp.log(total))
        mixed = [
            _dot(w, _zero_after(qkv[at.columns(2)], valid), _TRANSPOSED, spec)
            for at, w in zip(places, weights, strict=True)
        ]
        for at, x, norm in zip(places, mixed, found, strict=True):
            out[at.columns()] = _unstack(x, spec).astype(out.dtype)
            norms[at.norms()] = norm

    _each_group(*qkv.shape[:2], spec, work)


def _backward_kernel(
    qkv: pl.Ref, out: pl.Ref, norms: pl.Ref, g: pl.Ref, dqkv: pl.Ref, *, spec: ModelSpec, valid: int
) -> None:
    """One block: from ``g``, the gradient of ``out`` [views, N, d], to ``dqkv``, that of ``qkv`` [views, N, 3 * d]."""
    dtype = qkv.dtype

    def before_softmax(at: _Place) -> tuple[Array, ...]:
        q, k, v = (qkv[at.columns(i)] for i in range(3))
        q = _stack(_scaled(q, spec), spec).astype(dtype)
        do = _stack(g[at.columns()].astype(spec.stat_dtype), spec)
        products = (do * _stack(out[at.columns()].astype(spec.stat_dtype), spec)).astype(dtype)
        do = do.astype(dtype)
        shift = _dot(jnp.ones((2 * ROWS, cut(spec)), dtype), products, _ROWS_BY_ROWS, spec)[:1]
        logits = _dot(_repeat_first(k, valid), q, _ROWS_BY_ROWS, spec)
        dweights = _dot(v, do, _ROWS_BY_ROWS, spec) - shift
        return q, _zero_after(_scaled(k, spec).astype(dtype), valid), do, logits, dweights

    def work(places: list[_Place]) -> None:
        begun = [before_softmax(at) for at in places]
        softmax = []
        for at, (*_, logits, dweights) in zip(places, begun, strict=True):
            weights = jnp.exp(logits - norms[at.norms()])
            softmax.append((weights.astype(dtype), (weights * dweights).astype(dtype)))
        grads = []
        for (q, k, do, *_), (weights, dlogits) in zip(begun, softmax, strict=True):
            dq = _unstack(_dot(dlogits, k, _TRANSPOSED, spec), spec)
            dk, dv = _dot(dlogits, q, _PLAIN, spec), _dot(weights, do, _PLAIN, spec)
            grads.append((dq, _zero_after(dk, valid), _zero_after(dv, valid)))
        for at, three in zip(places, grads, strict=True):
            for third, grad in enumerate(three):
                dqkv[at.columns(third)] = grad.astype(dtype)

    _each_group(*qkv.shape[:2], spec, work)


def _heads(spec: ModelSpec) -> int:
    """Heads in a cut."""
    return cut(spec) * spec.heads // spec.width


def _scaled(x: Array, spec: ModelSpec) -> Array:
    return x.astype(spec.stat_dtype) * (spec.width // spec.heads) ** -0.5


def _dot(a: Array, b: Array, dims: tuple, spec: ModelSpec) -> Array:
    return lax.dot_general(a, b, dims, precision=precision(a.dtype), preferred_element_type=spec.stat_dtype)


def _columns(x: Array, i: int, spec: ModelSpec) -> Array:
    """Which elements of [N, cut] lie in the columns of head ``i``."""
    at, head = lax.broadcasted_iota(jnp.int32, x.shape, 1), spec.width // spec.heads
    return (at >= i * head) & (at < (i + 1) * head)


def _stack(x: Array, spec: ModelSpec) -> Array:
    """[N, cut] -> [heads * N, cut]: for each head a copy with the columns of the others zeroed."""
    return jnp.concatenate([jnp.where(_columns(x, i, spec), x, jnp.zeros_like(x)) for i in range(_heads(spec))])


def _unstack(x: Array, spec: ModelSpec) -> Array:
    """[heads * N, cut] -> [N, cut]: from the rows of each head its own columns."""
    first, *others = jnp.split(x, _heads(spec))
    for i, part in enumerate(others, 1):
        first = jnp.where(_columns(part, i, spec), part, first)
    return first


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
