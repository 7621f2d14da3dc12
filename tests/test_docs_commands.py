"""Every command that docs/evaluation.md and docs/data.md show exists and parses; evaluation names what there is."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "evaluation.md"
# Runs in its own process, one fork per command: commands define flags of the same names.
DRIVER = """
import argparse, importlib, json, os, runpy, sys
from absl import app, flags

class Parsed(BaseException):
    "The command understood its flags; its work is not wanted."

def stop_absl(main, argv=None, flags_parser=None, **_):
    flags.FLAGS(sys.argv)
    module = sys.modules["__main__"] if not hasattr(main, "__globals__") else main.__globals__
    check(module)
    raise Parsed

def check(module):
    name = sys.argv[0]
    if name == "terrafm_jax.evaluate":
        found = module["settings"]()
        from terrafm_jax.evals import protocols
        from terrafm_jax.evals.datasets import SUITES, _OPTIONS
        for protocol in found.get("protocols", ()):
            protocols.check(protocol)
        assert found["suite"] in SUITES, found["suite"]
        assert set(found["options"]) <= _OPTIONS.get(found["suite"], set()), found["options"]
        exist(found["suite"], found.get("names") or ())
    if name == "terrafm_jax.finetune":
        from terrafm_jax.finetuning import config
        chosen = flags.FLAGS.config
        config.check(chosen)
        exist(chosen.data.suite, (chosen.data.name,) if chosen.data.name else ())
    if name == "terrafm_jax.crossvalidate":
        from terrafm_jax.evals import protocols
        from terrafm_jax.finetuning.folds import PROTOCOL
        for protocol in flags.FLAGS.protocol:
            assert protocol == PROTOCOL or not protocols.check(protocol)

def exist(suite, names):
    from terrafm_jax.evals.datasets import copernicus, geobench
    known = {"geobench": geobench.DATASETS, "copernicus": copernicus.DATASETS}.get(suite)
    assert known is None or set(names) <= set(known), (names, sorted(known))

parse = argparse.ArgumentParser.parse_args
def stop_argparse(self, args=None, namespace=None):
    parse(self, args, namespace)
    raise Parsed

# What most commands need is imported before the forks, not once more in each of them.
import terrafm_jax.evals.protocols, terrafm_jax.finetuning.folds, terrafm_jax.finetuning.tuned
app.run = stop_absl
argparse.ArgumentParser.parse_args = stop_argparse
failed = {}
for command in json.load(sys.stdin):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        sys.argv = command
        try:
            runpy.run_module(command[0], run_name="__main__", alter_sys=False)
        except Parsed:
            os._exit(0)
        except BaseException as e:
            print(f"{' '.join(command)}: {type(e).__name__}: {e}", flush=True)
        os._exit(1)
    failed[" ".join(command)] = os.waitpid(child, 0)[1]
sys.exit(1 if any(failed.values()) else 0)
"""


def commands(text: str) -> list[list[str]]:
    """Arguments behind ``python -m`` of every command in blocks and in inline code."""
    joined = re.sub(r"\\\n\s*", " ", text)
    blocks = re.findall(r"```\w*\n(.*?)```", joined, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += re.findall(r"`(python -m [^`\n]*)`", re.sub(r"```.*?```", "", joined, flags=re.S))
    found = [shlex.split(line, comments=True) for line in lines if line.strip().startswith("python -m")]
    return [words[2:] for words in found]


def parse_all(found: list[list[str]]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(found), capture_output=True, text=True, cwd=ROOT
    )


def test_every_command_of_the_page_parses():
    found = commands(PAGE.read_text())
    assert len(found) > 25
    assert not [c for c in found if "…" in " ".join(c)]
    done = parse_all(found)
    assert done.returncode == 0, done.stdout + done.stderr


def test_commands_of_preparation_parse():
    """Those of docs/data.md and of the modules that it speaks of; ``...`` stands for further flags."""
    texts, checked = [(ROOT / "docs" / "data.md").read_text()], set()
    for name in ("majortom", "geotiff", "stac", "inspect"):
        texts.append(f"```\n{importlib.import_module(f'data_prep.{name}').__doc__}\n```")
    for name, *words in (command for text in texts for command in commands(text)):
        if name.startswith("data_prep."):
            module = importlib.import_module("data_prep.synthetic.command" if name.endswith("synthetic") else name)
            given = [{"W": "5", "S": "45", "E": "11", "N": "48"}.get(word, word) for word in words if word != "..."]
            given += ["--worldcover", "none", "--out", "OUT"] if "..." in words else []
            module.parser().parse_args(given)
            checked.add(name.removeprefix("data_prep."))
    assert checked == {"majortom", "geotiff", "stac", "inspect", "synthetic"}


def test_every_published_row_of_ours_has_its_command():
    from terrafm_jax.evals.published import PUBLISHED

    named = {n for c in commands(PAGE.read_text()) for word in c for n in re.split(r"[=,]", word)}
    wanted = {p.dataset for p in PUBLISHED if p.model == "TerraFM-B"} - {"Landslide4Sense"}
    assert wanted <= named
    assert "landslide4sense" in named


def test_wrong_commands_would_be_found():
    wrong = (
        "terrafm_jax.evaluate --checkpoint x --suite geobench --data d --names m-eurosatt",
        "terrafm_jax.evaluate --checkpoint x --suite geobench --data d --protocol knn",
        "terrafm_jax.evaluate --checkpoint x --suite geobench --data d --foldz 3",
        "terrafm_jax.finetune --config=configs/finetune/none.py --workdir w",
        "terrafm_jax.embedd --out x",
    )
    done = parse_all([command.split() for command in (*wrong, "terrafm_jax.embed picture a.tif --out p.png")])
    assert done.returncode == 1
    assert [line.partition(": ")[0] for line in done.stdout.splitlines() if line.startswith("terrafm_jax")] == [*wrong]
