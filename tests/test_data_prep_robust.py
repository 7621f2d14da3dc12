"""Interruptions, full disks and killed workers: nothing is lost, nothing is doubled."""

from __future__ import annotations

import csv
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_prep_cells import command, make_source

from data_prep import chunks, majortom, run, write
from data_prep.chunks import Job, Unit
from data_prep.run import make_chunks, prepare_all
from data_prep.scenes import Scene, SceneFile, facts
from data_prep.worldcover import WorldCover


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("robust"), 10)


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("expected") / "data"
    assert majortom.main(command(source, out)) == 0
    return files(out)


def start(source: Path, out: Path, *flags: str) -> subprocess.Popen[bytes]:
    call = [sys.executable, "-m", "data_prep.majortom", *command(source, out, *flags)]
    return subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "times"), [("1", 4), ("2", 2)])
def test_killed_at_any_moment_it_continues_to_the_same_bytes(
    source: Path, expected: dict[str, bytes], tmp_path: Path, workers: str, times: int
):
    """SIGKILL of all its processes as soon as each new file appears, until a run gets through."""
    out, kills, seen = tmp_path / "data", 0, set()
    for _ in range(40):
        process = start(source, out, "--workers", workers)
        killed = False
        while process.poll() is None:
            work = out / ".work"
            try:
                new = {p.name for p in work.iterdir() if "chunk" in p.name} - seen
            except FileNotFoundError:  # not made yet, or just removed by a run that is complete
                new = set()
            if new and kills < times:
                seen |= new
                os.killpg(process.pid, signal.SIGKILL)
                killed = True
                break
            time.sleep(0.002)
        process.wait()
        if not killed:
            assert process.returncode == 0, process.stderr.read().decode() if process.stderr else ""
            break
        kills += 1
    assert kills == times
    assert files(out) == expected


def test_interrupted_while_the_shards_get_their_names(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Each rename and each small file of the last phase is a moment to stop at."""
    plain = Path.replace
    begun = tmp_path / "begun"

    def stopped(out: Path, stop: int) -> int:
        calls = 0

        def stopping(self: Path, target: Any) -> Path:
            nonlocal calls
            calls += Path(target).parent == out
            if calls > stop:
                raise KeyboardInterrupt
            return plain(self, target)

        monkeypatch.setattr(Path, "replace", stopping)
        code = majortom.main(command(source, out))
        monkeypatch.undo()
        return code

    assert stopped(begun, 0) == 130
    stop = 0
    while True:
        out = tmp_path / f"stop{stop}"
        shutil.copytree(begun, out)
        code = stopped(out, stop)
        if code == 0:
            break
        assert code == 130
        assert majortom.main(command(source, out)) == 0
        assert files(out) == expected
        stop += 1
    assert stop == len(expected), "the work folder has one moment for each file of the result"


def test_interrupted_while_the_work_folder_goes(
    source: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    """What is complete stays complete: no cell is prepared again, and no other job takes the folder over."""
    out, plain = tmp_path / "data", shutil.rmtree

    def stopping(path: Path, *rest: Any, **options: Any) -> None:
        if Path(path).name == "metadata" or not Path(path).exists():
            return plain(path, *rest, **options)
        for file in sorted(Path(path).iterdir())[::2]:
            file.unlink() if file.is_file() else plain(file)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", stopping)
    assert majortom.main(command(source, out)) == 130
    monkeypatch.undo()
    assert majortom.main(command(source, out, "--max-nodata", "0.1")) == 1
    assert "holds another data set: --max-nodata" in capsys.readouterr().err
    monkeypatch.setattr(chunks, "prepare", None)
    assert majortom.main(command(source, out)) == 0
    assert files(out) == expected
    assert all(path.is_file() for path in out.iterdir())


def test_a_folder_that_cannot_be_written_to(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("")
    assert majortom.main(command(source, tmp_path / "file")) == 1
    assert f"--out {tmp_path / 'file'}: cannot be written to (Not a directory)" in capsys.readouterr().err


def test_full_disk_at_the_very_start(source: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]):
    def full(self: Path, *_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "mkdir", full)
    assert majortom.main(command(source, tmp_path / "data")) == 4
    assert "no space left under" in capsys.readouterr().err


def test_sigterm_stops_cleanly(source: Path, expected: dict[str, bytes], tmp_path: Path):
    out = tmp_path / "data"
    process = start(source, out, "--workers", "2")
    while process.poll() is None and not list(out.glob(".work/chunk-*.npz")):
        time.sleep(0.005)
    process.terminate()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130, err.decode()
    assert b"start the same command again" in err
    assert majortom.main(command(source, out)) == 0
    assert files(out) == expected


def test_another_option_cannot_continue_it(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "data"
    process = start(source, out)
    while process.poll() is None and not list(out.glob(".work/chunk-*.npz")):
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert majortom.main(command(source, out, "--sea-keep", "0.5")) == 1
    message = capsys.readouterr().err
    assert "other options" in message
    assert "--sea-keep 0.02 there, 0.5 now" in message
    assert "--require" not in message


def test_two_jobs_in_one_folder(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    import fcntl

    out = tmp_path / "data"
    (out / ".work").mkdir(parents=True)
    with open(out / ".work" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert majortom.main(command(source, out)) == 1
    assert "another process" in capsys.readouterr().err


def test_full_disk_stops_with_a_message_and_loses_nothing(source: Path, expected: dict[str, bytes], tmp_path: Path):
    """Files may not grow beyond 40 kB (RLIMIT_FSIZE): the same errors as a full disk, in the C++ writer too."""
    out = tmp_path / "data"
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000));"
        "from data_prep.majortom import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run([sys.executable, "-c", limited, *command(source, out)], capture_output=True, text=True)
    assert done.returncode == 4, done.stderr
    assert "no space left" in done.stderr
    assert "start the same command again" in done.stderr
    assert not list(out.glob("*.array_record*")), "no half shard has a name"
    assert not list(out.glob(".work/*.tmp-*"))
    assert majortom.main(command(source, out)) == 0
    assert files(out) == expected


def test_full_disk_while_reports_are_written(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "data"
    monkeypatch.setattr(np, "savez", full)
    assert majortom.main(command(source, out)) == 4
    monkeypatch.undo()
    assert majortom.main(command(source, out)) == 0


def test_full_disk_at_every_small_file(
    source: Path, expected: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    """Plan, index, statistics, reports and metadata: whichever does not fit, the next start completes the rest."""
    out, plain, moment = tmp_path / "data", write.sync, 0
    while True:
        calls = 0

        def full(path: Path, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise OSError(errno.ENOSPC, "No space left on device", str(path))
            plain(path)

        monkeypatch.setattr(write, "sync", full)
        code = majortom.main(command(source, out))
        monkeypatch.undo()
        if code == 0:
            break
        assert code == 4
        message = capsys.readouterr().err
        assert "no space left" in message
        assert "start the same command again" in message
        moment += 1
    assert moment > 6
    assert files(out) == expected


class Deadly:
    """A source whose second cell ends the process that reads it."""

    def __init__(self, source: Path, victim: str):
        self.inner, self.victim = majortom.MajorTom(str(source)), victim

    def read(self, unit: Unit) -> Any:
        if unit.cell == self.victim:
            os.kill(os.getpid(), signal.SIGSEGV)
        return self.inner.read(unit)


class DeadlyWhileCounting(Deadly):
    """Its victim's process dies with the lock of the counter of cells that are done."""

    def read(self, unit: Unit) -> Any:
        if unit.cell == self.victim and run._counter is not None:
            run._counter.get_lock().acquire()
        return super().read(unit)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Deadly, DeadlyWhileCounting])
