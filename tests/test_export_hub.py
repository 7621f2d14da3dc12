"""What users get of an export: the hub folder and its card, the command, the recipes of docs/interop.md."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from weights_samples import assert_bitwise, assert_close, images, sample

from terrafm_jax import weights
from terrafm_jax.export import formats
from terrafm_jax.export.__main__ import main
from terrafm_jax.inference import Model
from terrafm_jax.loader import read

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def loaded():
    return sample()


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


# --- hub folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, workdir) -> Path:
    target = tmp_path_factory.mktemp("hub") / "terrafm"
    formats.write_folder(read(workdir), target)
    return target


def test_hub_folder_works_with_torch_alone(folder, loaded, tmp_path):
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
    wanted = Model(loaded).encode(**x)
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


# --- command line -------------------------------------------------------------------------------------------------


def test_command_writes_by_suffix(workdir, tmp_path, capsys):
    for name, options in (("a.pth", []), ("b.safetensors", ["--full"]), ("folder", [])):
        assert main(["--checkpoint", str(workdir), "--out", str(tmp_path / name), *options]) == 0
        assert name in capsys.readouterr().out
    assert main(["--checkpoint", str(tmp_path / "folder"), "--out", str(tmp_path / "c.pth"), "--full"]) == 0
    assert spec_has_fusion(tmp_path / "c.pth")
    assert not spec_has_fusion(tmp_path / "a.pth")


def test_a_folder_of_something_else_is_left_alone(workdir, tmp_path, capsys):
    """Its README.md and config.json were overwritten."""
    command = ["--checkpoint", str(workdir), "--out", str(tmp_path / "mine")]
    (tmp_path / "mine").mkdir()
    assert main(command) == 0, "an empty folder"
    (tmp_path / "mine" / "head.safetensors").touch()
    assert main(command) == 0, "a former export"
    assert not (tmp_path / "mine" / "head.safetensors").exists(), "the head of another encoder"
    capsys.readouterr()
    for name, text in (("config.json", '{"model_type": "vit"}'), ("config.json", "[]"), ("README.md", "my notes")):
        foreign = tmp_path / f"foreign{len(text)}"
        foreign.mkdir()
        (foreign / name).write_text(text)
        assert main(["--checkpoint", str(workdir), "--out", str(foreign)]) == 1
        assert f"holds {name} and is no former export" in capsys.readouterr().err
        assert [p.read_text() for p in foreign.iterdir()] == [text]
    (tmp_path / "file").write_text("x")
    assert main(["--checkpoint", str(workdir), "--out", str(tmp_path / "file")]) == 1
    assert "is a file" in capsys.readouterr().err


def spec_has_fusion(path: Path) -> bool:
    return read(path, heads=1).spec.fusion


def test_command_says_what_is_wrong_in_one_line(workdir, tmp_path, capsys):
    cases = [
        (["--checkpoint", str(tmp_path / "none"), "--out", "x.pth"], "not found"),
        (["--checkpoint", str(workdir), "--out", "x.onnx", "--size", "100"], "--size 100"),
        (["--checkpoint", str(workdir), "--out", "x.pth", "--student"], "no weights found"),
    ]
    for arguments, message in cases:
        assert main(arguments) == 1, "2 is for wrong flags"
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    with pytest.raises(SystemExit, match=r"^2$"):
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
