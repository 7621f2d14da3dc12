"""The training program, top to bottom: devices, data, state, compile, then the loop.

Order inside the loop makes resuming exact: evaluate and save the state *before* step n, then take
batch n, then step. Everything random is a function of the step and the seed.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from terrafm_jax import config as config_lib
from terrafm_jax import landcover
from terrafm_jax.data import pipeline
from terrafm_jax.sensors import Statistics
from terrafm_jax.training import pictures, report
from terrafm_jax.training import workdir as workdir_lib
from terrafm_jax.training.checkpoint import Checkpointer
from terrafm_jax.training.meter import Compiled, Meter, due
from terrafm_jax.training.metrics import MetricWriter, Progress, timed
from terrafm_jax.training.preemption import Interrupted, StopRequest
from terrafm_jax.training.run import Evaluator, Run, Tools, TrainingError, skipped_before
from terrafm_jax.training.sharding import check_batch, local_rows, make_mesh
from terrafm_jax.training.state import TrainState, with_weights
from terrafm_jax.training.step import abstract_state, draw_views, init_state, make_batch, parameter_table
from terrafm_jax.training.trace import Trace

log = logging.getLogger(__name__)


_SOON = 1000  # steps; a canvas that comes later is compiled when it does


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. ``exit_code`` is 0 only when complete, stopped where asked or interrupted by a person."""

    step: int
    complete: bool
    exit_code: int


def train(
    config: ConfigDict,
    workdir: str,
    evaluators: Callable[[Run], Sequence[Evaluator]] | None = None,
    read_weights: Callable[[str], Mapping[str, Any]] | None = None,
) -> Outcome:
    """Pretrains, or resumes what ``workdir`` holds.

    Args:
      config: checked here.
      workdir: local or gs:// folder.
      evaluators: called once with the plan; what it returns runs every ``config.knn.every``.
      read_weights: opens ``config.init_from``: path -> {"backbone": ..., "head": ...} (head optional).

    Raises:
      ConfigError: the config or the workdir does not fit.
      TrainingError: non-finite losses, too many unreadable records.
      CheckpointError: a checkpoint cannot be written or read.
    """
    config_lib.check(config)
    stop = StopRequest()  # a signal that comes while starting up is heard, too: the run ends at its first step
    try:
        return _train(config, workdir, evaluators, read_weights, stop)
    except TrainingError:
        if jax.process_index() == 0:
            report.write(workdir)
        raise
    finally:
        stop.close()


def _train(
    config: ConfigDict,
    workdir: str,
    evaluators: Callable[[Run], Sequence[Evaluator]] | None,
    read_weights: Callable[[str], Mapping[str, Any]] | None,
    stop: StopRequest,
) -> Outcome:
    # --- plan: config, data order, statistics, mesh ---
    run = plan(config, workdir)
    workdir_lib.claim(workdir, config, write=run.first)
    writer = MetricWriter(workdir, run.first, config.log.tensorboard, config.log.wandb)
    progress = Progress(0, run.total, enabled=run.first)
    describe(run, progress)

    # --- state: (1) the newest checkpoint of the workdir, (2) weights of init_from, (3) random ---
    checkpoints = Checkpointer(workdir, config.checkpoint.keep_last, run.steps["checkpoint.keep_every"])
    skipped: dict[str, int] = {}
    evaluated = None  # the step whose evaluation an earlier start has done
    if checkpoints.latest() is not None:
        state, meta = checkpoints.restore(abstract_state(run.spec, run.mesh))
        _same_data(run, meta)
        skipped = skipped_before(meta)
        evaluated = int(state.step) if meta.get("evaluated", True) else None
        progress.line(f"resumed step {int(state.step)} of {checkpoints.folder}; {report.goodput_line(workdir)}")
    else:
        state = init_state(run.spec, run.mesh)
        if config.init_from:
            state, taken = with_weights(state, read_weights(config.init_from))
            progress.line(f"weights taken from {config.init_from}: {taken}")
    start = int(state.step)
    progress.resume(start)
    writer.write(start, {"event": "start", "devices": jax.device_count(), "processes": jax.process_count()})

    # --- input, evaluators, signals ---
    loader = make_loader(run, start, skipped)
    tools = Tools(run, checkpoints, writer, loader, progress, stop, Trace(config.profile, workdir))
    together = True
    try:
        # No mesh is set around the loop: the step's shardings name theirs, and evaluators work on one device.
        return _loop(tools, state, start, evaluators(run) if evaluators else (), evaluated)
    except TrainingError:  # raised by all processes at the same step
        raise
    except BaseException:
        together = jax.process_count() == 1
        raise
    finally:
        tools.close(together)


