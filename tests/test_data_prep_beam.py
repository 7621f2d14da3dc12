"""The Beam pipeline gives the same bytes as the local run."""

from __future__ import annotations

import dataclasses
import errno
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_prep_cells import make_source

from data_prep import beam_pipeline, majortom, parquet, worldcover
from data_prep.cell import Options
from data_prep.chunks import Job, Unit, write_chunk
from data_prep.harmonize import Offset
from data_prep.worldcover import WorldCover


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


def test_elements_are_small_and_chunks_travel_with_their_offsets_alone(tmp_path: Path, monkeypatch):
    """Dataflow refuses job graphs above 10 MB; 2.2 million cells and their offsets are over a gigabyte."""
    keys = [("s2_l2a", f"product {i}") for i in range(1000)]
    units = [Unit(f"cell {i}", 0, {"row": i}, (keys[i],)) for i in range(1000)]
    offsets = {key: Offset(float(i), "pixels") for i, key in enumerate(keys)}
    job = Job(majortom.MajorTom("x"), WorldCover(None, {}), Options(), str(tmp_path), offsets=offsets)
    job.work.mkdir()
    elements = beam_pipeline.write_elements(job, {i: units[10 * i : 10 * i + 10] for i in range(100)})
    assert len(pickle.dumps(elements)) < 100 * 40
    seen = []
    monkeypatch.setattr(beam_pipeline, "write_chunk", lambda *given: seen.append(given) or given[1])
    assert beam_pipeline.prepare_element(elements[77]) == 77
    ((part, number, those, _, _),) = seen
    assert (number, those) == (77, units[770:780])
    assert part == dataclasses.replace(job, offsets={key: offsets[key] for key in keys[770:780]})


def test_threads_have_open_files_of_their_own(tmp_path: Path):
    """Two threads in one GDAL data set or one Parquet file end the process, or read nothing."""
    source = make_source(tmp_path, 1)
    table, cover = source / "Core-S2L2A/images/part_00000.parquet", next((source / "worldcover").glob("*.tif"))
    for opened, path in ((parquet._open, str(table)), (worldcover._open, str(cover))):
        with ThreadPoolExecutor(1) as pool:
            theirs = pool.submit(opened, path).result()
            assert pool.submit(opened, path).result() is theirs
        assert opened(path) is opened(path)
        assert opened(path) is not theirs


def test_a_chunk_done_twice_at_once_is_whole(tmp_path: Path):
    """Beam may start a bundle again while the first try still runs, in the same process or one of the same number."""
    source, cover = make_source(tmp_path / "in", 3), WorldCover(None, {})
    options = Options(tile_size=24, stride=24)
    args = majortom.parser().parse_args(command(source, tmp_path))
    cells, units, _ = majortom.plan(args, options, cover)
    jobs = {name: Job(cells, cover, options, str(tmp_path / name)) for name in ("once", "twice")}
    for job in jobs.values():
        job.work.mkdir(parents=True)
    write_chunk(jobs["once"], 0, units, (), lambda key: None)
    again = iter([units])

    def report(key: str) -> None:
        if not key:  # after the first cell, the whole chunk is done elsewhere
            for same in again:
                write_chunk(jobs["twice"], 0, same, (), lambda key: None)

    write_chunk(jobs["twice"], 0, units, (), report)
    assert files(jobs["twice"].work) == files(jobs["once"].work)


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
