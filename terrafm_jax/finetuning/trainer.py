"""One fine-tuning run with one learning rate: train, validate every epoch, keep the best, resume exactly, test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from terrafm_jax import weights
from terrafm_jax.evals import heads, linear, metrics, segmentation
from terrafm_jax.evals.knn import score_classification
from terrafm_jax.evals.metrics import Result
from terrafm_jax.finetuning import network
from terrafm_jax.finetuning.data import Source, check_origin, steps_per_epoch
from terrafm_jax.finetuning.network import Adam, Batch, Flat, TuneSpec
from terrafm_jax.processes import to_host
from terrafm_jax.sensors import SENSORS, Statistics
from terrafm_jax.training.checkpoint import Checkpointer
from terrafm_jax.training.compiler import CPU_OPTIONS
from terrafm_jax.training.metrics import MetricWriter
from terrafm_jax.training.preemption import StopRequest
from terrafm_jax.training.sharding import RULES, make_batch, param_shardings

# The encoder lies as in pretraining; heads and LoRA factors are small and replicated.
TUNE_RULES = ((r"(head|lora)/.*", P()), *RULES)
Carry = tuple[dict, Array, Flat]  # the head's running statistics, sums of loss and gradients


class TuningError(RuntimeError):
    """Fine-tuning cannot go on; the message says why and what is still usable."""


@flax.struct.dataclass
class TuneState:
    """Flat dicts of parameters by path (trained and frozen), Adam's moments, the head's running statistics."""

    step: Array
    trainable: dict[str, Array]
    frozen: dict[str, Array]
    mu: dict[str, Array]
    nu: dict[str, Array]
    head: dict


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything a run needs that does not change. ``scale``: (mean, deviation) of regression targets."""

    spec: TuneSpec
    adam: Adam
    rate: float
    stats: Statistics
    mesh: jax.sharding.Mesh
    batch_size: int
    microbatches: int
    eval_batch_size: int
    epochs: int
    seed: int
    flips: bool
    mixup: float
    smoothing: float
    patience: int
    class_weights: np.ndarray | None
    scale: tuple[float, float]
    classes: tuple[str, ...]
    resamples: int
    name: str


def shardings(plan: Plan, state: TuneState) -> TuneState:
    everywhere = NamedSharding(plan.mesh, P())
    trained = param_shardings(plan.mesh, state.trainable, TUNE_RULES)
    frozen = param_shardings(plan.mesh, state.frozen, TUNE_RULES)
    head = jax.tree.map(lambda _: everywhere, state.head)
    return TuneState(everywhere, trained, frozen, trained, trained, head)


def init_state(plan: Plan, backbone: Mapping[str, Any]) -> TuneState:
    """The state of step 0, sharded over the plan's mesh."""
    trainable, frozen, head = network.init(plan.spec, backbone, jax.random.key(plan.seed))
    zeros = {k: jnp.zeros_like(v) for k, v in trainable.items()}
    state = TuneState(jnp.zeros((), jnp.int32), trainable, frozen, zeros, dict(zeros), head)
    # Copies: the step donates its input, and two fields must not be one buffer.
    return jax.tree.map(lambda x, s: jax.device_put(np.array(x), s), state, shardings(plan, state))


