"""What a checkpoint says besides the state, and what the next start makes of it."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_step import tiny
from tiles_fake import fake_record, write_dataset

from terrafm_jax import landcover
from terrafm_jax.config import ConfigError, base, flatten
from terrafm_jax.data import pipeline
from terrafm_jax.data.sampling import SamplingSpec
from terrafm_jax.data.tiles import INDEX_DTYPE
from terrafm_jax.models import cudnn
from terrafm_jax.sensors import Statistics
from terrafm_jax.training import init_from, tools
from terrafm_jax.training import plan as plans
from terrafm_jax.training.plan import Plan

COUNTS = {"0": {"a": 1}, "1": {"a": 2, "b": 5}}


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (2, [{"a": 1}, {"a": 2, "b": 5}]),
        (1, [{"a": 3, "b": 5}]),
        (3, [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 1}]),
        (10, [{"a": 1}] * 3 + [{"b": 1}] * 5 + [{}] * 2),
    ],
)
def test_each_process_takes_up_its_own_count_of_damage(
    processes: int, expected: list[dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another number of processes each takes a share: the run's total stays."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    found = []
    for index in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda index=index: index)
        found.append(tools.skipped_before({"skipped": COUNTS}))
    assert found == expected
    assert sum((Counter(counts) for counts in found), Counter()) == {"a": 3, "b": 5}


def test_damage_before_a_start_on_more_processes_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of 80 records was damaged, a fifth may be; four processes go on, and the first meets another one."""
    folder = write_dataset(tmp_path, [fake_record(i) for i in range(80)], per_shard=1)
    order = pipeline.make_order(folder, "train", SamplingSpec("uniform"), batch_size=8, seed=0)
    shard = folder / f"fake-train.array_record-{order.batch(10)[0]:05d}-of-00080"
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    monkeypatch.setattr(pipeline, "_MIN_ATTEMPTS", 0)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    monkeypatch.setattr(jax, "process_index", lambda: 0)
    before = tools.skipped_before({"skipped": {"0": {"a": 8}}})
    loader = pipeline.make_loader(
        folder, "train", order, start_step=10, rows=np.arange(2), max_skipped=0.2, skipped=before
    )
    next(loader)
    loader.close()
    assert loader.skipped == {"a": 2, shard.name: 1}


def a_plan(**changes: bool) -> Plan:
    config = base()
    config.data.dir = "DATA"
    for key, value in changes.items():
        config[key] = value
    spec, order = SimpleNamespace(stats=Statistics.published()), SimpleNamespace(num_records=40)
    steps = {"total_steps": 200, "optim.warmup": 10, "checkpoint.every": 3}
    return Plan(config, "RUN", spec, steps, order, None, True, "digest")


def test_a_run_goes_on_with_its_own_data_only() -> None:
    meta = {"records": 40, "statistics": json.loads(Statistics.published().to_json())}
    a_plan().check_data(meta)
    a_plan().check_data({})
    with pytest.raises(ConfigError, match=r"config.data.dir: DATA has other records than the data set that RUN"):
        a_plan().check_data({**meta, "records": 41})
    other = json.loads(json.dumps(meta["statistics"]).replace("0", "1"))
    with pytest.raises(ConfigError, match="other records and other statistics"):
        a_plan().check_data({"records": 41, "statistics": other})
    with pytest.raises(ConfigError, match="DATA has other records than the data set"):  # as many, say in another order
        a_plan().check_data({**meta, "index": "another"})
    with pytest.raises(ConfigError, match="DATA has other records than the data set"):
        a_plan().check_data({**meta, "records": 41, "index": "another"})
    a_plan(allow_config_change=True).check_data({"records": 41})


def test_a_run_that_goes_on_with_another_recipe_says_what_changed() -> None:
    """The flag that allows it stays in the script; and schedules of another length jump."""
    plan = a_plan()
    config = json.loads(json.dumps(flatten(plan.config)))
    assert plan.schedules() == {"total_steps": 200, "optim.warmup": 10}
    assert plan.changes({"config": config, "schedules": plan.schedules()}) == []
    assert plan.changes({}) == [], "a checkpoint of an older version"
    before = {"config": config | {"batch_size": 512, "log.every": "7"}, "schedules": {"total_steps": 400}}
    batch, total = plan.changes(before)
    assert batch == "warning: changed since the checkpoint: config.batch_size: 512 there, 1024 here"
    assert total.endswith("config.total_steps: 400 steps there, 200 here")
    longer = {"config": config | {"total_steps": "other"}, "schedules": {"total_steps": 400}}
    assert len(plan.changes(longer)) == 1, "told once"
    (data,) = plan.changes({"config": config, "index": "another"})
    assert data.endswith("config.data.dir: DATA has other records")


def test_a_batch_larger_than_the_data_set_is_told_of(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path, [fake_record(i) for i in range(8)])
    small, large = (
        pipeline.make_order(folder, "train", SamplingSpec("uniform"), batch_size=size, seed=0) for size in (8, 9)
    )
    assert plans.repeated_in_a_batch(small) == ""
    assert plans.repeated_in_a_batch(large).startswith("warning: an epoch has 8 records, a batch 9")


@pytest.mark.parametrize(
    ("step", "said"), [(None, "There is no checkpoint yet"), (7, "The last good checkpoint is RUN/checkpoints/7")]
)
def test_what_an_error_says_of_checkpoints(step: int | None, said: str) -> None:
    checkpoints = SimpleNamespace(latest=lambda: step, folder=Path("RUN/checkpoints"))
    assert tools.Tools.last_good(SimpleNamespace(checkpoints=checkpoints)) == said


