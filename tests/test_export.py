"""Exports: round trips bit for bit, the same features in PyTorch, StableHLO and ONNX, hub folder, command line."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from weights_samples import TINY, images, sample

from terrafm_jax import weights
from terrafm_jax.export import formats, torch_weights
from terrafm_jax.export.__main__ import main
from terrafm_jax.export.formats import ExportError
from terrafm_jax.inference import Model
from terrafm_jax.loader import read
from terrafm_jax.models import ModelSpec, project

torch = pytest.importorskip("torch")
import torch_reference as reference  # noqa: E402

SIZES = [(64, 64), (96, 96), (128, 128), (224, 224), (320, 320), (224, 320)]
TOLERANCE = 1e-4  # relative to the largest value, float32


def chw(x: dict[str, np.ndarray]) -> dict:
    return {k: torch.from_numpy(v.astype(np.float32)).permute(0, 3, 1, 2).contiguous() for k, v in x.items()}


def assert_close(ours, theirs) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def assert_same_features(ours, theirs) -> None:
    for a, b in zip(jax.tree.leaves(tuple(ours)), jax.tree.leaves(tuple(theirs)), strict=True):
        assert_close(a, b)


def assert_bitwise(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def loaded():
    return sample()


@pytest.fixture(scope="module")
def model(loaded) -> Model:
    return Model(loaded)


@pytest.fixture(scope="module")
def module(loaded):
    return formats.torch_module(loaded)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, loaded) -> Path:
    folder = tmp_path_factory.mktemp("run")
    meta = {
        "step": 7,
        "model": dataclasses.asdict(loaded.spec),
        "statistics": json.loads(loaded.stats.to_json()),
        "config": loaded.meta["config"],
        "metrics": {"knn": 0.5},
    }
    weights.save_npz(folder / "teacher" / "7", loaded.params, meta)
    return folder


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


def test_safetensors_carry_size_and_statistics(tmp_path, loaded):
    formats.write_state(loaded, tmp_path / "x.safetensors", full=True)
    found = read(tmp_path / "x.safetensors")
    assert found.spec == loaded.spec
    assert found.stats.mean == loaded.stats.mean
    formats.write_state(loaded, tmp_path / "again.safetensors", full=True)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "again.safetensors").read_bytes()


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
    model.__dict__["_mesh"] = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
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
        alone = module({"s2_l2a": chw(x)["s2_l2a"]})
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
    ):
        with pytest.raises(ValueError, match=message):
            module(bad)
    with pytest.raises(ValueError, match=r"unknown bands \['B10'\]"):
        module.keep_bands("s2_l2a", ["B10"])


# --- hub folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, workdir) -> Path:
    target = tmp_path_factory.mktemp("hub") / "terrafm"
    formats.write_folder(read(workdir), target)
    return target


def test_hub_folder_works_with_torch_alone(folder, model, tmp_path):
    """In an interpreter that cannot import anything but torch and its own needs."""
    x = images((64, 96))
    np.savez(tmp_path / "x.npz", **{k: np.moveaxis(v, -1, 1).astype(np.float32) for k, v in x.items()})
    code = f"""
import sys
class Block:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("jax", "flax", "terrafm_jax", "safetensors", "huggingface_hub"):
            raise ImportError(name)
sys.meta_path.insert(0, Block())
sys.path.insert(0, {str(folder)!r})
import numpy as np, torch
from modeling_terrafm import TerraFM
model = TerraFM.from_pretrained({str(folder)!r})
x = np.load({str(tmp_path / "x.npz")!r})
with torch.no_grad():
    out = model({{k: torch.from_numpy(x[k]) for k in x.files}})
np.savez({str(tmp_path / "y.npz")!r}, cls=out.cls.numpy(), patches=out.patches.numpy())
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    found = np.load(tmp_path / "y.npz")
    wanted = model.encode(**x)
    assert_close(found["cls"], wanted.cls)
    assert_close(found["patches"], wanted.patches)


def test_hub_folder_holds_what_a_user_asks(folder, loaded):
    files = {"README.md", "config.json", "modeling_terrafm.py", "model.safetensors"}
    assert {p.name for p in folder.iterdir() if p.is_file()} == files
    config = json.loads((folder / "config.json").read_text())
    assert config["torch"]["bands"]["s1"] == ["VV", "VH"]
    assert config["metrics"] == {"knn": 0.5}
    card = (folder / "README.md").read_text()
    for wanted in (
        "license: apache-2.0", "CC-BY-SA-4.0", "CC-BY-4.0", "Contains modified Copernicus Sentinel data",
        "ESA WorldCover", "Single-date", '{"knn": 0.5}', "`tiles`", "B8A", "batch size (`batch_size`): 8",
    ):  # fmt: skip
        assert wanted in card
    assert config["config"]["data.dir"] == "tiles"
    assert not any("/somewhere" in (folder / name).read_bytes().decode("latin-1") for name in files)
    assert_bitwise(weights.flatten(read(folder).params), weights.flatten(loaded.params))


