"""The training program, top to bottom: devices, data, state, compile, then the loop.

Order inside the loop makes resuming exact: evaluate and save the state *before* step n, then take
batch n, then step. Everything random is a function of the step and the seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from terrafm_jax import config as config_lib
from terrafm_jax.data import pipeline
from terrafm_jax.training import pictures, report
from terrafm_jax.training import workdir as workdir_lib
from terrafm_jax.training.checkpoint import Checkpointer
from terrafm_jax.training.compiled import Compiled
from terrafm_jax.training.init_from import Weights, doubts_about, unread_weights, with_weights
from terrafm_jax.training.meter import Meter, due
from terrafm_jax.training.metrics import MetricWriter, Progress, timed
from terrafm_jax.training.plan import Plan, describe, make_plan, record
from terrafm_jax.training.preemption import Interrupted, StopRequest
from terrafm_jax.training.sharding import local_rows, make_batch
from terrafm_jax.training.state import TrainState
from terrafm_jax.training.step import abstract_state, init_state, views_of_step
from terrafm_jax.training.tools import Evaluator, Tools, TrainingError, skipped_before
from terrafm_jax.training.trace import Trace

_SOON = 1000  # canvases that occur within this many steps are compiled ahead, others when they first occur


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a run ended. ``exit_code`` is 0 only when complete, stopped where asked or interrupted by a person."""

    step: int
    complete: bool
    exit_code: int


def train(
    config: ConfigDict,
    workdir: str,
    evaluators: Callable[[Plan], Sequence[Evaluator]] | None = None,
    read_weights: Callable[[str], Weights] | None = None,
) -> Outcome:
    """Pretrains, or resumes what ``workdir`` holds.

    Args:
      config: checked here.
      workdir: local or gs:// folder.
      evaluators: called once with the plan; the functions it returns run every ``config.knn.every``.
      read_weights: opens ``config.init_from``.

    Raises:
      ConfigError: the config or the workdir does not fit.
      TrainingError: non-finite losses, too many unreadable records.
      CheckpointError: a checkpoint cannot be written or read.
    """
    config_lib.check(config)
    stop = StopRequest()  # before start-up, so that a signal during it is honored, too: at the first step
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
    evaluators: Callable[[Plan], Sequence[Evaluator]] | None,
    read_weights: Callable[[str], Weights] | None,
    stop: StopRequest,
) -> Outcome:
    # --- plan: config, data order, statistics, mesh ---
    plan = make_plan(config, workdir)
    workdir_lib.claim(workdir, config, write=plan.writes)
    writer = MetricWriter(workdir, plan.writes, config.log.tensorboard, config.log.wandb)
    progress = Progress(0, plan.total, enabled=plan.writes)
    describe(plan, progress)

    # --- state ---
    checkpoints = Checkpointer(workdir, config.checkpoint.keep_last, plan.steps["checkpoint.keep_every"])
    state, skipped, evaluated = _begin(plan, checkpoints, read_weights, progress)
    start = int(state.step)
    progress.resume(start)
    # Of a run that was complete nobody waited for the next start: the time between is not lost (report.goodput).
    idle = {"after": "complete"} if plan.writes and workdir_lib.is_done(workdir) else {}
    if plan.writes:
        record(plan)  # only now: a start that is refused, on other data, must leave the run's files as they were
        if start < plan.total:
            workdir_lib.mark_open(workdir)
    writer.write(start, {"event": "start", "devices": jax.device_count(), "processes": jax.process_count(), **idle})

    # --- input, evaluators, signals ---
    loader = make_loader(plan, start, skipped)
    tools = Tools(plan, checkpoints, writer, loader, progress, stop, Trace(config.profile, workdir))
    together = True
    try:
        # No mesh is set around the loop: the step's shardings name theirs, and evaluators work on one device.
        return _loop(tools, state, start, evaluators(plan) if evaluators else (), evaluated)
    except BaseException as error:
        # All processes raise a TrainingError at the same step. Any other error happens to one process while the others
        # are in a step or gone, so closing must not wait for them.
        together = isinstance(error, TrainingError) or jax.process_count() == 1
        raise
    finally:
        tools.close(together)


def _begin(
    plan: Plan, checkpoints: Checkpointer, read_weights: Callable[[str], Weights] | None, progress: Progress
) -> tuple[TrainState, dict[str, int], int | None]:
    """The state to train from: of the newest checkpoint of the workdir, else of ``config.init_from``, else random.

    Returns:
      The state, the damaged records by file that this process has skipped before it, and its step if that has been
      evaluated already, else None.
    """
    init_from = plan.config.init_from
    if checkpoints.latest() is None:
        state = init_state(plan.spec, plan.mesh)
        if init_from:
            given = read_weights(init_from)
            state, taken = with_weights(state, given.params)
            progress.line(f"weights taken from {init_from}: {taken}")
            for doubt in doubts_about(given, plan.spec.model, plan.spec.stats):
                progress.line(f"warning: {init_from}: {doubt}")
        return state, {}, None
    state, meta = checkpoints.restore(abstract_state(plan.spec, plan.mesh))
    plan.check_data(meta)
    step = int(state.step)
    progress.line(f"resumed step {step} of {checkpoints.folder}; {report.goodput_line(plan.workdir)}")
    for warning in [*plan.changes(meta), *filter(None, [unread_weights(init_from, meta)])]:
        progress.line(warning)
    return state, skipped_before(meta), step if meta.get("evaluated", True) else None


