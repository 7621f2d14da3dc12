"""What the parts of the training program hand to each other: the plan of a run, and its tools."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from terrafm_jax import config as config_lib
from terrafm_jax import weights
from terrafm_jax.data.sampling import Order
from terrafm_jax.provenance import portable
from terrafm_jax.training.checkpoint import Checkpointer, to_host
from terrafm_jax.training.metrics import MetricWriter, Progress
from terrafm_jax.training.preemption import StopRequest
from terrafm_jax.training.state import TrainState
from terrafm_jax.training.step import TrainSpec
from terrafm_jax.training.trace import Trace

# An evaluator gets (step, state, poll) and yields (name, value). It calls poll() at every batch, equally often on
# every process, and lets the Interrupted pass that it raises when the job is told to stop.
Evaluator = Callable[[int, TrainState, Callable[[], None]], Iterator[tuple[str, float]]]


@dataclasses.dataclass
class Run:
    """What the parts of the program share: the resolved plan of one run."""

    config: ConfigDict
    workdir: str
    spec: TrainSpec
    steps: Mapping[str, int]
    order: Order
    mesh: jax.sharding.Mesh
    first: bool  # this is the process that writes

    @property
    def total(self) -> int:
        return self.steps["total_steps"]

    @property
    def stop(self) -> int:
        return min(self.total, self.config.stop_at_step or self.total)


@dataclasses.dataclass
class Tools:
    """What the loop uses besides the state."""

    run: Run
    checkpoints: Checkpointer
    writer: MetricWriter
    loader: Any
    progress: Progress
    stop: StopRequest
    trace: Trace

    def save(self, state: TrainState, step: int, evaluated: bool) -> None:
        """Starts to write a checkpoint. ``evaluated`` False: the next start has to evaluate this step again."""
        meta = {
            "step": step,
            "evaluated": evaluated,
            "example": step * self.run.config.batch_size,
            "skipped": self.loader.skipped,
            "model": dataclasses.asdict(self.run.spec.model),
            "config": config_lib.flatten(self.run.config),
            "statistics": json.loads(self.run.spec.stats.to_json()),
        }
        self.checkpoints.save(step, state, meta)

    def export_teacher(self, state: TrainState, step: int) -> None:
        """Writes the teacher's weights alone, under ``WORKDIR/teacher/STEP``: what users load."""
        params = to_host(state.teacher)
        if self.run.first:
            meta = {
                "step": step,
                "model": dataclasses.asdict(self.run.spec.model),
                "statistics": json.loads(self.run.spec.stats.to_json()),
                "config": portable(config_lib.flatten(self.run.config)),  # users pass these folders on
            }
            weights.save_npz(epath.Path(self.run.workdir) / "teacher" / str(step), params, meta)

    def close(self, together: bool = True) -> None:
        """Ends everything. ``together`` False: other processes are elsewhere or gone, so nothing waits for them."""
        self.trace.close()
        self.progress.close()
        self.loader.close()
        self.writer.close()
        self.stop.close()
        if together:
            self.checkpoints.close()
