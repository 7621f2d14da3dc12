"""A workdir belongs to one recipe: it is refused to others, and says which keys differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from terrafm_jax.config import ConfigError, base
from terrafm_jax.training import workdir


@pytest.fixture
def config() -> ConfigDict:
    return base()


def test_a_new_folder_is_claimed_and_can_be_claimed_again(tmp_path: Path, config: ConfigDict) -> None:
    run = tmp_path / "run"
    workdir.claim(str(run), config, write=True)
    assert json.loads((run / "config.json").read_text())["batch_size"] == 1024
    workdir.claim(str(run), config, write=True)


def test_what_may_change_between_starts(tmp_path: Path, config: ConfigDict) -> None:
    workdir.claim(str(tmp_path), config, write=True)
    config.stop_at_step, config.data.workers, config.log.every, config.mesh.fsdp = 5, 0, "1", 2
    workdir.claim(str(tmp_path), config, write=True)


def test_another_recipe_is_refused_with_every_difference(tmp_path: Path, config: ConfigDict) -> None:
    workdir.claim(str(tmp_path), config, write=True)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    config.objective.alpha, config.batch_size = 1.0, 512
    with pytest.raises(ConfigError, match=r"(?s)batch_size: 1024 there, 512 here.*alpha: 0.8 there, 1.0 here"):
        workdir.claim(str(tmp_path), config, write=True)
    config.allow_config_change = True
    workdir.claim(str(tmp_path), config, write=True)


@pytest.mark.parametrize("place", [".", "lr_0.001"])
def test_a_start_that_failed_before_its_first_step_binds_nobody(tmp_path: Path, config: ConfigDict, place: str) -> None:
    """Say on a wrong --config.knn.split: the next start has it right, and more steps perhaps."""
    workdir.claim(str(tmp_path), config, write=True)
    metrics, start = tmp_path / place / "metrics.jsonl", '{"step": 0, "time": 1.0, "event": "start"}\n'
    metrics.parent.mkdir(exist_ok=True)
    metrics.write_text(start)
    config.total_steps = "77"
    workdir.claim(str(tmp_path), config, write=True)
    assert json.loads((tmp_path / "config.json").read_text())["total_steps"] == "77"
    metrics.write_text(start + '{"step": 1, "time": 2.0, "loss": 1.0}\n')
    config.total_steps = "78"
    with pytest.raises(ConfigError, match="total_steps: '77' there, '78' here"):
        workdir.claim(str(tmp_path), config, write=True)


def test_a_run_of_a_version_that_lacked_a_field_goes_on_with_its_default(tmp_path: Path, config: ConfigDict) -> None:
    workdir.claim(str(tmp_path), config, write=True)
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    record = tmp_path / "config.json"
    found = json.loads(record.read_text())
    del found["views.aspect"]
    record.write_text(json.dumps(found))
    config.views.aspect = (0.5, 2.0)
    with pytest.raises(ConfigError, match=r"views.aspect: \[0.75, 1.33\d+\] there, \[0.5, 2.0\] here"):
        workdir.claim(str(tmp_path), config, write=True)
    workdir.claim(str(tmp_path), base(), write=True)


def test_a_folder_that_cannot_be_made_is_named(config: ConfigDict, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"workdir .*file/run: "):
        workdir.claim(str(tmp_path / "file" / "run"), config, write=True)


def test_a_damaged_record_of_the_config_is_named(tmp_path: Path, config: ConfigDict) -> None:
    workdir.claim(str(tmp_path), config, write=True)
    (tmp_path / "config.json").write_text('{"batch_size": 10')
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        workdir.claim(str(tmp_path), config, write=True)


def test_a_folder_with_foreign_files_is_refused_but_logs_are_fine(tmp_path: Path, config: ConfigDict) -> None:
    for name in ("slurm.log", "thesis.txt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("")
    workdir.claim(str(tmp_path / "slurm.log"), config, write=True)
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        workdir.claim(str(tmp_path / "thesis.txt"), config, write=True)
    assert sorted(p.name for p in (tmp_path / "thesis.txt").iterdir()) == ["thesis.txt"]
    assert sorted(p.name for p in (tmp_path / "slurm.log").iterdir()) == [".lock", "config.json", "slurm.log"]


def test_other_processes_leave_looking_and_writing_to_the_first(tmp_path: Path, config: ConfigDict) -> None:
    (tmp_path / "config.json").write_text("")  # the first process is about to write
    workdir.claim(str(tmp_path), config, write=False)
    assert (tmp_path / "config.json").read_text() == ""


def test_a_folder_that_not_all_processes_see_is_refused(
    tmp_path: Path, config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the first checkpoint would wait for parts that are written elsewhere."""
    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda refused: refused)
    monkeypatch.setattr(workdir, "PATIENCE", 0.1)
    said = []

    def job(mine: np.ndarray) -> list[np.ndarray]:
        said.append(int(mine[0]))
        return [np.array([1]), mine, mine]

    monkeypatch.setattr(workdir.processes, "rows_of_all", job)
    with pytest.raises(ConfigError, match=rf"workdir {tmp_path}/own: processes \[1, 2\] do not see the config.json"):
        workdir.claim(f"{tmp_path}/own", config, write=False)
    workdir.claim(f"{tmp_path}/shared", config, write=True)
    workdir.claim(f"{tmp_path}/shared", config, write=False)
    assert said == [0, 1, 1]


HOLD = """
import sys, time
from terrafm_jax.config import base
from terrafm_jax.training import workdir
workdir.claim(sys.argv[1], base(), write=True)
print("held", flush=True)
time.sleep(600)
"""


def test_a_folder_in_use_is_refused_until_its_process_is_gone(
    tmp_path: Path, config: ConfigDict, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=root, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(workdir, "PATIENCE", 0.1)
        with pytest.raises(ConfigError, match=rf"in use by process {other.pid} on .*give another --workdir"):
            workdir.claim(str(tmp_path), config, write=True)
    finally:
        other.kill()
        other.wait()
    workdir.claim(str(tmp_path), config, write=True)  # a killed process leaves no lock
