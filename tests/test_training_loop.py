"""The loop inside one process: what is logged where, what a checkpoint remembers, a stop while evaluating."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict
from tiles_fake import fake_record, write_dataset

from configs.demo import get_config
from terrafm_jax.config import ConfigError, flatten, model_spec
from terrafm_jax.data.pipeline import load_index
from terrafm_jax.sensors import Statistics
from terrafm_jax.training import flops, loop, report, tools
from terrafm_jax.training.plan import make_plan

pytestmark = pytest.mark.slow

STEPS, BATCH = 9, 8  # an epoch
DAMAGED = "fake-train.array_record-00003-of-00009"  # 8 records
PEAK = 1e12  # FLOP/s of a device, where it is known


def statistics() -> Statistics:
    """Other ones than the published."""
    published = Statistics.published()
    return dataclasses.replace(published, mean={k: tuple(m + 1 for m in v) for k, v in published.mean.items()})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many tiles as a run sees; a ninth of them cannot be read."""
    folder = write_dataset(tmp_path_factory.mktemp("data"), [fake_record(i) for i in range(STEPS * BATCH)])
    shard = folder / DAMAGED
    shard.write_bytes(b"\xff" * len(shard.read_bytes()))
    (folder / "statistics.json").write_text(statistics().to_json())
    return folder


def tiny(data: Path, **fields: Any) -> ConfigDict:
    c = get_config("runlocal")
    c.data.dir, c.data.max_skipped, c.data.sampling = str(data), 1.0, "uniform"
    c.total_steps, c.knn.every, c.checkpoint.every = str(STEPS), "3", "3"
    c.checkpoint.keep_last, c.checkpoint.keep_every = 1, "7"
    c.model.sensors, c.model.fusion, c.model.depth = ("s1",), False, 1
    c.views.global_size, c.views.local_size, c.views.locals = 32, 16, 1
    c.log.pictures, c.log.tensorboard = False, True
    for key, value in fields.items():
        section, _, name = key.rpartition("__")
        (c[section] if section else c)[name] = value
    return c


class Watched:
    """An evaluator that notes the steps it sees, and is told to stop in the middle of one of them."""

    def __init__(self, stop_at: int = -1):
        self.steps: list[int] = []
        self.stop_at = stop_at

    def __call__(self, step: int, state: Any, poll: Callable[[], None]) -> Iterator[tuple[str, float]]:
        self.steps.append(step)
        yield "begun", 1.0
        if step == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        poll()
        yield "watched", float(step)


def rows(workdir: Path, key: str) -> dict[int, dict]:
    """Rows of the metrics that hold ``key``, by step."""
    found = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row for row in found if key in row}


def meta(workdir: Path, step: int) -> dict:
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())


