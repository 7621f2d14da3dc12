"""What a run uses besides its state: checkpoints, metrics, input, progress, signals."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from terrafm_jax import config as config_lib
from terrafm_jax import weights
from terrafm_jax.data.memory import free_batches
from terrafm_jax.data.pipeline import Loader
from terrafm_jax.processes import objects_of_all, to_host
from terrafm_jax.provenance import portable
from terrafm_jax.training.checkpoint import Checkpointer
from terrafm_jax.training.metrics import MetricWriter, Progress
from terrafm_jax.training.plan import Plan
from terrafm_jax.training.preemption import StopRequest
from terrafm_jax.training.state import TrainState
from terrafm_jax.training.trace import Trace

# An evaluator takes (step, state, poll) and yields (name, value) pairs. It must call poll() at every batch, equally
# often on every process, and must not catch the Interrupted that poll() raises when the job is told to stop.
Evaluator = Callable[[int, TrainState, Callable[[], None]], Iterator[tuple[str, float]]]

REMEDY = "try a lower config.optim.base_lr, and check the statistics of the data"  # for losses that are not finite


class TrainingError(RuntimeError):
    """Training cannot continue; the message says why, and which checkpoint is the last good one."""


@dataclasses.dataclass
class Tools:
    """What the loop uses besides the state: the plan, and everything that reads or writes outside the step."""

    plan: Plan
    checkpoints: Checkpointer
    writer: MetricWriter
    loader: Loader
    progress: Progress
    stop: StopRequest
    trace: Trace

    def save(self, state: TrainState, step: int, evaluated: bool) -> None:
        """Starts to write a checkpoint. ``evaluated`` False: the next start evaluates this step, if that is due.

        Raises:
          TrainingError: the state is not finite; it must not replace a good checkpoint.
        """
        self._require_finite(state, step)
        config = self.plan.config
        meta = {
            "step": step,
            "evaluated": evaluated,
            "example": -(-step // config.data.echo) * config.batch_size,
            "skipped": {str(process): found for process, found in enumerate(objects_of_all(self.loader.skipped))},
            "model": dataclasses.asdict(self.plan.spec.model),
            "config": config_lib.flatten(config),
            "schedules": self.plan.schedules(),
            **self.plan.data_facts(),
        }
        self.writer.flush()  # a resumed run repeats the rows of later steps only, so earlier ones must not get lost
        self.checkpoints.save(step, state, meta)

    def mark_evaluated(self, step: int) -> None:
        """Notes in the checkpoint that this start resumed from that its evaluation, once stopped, is done."""
        self.writer.flush()  # what was found, before it is said to be there
        if self.plan.writes:
            self.checkpoints.amend(step, {"evaluated": True})

    def _require_finite(self, state: TrainState, step: int) -> None:
        if bool(all_finite(state)):
            return
        raise TrainingError(f"step {step}: parameters, teacher or moments are not finite. {self.last_good()}; {REMEDY}")

    def last_good(self) -> str:
        """A sentence that names the newest checkpoint."""
        step = self.checkpoints.latest()
        if step is None:
            return "There is no checkpoint yet"
        return f"The last good checkpoint is {self.checkpoints.folder / str(step)}"

    def export_teacher(self, state: TrainState, step: int) -> None:
        """Writes the teacher's weights alone, under ``WORKDIR/teacher/STEP``: what users load. Raises TrainingError."""
        self._require_finite(state, step)
        params = to_host(state.teacher)
        if self.plan.writes:
            meta = {
                "step": step,
                "model": dataclasses.asdict(self.plan.spec.model),
                "statistics": json.loads(self.plan.spec.stats.to_json()),
                "config": portable(config_lib.flatten(self.plan.config)),  # users pass these folders on
            }
            weights.save_npz(epath.Path(self.plan.workdir) / "teacher" / str(step), params, meta)

    def close(self, together: bool = True) -> None:
        """Ends everything. ``together`` False: other processes are elsewhere or gone, so nothing waits for them."""
        self.trace.close()
        self.progress.close()
        self.loader.close()
        self.writer.close()
        if together:
            self.checkpoints.close()
        free_batches()


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """bool []: no leaf of the tree holds a NaN or an infinity."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def skipped_before(meta: Mapping[str, Any]) -> dict[str, int]:
    """What this process had skipped at the checkpoint. If the number of processes has changed, an even share of all.

    A process compares its count with the number of records that it requested itself (``Loader``), a like share of all.
    """
    found, count = meta.get("skipped", {}), jax.process_count()
    if len(found) == count:
        return dict(found.get(str(jax.process_index()), {}))
    total: dict[str, int] = {}
    for counts in found.values():
        for file, number in counts.items():
            total[file] = total.get(file, 0) + number
    mine, dealt = {}, 0  # dealt out like cards, one file after the other: no process gets all remainders
    for file, number in total.items():
        mine[file] = len(range((jax.process_index() - dealt) % count, number, count))
        dealt += number
    return {file: number for file, number in mine.items() if number}
