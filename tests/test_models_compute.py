"""Switches that say how to compute must not change what is computed; shapes, errors, drop path, init."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terrafm_jax import weights
from terrafm_jax.models import ModelSpec, cudnn, encode, init_params, parameter_count, patchify, project
from terrafm_jax.models.attention import attend, resolve, rows
from terrafm_jax.models.vit import drop_path_keep, run_blocks
from terrafm_jax.sensors import NORMALIZED_MEAN
from terrafm_jax.training.compiler import CPU_OPTIONS, compiler_options
from terrafm_jax.training.sharding import make_mesh

SPEC = ModelSpec(width=32, depth=4, heads=2, patch=4, fusion_heads=8, prototypes=64, head_hidden=48, head_bottleneck=16)
forward = jax.jit(encode, static_argnums=0, static_argnames="layers")
SWITCHES = {
    "scan": {"scan": True},
    "remat dots": {"remat": "dots"},
    "remat block": {"remat": "block"},
    "scan and remat block": {"scan": True, "remat": "block"},
    "attention xla": {"attention": "xla"},
    "attention head_major": {"attention": "head_major"},
    "attention pallas": {"attention": "pallas"},
    "as on TPU": {"platform": "tpu"},
    "as on GPU": {"platform": "gpu"},
    "written out": {"folded": False},
}


@pytest.fixture(scope="module")
def params() -> dict:
    return init_params(SPEC, jax.random.key(0))


@pytest.fixture(scope="module")
def patches() -> dict:
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (4, 3, 5)
    return {s: jax.random.normal(k, (*shape, SPEC.patch_features(s))) for s, k in zip(SPEC.sensors, keys, strict=True)}


PRESENT = jnp.asarray([[1, 1, 1], [1, 0, 1], [0, 1, 1], [0, 1, 0]], bool)


def run(spec: ModelSpec, params: dict, patches: dict) -> tuple:
    """Features, logits and gradients with drop path on."""
    key = jax.random.key(5)

    def objective(params):
        features = encode(spec, params["backbone"], patches, PRESENT, drop_key=key, layers=(1, -1))
        logits = project(spec, params["head"], features.cls)
        weight = jnp.cos(jnp.arange(logits.size, dtype=jnp.float32)).reshape(logits.shape)
        return (logits * weight).sum() + features.layers[0][1].astype(jnp.float32).std(), features

    (_, features), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return features, gradients


@pytest.fixture(scope="module")
def plain(params, patches) -> tuple:
    return run(SPEC, params, patches)


@pytest.mark.parametrize("switch", SWITCHES)
def test_switches_change_nothing(params, patches, plain, switch):
    features, gradients = run(dataclasses.replace(SPEC, **SWITCHES[switch]), params, patches)
    for a, b in zip(jax.tree.leaves(features), jax.tree.leaves(plain[0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)
    expected = weights.flatten(plain[1])
    for name, value in weights.flatten(gradients).items():
        scale = max(float(jnp.abs(expected[name]).max()), 1e-3)
        assert float(jnp.abs(value - expected[name]).max()) < 2e-4 * scale, name


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_bfloat16_stays_close_and_keeps_its_parameters_and_logits_in_float32(params, patches, plain, platform):
    spec = dataclasses.replace(SPEC, dtype="bfloat16", platform=platform, attention="xla")
    features, gradients = run(spec, params, patches)
    assert features.cls.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype("float32")}
    assert project(spec, params["head"], features.cls).dtype == jnp.float32
    for ours, exact in zip(features[:2], plain[0][:2], strict=True):
        a, b = np.asarray(ours, np.float32).ravel(), np.asarray(exact).ravel()
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_norm_of_gpus_has_the_gradients_of_the_plain_one(eps):
    """Rows far from zero, as sums over many samples are where an error would show; in float64."""
    from terrafm_jax.models.layers import layer_norm

    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, scale, bias, weight = (rng.normal(2.0, 1.0, shape) for shape in ((2, 5, 12), (12,), (12,), (2, 5, 12)))

        def loss(*arrays: jax.Array, platform: str) -> jax.Array:
            spec = dataclasses.replace(SPEC, dtype="float64", platform=platform)
            return (jnp.sin(layer_norm(*arrays, eps, spec)) * weight).sum()

        plain, ours = (
            jax.jit(jax.value_and_grad(functools.partial(loss, platform=platform), argnums=(0, 1, 2)))(x, scale, bias)
            for platform in ("cpu", "gpu")
        )
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_scan_is_one_loop(params, patches):
    spec = dataclasses.replace(SPEC, scan=True)
    text = jax.jit(lambda p, x: encode(spec, p, x).cls).lower(params["backbone"], patches).as_text()
    assert text.count("stablehlo.while") == 1


def test_linear_backward_makes_no_transposing_copy():
    """The weight gradient of JAX's own rule is born [out, in]; ours must come out [in, out]."""
    from terrafm_jax.models.layers import linear

    def transposes(product) -> int:
        x, kernel = jnp.ones((6, 5, 32)), jnp.ones((32, 64))
        loss = jax.grad(lambda kernel: (product(x, kernel) ** 2).sum())
        return str(jax.make_jaxpr(loss)(kernel)).count("transpose[")

    assert transposes(jnp.matmul) == 1
    for platform in ("cpu", "gpu"):
        spec = dataclasses.replace(SPEC, platform=platform)
        assert transposes(lambda x, kernel, spec=spec: linear(x, kernel, None, spec)) == 0


