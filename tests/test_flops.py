"""The numerator of MFU against a count of the products that JAX traces, and against the table of the docs."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from terrafm_jax.models.layers import SUMS, with_parameters
from terrafm_jax.models.patch_embed import PatchEmbed
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.terrafm import encode_cls, init_params, project
from terrafm_jax.ssl.views import ViewSpec
from terrafm_jax.training import flops

SPEC = ModelSpec(
    width=48, depth=2, heads=3, patch=8, grid=3, queries=2, fusion_heads=4, prototypes=40, head_hidden=24,
    head_bottleneck=16, drop_path=0.0,
)  # fmt: skip
VIEWS = ViewSpec(globals=2, locals=0, global_size=24, patch=8)


def traced(function: Any, *arguments: Any) -> float:
    """FLOPs of the matrix products that the outputs of ``function`` depend on."""

    def count(jaxpr: Any) -> float:
        wanted, total = set(jaxpr.outvars), 0.0
        for equation in reversed(jaxpr.eqns):
            if wanted.isdisjoint(equation.outvars):
                continue
            wanted |= {v for v in equation.invars if not hasattr(v, "val")}
            if SUMS in str(equation.source_info.name_stack):  # inside a call the stack begins anew
                continue
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
                total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
            inner = [getattr(p, "jaxpr", p) for p in equation.params.values()]
            total += sum(count(j) for j in inner if hasattr(j, "eqns"))
        return total

    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    return count(jaxpr.replace(outvars=[v for v in jaxpr.outvars if not hasattr(v, "val")]))


def weight_products(spec: ModelSpec, parameters: Any) -> tuple[float, float]:
    """FLOPs of forming them once, and once with gradients."""

    def square(parameters: Any) -> jax.Array:
        folded = with_parameters(PatchEmbed, spec, parameters).fold()
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(folded))

    return traced(square, parameters), traced(jax.grad(square), parameters)


@pytest.mark.parametrize("fusion", [True, False])
def test_formula_equals_the_products_of_student_and_teacher(fusion: bool) -> None:
    """Of one image with all sensors drawn; weight products, formed once a step, are left out of both."""
    spec = dataclasses.replace(SPEC, fusion=fusion)
    params = jax.eval_shape(lambda: init_params(spec, jax.random.key(0)))
    patches = {s: jax.ShapeDtypeStruct((2, 3, 3, spec.patch_features(s)), "float32") for s in spec.sensors}
    present = jax.ShapeDtypeStruct((2, 3), "bool")

    def logits(params: Any, patches: Any, present: Any) -> jax.Array:
        (cls,) = encode_cls(spec, params["backbone"], [(patches, present)], keep=[None])
        return jnp.square(project(spec, params["head"], cls)).sum()  # a linear loss would not need the logits

    teacher = traced(logits, params, patches, present)
    student = traced(jax.grad(logits), params, patches, present)
    assert (
        student + teacher - sum(weight_products(spec, params["backbone"]["patch_embed"]))
        == flops.image_flops(spec, VIEWS, share=1.0).total
    )


def test_drop_path_and_sensors_that_were_not_drawn_lower_it() -> None:
    whole = flops.image_flops(SPEC, VIEWS, share=1.0)
    dropped = flops.image_flops(dataclasses.replace(SPEC, drop_path=0.5), VIEWS, share=1.0)
    # Of 3 + 1 passes of two layers the student's three lose half of the second one.
    assert dropped.blocks == pytest.approx(whole.blocks * (1 - 3 * 0.25 / 4))
    pixels, project = flops.embedding_flops(SPEC, 9, 1.0)
    assert whole.embedding == 2 * (3 * pixels + 4 * project)
    assert flops.image_flops(SPEC, VIEWS, share=0.5).embedding == 2 * (3 * pixels / 2 + 4 * project)
    assert flops.image_flops(SPEC, VIEWS).embedding == pytest.approx(2 * (3 * pixels * 4 / 7 + 4 * project))


@pytest.mark.parametrize("size", ["s", "b", "l"])
def test_table_of_the_docs(root: Path, size: str) -> None:
    found = flops.image_flops(ModelSpec.of_size(size), ViewSpec())
    numbers = (found.total, found.embedding, found.blocks, found.head)
    row = f"| {size.upper()} | " + " | ".join(f"{n / 1e9:.1f}" for n in numbers) + " |"
    assert row in (root / "docs/performance.md").read_text()


@pytest.mark.parametrize(
    ("kind", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA L4", 121e12), ("NVIDIA L40", 181e12), ("NVIDIA L40S", 362e12), ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12), ("cpu", 0.0),
    ],
)  # fmt: skip
def test_names_of_devices_that_begin_alike_are_told_apart(kind: str, bf16: float) -> None:
    assert flops.peak_flops(kind) == bf16
