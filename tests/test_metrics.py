"""``metrics.jsonl``: on a disk at once, in a bucket without writing the whole run at every line."""

from __future__ import annotations

import json
import time
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import ClassVar

import pytest
from etils import epath

from terrafm_jax.config import base
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.training import loop, metrics, report
from terrafm_jax.training.metrics import MetricWriter
from terrafm_jax.training.tools import Tools

RUN = "fake://bucket/run"


@epath.register_path_cls("fake://")
class Stored(PurePosixPath):
    """A path of an object store: objects are written whole."""

    objects: ClassVar[dict[str, str]]
    sizes: ClassVar[list[int]]  # of all that was written

    def exists(self) -> bool:
        return str(self) in self.objects

    def read_text(self) -> str:
        return self.objects[str(self)]

    def write_text(self, text: str) -> None:
        self.objects[str(self)] = text
        self.sizes.append(len(text))


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> type[Stored]:
    monkeypatch.setattr(Stored, "objects", {}, raising=False)
    monkeypatch.setattr(Stored, "sizes", [], raising=False)
    return Stored


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The writer's seconds, as the test sets them."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(monotonic=lambda: now.seconds, time=lambda: now.seconds))
    return now


def writer() -> MetricWriter:
    return MetricWriter(RUN, True, tensorboard=False)


def steps() -> list[int]:
    """Of the rows that others can read."""
    path = epath.Path(RUN) / "metrics.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_on_a_disk_every_row_is_there_at_once(tmp_path: Path) -> None:
    writer = MetricWriter(str(tmp_path), True, tensorboard=False)
    for step in range(3):
        writer.write(step, {"loss": 1.0})
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step + 1


def test_a_row_cut_short_costs_no_other(tmp_path: Path) -> None:
    """The next start's event was joined to it, and with the event the start was lost to the report."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "time": 1.0, "event": "start"}\n{"step": 1, "lo')
    writer = MetricWriter(str(tmp_path), True, tensorboard=False)
    writer.write(0, {"event": "start"})
    writer.write(1, {"loss": 2.0})
    assert [len(run) for run in report.runs(report.read_rows(tmp_path))] == [1, 2]


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        MetricWriter(str(tmp_path), True, tensorboard=False).write(1, {"loss": 1.0})


def test_in_a_bucket_a_long_run_is_not_written_at_every_line(store, clock, monkeypatch) -> None:
    """A row a second: what is written grows as the time, and not as its square (at every line it would be 1.4 GB)."""
    monkeypatch.setattr(metrics, "RATE", 1000)
    out, seconds = writer(), 5000
    for step in range(seconds):
        out.write(step, {"loss": 1.0, "note": "x" * 60})
        if step % 100 == 0:
            assert step - steps()[-1] <= max(metrics.PAUSE, store.sizes[-1] / metrics.RATE)
        clock.seconds += 1
    out.close()
    assert steps() == list(range(seconds))
    assert store.sizes[-1] > 10 * metrics.PAUSE * metrics.RATE, "so large that the rate counts"
    assert sum(store.sizes) <= metrics.RATE * seconds + 2 * store.sizes[-1]


def test_the_start_and_all_that_is_flushed_can_be_read(store, clock) -> None:
    out = writer()
    out.write(0, {"event": "start"})
    assert steps() == [0]
    out.write(1, {"loss": 1.0})
    out.write(2, {"loss": 1.0})
    assert steps() == [0]
    out.flush()
    assert steps() == [0, 1, 2]
    out.flush()
    assert len(store.sizes) == 2, "nothing was new"

    again = writer()  # the first one was killed
    again.write(2, {"event": "start"})
    again.close()
    assert steps() == [0, 1, 2, 2]


def test_what_a_checkpoint_has_behind_it_is_readable_before_it_is_written(clock, monkeypatch) -> None:
    """A kill just after it must not lose rows of steps that nobody does again."""
    found: list[list[int]] = []
    out = writer()
    plan = SimpleNamespace(
        config=base(), spec=SimpleNamespace(model=ModelSpec()), data_facts=dict, schedules=dict
    )  # fmt: skip
    checkpoints = SimpleNamespace(save=lambda *_: found.append(steps()))
    tools = Tools(plan, checkpoints, out, SimpleNamespace(skipped={}), None, None, None)
    monkeypatch.setattr(tools, "_require_finite", lambda *_: None)
    for step in range(3):
        out.write(step, {"loss": 1.0})
    tools.save(None, 3, True)
    assert found == [[0, 1, 2]]


def test_the_page_at_the_end_sees_every_row(clock, monkeypatch) -> None:
    """Also where no checkpoint was written just before."""
    found: list[list[int]] = []
    monkeypatch.setattr(loop.report, "write", lambda _: found.append(steps()))
    monkeypatch.setattr(loop.report, "goodput_line", lambda _: "")
    out = writer()
    for step in range(3):
        out.write(step, {"loss": 1.0})
    plan = SimpleNamespace(writes=True, workdir=RUN, total=5)
    loop._finish(Tools(plan, None, out, None, SimpleNamespace(line=lambda _: None), None, None), 3, 3, False)
    assert found == [[0, 1, 2]]


def test_two_starts_within_a_second_keep_the_scalars_of_both(tmp_path: Path, monkeypatch) -> None:
    """TensorBoard's files are named by the second in which they are opened."""
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    for _ in range(2):
        MetricWriter(str(tmp_path), True).close()
    assert len(list((tmp_path / "tensorboard").glob("events.out.tfevents.*"))) == 2
