"""``make demo`` in small: every step from cells to pictures, and all that its last lines promise."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK_FLAGS
from ml_collections import ConfigDict
from PIL import Image

import configs.demo
import terrafm_jax
from terrafm_jax import demo

PICTURES = {"views.png", "curves.png", "knn.png", "landcover.png", "features.png"}
# Sizes alone: what is drawn, trained and compared stays the demo's.
SMALL = {"batch_size": 8, "model.width": 48, "model.heads": 3, "model.depth": 1, "views.locals": 1,
         "views.global_size": 32, "views.local_size": 16, "log.every": "1", "knn.train_examples": 16,
         "knn.test_examples": 16}  # fmt: skip


@pytest.mark.slow
def test_the_demo_makes_what_it_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    out, module, get_config = tmp_path / "out", demo._module, configs.demo.get_config

    def small_module(*arguments: object) -> None:
        flags = [f"--config.{key}={value}" for key, value in SMALL.items()]
        module(*arguments, *(flags if arguments[0] == "terrafm_jax.main" else ()))

    def small_config() -> ConfigDict:
        config = get_config()
        config.update_from_flattened_dict(SMALL)
        return config

    monkeypatch.setenv("XLA_FLAGS", QUICK_FLAGS)  # for the commands that it starts
    monkeypatch.setattr(configs.demo, "get_config", small_config)
    for name, value in {"_module": small_module, "CELL": 120, "TILE": 60}.items():
        monkeypatch.setattr(demo, name, value)
    arguments = f"demo --out {out} --cells 12 --heldout 12 --steps 2 --workers 2"
    monkeypatch.setattr(sys, "argv", arguments.split())
    assert demo.main() == 0

    drawn = {path.name: np.asarray(Image.open(path).convert("RGB")) for path in (out / "pictures").iterdir()}
    assert drawn.keys() == PICTURES
    for name, picture in drawn.items():
        colors, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
        assert len(colors) > 20, name
        assert counts.max() < 0.97 * counts.sum(), f"{name}: hardly anything on its background"

    found = json.loads((out / "results.json").read_text())
    assert (found["protocol"], found["tiles"]) == ("galileo-knn20", 48)
    assert list(found["top1"]) == ["majority class", "raw band statistics", "random init", "pretrained"]
    assert all(0 <= low <= top1 <= high <= 1 for top1, low, high in found["top1"].values())

    said = capsys.readouterr().out
    assert all(f"=== {number}/5" in said for number in range(1, 6))
    for path in (out / "tiles", out / "run", out / "terrafm-demo.safetensors", out / "pictures", out / "results.json"):
        assert f" {path}\n" in said or f" {path} " in said, path
        assert path.exists()
    for name in ("metrics.jsonl", "checkpoints", "teacher", "config_resolved.json", "parameters.txt"):
        assert (out / "run" / name).exists(), name
    model = terrafm_jax.load(str(out / "run"))
    image = np.full((1, 64, 64, 12), 1500.0, np.float32)
    assert np.isfinite(model.encode(s2_l2a=image).cls).all()


def test_what_it_says_to_type_next_can_be_pasted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "with a space"
    demo._summary(out, out / "run", out / "w.safetensors", 60.0)
    pasted = capsys.readouterr().out.replace("\\\n", "")
    commands = [shlex.split(line) for line in pasted.splitlines() if " -m " in line and not line.startswith(" ")]
    assert [command[1:3] for command in commands] == [["-m", "data_prep.inspect"], ["-m", "terrafm_jax.main"]]
    assert all(os.path.samefile(command[0], sys.executable) for command in commands)
    assert commands[0][3:] == [str(out / "tiles")]
    assert {
        f"--workdir={out / 'run'}",
        f"--config.data.dir={out / 'tiles'}",
        "--config.allow_config_change=True",
    } < set(commands[1])
