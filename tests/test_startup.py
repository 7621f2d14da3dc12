"""What every command does before its work: configs are found, wrong flags are one line, --help ends well."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from absl import flags
from conftest import ROOT

from terrafm_jax import startup

COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for package in ("terrafm_jax", "data_prep", "benchmarks")
    for path in (ROOT / package).rglob("*.py")
    if re.search(r'^if __name__ == "__main__":', path.read_text(), re.M) or path.name == "__main__.py"
)
# One process, a fork per command: importing jax once is most of the time. Each prints its code and its errors.
DRIVER = """
import io, json, os, runpy, sys
import absl.app, jax, ml_collections, terrafm_jax.config
for folder, *words in json.load(sys.stdin):
    os.chdir(folder)
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write, 1), os.dup2(write, 2)
        sys.argv, code = words, 0
        try:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else int(e.code is not None)
        except BaseException as e:
            code = f"{type(e).__name__}: {e}"
        sys.stdout.flush(), sys.stderr.flush()
        os.write(write, ("\\0" + str(code)).encode())
        os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read().decode()
    os.waitpid(child, 0)
    print(json.dumps(text.rpartition("\\0")[::2]), flush=True)
"""


def outcomes(commands: list[str], *folders: Path) -> list[tuple[str, str]]:
    """(what was printed, exit code or exception) of every command, started in its folder or all in the same one."""
    places = folders * len(commands) if len(folders) == 1 else folders
    listed = [[str(folder), *command.split()] for folder, command in zip(places, commands, strict=True)]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], input=json.dumps(listed), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_help_of_every_command_is_no_error(tmp_path: Path) -> None:
    assert {"terrafm_jax.main", "terrafm_jax.export", "terrafm_jax.ahead.scaling", "data_prep.stac"} <= set(COMMANDS)
    found = outcomes([f"{name} --help" for name in COMMANDS], tmp_path)
    assert {name: code for name, (_, code) in zip(COMMANDS, found, strict=True) if code != "0"} == {}
    for name, (text, _) in zip(COMMANDS, found, strict=True):
        assert "usage" in text.lower() or "flags:" in text, name
    shown = dict(zip(COMMANDS, found, strict=True))["terrafm_jax.evaluate"][0]
    assert "--protocol" in shown
    assert "--config" in shown


DEMO, QUICK = "main --config=configs/demo.py --workdir=w", "finetune --config=configs/finetune/quick.py --workdir=w"
DATA = "--checkpoint x --suite folder --data d"
WRONG = [
    ("main --config=configs/dmo.py --workdir=w --config.seed=1",
     "looked for [^;]*/configs/dmo.py and [^;]*/configs/dmo.py; shipped are configs/demo.py, configs/vitb.py"),
    ("finetune --config=my.py --workdir=w", "looked for [^;]*/my.py; shipped are configs/finetune/class.*quick.py"),
    ("aot --config=configs/none.py --topology=v5e:2x2", "file not found"),
    ("main --config=configs/vitb.py:runlocla --workdir=w", r"'runlocla': expected runlocal or one of \['single'"),
    ("finetune --config=configs/finetune/quick.py:small --workdir=w", "argument 'small', expected 'runlocal'"),
    ("evaluate --config=configs/eval/folder.py:small", "folder.py takes no argument, found 'small'"),
    ("evaluate --config=empty.py", "empty.py defines no get_config"),
    (f"{DEMO} --config.opitm.base_lr=1 --config.views.locals.x=2",
     r"opitm.base_lr: no such config key; did you mean config.optim.base_lr\?; config.views.locals.x: no such"),
    (f"{DEMO} --config.base_lr=1", r"did you mean config.optim.base_lr\?"),
    (f"{DEMO} --config.views.foo=1", "config.views has .*global_size, .*locals"),
    (f"{DEMO} --config.seed=much", "config.seed=much"),
    (f"{QUICK} --config.lr=0.1", r"config.lr: no such config key; did you mean config.rates\?"),
    (f"{QUICK} --config.epoch=3", r"did you mean config.epochs\?"),
    (f"{QUICK} stray", r"unknown arguments \['stray'\]"),
    ("main --config=configs/demo.py", "--workdir is missing"),
    ("evaluate --checkpoint x", "give --suite, --data"),
    (f"evaluate {DATA} --shots few", "--shots=few: expected whole numbers"),
    (f"evaluate {DATA} --config=typo.py", r"unknown fields \['protocol'\]"),
    ("crossvalidate --data d --out o", "--checkpoint"),
]  # fmt: skip


def test_what_is_wrong_with_flags_is_one_line_and_code_2(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "typo.py").write_text(
        "from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({'protocol': ('logreg',)})\n"
    )
    found = outcomes([f"terrafm_jax.{command}" for command, _ in WRONG], tmp_path)
    for (command, message), (text, code) in zip(WRONG, found, strict=True):
        assert code == "2", (command, text, code)
        assert re.fullmatch(rf"error: [^\n]*{message}[^\n]*\n", text), (command, text)


def test_configs_are_found_from_anywhere_own_ones_first_and_their_bugs_keep_the_traceback(tmp_path: Path) -> None:
    (tmp_path / "bug.py").write_text("def get_config():\n    return {}['x']\n")
    own = tmp_path / "own"
    (own / "configs").mkdir(parents=True)
    (own / "configs/demo.py").write_text("from terrafm_jax.config import ConfigError\nraise ConfigError('mine')\n")
    demo = "terrafm_jax.main --config=configs/demo.py:runlocal --workdir=w --config.data.dir=/nowhere"
    bug = "terrafm_jax.main --config=bug.py --workdir=w"
    shipped, wrong, mine = outcomes([demo, bug, demo], tmp_path, tmp_path, own)
    assert "error: /nowhere: no dataset_info.json" in shipped[0]
    assert shipped[1] == "1"
    assert wrong[1] == "RuntimeError: bug.py failed: KeyError: 'x'"
    assert mine == ("error: flag --config=configs/demo.py:runlocal: mine\n", "2")


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shells leave it alone there: `--workdir=~/run` made a folder called `~`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    command = "terrafm_jax.main --config=configs/demo.py:runlocal --workdir=~/run --config.data.dir=~/tiles"
    ((text, code),) = outcomes([command], tmp_path)
    assert code == "1"
    assert f"error: {tmp_path}/home/tiles: no dataset_info.json" in text
    assert not (tmp_path / "~").exists()


def test_what_a_disk_refuses_is_one_line_and_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, startup.one_line(KeyError):
        raise OSError(28, "No space left on device", "out/results.md")
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device: 'out/results.md'\n"


@pytest.mark.parametrize("where", ["startup.one_line()", "main"])
def test_ctrl_c_is_one_line_and_code_130(where: str, tmp_path: Path) -> None:
    """The second one, in pretraining: the first saves."""
    body = {
        "startup.one_line()": "with startup.one_line():\n    raise KeyboardInterrupt",
        "main": "import terrafm_jax.training.loop as loop\nfrom terrafm_jax import main\n"
        "def train(*_):\n    raise KeyboardInterrupt\nloop.train = train\n"
        "flags.FLAGS(['x', '--workdir=w'])\nmain.main([])",
    }[where]
    code = f"from absl import flags\nfrom terrafm_jax import startup\n{body}\n"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 130, done.stderr
    assert done.stderr == "interrupted; the same command continues with what is on disk\n"


def test_lists_given_twice_hold_both_and_replace_the_default() -> None:
    values = flags.FlagValues()
    for name, default in (("protocol", ["knn"]), ("names", None)):
        flag = startup._ListFlag(flags.ListParser(), flags.ListSerializer(","), name, default, "names")
        flags.DEFINE_flag(flag, values)
    values(["command"])
    assert (values.protocol, values.names) == (["knn"], None)
    values.unparse_flags()
    values(["command", "--protocol=a,b", "--names=x", "--protocol=c"])
    assert (values.protocol, values.names) == (["a", "b", "c"], ["x"])


@pytest.mark.slow
def test_a_built_wheel_holds_the_configs(tmp_path: Path) -> None:
    # Beside them go caches, which other tests write at the same time: a file may be gone before it is copied.
    left = shutil.ignore_patterns(".git", ".venv*", "build", "tests", "__pycache__", ".*_cache", "*.egg-info")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=left)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-q"]
    done = subprocess.run([*command, "-w", str(tmp_path), str(copy)], capture_output=True, text=True)
    if "setuptools" in done.stderr and "No module named" in done.stderr:
        pytest.skip("no setuptools to build with")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {p.relative_to(ROOT).as_posix() for p in (ROOT / "configs").rglob("*.py")}
    assert len(configs) > 10
    assert configs <= names