def test_the_card_tells_the_recipe():
    """Every row of it names a key of the config: a renamed key would drop out without a word."""
    from terrafm_jax import config
    from terrafm_jax.export import card

    given = config.flatten(config.base())
    assert {name for name, _ in card._RECIPE} <= given.keys()
    text = card.model_card(dataclasses.replace(sample(), meta={"step": 7, "config": given}), "abc", "apache-2.0")
    assert "learning rate for a batch of 256 (`optim.base_lr`): 0.0005" in text


def test_truncated_weights_are_named_by_the_torch_module(folder, tmp_path):
    from terrafm_jax.export.torch_model import read_safetensors

    (tmp_path / "x.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated at tensor"):
        read_safetensors(tmp_path / "x.safetensors")


def test_push_and_load_through_the_hub_client(folder, tmp_path, monkeypatch, loaded):
    """The client's two calls are replaced by copies to and from a local folder."""
    import shutil

    huggingface_hub = pytest.importorskip("huggingface_hub")
    from terrafm_jax.export import hub

    store = tmp_path / "store"

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo, exist_ok, private):
            assert (exist_ok, private) == (True, True)
            (store / repo).mkdir(parents=True)

        def upload_folder(self, folder_path, repo_id, commit_message):
            shutil.copytree(folder_path, store / repo_id, dirs_exist_ok=True)
            return f"hub/{repo_id}"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(store / name))
    assert hub.push(folder, "someone/terrafm") == "hub/someone/terrafm"
    assert_bitwise(weights.flatten(read("hf://someone/terrafm").params), weights.flatten(loaded.params))


# --- programs -----------------------------------------------------------------------------------------------------


def test_stablehlo_takes_any_batch_and_knows_its_weights(tmp_path, loaded, model):
    formats.write_stablehlo(loaded, tmp_path / "x.stablehlo", (32, 48), ("s1", "s2_l2a"))
    program = jax.export.deserialize(bytearray((tmp_path / "x.stablehlo").read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    for batch in (1, 3):
        x = images((32, 48), batch=batch, sensors=("s1", "s2_l2a"))
        found = program.call({k: v.astype(np.float32) for k, v in x.items()})
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
        x = images((64, 96), batch=batch)
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


# --- command line -------------------------------------------------------------------------------------------------


def test_command_writes_by_suffix(workdir, tmp_path, capsys):
    for name, options in (("a.pth", []), ("b.safetensors", ["--full"]), ("folder", [])):
        assert main(["--checkpoint", str(workdir), "--out", str(tmp_path / name), *options]) == 0
        assert name in capsys.readouterr().out
    assert main(["--checkpoint", str(tmp_path / "folder"), "--out", str(tmp_path / "c.pth"), "--full"]) == 0
    assert spec_has_fusion(tmp_path / "c.pth")
    assert not spec_has_fusion(tmp_path / "a.pth")


def spec_has_fusion(path: Path) -> bool:
    return read(path, heads=1).spec.fusion


def test_command_says_what_is_wrong_in_one_line(workdir, tmp_path, capsys):
    cases = [
        (["--checkpoint", str(tmp_path / "none"), "--out", "x.pth"], "not found"),
        (["--checkpoint", str(workdir), "--out", "x.onnx", "--size", "100"], "--size 100"),
        (["--checkpoint", str(workdir), "--out", "x.pth", "--student"], "no weights found"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    with pytest.raises(SystemExit):
        main(["--checkpoint", "x", "--out", "x.zip"])
    assert "unknown suffix" in capsys.readouterr().err


# --- recipes ------------------------------------------------------------------------------------------------------


def recipes() -> dict[str, str]:
    """Python blocks of docs/interop.md by the heading above them."""
    text = (Path(__file__).parents[1] / "docs" / "interop.md").read_text()
    found = {}
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        blocks = body.split("```python\n")[1:]
        if blocks:
            found[title] = "\n".join(block.partition("```")[0] for block in blocks)
    return found


NEEDS = {"Registered in TerraTorch": "terratorch", "torchgeo-bench": "torchgeo_bench"}


@pytest.mark.parametrize("title", recipes())
def test_recipes_of_the_interop_page_run(title, folder, workdir, tmp_path, monkeypatch):
    for word, package in NEEDS.items():
        if word in title and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    (tmp_path / "FOLDER").symlink_to(folder)
    (tmp_path / "WORKDIR").symlink_to(workdir)
    exec(compile(recipes()[title], f"docs/interop.md: {title}", "exec"), {"__name__": "recipe"})