def plan(config: ConfigDict, workdir: str) -> Run:
    """Reads the data set's index and statistics, converts durations, builds specs and mesh."""
    if not config.data.dir:
        raise config_lib.ConfigError("config.data.dir: empty; give the folder of a prepared data set (docs/data.md)")
    d, m = config.data, config.mesh
    mesh = make_mesh(data=m.data, fsdp=m.fsdp, tensor=m.tensor)
    check_batch(mesh, config.batch_size, config.microbatches)
    sampling = config_lib.sampling_spec(config)
    order = pipeline.make_order(
        d.dir, d.split, sampling, batch_size=config.batch_size, seed=config.seed,
        sensors=tuple(config.model.sensors), canvases=d.canvases,
    )  # fmt: skip
    shares = np.asarray(order.expected_histogram(), np.float64)
    stats = Statistics.published() if d.statistics == "published" else pipeline.load_statistics(d.dir)
    steps = config_lib.durations(config, order.examples_per_epoch)
    return Run(
        config=config,
        workdir=str(workdir),
        spec=config_lib.train_spec(config, steps, stats, shares),
        steps=steps,
        order=order,
        mesh=mesh,
        first=jax.process_index() == 0,
    )


def _same_data(run: Run, meta: Mapping[str, Any]) -> None:
    """Raises ConfigError where the checkpoint comes of other records or statistics: resuming would not be exact."""
    mine = {"records": run.order.num_records, "statistics": json.loads(run.spec.stats.to_json())}
    different = [key for key, value in mine.items() if meta.get(key, value) != value]
    if different and not run.config.allow_config_change:
        raise config_lib.ConfigError(
            f"config.data.dir: {run.config.data.dir} has other {' and other '.join(different)} than the data set that "
            f"{run.workdir} was trained on; give that one (it may have moved), another --workdir, or "
            "--config.allow_config_change=True to go on with this one"
        )


def make_loader(run: Run, start: int, skipped: Mapping[str, int]) -> pipeline.Loader:
    """The Grain pipeline of this process, positioned at step ``start``."""
    d = run.config.data
    return pipeline.make_loader(
        d.dir, d.split, run.order, start_step=start, stop_step=run.total, sensors=run.spec.model.sensors,
        workers=d.workers, cache=d.cache, echo=d.echo, canvases=d.canvases, max_skipped=d.max_skipped, skipped=skipped,
        rows=local_rows(run.mesh, run.config.batch_size, jax.process_index()),
    )  # fmt: skip


def describe(run: Run, progress: Progress) -> None:
    """Logs the plan and writes ``config_resolved.json``, ``statistics.json``, ``parameters.txt``, ``landcover.png``."""
    frequent = [n for n, f in zip(landcover.NAMES, run.spec.frequent, strict=True) if f]
    progress.line(f"{jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(run.mesh.shape)}")
    progress.line(f"{run.total} steps of {run.config.batch_size}, {run.order.examples_per_epoch} records an epoch")
    for line in run.order.describe().splitlines():
        progress.line(line)
    progress.line(f"frequent land cover: {', '.join(frequent) or 'none, so there is one center'}")
    if run.first:
        folder = epath.Path(run.workdir)
        resolved = {"config": config_lib.flatten(run.config), "steps": dict(run.steps), "frequent": frequent}
        (folder / "config_resolved.json").write_text(json.dumps(resolved, indent=2))
        (folder / "statistics.json").write_text(run.spec.stats.to_json())
        (folder / "parameters.txt").write_text(parameter_table(run.spec, run.mesh))
        order = run.order
        pictures.save_classes(folder / "landcover.png", order.natural_histogram(), order.expected_histogram())


