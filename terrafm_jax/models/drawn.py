"""Stems for the views that see a sensor, and for no others.

Masked, the stem of a sensor is computed for every view, and fusion gives what a view did not draw the weight zero: with
the paper's draw three sevenths of that work is for nothing. Shapes are fixed before draws are known, so each sensor has
room for a fixed number of views on each device, those that drew it come first, and the results are put back in place.
Draws must be stratified (``ssl.modalities``), so that little room is enough. Where records lack sensors, more views may
see one of the others than there is room for: if so on any device, its stem runs over the remaining views as well. The
result is that of the masked form, but for rounding.
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
    """Of one sensor, the order in which the N views of each of P devices are computed: first those that see it.

    first: int32 [P, room], the views there is room for. rest: int32 [P, N - room], the others.
    place: int32 [P, N], where in that order a view is that sees the sensor; of the others any number.
    fits: bool [], whether on every device all that see it are among the first.
    """

    first: Array
    rest: Array
    place: Array
    fits: Array


def parts() -> int:
    """Over how many devices the mesh in context, if any, splits a batch."""
    mesh = get_abstract_mesh()
    sizes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for name, size, kind in sizes if name in BATCH_AXES and kind == AxisType.Auto)


def fits(present: Array, places: Sequence[int]) -> Array:
    """bool [M]: which sensors no device sees in more views than there are ``places`` for; ``present``: bool [B, M]."""
    seen = present.reshape(parts(), -1, present.shape[-1]).sum(1)
    return jnp.all(seen <= jnp.asarray([places]), axis=0)


def rows(present: Array, places: Sequence[int]) -> list[Rows]:
    """For each of M sensors the views that are to be computed.

    Args:
      present: bool [B, M], B split over the devices.
      places: M numbers of views that each device has room for.
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
    """``stems.stem_products`` for the views that see the sensor; for the others finite values that mean nothing.

    The caller gives those the weight zero, so that no gradient comes from them. The patches get none at all: nothing
    that is learned lies before them.
    """
    room = views.first.shape[1]
    found = [
        _take(y, jnp.minimum(views.place, room - 1))
        for y in _of(views.first, x, kernel, bias, widths, out_dtypes, spec)
    ]

    def with_rest(found: list[Array]) -> list[Array]:
        more = _of(views.rest, x, kernel, bias, widths, out_dtypes, spec)
        place = jnp.clip(views.place - room, 0, views.rest.shape[1] - 1)
        late = (views.place >= room).reshape(-1)
        return [
            jnp.where(lax.expand_dims(late, range(1, y.ndim)), _take(m, place), y)
            for m, y in zip(more, found, strict=True)
        ]

    return lax.cond(views.fits, lambda found: found, with_rest, found)


def _of(rows: Array, x: Array, *arguments: Any) -> list[Array]:
    return stem_products(_take(x, rows), *arguments)


def _products_fwd(x: Array, kernel: Array, bias: Array, views: Rows, *static: object) -> tuple:
    return products(x, kernel, bias, views, *static), (x, kernel, bias, views)


def _products_bwd(widths: tuple, out_dtypes: tuple, spec: ModelSpec, saved: tuple, gs: list[Array]) -> tuple:
    x, kernel, bias, views = saved

    def gradient(rows: Array) -> tuple[Array, Array]:
        pull = jax.vjp(lambda k, b: _of(rows, x, k, b, widths, out_dtypes, spec), kernel, bias)[1]
        return pull([_take(g, rows) for g in gs])

    def with_rest(found: tuple[Array, Array]) -> tuple[Array, Array]:
        return jax.tree.map(jnp.add, found, gradient(views.rest))

    found = gradient(views.first)
    return None, *lax.cond(views.fits, lambda found: found, with_rest, found), None


products.defvjp(_products_fwd, _products_bwd)


def _take(x: Array, index: Array) -> Array:
    """Rows of [P * N, ...] by ``index`` [P, K] into each of the P parts -> [P * K, ...]; no row leaves its device."""
    count = index.shape[0]
    if count == 1:
        return x.at[index[0]].get(mode="promise_in_bounds")
    split = x.reshape(count, -1, *x.shape[1:])
    taken = jax.vmap(lambda part, at: part.at[at].get(mode="promise_in_bounds"))(split, index)
    return taken.reshape(-1, *x.shape[1:])