def test_finite_means_every_leaf() -> None:
    tree = {"a": np.ones(3, np.float32), "b": {"c": np.ones((2, 2), np.float32)}, "step": np.int32(7)}
    assert tools.all_finite(tree)
    tree["b"]["c"][1, 1] = np.inf
    assert not tools.all_finite(tree)


@pytest.mark.parametrize(
    ("others", "asked", "expected"), [(1, "auto", "auto"), (0, "auto", "xla"), (0, "cudnn", "cudnn")]
)
def test_processes_attend_alike(others: int, asked: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN works here; where it does not elsewhere, nobody uses it: other programs would wait for each other."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(cudnn, "works", lambda: True)
    monkeypatch.setattr(plans.processes, "rows_of_all", lambda mine: [mine, np.array([others])])
    spec = tiny()
    spec = dataclasses.replace(
        spec, model=dataclasses.replace(spec.model, attention=asked, dtype="bfloat16", platform="gpu")
    )
    assert plans.with_one_attention(spec).model.attention == expected
    on_cpu = dataclasses.replace(spec, model=dataclasses.replace(spec.model, platform="cpu"))
    assert plans.with_one_attention(on_cpu) is on_cpu


def test_processes_with_other_flags_or_data_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train on its own: on a mixture of data sets, or on other steps than the rest, which wait for it."""
    records = {"here": range(4), "copy": range(4), "other": range(1, 5)}
    here, copy, other = (write_dataset(tmp_path / n, [fake_record(i) for i in r]) for n, r in records.items())
    first: list[dict] = []
    monkeypatch.setattr(jax, "process_count", lambda: 3)

    def process(folder: Path, **changes: object) -> None:
        config = base()
        config.data.dir, config.data.statistics = str(folder), "published"
        config.update(changes)
        plans.check_alike(config)

    load, held_out = plans.pipeline.load_index, np.zeros(3, INDEX_DTYPE)
    given = {"train": None, "validation": held_out}
    monkeypatch.setattr(
        plans.pipeline,
        "load_index",
        lambda folder, split: load(folder, split) if given[split] is None else given[split],
    )
    monkeypatch.setattr(plans.processes, "objects_of_all", lambda mine: first.append(mine) or [mine])
    process(here)
    monkeypatch.setattr(plans.processes, "objects_of_all", lambda mine: [first[0], first[0], mine])
    process(here)
    process(copy, data={"workers": 3})  # what a host may have of its own
    with pytest.raises(ConfigError, match=r"^process 2 has other config\.seed than process 0: give all"):
        process(here, seed=1)
    with pytest.raises(ConfigError, match=r"other config\.batch_size, records of config\.data\.dir than process 0"):
        process(other, batch_size=8)
    given["validation"] = held_out[:2]
    with pytest.raises(ConfigError, match=r"^process 2 has other records of config\.knn\.split than process 0"):
        process(here)
    given["validation"] = None  # there is no such split: with kNN that ends the run, without it nobody looks
    with pytest.raises(ConfigError, match=r"other records of config\.knn\.split than"):
        process(here)
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    process(other, seed=1)


def test_warmups_that_outlast_the_run_are_named() -> None:
    steps = {"optim.warmup": 100, "optim.freeze_last": 300, "objective.teacher_temp_warmup": 900}
    assert plans.unfinished_schedules(steps, 301) == ""
    assert plans.unfinished_schedules(steps, 300).endswith("within config.optim.freeze_last (300 steps)")
    found = plans.unfinished_schedules(steps, 100)
    assert found.endswith("within config.optim.warmup (100 steps), config.optim.freeze_last (300 steps)")


@pytest.mark.parametrize(
    ("mode", "known", "told"), [("balanced", 0, True), ("balanced", 1, False), ("paper", 0, False)]
)
def test_classes_that_are_not_known_are_not_balanced_in_silence(
    mode: str, known: int, told: bool, tmp_path: Path
) -> None:
    categories = [0] * known + [landcover.UNKNOWN] * (8 - known)
    folder = write_dataset(tmp_path, [fake_record(i, category=c) for i, c in enumerate(categories)])
    order = pipeline.make_order(folder, "train", SamplingSpec(mode), batch_size=2, seed=0)
    assert ("no classes to balance" in plans.nothing_to_balance(order)) == told


def test_a_sensor_that_no_tile_holds_is_told_of(tmp_path: Path) -> None:
    """Its stem stays random, and the model would give features of it all the same."""
    records = [fake_record(i, sensors=("s2_l2a",) if i % 4 else ("s2_l1c", "s2_l2a")) for i in range(8)]
    folder = write_dataset(tmp_path, records)
    order = pipeline.make_order(folder, "train", SamplingSpec("uniform"), batch_size=2, seed=0)
    told, warned = plans.held_sensors(order)
    assert told == "sensors: s1 in 0 tiles, s2_l1c in 2 tiles, s2_l2a in 8 tiles"
    assert "no tile holds s1," in warned
    assert warned.endswith("--config.model.sensors=\"('s2_l1c', 's2_l2a')\"")
    held = pipeline.make_order(
        folder, "train", SamplingSpec("uniform"), batch_size=2, seed=0, sensors=("s2_l1c", "s2_l2a")
    )
    assert len(plans.held_sensors(held)) == 1


def test_weights_that_come_too_late_are_told_of() -> None:
    """The flag of a start that resumes: without a word the run would pass for one that began with them."""
    assert init_from.unread_weights("", {"config": {"init_from": "a"}}) == ""
    assert init_from.unread_weights("a", {"config": {"init_from": "a"}}) == ""
    assert "init_from=b is not read: this run began with random ones" in init_from.unread_weights(
        "b", {"config": {"init_from": ""}}
    )