def _loop(
    tools: Tools, state: TrainState, start: int, evaluators: Sequence[Evaluator], evaluated: int | None
) -> Outcome:
    run, steps = tools.run, tools.run.steps
    step_fn = Compiled(run, tools.progress)
    step_fn.ahead(tools.loader.coming(max(0, min(run.stop - start, _SOON))))
    meter = Meter(run, tools)
    saved = start if start else None
    batch = arrays = None
    for step in range(start, max(start, run.stop) + 1):
        # --- the state before step `step`: evaluate, save, stop ---
        last = step >= run.stop  # a checkpoint may be past it, where config.stop_at_step has been lowered
        whole = True
        if evaluators and due(step, steps["knn.every"], last and step == run.total) and step != evaluated:
            meter.flush()
            with timed(meter.seconds, "evaluation"):
                whole = _evaluate(tools, evaluators, step, state)
        preempted = tools.stop.reached()
        if step != saved and step > 0 and due(step, steps["checkpoint.every"], last or preempted):
            meter.flush(log=preempted)
            if not meter.nonfinite:
                with timed(meter.seconds, "checkpoint"):
                    tools.save(state, step, whole)
                saved = step
            elif last:
                raise TrainingError(f"step {step}: loss or gradient not finite at the end. {tools.last_good()}")
            else:  # a state of which such losses come must not take the place of a good one
                tools.progress.line(f"step {step}: not saved, as loss or gradient are not finite")
        if step > 0 and due(step, steps["checkpoint.teacher_every"], last) and not meter.nonfinite:
            tools.export_teacher(state, step)
        if last or preempted:
            break
        step_fn.wait()
        # --- batch, step; the metrics of the previous step are read while this one runs ---
        with timed(meter.seconds, "data"):
            tiles = next(tools.loader)
            if tiles is not batch:  # an echoed batch (data.echo) is on the devices already
                batch, arrays = tiles, make_batch(run.mesh, tiles, run.config.batch_size)
        if step == start == 0 and run.config.log.pictures and run.first:
            _draw_first_batch(run, batch)
        tools.trace.before(step, state)
        state, metrics = step_fn(state, arrays)
        meter.push(step + 1, metrics)
    meter.flush()
    tools.checkpoints.wait()
    return _finish(tools, step, saved, preempted and (step < run.stop or not whole))


def _evaluate(tools: Tools, evaluators: Sequence[Evaluator], step: int, state: TrainState) -> bool:
    """Writes what the evaluators find. False: told to stop in the middle; nothing of the interrupted one is written."""
    try:
        for evaluate in evaluators:
            tools.writer.write(step, dict(evaluate(step, state, tools.stop.poll)))
    except Interrupted:
        tools.progress.line(f"step {step}: told to stop while evaluating; the next start evaluates this step again")
        return False
    return True


def _finish(tools: Tools, step: int, saved: int | None, preempted: bool) -> Outcome:
    run = tools.run
    if run.first:
        report.write(run.workdir)
        tools.progress.line(report.goodput_line(run.workdir))
    if preempted and not tools.stop.by_person:
        newest = "no checkpoint yet" if saved is None else f"newest checkpoint: step {saved}"
        tools.progress.line(f"stopped by a signal at step {step}, {newest}; start again to resume")
        return Outcome(step, False, run.config.exit_code_preempted)
    complete = step >= run.total
    if complete and run.first:
        workdir_lib.mark_done(run.workdir, step)
    tools.progress.line(f"{'complete' if complete else 'stopped'} at step {step} of {run.total}: {run.workdir}")
    return Outcome(step, complete, 0)


def _draw_first_batch(run: Run, batch: Mapping[str, Any]) -> None:
    views = jax.jit(lambda b: draw_views(run.spec, b, 0))(jax.tree.map(lambda x: x[:8], dict(batch)))
    pictures.save_views(epath.Path(run.workdir) / "views.png", views, run.spec.views)
