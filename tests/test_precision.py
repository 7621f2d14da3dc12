"""An accelerator rounds the operands of fp32 products (TF32, bf16) unless each states its precision: all of ours do."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from test_step import BATCH, METERS, one_device, tiny

from terrafm_jax.training.batches import batch_shapes
from terrafm_jax.training.sharding import batch_sharding
from terrafm_jax.training.step import abstract_state, make_step

PRODUCT = ("stablehlo.dot", "stablehlo.convolution")


@pytest.mark.parametrize(
    "how",
    [{"platform": "cpu"}, {"platform": "gpu"}, {"platform": "tpu"}, {"folded": False, "remat": "block"}],
    ids=str,
)
def test_every_product_of_an_fp32_step_is_exact(how: dict[str, object]) -> None:
    """Views, both networks, loss, gradients and update, as they are written for each platform."""
    spec, mesh = tiny(("s1", "s2_l2a")), one_device()
    spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, **how))
    batch = batch_shapes(spec.model.sensors, BATCH, METERS, batch_sharding(mesh))
    text = make_step(spec, mesh).lower(abstract_state(spec, mesh), batch).as_text()
    products = [line for line in text.splitlines() if any(word in line for word in PRODUCT)]
    assert len(products) > 100
    assert [line for line in products if "precision = [HIGHEST, HIGHEST]" not in line] == []


def test_the_check_sees_a_product_of_default_precision() -> None:
    text = jax.jit(lambda a: a @ a).lower(jax.ShapeDtypeStruct((2, 2), "float32")).as_text()
    (line,) = [line for line in text.splitlines() if any(word in line for word in PRODUCT)]
    assert "HIGHEST" not in line