def test_patchify_orders_row_column_band():
    image = jnp.arange(2 * 8 * 12 * 3).reshape(2, 8, 12, 3)
    out = patchify(image, 4)
    assert out.shape == (2, 2, 3, 48)
    for b, i, j, r, c, band in [(0, 0, 0, 0, 0, 0), (1, 1, 2, 3, 1, 2), (0, 1, 0, 2, 3, 1)]:
        assert out[b, i, j, (r * 4 + c) * 3 + band] == image[b, i * 4 + r, j * 4 + c, band]
    with pytest.raises(ValueError, match=r"9x12.*divisible by 4"):
        patchify(jnp.zeros((1, 9, 12, 1)), 4)


def test_logits_are_cosines(params):
    """Neither the length of a prototype nor that of what the MLP gives shows in the logits."""
    cls, head = jax.random.normal(jax.random.key(0), (3, SPEC.width)), params["head"]
    logits = project(SPEC, head, cls)
    assert float(jnp.abs(logits).max()) <= 1 + 1e-5
    longer = {**head, "last_layer": {"kernel": 7.0 * head["last_layer"]["kernel"]}}
    longer["mlp"] = {**head["mlp"], "2": {name: 3.0 * x for name, x in head["mlp"]["2"].items()}}
    np.testing.assert_allclose(project(SPEC, longer, cls), logits, atol=1e-5)


def test_drop_path_rises_linearly_and_keeps_the_expectation():
    spec = dataclasses.replace(SPEC, drop_path=0.4)
    keep = drop_path_keep(spec, 20_000, jax.random.key(0))
    assert keep.shape == (4, 2, 20_000)
    np.testing.assert_allclose((keep == 0).mean((1, 2)), [0, 0.4 / 3, 0.8 / 3, 0.4], atol=0.01)
    np.testing.assert_allclose(keep.mean((1, 2)), 1.0, atol=0.02)
    together = ((keep[-1, 0] == 0) & (keep[-1, 1] == 0)).mean()
    np.testing.assert_allclose(together, 0.16, atol=0.01)


def test_drop_path_draws_per_sample_and_per_key(params, patches):
    same = {s: jnp.broadcast_to(x[:1], x.shape) for s, x in patches.items()}
    spec = dataclasses.replace(SPEC, drop_path=0.9)
    first, second = (forward(spec, params["backbone"], same, drop_key=jax.random.key(i)).cls for i in (0, 1))
    assert len(np.unique(np.asarray(first), axis=0)) > 1
    assert not np.allclose(first, second)
    without = forward(spec, params["backbone"], same).cls
    assert len(np.unique(np.asarray(without).round(5), axis=0)) == 1


def test_init_follows_dino(params):
    flat = weights.flatten(params)
    for name, value in flat.items():
        if name.endswith(("scale",)):
            assert (value == 1).all(), name
        elif (name.endswith("_embed") and "pos" not in name) or (name.endswith("bias") and "conv2d" not in name):
            assert (value == 0).all(), name
        elif "conv2d" in name and name.endswith("bias"):
            kernel = flat[name.removesuffix("bias") + "kernel"]
            np.testing.assert_allclose(value, -NORMALIZED_MEAN * kernel.sum(0), atol=1e-5, err_msg=name)
        elif "conv2d" in name:
            bound = SPEC.patch_features(name.split("/")[2].removeprefix("conv2d_")) ** -0.5
            assert 0.9 * bound < float(jnp.abs(value).max()) <= bound, name
        elif "last_layer" not in name and value.size > 500:
            assert 0.017 < float(value.std()) < 0.023, name
    assert all(value.dtype == jnp.float32 for value in flat.values())
    again = weights.flatten(init_params(SPEC, jax.random.key(0)))
    other = weights.flatten(init_params(SPEC, jax.random.key(1)))
    assert all((again[k] == v).all() for k, v in flat.items())
    assert not (other["backbone/cls_token"] == flat["backbone/cls_token"]).all()


