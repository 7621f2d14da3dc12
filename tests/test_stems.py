"""The encoder gives the same features and gradients for both layouts of the patches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from views_fake import as_columns

from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.stems import stem_product, together
from terrafm_jax.models.terrafm import encode, init_params

TINY = {"width": 48, "depth": 1, "heads": 2, "fusion_heads": 4, "grid": 2, "prototypes": 8, "patch": 8}


@pytest.mark.parametrize(("bands", "patch", "expected"), [(2, 16, 4), (12, 16, 2), (8, 16, 1), (12, 14, 1), (1, 4, 1)])
def test_columns_side_by_side_fill_registers(bands: int, patch: int, expected: int) -> None:
    assert together(bands, patch) == expected


@pytest.mark.parametrize("folded", [True, False])
@pytest.mark.parametrize("sensors", [("s1", "s2_l2a"), ("s2_l2a",)])
def test_both_layouts_give_the_same_features_and_gradients(folded: bool, sensors: tuple[str, ...]) -> None:
    spec = ModelSpec(**TINY, folded=folded)
    params = init_params(spec, jax.random.key(0))["backbone"]
    keys = jax.random.split(jax.random.key(1), 2)
    plain = {s: jax.random.normal(k, (3, 2, 3, spec.patch_features(s))) for s, k in zip(sensors, keys, strict=False)}
    columns = {s: as_columns(x, spec.patch) for s, x in plain.items()}
    present = jnp.asarray([[s in sensors for s in spec.sensors]] * 3)

    @jax.jit
    def loss(params: dict, patches: dict) -> tuple[jax.Array, jax.Array]:
        features = encode(spec, params, patches, present)
        return jnp.sum(features.cls**2) + jnp.sum(features.patches**3), features.patches

    one, two = (jax.value_and_grad(loss, has_aux=True)(params, x) for x in (plain, columns))
    assert one[0][1].shape == (3, 2, 3, 48)
    # Without the loss itself: terms of either sign, whose sum is as small as the rounding of the largest.
    one, two = ((features, gradients) for (_, features), gradients in (one, two))
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(two), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(np.abs(b).max())), err_msg=str(path))


def test_kernel_gradients_are_not_rounded_to_the_compute_dtype() -> None:
    """What is summed over devices is float32, also where the products are bfloat16."""
    spec = ModelSpec(**TINY, dtype="bfloat16")
    x = jax.random.normal(jax.random.key(0), (3, 2, 1, 3, 128), jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (128, 4))
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(stem_product(x, k, None, spec).astype(jnp.float32) ** 2)))(kernel)
    assert gradient.dtype == jnp.float32
    assert np.mean(np.asarray(gradient != gradient.astype(jnp.bfloat16).astype(jnp.float32))) > 0.5


def test_wrong_shapes_are_named_in_either_layout() -> None:
    spec = ModelSpec(**TINY)
    params = init_params(spec, jax.random.key(0))["backbone"]
    with pytest.raises(ValueError, match="s1: patches have 64 values; expected 128"):
        encode(spec, params, {"s1": jnp.zeros((1, 2, 8, 2, 8))})
    with pytest.raises(ValueError, match=r"s1: 8 times 16 values in a patch; expected 1 times 128"):
        encode(spec, params, {"s1": jnp.zeros((1, 2, 8, 2, 16))})
    with pytest.raises(ValueError, match="equal B, h, w"):
        encode(spec, params, {"s1": jnp.zeros((1, 2, 2, 128)), "s2_l2a": jnp.zeros((1, 2, 8, 3, 96))})
