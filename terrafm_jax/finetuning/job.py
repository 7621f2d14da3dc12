"""A fine-tuning job: data set, weights and config become runs, one per learning rate; the best is tested and kept."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from terrafm_jax.config import ConfigError
from terrafm_jax.evals import charts, protocols, report, store
from terrafm_jax.evals.datasets import open_suite
from terrafm_jax.evals.datasets.base import Dataset, Split, by_image, few_shot, held_out, label_fraction, spread
from terrafm_jax.evals.datasets.doubts import doubts, unseen
from terrafm_jax.evals.encoders import open_encoder
from terrafm_jax.evals.features import Encoder, FeatureError
from terrafm_jax.evals.linear import task_of
from terrafm_jax.evals.session import note
from terrafm_jax.finetuning import config as schema
from terrafm_jax.finetuning.data import Source, class_weights, digest, steps_per_epoch
from terrafm_jax.finetuning.network import Adam, TuneSpec
from terrafm_jax.finetuning.trainer import Plan, Run, TuningError
from terrafm_jax.training import workdir as workdir_lib
from terrafm_jax.training.preemption import StopRequest
from terrafm_jax.training.sharding import check_batch, make_mesh

PROTOCOL = "finetune"


@dataclasses.dataclass
class Job:
    """Reads config, weights and data; :meth:`run` trains. Raises ConfigError, DatasetError, FeatureError."""

    config: ConfigDict
    workdir: str
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        schema.check(self.config)
        if jax.process_count() > 1:
            raise ConfigError("fine-tuning runs in one process, on all of its devices; start it without --distributed")
        c = self.config
        encoder = open_encoder(c.init_from, c.image_size, c.compute.dtype, c.upstream_l2a_stem)
        if not isinstance(encoder, Encoder):
            raise ConfigError(f"config.init_from: {c.init_from!r} has no weights to tune")
        self.encoder, self.dataset = encoder, _dataset(c)
        self.inputs = _inputs(c, encoder, self.dataset)
        self.folder = Path(self.workdir)
        self._too_few = False  # samples to hold some of them out

    def sources(self) -> dict[str, Source]:
        """The splits to read; without a validation split a fifth of train is held out."""
        c, splits = self.config, dict(self.dataset.splits)
        splits = {name: split for name, split in splits.items() if len(split)}  # a share of 0, or of few images
        if "train" not in splits:
            raise ConfigError(f"{self.dataset.info.name}: has no train split, only {list(splits)}")
        splits["train"] = _subset(splits["train"], c.data.fraction, c.data.shots, c.seed)
        if "val" not in splits:
            splits["train"], splits["val"] = _hold_out(splits["train"], c.seed)
            self._too_few = not set(splits["train"].ids).isdisjoint(splits["val"].ids)
            if not self._too_few:
                self.say(f"no validation split: {len(splits['val'])} train samples are held out")
        if c.data.limit:
            splits = {k: s.subset(spread(len(s), c.data.limit)) for k, s in splits.items()}
        cache = c.data.cache == "ram"
        return {
            k: Source(self.dataset.info, s, self.inputs, c.data.threads, cache, c.image_size) for k, s in splits.items()
        }

    def plan(self, sources: dict[str, Source], rate: float) -> Plan:
        c, info = self.config, self.dataset.info
        outputs = 1 if info.task == "regression" else len(info.classes)
        head = c.head
        if head == "auto":
            head = "patch_linear" if info.task == "segmentation" else "linear"
        model = dataclasses.replace(self.encoder.spec, drop_path=c.drop_path)
        spec = TuneSpec(
            model=model, inputs=self.inputs, task=info.task, outputs=outputs, head=head, mode=c.mode,
            last_blocks=c.last_blocks, lora_rank=c.lora_rank, lora_alpha=c.lora_alpha, image_size=c.image_size,
            ignore=info.ignore, head_norm=c.head_norm, upernet_channels=c.upernet_channels,
        )  # fmt: skip
        mesh = make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
        check_batch(mesh, c.batch_size, c.microbatches)
        check_batch(mesh, c.eval_batch_size)
        if c.mixup and info.task not in protocols.WHOLE_IMAGE:
            raise ConfigError(f"config.mixup: {c.mixup} does not apply to {info.task}")
        if c.class_weights == "balanced" and info.task not in ("classification", "segmentation"):
            raise ConfigError(f"config.class_weights: balanced does not apply to {info.task}")
        total = steps_per_epoch(len(sources["train"]), c.batch_size) * c.epochs
        adam = Adam(total, round(c.warmup * total), c.min_rate, c.weight_decay, c.clip, c.layer_decay)
        weights, scale = None, (0.0, 1.0)
        if c.class_weights == "balanced":
            weights = class_weights(sources["train"], outputs, info.ignore)
        if info.task == "regression":
            values = np.array([float(sources["train"].read(i).target) for i in range(len(sources["train"]))])
            scale = (float(values.mean()), float(values.std()) or 1.0)
        return Plan(
            spec=spec, adam=adam, rate=rate, stats=self.encoder.stats, mesh=mesh, batch_size=c.batch_size,
            microbatches=c.microbatches, eval_batch_size=c.eval_batch_size, epochs=c.epochs, seed=c.seed, flips=c.flips,
            mixup=c.mixup, smoothing=c.label_smoothing, patience=c.patience, class_weights=weights, scale=scale,
            classes=tuple(info.classes), resamples=c.resamples, name=c.name or self.encoder.name,
        )  # fmt: skip

    def run(self) -> dict[str, Any] | None:
        """Trains every rate, tests the best and writes ``best/``, ``results.*`` and ``predictions/``.

        Returns the row of results.jsonl, or None when it was stopped early (start again to continue). A rate that
        diverges is left out; raises TuningError when all do.
        """
        recipe = self.config.copy_and_resolve_references()
        with recipe.unlocked():
            del recipe.stop_at_epoch  # says how far to go now, not what the run is
        workdir_lib.claim(self.workdir, recipe, write=True)
        sources = self.sources()
        shown = ", ".join(f"{k} {len(s)}" for k, s in sources.items())
        self.say(f"{self.dataset.info.name} ({self.dataset.info.task}): {shown}; inputs {'+'.join(self.inputs)}")
        info, splits = self.dataset.info, {key: source.split for key, source in sources.items()}
        doubted = doubts(self.dataset) + unseen(info.name, info.classes, splits)
        if "test" not in splits:
            doubted.append(f"{info.name}: no test split: the result is that of validation, which chose, so it flatters")
        if self._too_few:
            doubted.append(f"{info.name}: too few samples to hold any out, validation is on those trained on")
        for text in doubted:
            self.say(f"WARNING {text}")
        with contextlib.ExitStack() as stack:
            stop = stack.enter_context(contextlib.closing(StopRequest()))
            for source in sources.values():
                stack.callback(source.close)
            runs: list[Run] = []
            diverged: dict[float, TuningError] = {}
            origin = {"config.init_from": self.encoder.weights_hash, "config.data.dir": digest(sources)}
            for rate in self.config.rates:
                run = Run(self.plan(sources, rate), self.folder / f"lr_{rate:g}", sources,
                          tensorboard=self.config.tensorboard, say=self.say, origin=origin,
                          strict=not self.config.allow_config_change)  # fmt: skip
                stack.enter_context(contextlib.closing(run))
                try:
                    complete = run.train(self.encoder.params, self.config.stop_at_epoch, stop)
                except TuningError as error:  # a sweep goes beyond the rates that work
                    self.say(f"left out: {error}")
                    diverged[rate] = error
                    continue
                if not complete:
                    self.say(f"stopped; start again with --workdir={self.workdir} to continue")
                    return None
                runs.append(run)
            if not runs:
                raise next(iter(diverged.values()))
            return self._finish(max(runs, key=lambda run: run.best[0]), sources, doubted, list(diverged))

    def _finish(
        self, best: Run, sources: dict[str, Source], doubted: Sequence[str], diverged: Sequence[float]
    ) -> dict[str, Any]:
        state = best.best_state(self.encoder.params)
        split = "test" if "test" in sources else "val"
        result = best.evaluate(state, split)
        c, info = self.config, self.dataset.info
        settings = result.settings | {"split": split, "rates": list(c.rates)}
        settings |= {"diverged": list(diverged)} if diverged else {}
        row = {
            "key": f"finetune-{Path(self.workdir).name}", "model": best.plan.name, "weights": self.encoder.weights_hash,
            "suite": c.data.suite, "dataset": info.name, "task": info.task, **info.printed, "inputs": list(self.inputs),
            "image_size": c.image_size, "protocol": self.protocol(), "fraction": c.data.fraction,
            "shots": c.data.shots, "seed": c.seed, "samples": {k: len(s) for k, s in sources.items()},
            "metrics": report.as_entry(result.metrics),
            "per_class": result.per_class, "classes": list(info.classes), "confusion": result.confusion,
            "settings": settings,
            "note": note(self.dataset, self.inputs, doubted, c.data.limit),
        }  # fmt: skip
        shutil.copytree(Path(str(best.folder)) / "best", self.folder / "best", dirs_exist_ok=True)
        (self.folder / "results.jsonl").write_text(json.dumps(row, default=store.plain) + "\n")
        (self.folder / "results.md").write_text(report.markdown([row]))
        if row["confusion"] is not None:
            charts.confusion_figure(row, self.folder / "figures" / "confusion.png")
        if c.predictions:
            from terrafm_jax.finetuning.predict import write_predictions

            write_predictions(self.folder / "predictions", best, state, split, info)
        headline = protocols.headline("", info.task)
        found = f"{headline} {result.metrics[headline]} on {split}, rate {best.plan.rate:g}"
        self.say(f"{info.name}: {found} -> {self.folder / 'results.md'}; weights: {self.folder / 'best'}")
        return row

    def protocol(self) -> str:
        """The named protocol that the config is, else a description."""
        c, reference = self.config, schema.base()
        for name, fields in PROTOCOLS.items():
            head = fields.get("head") or ("auto", "linear")
            same = all(c[k] == fields.get(k, reference[k]) for k in _DEFINING)
            if same and tuple(c.rates) == fields["rates"] and c.head in head:
                return name
        return f"{PROTOCOL}: {c.mode}, {c.epochs} epochs"


GALILEO_FINETUNE_RATES = (1e-5, 3e-5, 6e-5, 1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3)
_DEFINING = ("epochs", "batch_size", "warmup", "weight_decay", "clip", "layer_decay", "min_rate", "mode", "mixup",
             "class_weights", "patience", "label_smoothing", "flips", "drop_path", "head_norm",
             "upernet_channels")  # fmt: skip
# What a config must be to carry a name: these fields, all others of _DEFINING as in config.base().
PROTOCOLS: dict[str, dict[str, Any]] = {
    "galileo-finetune/1": {"rates": GALILEO_FINETUNE_RATES},
    # [ours] how the paper trained on Landslide4Sense is not published.
    "upernet-finetune/2": {
        "rates": (1e-4,), "head": ("upernet",), "batch_size": 16, "layer_decay": 0.75, "class_weights": "balanced",
        "patience": 10,
    },
}  # fmt: skip


def _dataset(c: ConfigDict) -> Dataset:
    options = {"bands": c.data.bands} if c.data.bands else {}
    found = open_suite(c.data.suite, c.data.dir, (c.data.name,) if c.data.name else (), **options)
    if len(found) != 1:
        raise ConfigError(f"config.data.name: give one of {[d.info.name for d in found]}")
    dataset = store.tiled(found[0], c.data.tile) if c.data.tile else found[0]
    if dataset.info.task == "change":
        raise ConfigError(f"{dataset.info.name}: change pairs are evaluated by feature difference, not fine-tuned")
    return dataset


def _inputs(c: ConfigDict, encoder: Encoder, dataset: Dataset) -> tuple[str, ...]:
    if c.data.inputs:
        return encoder.check(dataset.info.select(tuple(c.data.inputs)))
    shared = [k for k in dataset.info.inputs if k in encoder.spec.sensors]
    try:
        return encoder.check(shared)
    except FeatureError:
        if not shared:
            raise
        return encoder.check(shared[-1:])  # weights without fusion take one sensor: the optical one stands last


def _targets(split: Split) -> np.ndarray:
    """Labels for stratified draws; segmentation masks are not read."""
    if split.labels is not None:
        return split.labels
    first = split[0].target
    if np.ndim(first) == 2:
        return np.zeros((len(split), 1))
    return np.asarray([split[i].target for i in range(len(split))])


def _subset(split: Split, fraction: float, shots: int, seed: int) -> Split:
    if fraction == 1 and not shots:
        return split
    targets = _targets(split)
    if shots and task_of(targets) == "classification":
        return split.subset(few_shot(targets, shots, seed))
    if shots:
        raise ConfigError("config.data.shots: needs one class per sample")
    return split.subset(label_fraction(targets, fraction, seed))


def _hold_out(split: Split, seed: int) -> tuple[Split, Split]:
    images = by_image(split.ids)
    whole = len(images) == len(split)
    parts = held_out(_targets(split) if whole else np.zeros((len(images), 1)), seed)
    rest, held = (split.subset(np.sort(np.concatenate([images[i] for i in part]))) for part in parts)
    return rest, held