def test_subset_of_sensors_has_only_their_stems():
    spec = dataclasses.replace(SPEC, sensors=("s1", "s2_l2a"))
    shapes = jax.eval_shape(lambda k: init_params(spec, k), jax.random.key(0))
    assert sorted(k for k in shapes["backbone"]["patch_embed"] if "conv" in k) == ["conv2d_s1", "conv2d_s2_l2a"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sensors": ("s2_l2a", "s1")}, "in that order"),
        ({"heads": 5}, "width 32 is not divisible by heads 5"),
        ({"fusion_heads": 7}, "fusion_heads 7"),
        ({"dtype": "float16"}, "dtype is 'float16'"),
        ({"remat": "some", "attention": "flash"}, "remat is 'some'.*attention is 'flash'"),
        ({"drop_path": 1.0}, "drop_path"),
    ],
)
def test_spec_names_its_faults(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SPEC, **change)


def test_unknown_size_is_named():
    with pytest.raises(ValueError, match="'xl'"):
        ModelSpec.of_size("xl")


def test_encode_names_all_faults_at_once(params):
    x = {"s1": jnp.zeros((2, 3, 3, 7)), "s3": jnp.zeros((2, 3, 4, 7))}
    with pytest.raises(ValueError, match=r"(?s)'s3'.*equal B, h, w.*7 values.*layers \[9\]"):
        encode(SPEC, params["backbone"], x, layers=(0, 9))
    plain = dataclasses.replace(SPEC, fusion=False)
    two = {s: jnp.zeros((1, 1, 1, SPEC.patch_features(s))) for s in ("s1", "s2_l2a")}
    with pytest.raises(ValueError, match="no fusion"):
        encode(plain, params["backbone"], two)
    with pytest.raises(ValueError, match="no sensor"):
        encode(SPEC, params["backbone"], {})


def test_cudnn_says_what_it_needs(params, patches):
    with pytest.raises(ValueError, match="bfloat16"):
        encode(dataclasses.replace(SPEC, attention="cudnn"), params["backbone"], patches)


@pytest.fixture
def on_gpu(monkeypatch):
    """As on a machine with a GPU, but for cuDNN's call, which the test replaces."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cudnn.works.cache_clear()
    yield monkeypatch
    cudnn.works.cache_clear()


def test_auto_on_gpu_is_cudnn_where_it_works(on_gpu):
    b = ModelSpec(platform="gpu", dtype="bfloat16")
    on_gpu.setattr(cudnn, "attend", lambda qkv, tokens: cudnn._exact(qkv.astype(jnp.float32), tokens).astype(qkv.dtype))
    assert jax.jit(lambda x: x + (resolve(b, 197) == "cudnn"))(0) == 1  # asked while tracing, as the step does
    assert [rows(b, n) for n in (197, 37, 40)] == [198, 38, 40]
    assert resolve(dataclasses.replace(b, dtype="float32"), 197) == "xla"
    assert resolve(dataclasses.replace(b, width=1056, fusion_heads=16), 197) == "cudnn"  # heads of 88
    assert resolve(dataclasses.replace(b, width=720, fusion_heads=16), 197) == "xla"  # of 60


def refuses(qkv: jax.Array, tokens: int) -> jax.Array:
    raise NotImplementedError("needs another driver")


FAULTS = {
    "does not run": (refuses, "needs another driver"),
    "attends to padding": (lambda qkv, tokens: cudnn._exact(qkv.astype(jnp.float32), qkv.shape[1]), "is off by"),
    "not a number": (lambda qkv, tokens: cudnn._exact(qkv.astype(jnp.float32), tokens) * jnp.nan, "is off by nan"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_xla_attends_where_cudnn_does_not(on_gpu, caplog, fault):
    call, message = FAULTS[fault]
    on_gpu.setattr(cudnn, "attend", call)
    with caplog.at_level("WARNING"):
        assert resolve(ModelSpec(platform="gpu", dtype="bfloat16"), 197) == "xla"
    assert message in caplog.text


def test_nothing_comes_back_from_padding():
    x = jnp.ones((2, 4, 3))
    gradient = jax.grad(
        lambda x: (cudnn._gradient_of_first(x, 3) * jnp.where(jnp.arange(4) < 3, 2.0, jnp.nan)[None, :, None]).sum()
    )(x)
    np.testing.assert_array_equal(gradient, np.where(np.arange(4)[None, :, None] < 3, 2.0, 0.0) * np.ones((2, 4, 3)))


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN is a library of NVIDIA GPUs")
@pytest.mark.parametrize("tokens", [197, 37])
def test_cudnn_attends_as_xla_does(tokens):
    """On a GPU: ``JAX_PLATFORMS=cuda python -m pytest tests/test_models_compute.py -k cudnn``."""
    assert cudnn.works()
    assert_attends_as_xla("cudnn", tokens)


def assert_attends_as_xla(implementation, tokens):
    """Values and gradients in bfloat16: as close to fp32 as XLA's own, but for a factor of two."""
    qkv = jax.random.normal(jax.random.key(0), (4, tokens, 3 * 128))
    weight = jax.random.normal(jax.random.key(1), (4, tokens, 128))

    def run(implementation, dtype):
        spec = ModelSpec(width=128, depth=1, heads=2, attention=implementation, dtype=dtype)
        padding = ((0, 0), (0, rows(spec, tokens) - tokens), (0, 0))

        def loss(x):
            out = attend(jnp.pad(x, padding).astype(dtype), spec, tokens)[:, :tokens].astype(jnp.float32)
            return (out * weight).sum(), out

        (_, out), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(qkv)
        return np.asarray(out), np.asarray(gradient)

    for exact, theirs, xla in zip(
        run("xla", "float32"), run(implementation, "bfloat16"), run("xla", "bfloat16"), strict=True
    ):
        assert np.abs(theirs - exact).max() <= 2 * np.abs(xla - exact).max()


