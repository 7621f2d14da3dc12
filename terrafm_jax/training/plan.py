"""The plan of a run: its config resolved for this data set and these devices, before training starts."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from terrafm_jax import config as config_lib
from terrafm_jax import landcover, processes
from terrafm_jax.data import pipeline
from terrafm_jax.data.sampling import Order
from terrafm_jax.data.source import DataError
from terrafm_jax.models import cudnn
from terrafm_jax.sensors import Statistics
from terrafm_jax.training import pictures
from terrafm_jax.training import workdir as workdir_lib
from terrafm_jax.training.metrics import Progress
from terrafm_jax.training.sharding import check_batch, make_mesh
from terrafm_jax.training.step import TrainSpec, parameter_table


@dataclasses.dataclass(frozen=True)
class Plan:
    """What all parts of the program share and none changes.

    Attributes:
      config: the checked config, read for what concerns only the host (paths, intervals, workers).
      workdir: the run's folder, local or gs://.
      spec: what the compiled step depends on.
      steps: every duration of the config in steps, by its dotted name ("checkpoint.every").
      order: which records each step trains on.
      mesh: the devices.
      writes: whether this process writes the run's files; only the first of several does.
      index: digest of the data set's index, from which the order is computed.
    """

    config: ConfigDict
    workdir: str
    spec: TrainSpec
    steps: Mapping[str, int]
    order: Order
    mesh: jax.sharding.Mesh
    writes: bool
    index: str

    @property
    def total(self) -> int:
        """Steps of the whole run, where the schedules end."""
        return self.steps["total_steps"]

    @property
    def stop(self) -> int:
        """The step at which this start ends: the last one, or ``config.stop_at_step``."""
        return min(self.total, self.config.stop_at_step or self.total)

    def data_facts(self) -> dict[str, Any]:
        """What a checkpoint says of the data set, by which :meth:`check_data` knows it again."""
        return {
            "records": self.order.num_records,
            "index": self.index,
            "statistics": json.loads(self.spec.stats.to_json()),
        }

    def check_data(self, meta: Mapping[str, Any]) -> None:
        """Raises ConfigError where a checkpoint comes from other records or statistics: resuming would not be exact.

        ``meta`` is the checkpoint's metadata (``Tools.save``).
        """
        different = self._other_data(meta)
        if different and not self.config.allow_config_change:
            raise config_lib.ConfigError(
                f"config.data.dir: {self.config.data.dir} has {different} than the data set "
                f"that {self.workdir} was trained on; give that one (it may have moved), another --workdir, or "
                "--config.allow_config_change=True to continue with this one"
            )

    def _other_data(self, meta: Mapping[str, Any]) -> str:
        """ "other records and other statistics", as far as that is so; "" for the data of the checkpoint."""
        different = [key for key, value in self.data_facts().items() if meta.get(key, value) != value]
        # As many records may be other ones, or the same in another order.
        return " and ".join(dict.fromkeys("other records" if key == "index" else f"other {key}" for key in different))

    def schedules(self) -> dict[str, int]:
        """Lengths of the schedules in steps, by the names of their config fields."""
        return {key: self.steps[key] for key in _SCHEDULES if key in self.steps}

    def changes(self, meta: Mapping[str, Any]) -> list[str]:
        """How the run differs from here on from what led to a checkpoint (``config.allow_config_change``), in lines.

        ``meta`` is the checkpoint's metadata (``Tools.save``). Schedules are functions of the step alone, so with
        another length the run is elsewhere on them, also where their config fields, in epochs, are the same.
        """
        mine = json.loads(json.dumps(config_lib.flatten(self.config)))
        before, theirs = meta.get("schedules", {}), meta.get("config", mine)
        lines = workdir_lib.differences({key: theirs.get(key, value) for key, value in mine.items()}, mine)
        if other := self._other_data(meta):
            lines.append(f"config.data.dir: {self.config.data.dir} has {other}")
        lines += [
            f"config.{key}: {before[key]} steps there, {steps} here"
            for key, steps in self.schedules().items()
            if before.get(key, steps) != steps and theirs.get(key, mine.get(key)) == mine.get(key)  # else said above
        ]
        return [f"warning: changed since the checkpoint: {line}" for line in lines]


# Durations that the compiled step depends on.
_SCHEDULES = ("total_steps", "optim.warmup", "optim.freeze_last", "objective.teacher_temp_warmup")


def make_plan(config: ConfigDict, workdir: str) -> Plan:
    """Reads the data set's index and statistics, converts durations, builds specs and mesh.

    Raises:
      ConfigError, ShardingError, or what the data set lacks; each names the config key or the file.
    """
    if not config.data.dir:
        raise config_lib.ConfigError("config.data.dir: empty; give the folder of a prepared data set (docs/data.md)")
    d, m = config.data, config.mesh
    check_alike(config)
    mesh = make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor)
    check_batch(mesh, config.batch_size, config.microbatches)
    order = pipeline.make_order(
        d.dir, d.split, config_lib.sampling_spec(config), batch_size=config.batch_size, seed=config.seed,
        sensors=tuple(config.model.sensors), canvases=d.canvases,
    )  # fmt: skip
    stats = Statistics.published() if d.statistics == "published" else pipeline.load_statistics(d.dir)
    steps = config_lib.durations(config, order.examples_per_epoch)
    shares = np.asarray(order.expected_histogram(), np.float64)
    return Plan(
        config=config,
        workdir=str(workdir),
        spec=with_one_attention(config_lib.train_spec(config, steps, stats, shares)),
        steps=steps,
        order=order,
        mesh=mesh,
        writes=jax.process_index() == 0,
        index=_digest(d.dir, d.split),
    )


# Config fields that processes may have of their own: where a host keeps its copies, and how it reads them.
_OWN = ("data.dir", "data.workers", "data.cache", "init_from", "knn.labelled")


def check_alike(config: ConfigDict) -> None:
    """Refuses processes with different configs or data sets (a collective on several processes).

    Left alone, they would train on a mixture of data sets, unnoticed, or take different steps and wait for each other
    forever. A data set is told by its index and its statistics; the records are not read.

    Raises:
      ConfigError: names the processes that differ from the first, and in what.
    """
    if jax.process_count() == 1:
        return
    d = config.data
    facts = {f"config.{key}": value for key, value in config_lib.flatten(config).items() if key not in _OWN}
    facts["records of config.data.dir"] = _digest(d.dir, d.split)
    for field in ("gallery", "split"):  # kNN stops where all agree at a batch: with other tiles they would count apart
        if config.knn[field] != d.split:
            with contextlib.suppress(DataError):  # one that is not there is told of by kNN, if that is wanted
                facts[f"records of config.knn.{field}"] = _digest(d.dir, config.knn[field])
    if d.statistics == "dataset":
        facts["statistics of config.data.dir"] = pipeline.load_statistics(d.dir).to_json()
    first, *others = processes.objects_of_all(facts)
    faults = []
    for process, theirs in enumerate(others, 1):
        different = sorted(key for key in first.keys() | theirs.keys() if first.get(key) != theirs.get(key))
        if different:
            faults.append(f"process {process} has other {', '.join(different)} than process 0")
    if faults:
        raise config_lib.ConfigError(
            f"{'; '.join(faults)}: give all processes the same flags and the same data set ({d.dir} here)"
        )


def _digest(folder: str, split: str) -> str:
    """Of the index of a split. Raises DataError."""
    return hashlib.sha256(np.ascontiguousarray(pipeline.load_index(folder, split)).view(np.uint8)).hexdigest()


def with_one_attention(spec: TrainSpec) -> TrainSpec:
    """XLA's attention on every GPU where cuDNN's fails on some (a collective on several processes with GPUs).

    Each process tests its own. Left to that, their programs would differ, and all would wait for each other forever.
    """
    model = spec.model
    if jax.process_count() == 1 or (model.attention, model.backend) != ("auto", "gpu") or not cudnn.fits(model):
        return spec
    works = [bool(rows[0]) for rows in processes.rows_of_all(np.array([cudnn.works()], np.int32))]
    return spec if all(works) else dataclasses.replace(spec, model=dataclasses.replace(model, attention="xla"))


def unfinished_schedules(steps: Mapping[str, int], total: int) -> str:
    """A line naming what a run of ``total`` steps ends within, else "". ``steps``: as in :class:`Plan`.

    Such a run never reaches its learning rate, or never trains the prototypes. (That a short one does not reach the
    teacher's last temperature is no fault.)
    """
    keys = ("optim.warmup", "optim.freeze_last")
    long = [f"config.{key} ({steps[key]} steps)" for key in keys if steps[key] >= total]
    return f"warning: the run ends after {total} steps, within {', '.join(long)}" if long else ""


def repeated_in_a_batch(order: Order) -> str:
    """A line where one batch takes more records than an epoch has, else "": the wrong folder, or too large a batch."""
    if order.batch_size <= order.epoch_size:
        return ""
    return (
        f"warning: an epoch has {order.examples_per_epoch} records, a batch {order.batch_size}: each batch holds tiles "
        "more than once; lower config.batch_size (is config.data.dir the right folder?)"
    )


def nothing_to_balance(order: Order) -> str:
    """A line where classes shall be balanced and no tile's is known, as where maps were not given, else ""."""
    if order.spec.mode != "balanced" or order.natural_histogram()[landcover.UNKNOWN] < 1:
        return ""
    return (
        "warning: config.data.sampling=balanced, but no tile has a known land cover, so there are no classes to balance"
    )


def held_sensors(order: Order) -> list[str]:
    """How many tiles hold each sensor, and a warning about those that none holds.

    The stem of such a sensor stays as it was drawn, but the model will take the sensor and give features of it.
    """
    lines = ["sensors: " + ", ".join(f"{key} in {count} tiles" for key, count in order.holding.items())]
    never = [key for key, count in order.holding.items() if not count]
    if never:
        rest = tuple(key for key in order.sensors if key not in never)
        lines.append(
            f"warning: no tile holds {', '.join(never)}, so nothing is learned of it; leave it out: "
            f'--config.model.sensors="{rest}"'
        )
    return lines


def describe(plan: Plan, progress: Progress) -> None:
    """Logs the plan."""
    frequent = _frequent(plan)
    progress.line(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(plan.mesh.shape)}")
    progress.line(f"{plan.total} steps of {plan.config.batch_size}, {plan.order.examples_per_epoch} records an epoch")
    for line in [*plan.order.describe().splitlines(), *held_sensors(plan.order)]:
        progress.line(line)
    progress.line(f"frequent land cover: {', '.join(frequent) or 'none, so there is one center'}")
    unfinished = unfinished_schedules(plan.steps, plan.total)
    for warning in filter(None, [unfinished, repeated_in_a_batch(plan.order), nothing_to_balance(plan.order)]):
        progress.line(warning)


def record(plan: Plan) -> None:
    """Writes ``config_resolved.json``, ``statistics.json``, ``parameters.txt`` and ``landcover.png`` of the workdir."""
    folder = epath.Path(plan.workdir)
    resolved = {"config": config_lib.flatten(plan.config), "steps": dict(plan.steps), "frequent": _frequent(plan)}
    (folder / "config_resolved.json").write_text(json.dumps(resolved, indent=2))
    (folder / "statistics.json").write_text(plan.spec.stats.to_json())
    (folder / "parameters.txt").write_text(parameter_table(plan.spec, plan.mesh))
    drawn, there = plan.order.expected_histogram(), plan.order.natural_histogram()
    pictures.save_classes(folder / "landcover.png", there, drawn)


def _frequent(plan: Plan) -> list[str]:
    """The land-cover categories that feed the second center, by name."""
    return [name for name, is_frequent in zip(landcover.NAMES, plan.spec.frequent, strict=True) if is_frequent]