class FakeWandb(ModuleType):
    """Stands for Weights & Biases: keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.begun: list[dict] = []
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> SimpleNamespace:
        self.begun.append(options)
        return SimpleNamespace(log=lambda values, step: self.rows.append((step, dict(values))), finish=self._finish)

    def _finish(self) -> None:
        self.finished += 1


@dataclasses.dataclass
class Start:
    """How one start of the program ended, the steps it evaluated, and what it left."""

    outcome: loop.Outcome
    evaluated: list[int]
    files: set[str]
    meta: dict[str, Any]


@dataclasses.dataclass
class Run:
    config: ConfigDict
    workdir: Path
    starts: list[Start]
    wandb: FakeWandb


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of nine steps in five starts: told to stop while it evaluates step 3; stopped after step 6; told to stop
    while it evaluates the last step; to the end; with nothing left. W&B is there, and the device's peak known, in the
    third one.
    """
    found = Run(tiny(data), tmp_path_factory.mktemp("loop") / "run", [], FakeWandb())

    def start(stop_at: int = -1, **fields: Any) -> None:
        evaluator = Watched(stop_at)
        outcome = loop.train(tiny(data, **fields), str(found.workdir), lambda run: [evaluator])
        files = {path.name for path in found.workdir.iterdir()}
        found.starts.append(Start(outcome, evaluator.steps, files, meta(found.workdir, outcome.step)))

    start(stop_at=3)
    start(stop_at_step=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", found.wandb)
        patch.setattr(flops, "peak_flops", lambda kind, dtype: PEAK)
        start(stop_at=9, log__wandb="a project")
    start()
    start()
    return found


def test_a_step_whose_evaluation_was_stopped_is_evaluated_by_the_next_start(run: Run) -> None:
    """And no other: the third start does not evaluate step 6 again, nor the last one step 9."""
    assert [start.evaluated for start in run.starts] == [[0, 3], [3, 6], [9], [9], []]
    assert [start.meta["evaluated"] for start in run.starts] == [False, True, False, True, True]
    assert run.starts[3].meta == run.starts[2].meta | {"evaluated": True}
    outcomes = [dataclasses.astuple(start.outcome) for start in run.starts]
    assert outcomes == [(3, False, 42), (6, False, 0), (9, False, 42), (9, True, 0), (9, True, 0)]
    assert ["DONE" in start.files for start in run.starts] == [False, False, False, True, True]
    events = [row.get("after") for row in report.read_rows(run.workdir) if row.get("event") == "start"]
    assert events == [None, None, None, None, "complete"], "the time before the last start is not lost"


def test_a_person_who_stops_the_last_evaluation_finds_no_complete_run(tmp_path: Path) -> None:
    """``DONE`` tells launchers that there is nothing left to do."""
    plan = SimpleNamespace(writes=True, total=9, stop=9, workdir=str(tmp_path))
    tools = SimpleNamespace(
        plan=plan,
        stop=SimpleNamespace(by_person=True),
        writer=SimpleNamespace(flush=lambda: None),
        progress=SimpleNamespace(line=lambda text: None),
    )
    assert loop._finish(tools, 9, 9, preempted=True) == loop.Outcome(9, False, 0)
    assert not (tmp_path / "DONE").exists()
    assert loop._finish(tools, 9, 9, preempted=False) == loop.Outcome(9, True, 0)
    assert (tmp_path / "DONE").exists()


def test_a_step_that_nothing_evaluated_is_evaluated_once_that_is_asked_for(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And the log tells the scores: a notebook or a terminal shows no metrics.jsonl."""
    caplog.set_level(logging.INFO)
    config = tiny(data, stop_at_step=3, max_nonfinite=0)  # none may be: steps whose losses are finite go on
    loop.train(config, str(tmp_path))
    assert not meta(tmp_path, 3)["evaluated"]
    (tmp_path / "DONE").write_text("step 3\n")  # as where total_steps was 3 before: it is not the end any more
    for steps in ([3], []):
        evaluator = Watched()
        loop.train(config, str(tmp_path), lambda run, evaluator=evaluator: [evaluator])
        assert evaluator.steps == steps
    assert meta(tmp_path, 3)["evaluated"]
    assert not (tmp_path / "DONE").exists()
    assert "step 3: begun 1, watched 3" in [record.getMessage() for record in caplog.records]


def test_scores_of_single_classes_are_left_to_the_table() -> None:
    found = {"knn_protocol": "p", "knn_top1": 0.5, "knn_macro": 0.25, "knn_class/tree": 1.0, "labelled/a/top1": 0.1}
    assert loop._headlines(found) == "knn_top1 0.5, knn_macro 0.25, labelled/a/top1 0.1"


def test_checkpoints_to_keep_are_written_between_the_others(run: Run) -> None:
    """Every seventh step stays, though it is no multiple of the third steps that are saved; of those the last one."""
    assert {int(path.name) for path in (run.workdir / "checkpoints").iterdir()} == {7, 9}


def test_nothing_of_half_an_evaluation_is_written(run: Run) -> None:
    found = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if "begun" in row] == [0, 3, 6, 9]
    assert [row["step"] for row in found if "watched" in row] == [0, 3, 6, 9]


def test_rows_tell_the_pace(run: Run) -> None:
    """From the second step of a start on: before it there is nothing to compare with."""
    found = rows(run.workdir, "loss")
    assert list(found) == list(range(1, STEPS + 1))
    work = flops.step_flops(make_plan(run.config, str(run.workdir)).spec) * BATCH
    for step, row in found.items():
        paced = step not in (1, 4, 7)
        assert ("images_per_second" in row) == ("tflops_per_second" in row) == paced
        assert ("mfu" in row) == (step in (8, 9)), "in the first two starts the peak is not known"
        if paced:
            assert row["images_per_second"] == pytest.approx(BATCH / row["seconds_per_step"])
            assert row["tflops_per_second"] == pytest.approx(work / row["seconds_per_step"] / 1e12)
    for step in (8, 9):
        expected = found[step]["tflops_per_second"] * 1e12 / (PEAK * jax.device_count())
        assert found[step]["mfu"] == pytest.approx(expected)
    for step in (2, 5, 8):  # no batch is fetched after the last step of a start
        assert 0 < found[step]["data_share"] < 1


def test_exporting_the_teacher_is_not_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is that of checkpoints, so that it neither counts as useful nor makes a straggler of who writes."""
    monkeypatch.setattr(tools.Tools, "export_teacher", lambda self, state, step: time.sleep(0.5))
    fields = {"checkpoint__every": "0", "checkpoint__keep_every": "0", "checkpoint__teacher_every": "2"}
    loop.train(tiny(data, stop_at_step=3, **fields), str(tmp_path / "run"))
    row = rows(tmp_path / "run", "loss")[2]
    assert row["checkpoint_share"] * row["seconds_per_step"] >= 0.5


def test_a_checkpoint_says_what_it_is_of(run: Run) -> None:
    assert run.starts[1].meta == {
        "step": 6,
        "evaluated": True,
        "example": 6 * BATCH,
        "records": len(load_index(run.config.data.dir, "train")),
        "index": hashlib.sha256(load_index(run.config.data.dir, "train").tobytes()).hexdigest(),
        "schedules": {
            "total_steps": STEPS,
            "optim.warmup": 1,
            "optim.freeze_last": 1,
            "objective.teacher_temp_warmup": 2,
        },
        "skipped": {"0": {DAMAGED: rows(run.workdir, "skipped")[6]["skipped"]}},
        "model": as_json(dataclasses.asdict(model_spec(run.config))),
        "config": as_json(flatten(run.config)) | {"stop_at_step": 6},
        "statistics": json.loads(statistics().to_json()),
    }


def test_a_start_with_other_data_leaves_the_run_as_it_was(data: Path, run: Run, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", [fake_record(i) for i in range(1, STEPS * BATCH + 1)])
    (other / "statistics.json").write_text(Statistics.published().to_json())
    kept = ("statistics.json", "landcover.png", "config_resolved.json", "metrics.jsonl")
    before = [(run.workdir / name).read_bytes() for name in kept]
    with pytest.raises(ConfigError, match="other records and other statistics than the data set"):
        loop.train(tiny(other), str(run.workdir))
    assert [(run.workdir / name).read_bytes() for name in kept] == before


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def test_records_skipped_before_a_restart_are_counted(run: Run) -> None:
    counts = [start.meta["skipped"]["0"] for start in run.starts[:3]]  # of the first process
    assert counts[2] == {DAMAGED: 8}
    assert 0 < counts[0][DAMAGED] < counts[1][DAMAGED] < 8
    logged = rows(run.workdir, "skipped")
    assert [{DAMAGED: logged[step]["skipped"]} for step in (3, 6, 9)] == counts


def events(folder: Path) -> Iterator[Any]:
    """TensorBoard's events: records of length, checksum, protocol buffer, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            yield Event.FromString(content[at + 12 : at + 12 + length])
            at += length + 16


def test_tensorboard_holds_the_scalars_of_all_starts(run: Run) -> None:
    found = {
        (value.tag, event.step): value.simple_value
        for event in events(run.workdir / "tensorboard")
        for value in event.summary.value
    }
    for key in ("loss", "grad_norm", "watched"):
        expected = {(key, step): row[key] for step, row in rows(run.workdir, key).items()}
        assert {k: v for k, v in found.items() if k[0] == key} == pytest.approx(expected)


def test_wandb_gets_the_rows_of_its_start(run: Run) -> None:
    (options,) = run.wandb.begun
    name = (run.workdir / "wandb_id").read_text()  # the next start goes on with the same run
    assert options == {"project": "a project", "id": name, "resume": "allow", "dir": str(run.workdir)}
    assert name.isalnum()
    losses = {step: values["loss"] for step, values in run.wandb.rows if "loss" in values}
    assert losses == {step: row["loss"] for step, row in rows(run.workdir, "loss").items() if step > 6}
    assert run.wandb.finished == 1