def make_loader(plan: Plan, start: int, skipped: Mapping[str, int]) -> pipeline.Loader:
    """The Grain pipeline of this process, positioned at step ``start``."""
    d = plan.config.data
    return pipeline.make_loader(
        d.dir, d.split, plan.order, start_step=start, stop_step=plan.total, sensors=plan.spec.model.sensors,
        workers=d.workers, cache=d.cache, echo=d.echo, canvases=d.canvases, max_skipped=d.max_skipped, skipped=skipped,
        rows=local_rows(plan.mesh, plan.config.batch_size, jax.process_index()),
    )  # fmt: skip


def _loop(
    tools: Tools, state: TrainState, start: int, evaluators: Sequence[Evaluator], evaluated: int | None
) -> Outcome:
    """The steps from ``start`` on. ``evaluated``: the step that an earlier start has evaluated, if it is this one."""
    plan, steps = tools.plan, tools.plan.steps
    step_fn = Compiled(plan, tools.progress)
    step_fn.ahead(tools.loader.coming(max(0, min(plan.stop - start, _SOON))))
    meter = Meter(tools)
    saved = start if start else None
    batch = arrays = None
    for step in range(start, max(start, plan.stop) + 1):
        # --- the state before step `step`: evaluate, save, stop ---
        last = step >= plan.stop  # a checkpoint may be past it, where config.stop_at_step has been lowered
        finished = None  # whether the evaluation before this step ran to its end; None: none was due
        if evaluators and due(step, steps["knn.every"], last and step == plan.total) and step != evaluated:
            meter.flush()
            with timed(meter.seconds, "evaluation"):
                finished = _evaluate(tools, evaluators, step, state)
                if finished and step == saved:
                    tools.mark_evaluated(step)
        preempted = tools.stop.reached()
        # Durations are rounded to steps one by one: 50 epochs are seldom a multiple of what one epoch comes to.
        stays = due(step, steps["checkpoint.keep_every"])
        if step != saved and step > 0 and due(step, steps["checkpoint.every"], stays or last or preempted):
            meter.flush(log=preempted)
            if _save(tools, meter, state, step, evaluated=bool(finished), last=last):
                saved = step
        if step > 0 and due(step, steps["checkpoint.teacher_every"], last) and not meter.nonfinite:
            with timed(meter.seconds, "checkpoint"):
                tools.export_teacher(state, step)
        if last or preempted:
            break
        step_fn.wait()
        # --- batch, step; the metrics of the previous step are read while this one runs ---
        with timed(meter.seconds, "data"):
            tiles = next(tools.loader)
            if tiles is not batch:  # an echoed batch (data.echo) is on the devices already
                batch, arrays = tiles, make_batch(plan.mesh, tiles, plan.config.batch_size)
        if step == start == 0 and plan.config.log.pictures and plan.writes:
            _draw_first_batch(plan, batch)
        tools.trace.before(step, state)
        with timed(meter.seconds, "device"):  # the call blocks where the backend queues no more work
            state, metrics = step_fn(state, arrays)
        meter.push(step + 1, metrics)
    meter.flush()
    tools.checkpoints.wait()
    return _finish(tools, step, saved, preempted and (step < plan.stop or finished is False))


def _save(tools: Tools, meter: Meter, state: TrainState, step: int, *, evaluated: bool, last: bool) -> bool:
    """Starts to write a checkpoint. False: the newest losses are not finite, and it must not replace a good one."""
    if meter.nonfinite and last:
        raise TrainingError(f"step {step}: loss or gradient not finite at the end. {tools.last_good()}")
    if meter.nonfinite:
        tools.progress.line(f"step {step}: not saved, as the loss or the gradient is not finite")
        return False
    with timed(meter.seconds, "checkpoint"):
        tools.save(state, step, evaluated=evaluated)
    return True


def _evaluate(tools: Tools, evaluators: Sequence[Evaluator], step: int, state: TrainState) -> bool:
    """Runs the evaluators and writes their results. False: told to stop midway; the interrupted one writes nothing."""
    try:
        for evaluate in evaluators:
            found = dict(evaluate(step, state, tools.stop.poll))
            tools.writer.write(step, found)
            if headlines := _headlines(found):
                tools.progress.line(f"step {step}: {headlines}")
    except Interrupted:
        tools.progress.line(f"step {step}: told to stop while evaluating; the next start evaluates this step again")
        return False
    return True


def _headlines(found: Mapping[str, Any]) -> str:
    """The scores of an evaluator for the log, without those of single classes."""
    scores = {name: value for name, value in found.items() if isinstance(value, float) and "_class/" not in name}
    return ", ".join(f"{name} {value:.4g}" for name, value in scores.items())


def _finish(tools: Tools, step: int, saved: int | None, preempted: bool) -> Outcome:
    plan = tools.plan
    if plan.writes:
        tools.writer.flush()
        report.write(plan.workdir)
        tools.progress.line(report.goodput_line(plan.workdir))
    if preempted and not tools.stop.by_person:
        newest = "no checkpoint yet" if saved is None else f"newest checkpoint: step {saved}"
        tools.progress.line(f"stopped by a signal at step {step}, {newest}; start again to resume")
        return Outcome(step, False, plan.config.exit_code_preempted)
    complete = step >= plan.total and not preempted  # told to stop at the last step, its evaluation is not done
    if complete and plan.writes:
        workdir_lib.mark_done(plan.workdir, step)
    tools.progress.line(f"{'complete' if complete else 'stopped'} at step {step} of {plan.total}: {plan.workdir}")
    return Outcome(step, complete, 0)


def _draw_first_batch(plan: Plan, batch: Mapping[str, Any]) -> None:
    views = jax.jit(lambda b: views_of_step(plan.spec, b, 0))(jax.tree.map(lambda x: x[:8], dict(batch)))
    pictures.save_views(epath.Path(plan.workdir) / "views.png", views, plan.spec.views)
