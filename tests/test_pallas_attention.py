"""TPU's attention kernels, interpreted: against plain attention, with padding, and over several devices."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from terrafm_jax.models import ModelSpec, encode, init_params
from terrafm_jax.models.attention import attend, resolve, rows
from terrafm_jax.models.tpu import attention_kernels
from terrafm_jax.models.vit import run_blocks

# (width, heads, tokens): two heads of 64 in a cut, four of 32, one of 128; with and without padding.
SHAPES = [(256, 4, 37), (128, 4, 16), (256, 2, 21), (128, 2, 200)]


def plain(qkv: jax.Array, heads: int, tokens: int) -> jax.Array:
    """Softmax attention written out in float64, [B, N, 3 d] -> [B, N, d]; the first ``tokens`` rows are keys."""
    batch, length, packed = qkv.shape
    q, k, v = np.moveaxis(np.asarray(qkv, np.float64).reshape(batch, length, 3, heads, -1), 2, 0)
    logits = np.einsum("bnhc,bmhc->bhnm", q, k) / np.sqrt(q.shape[-1])
    logits[..., tokens:] = -np.inf
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhc->bnhc", weights, v).reshape(batch, length, packed // 3)


@pytest.mark.parametrize(("width", "heads", "tokens"), SHAPES)
def test_equals_plain_attention(width, heads, tokens):
    spec = ModelSpec(width=width, heads=heads, attention="pallas", fusion_heads=8)
    qkv = jax.random.normal(jax.random.key(0), (3, attention_kernels.padded(tokens), 3 * width))
    found = attend(qkv, spec, tokens)
    np.testing.assert_allclose(found[:, :tokens], plain(qkv, heads, tokens)[:, :tokens], atol=2e-6)


@pytest.mark.parametrize(("width", "heads", "tokens"), SHAPES)
def test_gradient_equals_that_of_plain_attention_and_padding_gets_none(width, heads, tokens):
    spec = ModelSpec(width=width, heads=heads, attention="pallas", fusion_heads=8)
    length = attention_kernels.padded(tokens)
    qkv = jax.random.normal(jax.random.key(0), (2, length, 3 * width))
    g = jax.random.normal(jax.random.key(1), (2, length, width)) * (jnp.arange(length) < tokens)[None, :, None]
    (found,) = jax.vjp(lambda x: attend(x, spec, tokens), qkv)[1](g)
    reference = dataclasses.replace(spec, attention="xla")
    (expected,) = jax.vjp(lambda x: attend(x, reference), qkv[:, :tokens])[1](g[:, :tokens])
    np.testing.assert_allclose(found[:, :tokens], expected, atol=5e-6)
    assert not np.asarray(found[:, tokens:]).any()


def test_padding_rows_are_never_keys_however_large_they_are():
    spec = ModelSpec(width=128, heads=2, attention="pallas", fusion_heads=8)
    qkv = jax.random.normal(jax.random.key(0), (1, 16, 384))
    large = qkv.at[:, 13:].set(1e4)
    np.testing.assert_array_equal(attend(qkv, spec, 13)[:, :13], attend(large, spec, 13)[:, :13])


def test_bfloat16_is_as_close_to_the_exact_result_as_plain_attention():
    spec = ModelSpec(width=256, heads=4, dtype="bfloat16", attention="pallas", fusion_heads=8)
    qkv = jax.random.normal(jax.random.key(0), (2, 40, 768), jnp.bfloat16)
    exact = plain(qkv, 4, 40)
    error = np.abs(np.asarray(attend(qkv, spec), np.float64) - exact).max()
    other = np.abs(np.asarray(attend(qkv, dataclasses.replace(spec, attention="xla")), np.float64) - exact).max()
    assert error < 1.5 * other


def test_blocks_pad_and_cut_again():
    spec = ModelSpec(width=64, depth=2, heads=2, fusion_heads=4, prototypes=8, patch=4, sensors=("s1",))
    blocks = init_params(spec, jax.random.key(0))["backbone"]["blocks"]
    x = jax.random.normal(jax.random.key(1), (2, 19, 64))
    kernels = dataclasses.replace(spec, attention="pallas")
    assert (rows(spec, 19), rows(kernels, 19)) == (19, 24)
    expected, taps = run_blocks(spec, blocks, x, None, (0,))
    found, tapped = run_blocks(kernels, blocks, x, None, (0,))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(tapped[0], taps[0], atol=2e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_devices_work_on_their_own_part_of_the_batch(shape):
    """One device and eight give the same; the program moves no activation."""
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    spec = ModelSpec(width=64, depth=1, heads=2, fusion_heads=4, prototypes=8, patch=4, sensors=("s1",))
    spec = dataclasses.replace(spec, attention="pallas", folded=False)  # folded weights are gathered over fsdp
    params = init_params(spec, jax.random.key(0))["backbone"]
    patches = {"s1": jax.random.normal(jax.random.key(1), (8, 3, 3, spec.patch_features("s1")))}

    def gradient(params, patches):
        return jax.grad(lambda p: (encode(spec, p, patches).cls.astype(jnp.float32) ** 3).sum())(params)

    def on_mesh(params, patches):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return gradient(params, patches)

    split = NamedSharding(mesh, P(("data", "fsdp")))
    whole = NamedSharding(mesh, P())
    step = jax.jit(on_mesh, in_shardings=(whole, split), out_shardings=whole)
    assert "all-gather" not in step.lower(params, patches).compile().as_text()
    expected = jax.jit(gradient)(params, patches)
    for a, b in zip(jax.tree.leaves(step(params, patches)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_auto_takes_the_kernels_only_on_tpu_with_a_mesh_in_context():
    spec = ModelSpec(platform="tpu")
    assert resolve(spec, 197) == "head_major"
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((1,), ("data",))):
        assert resolve(spec, 197) == "pallas"
        assert resolve(spec, 4097) == "head_major"
        assert resolve(dataclasses.replace(spec, platform="gpu"), 197) != "pallas"
        for width in (96, 64):  # heads that do not fill a cut, and a cut that does not fill vector registers
            assert resolve(dataclasses.replace(spec, width=width, heads=2, fusion_heads=8), 197) == "head_major"


def test_what_does_not_fit_is_named():
    spec = ModelSpec(width=96, heads=2, attention="pallas", fusion_heads=8)
    with pytest.raises(ValueError, match=r"32 columns.*heads of 48"):
        attend(jnp.zeros((1, 8, 288)), spec)
    with pytest.raises(ValueError, match=r"at most 624.*found.*1000 tokens"):
        attend(jnp.zeros((1, 1000, 384)), ModelSpec(width=128, heads=2, attention="pallas", fusion_heads=8))
