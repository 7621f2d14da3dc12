"""An accelerator rounds the operands of fp32 products (TF32, bf16) unless each states its precision: all of ours do."""

from __future__ import annotations

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from test_step import BATCH, METERS, one_device, tiny

from terrafm_jax.evals import linear, segmentation
from terrafm_jax.evals.linear import PROBES
from terrafm_jax.evals.segmentation import DENSE, make_head
from terrafm_jax.training.batches import batch_shapes
from terrafm_jax.training.sharding import batch_sharding
from terrafm_jax.training.step import abstract_state, make_step

PRODUCT = ("stablehlo.dot", "stablehlo.convolution")


def products(text: str) -> list[str]:
    return [line for line in text.splitlines() if any(word in line for word in PRODUCT)]


def inexact(text: str) -> list[str]:
    return [line for line in products(text) if not re.search(r"precision(_config)? = \[.*HIGHEST.*HIGHEST", line)]


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
    assert len(products(text)) > 100
    assert inexact(text) == []


@pytest.mark.parametrize("name", PROBES)
def test_every_product_of_a_linear_probe_is_exact(name: str) -> None:
    train, logits = linear._programs(PROBES[name], "classification", 8, 3)
    x, rows = jnp.zeros((20, 8)), jnp.zeros(20, int)
    text = train.lower(x, rows, jnp.ones(2), jnp.arange(2)).as_text()
    assert len(products(text)) >= 2, "logits and gradient of the kernel"
    predicted = logits.lower(jax.eval_shape(train, x, rows, jnp.ones(2), jnp.arange(2)), x).as_text()
    assert products(predicted)
    assert inexact(text) + inexact(predicted) == []


@pytest.mark.parametrize("name", DENSE)
def test_every_product_of_a_dense_probe_is_exact(name: str) -> None:
    protocol = dataclasses.replace(DENSE[name], channels=8)
    fitted = segmentation._Fitted(protocol, make_head(protocol, 8, 3, 4), -1, 10, protocol.rates[:1], 0)
    maps = (jnp.zeros((2, 2, 2, 8)),) * 4
    step = fitted._step.lower(fitted.rates, fitted.carry, maps, jnp.zeros((2, 8, 8), int), 0, fitted.key).as_text()
    predict = fitted._predict.lower(fitted.carry, maps, (8, 8)).as_text()
    assert len(products(step)) > len(products(predict)) >= 1
    assert inexact(step) + inexact(predict) == []


def test_the_check_sees_a_product_of_default_precision() -> None:
    text = jax.jit(lambda a: a @ a).lower(jax.ShapeDtypeStruct((2, 2), "float32")).as_text()
    assert len(inexact(text)) == 1
