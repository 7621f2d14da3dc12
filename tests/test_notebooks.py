"""Every notebook runs from a clean state, shortened by its one setting; and is kept without outputs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
from conftest import QUICK_FLAGS
from weights_samples import sample

import terrafm_jax
from terrafm_jax import weights

NOTEBOOKS = sorted((Path(__file__).resolve().parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_is_kept_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    assert code
    assert all(not c["outputs"] and c["execution_count"] is None for c in code)
    assert "colab" in cells[0]["source"] or any("colab" in line for line in cells[0]["source"])
    assert "pip" in "".join(code[0]["source"])
    assert path.stat().st_size < 40_000


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_from_clean_state(path, tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("torch")
    monkeypatch.setenv("TERRAFM_QUICK", "1")
    monkeypatch.setenv("XLA_FLAGS", QUICK_FLAGS)
    monkeypatch.setenv("TERRAFM_NOTEBOOK_DIR", str(tmp_path))
    for name in ("TERRAFM_CHECKPOINT", "TERRAFM_WEIGHTS"):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": path.parent}}
    )
    client.execute()
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert pictures or path.stem == "4_weights"


@pytest.mark.parametrize("stem", ["2_finetune", "3_embed", "4_weights"])
def test_weights_may_be_named_relative_to_the_notebook(stem, tmp_path, monkeypatch):
    """Notebook 1 ends with such a path; the commands that the others start run in another folder."""
    loaded = sample()
    meta = {"step": 0, "model": dataclasses.asdict(loaded.spec), "statistics": json.loads(loaded.stats.to_json())}
    weights.save_npz(tmp_path / "out/run/teacher/3", loaded.params, meta)
    monkeypatch.chdir(tmp_path)
    name, variable = ("TERRAFM_WEIGHTS", "PATH") if stem == "4_weights" else ("TERRAFM_CHECKPOINT", "CHECKPOINT")
    monkeypatch.setenv(name, "out/run")
    path = next(p for p in NOTEBOOKS if p.stem == stem)
    cells = ("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
    code = next(c for c in cells if f'os.environ.get("{name}"' in c)
    scope = {"os": os, "Path": Path, "terrafm_jax": terrafm_jax, "WORK": tmp_path, "QUICK": True}
    exec(code, scope)
    assert scope[variable] == str(tmp_path / "out/run")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_what_was_interrupted_is_made_anew(path, tmp_path):
    """Half a folder, taken for a whole one by the next run of the cell, fails much later."""
    cells = ("".join(c["source"]) for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
    code = next(c for c in cells if "def once(" in c)
    scope = {"Path": Path, "shutil": shutil}
    exec(code[code.index("def once(") :], scope)

    def make(folder, fail):
        folder.mkdir()
        (folder / "first").touch()
        if fail:
            raise KeyboardInterrupt
        (folder / "last").touch()

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            scope["once"](tmp_path / "cells", lambda to: make(to, True))
    assert scope["once"](tmp_path / "cells", lambda to: make(to, False)) == tmp_path / "cells"
    assert {p.name for p in (tmp_path / "cells").iterdir()} == {"first", "last"}
    scope["once"](tmp_path / "cells", lambda to: make(to, True))
