"""Exports: round trips bit for bit, the same features in PyTorch, StableHLO and ONNX."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from weights_samples import TINY, assert_bitwise, assert_close, images, sample

from terrafm_jax import weights
from terrafm_jax.devices import LocalDevices
from terrafm_jax.export import formats, torch_weights
from terrafm_jax.export.__main__ import main as export_main
from terrafm_jax.export.formats import ExportError
from terrafm_jax.inference import Model
from terrafm_jax.loader import read
from terrafm_jax.models import ModelSpec, project
from terrafm_jax.sensors import Statistics

torch = pytest.importorskip("torch")
import torch_reference as reference  # noqa: E402

SIZES = [(64, 64), (96, 96), (128, 128), (224, 224), (320, 320), (224, 320)]


def chw(x: dict[str, np.ndarray]) -> dict:
    return {k: torch.from_numpy(v.astype(np.float32)).permute(0, 3, 1, 2).contiguous() for k, v in x.items()}


def assert_same_features(ours, theirs) -> None:
    for a, b in zip(jax.tree.leaves(tuple(ours)), jax.tree.leaves(tuple(theirs)), strict=True):
        assert_close(a, b)


@pytest.fixture(scope="module")
def loaded():
    return sample()


@pytest.fixture(scope="module")
def model(loaded) -> Model:
    return Model(loaded)


@pytest.fixture(scope="module")
def module(loaded):
    return formats.torch_module(loaded)


# --- state dicts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_full_state_dict_round_trip_is_bit_exact(tmp_path, loaded, suffix):
    path = tmp_path / f"full{suffix}"
    formats.write_state(loaded, path, full=True)
    found = read(path, heads=1)
    assert_bitwise(weights.flatten(found.params), weights.flatten(loaded.params))
    again = torch_weights.to_torch(torch_weights.from_torch(torch_weights.to_torch(loaded.params)))
    assert_bitwise(again, torch_weights.to_torch(loaded.params))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_upstream_state_dict_loads_strictly_and_comes_back(tmp_path, loaded, suffix):
    path = tmp_path / f"upstream{suffix}"
    formats.write_state(loaded, path)
    if suffix == ".pth":
        state = torch.load(path, weights_only=True)
    else:
        state = pytest.importorskip("safetensors.torch").load_file(path)
    reference.TerraFM(TINY.width, TINY.depth, TINY.heads).load_state_dict(state, strict=True)
    found = read(path, heads=1)
    assert not found.spec.fusion
    ours = weights.flatten(found.params)
    wanted = weights.flatten(loaded.params)
    assert_bitwise(ours, {k: v for k, v in wanted.items() if k.startswith("backbone/") and "fusion" not in k})


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dicts_carry_size_and_statistics(tmp_path, loaded, suffix):
    mean = {key: tuple(v + 100.0 for v in values) for key, values in loaded.stats.mean.items()}
    ours = dataclasses.replace(loaded, stats=Statistics(mean, loaded.stats.std, "computed"))
    formats.write_state(ours, tmp_path / f"x{suffix}", full=True)
    found = read(tmp_path / f"x{suffix}")
    assert found.spec == loaded.spec
    assert found.stats.mean == mean
    formats.write_state(ours, tmp_path / f"again{suffix}", full=True)
    if suffix == ".safetensors":
        assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()
    x = images((32, 32), sensors=("s1",))
    formats.write_state(ours, tmp_path / f"flat{suffix}")
    flat = read(tmp_path / f"flat{suffix}")
    assert flat.spec == dataclasses.replace(loaded.spec, fusion=False)
    assert_same_features(Model(flat).encode(**x), Model(ours).encode(**x))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_full_disk_leaves_no_half_file_of_weights(tmp_path, loaded, suffix, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("terrafm_jax.paths.write_atomically", full)
    monkeypatch.setattr("terrafm_jax.export.formats.write_atomically", full, raising=False)
    monkeypatch.setattr("terrafm_jax.export.safetensors_file.write_atomically", full, raising=False)
    path = tmp_path / f"x{suffix}"
    with pytest.raises(OSError, match="No space"):
        formats.write_state(loaded, path, full=True)
    assert not path.exists()


def test_the_command_says_what_a_plain_state_dict_leaves_out(tmp_path, loaded, capsys):
    formats.write_folder(loaded, tmp_path / "hub")
    assert export_main(["--checkpoint", str(tmp_path / "hub"), "--out", str(tmp_path / "x.pth")]) == 0
    assert "without fusion and head, as the released class has it; --full keeps them" in capsys.readouterr().out
    assert export_main(["--checkpoint", str(tmp_path / "hub"), "--out", str(tmp_path / "y.pth"), "--full"]) == 0
    assert "without fusion" not in capsys.readouterr().out


def test_upstream_needs_all_stems(tmp_path):
    lacking = sample(dataclasses.replace(TINY, sensors=("s2_l2a",)))
    with pytest.raises(ExportError, match=r"without s1, s2_l1c"):
        formats.write_state(lacking, tmp_path / "x.pth")
    formats.write_state(lacking, tmp_path / "x.pth", full=True)
    assert read(tmp_path / "x.pth", heads=1).spec.sensors == ("s2_l2a",)


# --- PyTorch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sensors", [("s1",), ("s2_l1c",), ("s2_l2a",), ("s1", "s2_l2a"), TINY.sensors])
def test_torch_module_gives_the_same_features(model, module, sensors):
    x = images((64, 96), sensors=sensors)
    with torch.no_grad():
        theirs = module(chw(x), layers=(0, -1))
    assert_same_features(model.encode(**x, layers=(0, -1)), theirs)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["s", "b"])
def test_published_sizes_agree_at_every_input_size(size):
    """All sensors fused and each of them alone, at every size.

    JAX takes the four cases as one batch in which sensors are missing (scanned blocks, one compilation a size),
    PyTorch each by itself. A sensor given alone is another program in JAX: checked at one size for each.
    """
    spec = ModelSpec.of_size(size, scan=True, prototypes=8)
    loaded = sample(spec, head=False)
    model, module = Model(loaded), formats.torch_module(loaded)
    model.__dict__["_devices"] = LocalDevices(jax.devices()[:1])
    cases = [spec.sensors, *((s,) for s in spec.sensors)]
    for shape, alone in itertools.zip_longest(SIZES, spec.sensors):
        x = images(shape, batch=len(cases), sensors=spec.sensors)
        given = {s: v.astype(np.float32) for s, v in x.items()}
        for row, kept in enumerate(cases):
            for sensor in set(spec.sensors) - set(kept):
                given[sensor][row] = np.nan
        ours = model.encode(**given)
        for row, kept in enumerate(cases):
            one = {s: x[s][row : row + 1] for s in kept}
            with torch.no_grad():
                theirs = module(chw(one))
            assert_same_features(jax.tree.map(lambda a, row=row: a[row : row + 1], ours), theirs)
            if kept == (alone,):
                assert_same_features(model.encode(**one), theirs)
    again = torch_weights.from_torch({name: tensor.numpy() for name, tensor in module.state_dict().items()})
    assert_bitwise(weights.flatten(again), weights.flatten(loaded.params))


def test_torch_module_agrees_with_the_reference(loaded, module):
    """Our two PyTorch forms were written apart; a fault common to JAX and export would show here."""
    net = reference.TerraFM(TINY.width, TINY.depth, TINY.heads, TINY.queries, TINY.fusion_heads)
    reference.load(net, weights.flatten(loaded.params["backbone"]))
    x = chw(images((96, 64)))
    normal = {k: module.normalize(k, v) for k, v in x.items()}
    with torch.no_grad():
        theirs, _ = net(normal)
        ours = module(x)
    assert_close(ours.cls, theirs[:, 0])
    assert_close(ours.patches.reshape(2, -1, 64), theirs[:, 1:])


def test_torch_module_masks_pixels_sensors_and_bands(model, module, loaded):
    x = images((64, 64), sensors=("s1", "s2_l2a"))
    mask = np.zeros((2, 64, 64), bool)
    mask[:, 5:30, :7] = True
    spoiled = {"s1": np.where(mask[..., None], np.nan, x["s1"]), "s2_l2a": x["s2_l2a"]}
    with torch.no_grad():
        assert_same_features(model.encode(**x, mask=mask), module(chw(x), mask=torch.from_numpy(mask)))
        assert_same_features(model.encode(**spoiled), module(chw(spoiled)))
        swath = {"s1": x["s1"], "s2_l2a": np.where(mask[..., None], 0, x["s2_l2a"])}  # its edge: zero in all bands
        swath["s2_l2a"][..., :6][:, 40:] = 0  # in some bands it is dark ground
        assert_same_features(model.encode(**swath), module(chw(swath)))
        assert_same_features(model.encode(s2_l2a=swath["s2_l2a"]), module(chw({"s2_l2a": swath["s2_l2a"]})))
        alone = module({"s2_l2a": chw(x)["s2_l2a"]})
        lacking = {"s1": x["s1"].astype(np.float32), "s2_l2a": x["s2_l2a"]}
        lacking["s1"][1] = np.nan
        assert_same_features(model.encode(**lacking), module(chw(lacking)))
        present = torch.tensor([[False, True], [False, True]])
        assert_same_features(module(chw(x), present=present), alone)
        cut = formats.torch_module(loaded).keep_bands("s2_l2a", ["B04", "B02"])
        assert_same_features(
            model.encode(s2_l2a=x["s2_l2a"][..., [3, 1]], bands={"s2_l2a": ["red", "blue"]}),
            cut({"s2_l2a": chw(x)["s2_l2a"][:, [3, 1]]}),
        )


def test_torch_head_gives_the_same_logits(loaded, module):
    cls = np.random.default_rng(0).normal(size=(3, TINY.width)).astype(np.float32)
    with torch.no_grad():
        assert_close(project(TINY, loaded.params["head"], cls), module.head(torch.from_numpy(cls)))


def test_torch_module_names_faults(module):
    x = chw(images((64, 64)))
    for bad, message in (
        ({}, "expected some of"),
        ({"s3": x["s1"]}, "expected some of"),
        ({"s1": x["s2_l2a"]}, r"expected \[B, 2, H, W\] \(VV, VH\)"),
        ({"s1": x["s1"][..., :50]}, "multiples of 16"),
        ({"s1": x["s1"][..., :48], "s2_l2a": x["s2_l2a"]}, r"'s1': \(\d, 2, 64, 48\).*expected the same B, H"),
    ):
        with pytest.raises(ValueError, match=message):
            module(bad)
    with pytest.raises(TypeError, match=r"images: found Tensor; expected a dict of sensor -> tensor \[B, bands"):
        module(x["s1"])
    with pytest.raises(TypeError, match=r"s1: found ndarray; expected a torch.Tensor"):
        module({"s1": x["s1"].numpy()})
    with pytest.raises(ValueError, match=r"unknown bands \['B10'\]"):
        module.keep_bands("s2_l2a", ["B10"])
    with pytest.raises(ValueError, match=r"sensor 's2'; expected one of \['s1', 's2_l1c', 's2_l2a'\]"):
        module.keep_bands("s2", ["B02"])


def test_torch_module_takes_rasters_of_any_type(module):
    x = chw(images((64, 64)))
    with torch.no_grad():
        for wide in (torch.float64, torch.int32):
            found = module({"s2_l2a": x["s2_l2a"].to(wide)}).cls
            torch.testing.assert_close(found, module({"s2_l2a": x["s2_l2a"].to(wide).float()}).cls)


# --- programs -----------------------------------------------------------------------------------------------------


def test_stablehlo_takes_any_batch_and_knows_its_weights(tmp_path, loaded, model):
    formats.write_stablehlo(loaded, tmp_path / "x.stablehlo", (32, 48), ("s1", "s2_l2a"))
    program = jax.export.deserialize(bytearray((tmp_path / "x.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for batch in (1, 3):
        x = {k: v.astype(np.float32) for k, v in images((32, 48), batch=batch, sensors=("s1", "s2_l2a")).items()}
        x["s1"][1:2], x["s2_l2a"][:, :, :9] = np.nan, 0
        found = program.call(x)
        wanted = model.encode(**x)
        assert_close(found["cls"], wanted.cls)
        assert_close(found["patches"], wanted.patches)


def test_onnx_agrees_in_onnxruntime(tmp_path, loaded, model):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    formats.write_onnx(loaded, tmp_path / "x.onnx", (64, 96))
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(TINY.sensors)
    for batch in (1, 3):
        x = {k: v.astype(np.float32) for k, v in images((64, 96), batch=batch).items()}
        x["s1"][1:2], x["s2_l2a"][:, :9], x["s2_l1c"][:, :, 40:] = np.nan, np.nan, 0
        cls, patches = session.run(None, {k: v.numpy() for k, v in chw(x).items()})
        wanted = model.encode(**x)
        assert_close(cls, wanted.cls)
        assert_close(patches, wanted.patches)


def test_programs_of_weights_without_fusion_take_one_sensor():
    plain = sample(dataclasses.replace(TINY, fusion=False))
    program = jax.export.deserialize(bytearray(formats.stablehlo(plain, (16, 16))))
    assert list(program.in_tree.unflatten(program.in_avals)[0][0]) == ["s2_l2a"]
    with pytest.raises(ExportError, match="no fusion weights"):
        formats.stablehlo(plain, (16, 16), ("s1", "s2_l2a"))
    with pytest.raises(ExportError, match="no stem for s9"):
        formats.stablehlo(plain, (16, 16), ("s9",))
