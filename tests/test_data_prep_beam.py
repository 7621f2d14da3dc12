"""The Beam pipeline gives the same bytes as the local run."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_prep_cells import make_source

from data_prep import majortom


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def command(source: Path, out: Path, *flags: str) -> list[str]:
    return ["--source", str(source), "--worldcover", str(source / "worldcover"), "--out", str(out), "--tile-size", "24",
            "--cells-per-shard", "2", *flags]  # fmt: skip


def test_without_beam_the_message_says_what_to_install(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    import sys

    source = make_source(tmp_path / "in", 1)
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    assert majortom.main(command(source, tmp_path / "out", "--runner", "DirectRunner")) == 1
    assert "terrafm_jax[beam]" in capsys.readouterr().err


@pytest.mark.slow
def test_direct_runner_equals_the_local_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("apache_beam", reason="extra [beam] is not installed")
    source = make_source(tmp_path / "in", 5)
    assert majortom.main(command(source, tmp_path / "local")) == 0
    assert majortom.main(command(source, tmp_path / "beam", "--runner", "DirectRunner")) == 0
    assert files(tmp_path / "beam") == files(tmp_path / "local")
    flags = ["--runner", "DirectRunner", "--direct_num_workers=2", "--direct_running_mode=multi_threading"]
    assert majortom.main(command(source, tmp_path / "threads", *flags)) == 0
    assert files(tmp_path / "threads") == files(tmp_path / "local")
    with pytest.raises(SystemExit):
        majortom.main(command(source, tmp_path / "x", "--no-such-flag"))


@pytest.mark.slow
def test_a_full_disk_is_told_through_beam(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    pytest.importorskip("apache_beam", reason="extra [beam] is not installed")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    source = make_source(tmp_path / "in", 1)
    monkeypatch.setattr(np, "savez", full)
    assert majortom.main(command(source, tmp_path / "out", "--runner", "DirectRunner")) == 4
    assert f"no space left under {tmp_path / 'out'}" in capsys.readouterr().err
    monkeypatch.undo()
    assert majortom.main(command(source, tmp_path / "out", "--runner", "DirectRunner")) == 0