def make_step(plan: Plan) -> Callable[[TuneState, Any], tuple[TuneState, dict[str, Array]]]:
    """The jitted update; everything random is a function of (seed, step)."""
    spec = plan.spec
    weight = None if plan.class_weights is None else jnp.asarray(plan.class_weights)

    def loss_of(trainable: Flat, frozen: Flat, head: dict, batch: Batch, key: Array) -> tuple[Array, dict]:
        targets = batch["targets"]
        for_flip, for_mix, for_net = jax.random.split(key, 3)
        if plan.flips:
            batch, targets = network.flip(for_flip, batch, targets)
        if plan.mixup:
            batch, targets = network.mixup(for_mix, batch, targets, plan.mixup, spec.outputs)
        if spec.task == "regression":
            targets = (targets - plan.scale[0]) / plan.scale[1]
        params = network.merged(spec, trainable, frozen)
        outputs, head = network.forward(spec, params, head, plan.stats, batch, train=True, key=for_net)
        return network.loss(spec, outputs, targets, weight, plan.smoothing), head

    def step(state: TuneState, batch: Any, rate: Array) -> tuple[TuneState, dict[str, Array]]:
        key = jax.random.fold_in(jax.random.key(plan.seed), state.step)
        grad = jax.value_and_grad(loss_of, has_aux=True)

        count, bands = plan.microbatches, batch["bands"]
        parts = {k: jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), v)
                 for k, v in batch.items() if k != "bands"}  # fmt: skip

        def micro(carry: Carry, part: tuple[Array | int, Batch]) -> tuple[Carry, None]:
            (head, total, sums), (i, rows) = carry, part
            rows = {**rows, "bands": bands}
            (value, head), grads = grad(state.trainable, state.frozen, head, rows, jax.random.fold_in(key, i))
            return (head, total + value, jax.tree.map(jnp.add, sums, grads)), None

        start = (state.head, jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.trainable))
        if count == 1:
            (head, value, grads), _ = micro(start, (0, jax.tree.map(lambda x: x[0], parts)))
        else:
            (head, value, grads), _ = jax.lax.scan(micro, start, (jnp.arange(count), parts))
        grads = jax.tree.map(lambda g: g / count, grads)
        trainable, mu, nu, norm = plan.adam.update(spec, state.trainable, grads, state.mu, state.nu, state.step, rate)
        new = TuneState(state.step + 1, trainable, state.frozen, mu, nu, head)
        return new, {"loss": value / count, "grad_norm": norm, "lr": plan.adam.learning_rate(state.step, rate)}

    on_cpu = jax.default_backend() == "cpu"
    compiled = jax.jit(step, donate_argnums=0, compiler_options=CPU_OPTIONS if on_cpu else None)
    return lambda state, batch: compiled(state, batch, jnp.float32(plan.rate))


def make_predict(plan: Plan) -> Callable[[TuneState, Any], Array]:
    """(state, batch) -> scores [B, C], values [B, 1], or classes of every pixel uint8 [B, H, W]."""
    spec = plan.spec

    @partial(jax.jit, static_argnames="size")
    def predict(trainable: Flat, frozen: Flat, head: dict, batch: Batch, size: tuple[int, int]) -> Array:
        params = network.merged(spec, trainable, frozen)
        (logits, *_), _ = network.forward(spec, params, head, plan.stats, batch)
        logits = logits.astype(jnp.float32)
        if spec.task == "segmentation":
            return heads.resize(logits, size).argmax(-1).astype(jnp.uint8)
        return network.scores(spec, logits, plan.scale)

    def run(state: TuneState, batch: Any, size: tuple[int, int] = (0, 0)) -> Array:
        return predict(state.trainable, state.frozen, state.head, batch, size)

    return run


def make_measure(plan: Plan) -> Callable[[TuneState, Any], Any]:
    """(state, batch) -> the head's batch-norm statistics of this batch alone, in the shape of ``state.head``."""
    spec = plan.spec

    @partial(jax.jit, out_shardings=NamedSharding(plan.mesh, P()))
    def measure(trainable: Flat, frozen: Flat, head: dict, batch: Batch) -> dict:
        return network.measured(spec, network.merged(spec, trainable, frozen), head, plan.stats, batch)

    return lambda state, batch: measure(state.trainable, state.frozen, state.head, batch)