def test_features_shapes_and_layers(params, patches):
    features = forward(SPEC, params["backbone"], {"s1": patches["s1"]}, layers=(0, -1))
    assert features.cls.shape == (4, 32)
    assert features.patches.shape == (4, 3, 5, 32)
    assert len(features.layers) == 2
    np.testing.assert_array_equal(features.layers[1][0], features.cls)
    assert not np.allclose(features.layers[0][1], features.patches)


def test_parameter_count(params):
    assert parameter_count(params) == sum(x.size for x in jax.tree.leaves(params))


def test_sharded_batch_needs_no_collective(params, patches):
    """Features of a batch split over 8 devices: no device needs another's samples."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    over, everywhere = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    x = jax.tree.map(lambda v: jax.device_put(jnp.concatenate([v, v]), over), patches)
    step = jax.jit(lambda p, x: encode(SPEC, p, x).cls, in_shardings=(everywhere, over), out_shardings=over)
    compiled = step.lower(params["backbone"], x).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to-all", "permute("))
    np.testing.assert_allclose(
        compiled(jax.device_put(params["backbone"], everywhere), x)[:4],
        forward(SPEC, params["backbone"], patches).cls,
        atol=2e-5,
    )


def most_operands(depth: int, options: dict[str, str] | None) -> int:
    """Of the fusions in the backward pass of so many blocks, the operands of the one that has most."""
    spec = ModelSpec(width=32, depth=depth, heads=2, drop_path=0.1, prototypes=8, head_hidden=8, platform="cpu")
    blocks = init_params(spec, jax.random.key(0))["backbone"]["blocks"]
    keep = drop_path_keep(spec, 4, jax.random.key(1))

    def loss(blocks: dict, x: jax.Array) -> jax.Array:
        return jnp.square(run_blocks(spec, blocks, x, keep)[0]).sum()

    lowered = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(blocks, jnp.ones((4, 17, 32)))
    text = lowered.compile(compiler_options=options).as_text()
    return max(line.count("param_") for line in text.splitlines() if line.startswith("%fused_computation"))


def test_cpu_writes_the_residual_streams_gradient_down() -> None:
    """With the step's compiler options no fusion reaches further up for twice the depth; without them it does."""
    assert compiler_options(make_mesh(devices=jax.devices()[:1]), "cpu") == CPU_OPTIONS
    assert most_operands(8, CPU_OPTIONS) == most_operands(4, CPU_OPTIONS)
    if jax.__version_info__ < (0, 11):  # what comes with jax 0.12 does not by itself
        assert most_operands(8, None) > 1.5 * most_operands(4, None)
