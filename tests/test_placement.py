"""Products of weights that lie split over devices: same numbers, and gradients that are summed once."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from terrafm_jax.models.layers import linear
from terrafm_jax.models.placement import row_product, weight_product
from terrafm_jax.models.spec import ModelSpec

SPEC = ModelSpec(width=32, depth=1, heads=2, sensors=("s1",))


def assert_close(found: tuple, expected: tuple) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def plain(a: jax.Array, row: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.square(x @ linear(a, b, None, SPEC) + linear(row[None], b, None, SPEC)).sum()


def placed(a: jax.Array, row: jax.Array, b: jax.Array, x: jax.Array) -> jax.Array:
    product = weight_product(a, b, SPEC)
    halves = x.reshape(2, -1, x.shape[-1])  # two uses of the product, as two sizes of views
    return sum(jnp.square(half @ product + row_product(row, b, SPEC)[None]).sum() for half in halves)


@pytest.fixture(scope="module")
def arrays() -> tuple[jax.Array, ...]:
    """[K, N], [N], [N, M] and 16 rows of inputs [16, K]."""
    shapes = (24, 16), (16,), (16, 40), (16, 24)
    return tuple(jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes))


def test_without_a_mesh_they_are_plain_products(arrays):
    assert_close(*(jax.jit(jax.grad(f, (0, 1, 2)))(*arrays) for f in (placed, plain)))


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (2, 2, 2)])
def test_split_over_devices_they_give_the_same_and_only_their_own_gradient_is_summed(arrays, shape):
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    lie = [NamedSharding(mesh, spec) for spec in (P("fsdp"), P(), P("fsdp"), P(("data", "fsdp")))]

    def on_mesh(a: jax.Array, row: jax.Array, b: jax.Array, x: jax.Array) -> tuple[jax.Array, ...]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            whole = jax.lax.with_sharding_constraint(b, P())
            return jax.grad(placed, (0, 1, 2))(a, row, whole, x)

    step = jax.jit(on_mesh, in_shardings=lie, out_shardings=tuple(lie[:3]))
    assert_close(step(*arrays), jax.grad(plain, (0, 1, 2))(*arrays))
    # The gradient of b [16, 40] needs no sum of its own: every device holds all that its rows take.
    text = step.lower(*arrays).compile().as_text()
    summed = re.findall(r"f32\[(\d+,\d+)\][^=]* (?:all-reduce|reduce-scatter)(?:-start)?\(", text)
    assert set(summed) & {"24,40", "40,24"}
    assert not set(summed) & {"16,40", "40,16", f"{16 // shape[1]},40", f"40,{16 // shape[1]}"}
