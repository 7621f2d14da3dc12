"""Stems computed only for the views that see a sensor.

The masked form computes a sensor's stem for every view, and fusion gives zero weight to sensors that a view did not
draw: with the paper's draw, three sevenths of that work is wasted. Shapes must be static although draws are random, so
each device reserves a fixed number of places per sensor: the views that drew the sensor are gathered to the front, the
stem runs over as many views as there are places, and its results are gathered back into the order of the views.

Draws must be stratified (``ssl.modalities``), so that few places suffice. Where records lack sensors, more views may
see one of the others than it has places: if that happens on any device, its stem runs over the remaining views as well.
The result equals that of the masked form up to rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, get_abstract_mesh

from terrafm_jax.models.spec import BATCH_AXES, ModelSpec
from terrafm_jax.models.stems import stem_products


class Rows(NamedTuple):
    """How each of P devices orders its N views for the stem of one sensor: those that see the sensor first.

    first: int32 [P, places], the views that get a place. rest: int32 [P, N - places], the others.
    place: int32 [P, N], where in that order each view that sees the sensor is; arbitrary for the others.
    fits: bool [], whether on every device all views that see the sensor are among the first.
    """

    first: Array
    rest: Array
    place: Array
    fits: Array


def parts() -> int:
    """Number of devices over which the mesh in context shards a batch; 1 without a mesh."""
    mesh = get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for name, size, kind in sizes if name in BATCH_AXES and kind == AxisType.Auto)


def fits(present: Array, places: Sequence[int]) -> Array:
    """bool [M]: whether on every device the views that see a sensor fit its ``places``; ``present``: bool [B, M]."""
    seen = present.reshape(parts(), -1, present.shape[-1]).sum(1)
    return jnp.all(seen <= jnp.asarray([places]), axis=0)


def rows(present: Array, places: Sequence[int]) -> list[Rows]:
    """The order of the views for each of M sensors.

    Args:
      present: bool [B, M], B sharded over the devices.
      places: per sensor, the number of places on each device.
    """
    split = present.reshape(parts(), -1, present.shape[-1])
    order = jnp.argsort(~split, axis=1, stable=True).astype(jnp.int32)
    place = jnp.maximum(jnp.cumsum(split, axis=1, dtype=jnp.int32) - 1, 0)
    fit = fits(present, places)
    return [Rows(order[:, :k, i], order[:, k:, i], place[..., i], fit[i]) for i, k in enumerate(places)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def products(
    x: Array,
    kernel: Array,
    bias: Array,
    views: Rows,
    widths: tuple[int, ...],
    out_dtypes: tuple[jnp.dtype, ...],
    spec: ModelSpec,
) -> list[Array]:
    """``stems.stem_products`` for the views that see the sensor; arbitrary finite values for the others.

    The caller must give those zero weight, so that they contribute no gradient. The patches get no gradient at all:
    nothing learned precedes them.
    """
    places = views.first.shape[1]
    found = [
        _take(y, jnp.minimum(views.place, places - 1))
        for y in _stems_of(views.first, x, kernel, bias, widths, out_dtypes, spec)
    ]

    def with_rest(found: list[Array]) -> list[Array]:
        more = _stems_of(views.rest, x, kernel, bias, widths, out_dtypes, spec)
        place = jnp.clip(views.place - places, 0, views.rest.shape[1] - 1)
        late = (views.place >= places).reshape(-1)
        return [
            jnp.where(lax.expand_dims(late, range(1, y.ndim)), _take(m, place), y)
            for m, y in zip(more, found, strict=True)
        ]

    return lax.cond(views.fits, lambda found: found, with_rest, found)


def _stems_of(rows: Array, x: Array, *arguments: Any) -> list[Array]:
    return stem_products(_take(x, rows), *arguments)


def _products_fwd(x: Array, kernel: Array, bias: Array, views: Rows, *static: object) -> tuple:
    return products(x, kernel, bias, views, *static), (x, kernel, bias, views)


def _products_bwd(widths: tuple, out_dtypes: tuple, spec: ModelSpec, saved: tuple, gs: list[Array]) -> tuple:
    """The kernel's and the bias's gradients, summed over devices only after the branch.

    An all-reduce in a branch is not joined with the others. On CPU it also ends in deadlocks within a few steps (seen
    with jaxlib 0.10.2 on four fake devices): XLA runs it beside those outside, and one device never gets there.
    """
    x, kernel, bias, views = saved
    x, *gs = (_split(a, len(views.first)) for a in (x, *gs))

    def of_device(rows: Array, x: Array, gs: list[Array]) -> tuple[Array, Array]:
        stems = lambda kernel, bias: stem_products(_rows_of(x, rows), kernel, bias, widths, out_dtypes, spec)  # noqa: E731
        return jax.vjp(stems, kernel, bias)[1]([_rows_of(g, rows) for g in gs])

    gradients = jax.vmap(of_device)

    def with_rest(found: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(jnp.add, found, gradients(views.rest, x, gs))

    found = gradients(views.first, x, gs)
    kernel, bias = (g.sum(0) for g in lax.cond(views.fits, lambda found: found, with_rest, found))
    return None, kernel, bias, None


products.defvjp(_products_fwd, _products_bwd)


def _take(x: Array, index: Array) -> Array:
    """Gathers rows of [P * N, ...] by ``index`` [P, K] within each of P devices' parts -> [P * K, ...]."""
    count = index.shape[0]
    if count == 1:
        return _rows_of(x, index[0])
    return jax.vmap(_rows_of)(_split(x, count), index).reshape(-1, *x.shape[1:])


def _split(x: Array, parts: int) -> Array:
    """[P * N, ...] -> [P, N, ...]."""
    return x.reshape(parts, -1, *x.shape[1:])


def _rows_of(x: Array, index: Array) -> Array:
    return x.at[index].get(mode="promise_in_bounds")