def test_a_cell_that_kills_its_worker_is_rejected_alone(source: Path, tmp_path: Path, kind: type[Deadly]):
    args = majortom.parser().parse_args(command(source, tmp_path / "data"))
    from data_prep import cli

    options = cli.options_of(args)
    cover = WorldCover.open(source / "worldcover")
    _, units, _ = majortom.plan(args, options, cover)
    job = Job(kind(source, units[3].cell), cover, options, str(tmp_path / "data"))
    summary = prepare_all(job, units, workers=2, chunk_size=2, plan={})
    assert summary["rejected"] == 1
    assert sum(summary["tiles"].values()) == 9 * 4
    (row,) = csv.DictReader((tmp_path / "data" / "rejected.csv").read_text().splitlines())
    assert row["unit"] == units[3].key
    assert "ends the worker" in row["reason"]


def test_flushing_a_growing_file_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks.Flusher, "STEP", 100)
    path = tmp_path / "shard"
    with open(path, "wb") as file:
        flusher = chunks.Flusher(path)
        for number in range(50):
            file.write(bytes([number]) * 37)
            file.flush()
            flusher.wrote(37)
    flusher.close()
    flusher.close()
    assert path.read_bytes() == b"".join(bytes([number]) * 37 for number in range(50))
    monkeypatch.delattr(os, "posix_fadvise")  # not every system has it
    flusher = chunks.Flusher(path)
    flusher.wrote(1000)
    flusher.close()


def test_what_is_said_of_files_is_told_apart_by_fields_and_not_by_the_names_of_classes():
    class Renamed(SceneFile):
        """The same by another name."""

    def said(kind: type[SceneFile], **fields) -> str:
        return facts([Scene("a", 0, (kind("/here/a.tif", "s1", **fields),))])

    assert said(Renamed) == said(SceneFile) == facts([Scene("a", 0, (SceneFile("/moved/a.tif", "s1"),))])
    assert len({said(SceneFile), said(SceneFile, nodata=-99.0), said(SceneFile, unit="dB")}) == 3


def test_chunks_are_fixed_by_the_plan():
    units = [Unit(f"c{i}", 0, None, outlook="holdout" if i % 5 == 0 else "train") for i in range(23)]
    found = make_chunks(units[::-1], 4)
    assert found == make_chunks(units, 4)
    assert [len({u.outlook for u in chunk}) for chunk in found] == [1] * len(found)
    assert sorted(u.cell for chunk in found for u in chunk) == sorted(u.cell for u in units)