def to_device(plan: Plan, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Batch arrays split over the mesh; band masks on every device."""
    rows = make_batch(plan.mesh, {k: v for k, v in batch.items() if k != "bands"})
    everywhere = NamedSharding(plan.mesh, P())
    return {**rows, "bands": {k: jax.device_put(v, everywhere) for k, v in batch["bands"].items()}}


class Run:
    """Trains in ``folder``; calling :meth:`train` again continues, also after a kill.

    Attributes:
      best: (score, epoch) on validation so far.
      origin: config key -> digest of what it led to; stands in checkpoints; if ``strict``, one of another is not
        continued.
    """

    def __init__(
        self, plan: Plan, folder: Any, sources: Mapping[str, Source], *, tensorboard: bool = False,
        say: Callable[[str], None] = print, origin: Mapping[str, str] | None = None,
        strict: bool = True,
    ):  # fmt: skip
        self.plan, self.folder, self.sources, self.say = plan, epath.Path(folder), dict(sources), say
        self.origin, self.strict = dict(origin or {}), strict
        self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpointer(str(self.folder), keep_last=1)
        self.writer = MetricWriter(str(self.folder), True, tensorboard)
        self.per_epoch = steps_per_epoch(len(self.sources["train"]), plan.batch_size)
        self.best: tuple[float, int] = (-np.inf, -1)
        self._predict, self._measure = make_predict(plan), make_measure(plan)

    @property
    def done(self) -> bool:
        return (self.folder / "DONE").exists()

    def train(self, backbone: Mapping[str, Any], stop_at_epoch: int = 0, stop: StopRequest | None = None) -> bool:
        """True when the run is complete, False when it stopped early on request. Raises TuningError."""
        plan = self.plan
        state = init_state(plan, backbone)
        if self.checkpoints.latest() is not None:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
            state, meta = self.checkpoints.restore(abstract)
            if self.strict:
                check_origin(self.folder, meta.get("origin", {}), self.origin)
            self.best = (float(meta["best"]), int(meta["best_epoch"]))
            self.say(f"{self.folder.name}: resumed at step {int(state.step)}")
        start, last = int(state.step), plan.epochs * self.per_epoch
        if start and self._patience_over(start // self.per_epoch):
            last = start
        batches = self.sources["train"].train(start, last, plan.batch_size, plan.seed)
        try:
            complete, state = self._steps(state, start, last, batches, stop_at_epoch, stop)
        finally:
            batches.close()
            self.checkpoints.wait()
        if complete:
            (self.folder / "DONE").write_text(f"step {int(state.step)}\n")
        return complete

    def _steps(
        self, state: TuneState, start: int, last: int, batches: Iterator[Batch], stop_at_epoch: int,
        stop: StopRequest | None,
    ) -> tuple[bool, TuneState]:  # fmt: skip
        step_fn = make_step(self.plan)
        for step in range(start, last):
            state, found = step_fn(state, to_device(self.plan, next(batches)))
            at_end = (step + 1) % self.per_epoch == 0
            epoch = (step + 1) // self.per_epoch
            if at_end and state.head:
                state = self._settle(state)
            if at_end and self._epoch_end(state, epoch, found):
                return True, state
            if at_end and stop_at_epoch and epoch >= stop_at_epoch and step + 1 < last:
                return False, state
            if stop is not None and stop.reached() and step + 1 < last:
                if not at_end:
                    self._save(state)
                return False, state
        return True, state

    def _settle(self, state: TuneState) -> TuneState:
        """Batch-norm statistics of the weights as they are, over at most ``MEASURED`` train batches.

        Running ones lag behind a network that trains. Class tokens of a pretrained encoder lie close together far from
        zero, so the lag outweighs their differences: with a few steps an epoch validation saw one class everywhere,
        and early stopping ended the run there.
        """
        count = min(self.per_epoch, network.MEASURED)
        total = None
        for batch in self.sources["train"].train(0, count, self.plan.batch_size, self.plan.seed):
            found = self._measure(state, to_device(self.plan, batch))
            total = found if total is None else jax.tree.map(jnp.add, total, found)
        return state.replace(head=jax.tree.map(lambda x: x / count, total))

    def _epoch_end(self, state: TuneState, epoch: int, found: Mapping[str, Array]) -> bool:
        """Validates, keeps the best, saves. True: no better score for ``patience`` epochs."""
        values = {k: float(v) for k, v in found.items()}
        if not np.isfinite(values["loss"]):
            raise TuningError(
                f"{self.folder}: loss is {values['loss']} at epoch {epoch}; lower config.rates (now "
                f"{self.plan.rate:g}) or look at the images. The best weights so far are kept"
            )
        result = self.evaluate(state, "val" if "val" in self.sources else "train", resamples=0)
        score = selection(self.plan.spec.task, result)
        if score == self.best[0] == -np.inf:
            why = f": only ignore ({self.plan.spec.ignore})?" if self.plan.spec.task == "segmentation" else ""
            self.say(
                f"{self.folder.name} epoch {epoch}: validation has no score to choose by, so the latest weights are "
                f"kept; look at what the labels of the validation samples hold{why}"
            )
        if score > self.best[0] or self.best[0] == -np.inf:
            self.best = (score, epoch)
            self._keep(state, epoch, score)
        self.writer.write(epoch * self.per_epoch, values | {f"val_{k}": v.value for k, v in result.metrics.items()})
        scores = f"validation {score:.4f}, best {self.best[0]:.4f}"
        self.say(f"{self.folder.name} epoch {epoch}: loss {values['loss']:.4f}, {scores}")
        self._save(state)
        return self._patience_over(epoch)

    def _patience_over(self, epoch: int) -> bool:
        return bool(self.plan.patience) and epoch - max(self.best[1], 0) >= self.plan.patience

    def _save(self, state: TuneState) -> None:
        meta = {"best": float(self.best[0]), "best_epoch": int(self.best[1]), "origin": self.origin}
        self.writer.flush()
        self.checkpoints.save(int(state.step), state, meta)

    def _keep(self, state: TuneState, epoch: int, score: float) -> None:
        """Writes ``best/``: the encoder as ``terrafm_jax.load`` reads it, and beside it ``head/`` (LoRA folded in)."""
        params = to_host(network.merged(self.plan.spec, state.trainable, state.frozen))
        head = {"head": params["head"], "head_state": to_host(state.head)}
        spec = self.plan.spec
        meta = {
            "step": int(state.step), "epoch": epoch, "score": score, "name": self.plan.name,
            "model": dataclasses.asdict(spec.model), "statistics": json.loads(self.plan.stats.to_json()),
            "finetuned": {
                **{k: v for k, v in dataclasses.asdict(spec).items() if k != "model"},
                "classes": list(self.plan.classes), "scale": list(self.plan.scale), "bands": self._bands(),
                "image_px": self.sources["train"].image_px(), "gsd": self.sources["train"].gsd(),
                "unit": self.sources["train"].info.unit,
            },
        }  # fmt: skip
        partial, final = self.folder / "best.partial", self.folder / "best"
        if partial.exists():
            partial.rmtree()
        weights.save_npz(partial / "head", head, meta["finetuned"])
        weights.save_npz(partial, {"backbone": params["backbone"]}, meta)
        if final.exists():
            final.rmtree()
        partial.rename(final)

    def _bands(self) -> dict[str, list[str]]:
        """Bands that the data set delivers, per sensor: the tuned network expects exactly these."""
        inputs = self.sources["train"].info.inputs
        return {
            k: [n for n, there in zip(SENSORS[k].band_names, inputs[k].mask, strict=True) if there]
            for k in self.plan.spec.inputs
        }

    def best_state(self, backbone: Mapping[str, Any]) -> TuneState:
        """The best weights as a state of this plan (for evaluation and prediction)."""
        found, head = (weights.load_npz(self.folder / "best" / f)[0] for f in ("", "head"))
        state = init_state(self.plan, backbone)
        own = {**state.frozen, **state.trainable}
        flat = weights.flatten({"backbone": found["backbone"], "head": head["head"]})
        placed = {k: jax.device_put(flat[k], own[k].sharding) for k in flat}
        # LoRA is folded into the kernels already: its factors in the fresh state are zero.
        lora = {k: v for k, v in own.items() if k.startswith("lora/")}
        statistics = state.head
        if head.get("head_state"):
            statistics = jax.tree.map(
                lambda old, new: jax.device_put(new, old.sharding), statistics, head["head_state"]
            )
        return dataclasses.replace(state, trainable=lora, frozen=placed, head=statistics)

    def outputs(self, state: TuneState, split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(predictions, targets) batch by batch, without the padding."""
        source = self.sources[split]
        for batch, count in source.evaluate(self.plan.eval_batch_size):
            size = tuple(batch["targets"].shape[1:3]) if self.plan.spec.task == "segmentation" else (0, 0)
            part = {k: v for k, v in batch.items() if k != "targets"}
            found = self._predict(state, to_device(self.plan, part), size)
            yield to_host(found)[:count], batch["targets"][:count]

    def evaluate(self, state: TuneState, split: str, resamples: int | None = None) -> Result:
        """Metrics of a split."""
        plan = self.plan
        draws = plan.resamples if resamples is None else resamples
        settings = {"rate": plan.rate, "mode": plan.spec.mode, "best epoch": self.best[1]}
        label = plan.name
        if plan.spec.task == "segmentation":
            counts, pictures = [], []
            for found, targets in self.outputs(state, split):
                pairs = zip(targets, found, strict=True)
                counts += [metrics.confusion_matrix(t, p, plan.spec.outputs, ignore=plan.spec.ignore) for t, p in pairs]
                pictures += list(found[: max(0, segmentation.SHOWN - len(pictures))])
            ids = self.sources[split].split.ids
            result = segmentation.score_segmentation(label, [np.stack(counts)], settings, draws, ids)
            return dataclasses.replace(result, predictions=np.stack(pictures))
        parts = list(self.outputs(state, split))
        scores, targets = (np.concatenate([p[i] for p in parts]) for i in (0, 1))
        if plan.spec.task == "regression":
            return linear.mean_of_runs(label, "regression", [scores], targets, settings, draws)
        targets = targets > 0.5 if plan.spec.task == "multilabel" else targets
        return score_classification(label, scores, targets, settings, resamples=draws)

    def close(self) -> None:
        self.checkpoints.close()
        self.writer.close()


def selection(task: str, result: Result) -> float:
    """What chooses epochs and learning rates: higher is better; minus infinity where the metric is not defined."""
    name = {"classification": "top1", "multilabel": "map_micro", "segmentation": "miou", "regression": "rmse"}[task]
    value = result.metrics[name].value
    return float(np.nan_to_num(-value if task == "regression" else value, nan=-np.inf, neginf=-np.inf))
