"""One evaluation: checkpoints x data sets x inputs x protocols x label amounts x seeds, resumable row by row."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals import charts, protocols, report, store
from terrafm_jax.evals.datasets import open_suite
from terrafm_jax.evals.datasets.base import Dataset, DatasetError
from terrafm_jax.evals.datasets.doubts import doubts, unseen
from terrafm_jax.evals.encoders import AnyEncoder, open_encoder
from terrafm_jax.evals.features import FeatureError
from terrafm_jax.evals.metrics import Result
from terrafm_jax.evals.protocols import Options, ProtocolError
from terrafm_jax.evals.store import Extracted
from terrafm_jax.paths import append_line

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``python -m terrafm_jax.evaluate`` was asked for.

    Attributes:
      checkpoints: see ``encoders.open_encoder``. suite, data, names, options: see ``datasets.open_suite``.
      protocols: names; empty takes ``protocols.DEFAULTS`` of each task.
      inputs: sensor combinations such as ``s1+s2_l2a``; ``each``: every sensor alone, ``fused``: all together,
        empty: every sensor alone and, with fusion weights, all together.
      fractions, shots, seeds: label amounts and their repetitions. Seeds count only where something is drawn.
      limit: samples per split at most (0: all), for trying things out; such rows are labelled.
      folds, repeats: above 0, all splits together are cross-validated (classification only) instead.
      tile: cut segmentation images into windows of so many pixels (0: whole).
      cache: folder of features; empty: ``OUT/cache``; ``none``: no cache.
    """

    checkpoints: tuple[str, ...]
    suite: str
    data: str
    out: str
    names: tuple[str, ...] = ()
    protocols: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (1.0,)
    shots: tuple[int, ...] = ()
    seeds: int = 1
    runs: int = 0
    epochs: int = 0
    image_size: int = 224
    batch_size: int = 32
    limit: int = 0
    tile: int = 0
    folds: int = 0
    repeats: int = 10
    resamples: int = 1000
    dtype: str = ""
    cache: str = ""
    figures: bool = True
    upstream_l2a_stem: bool = False
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def combinations(encoder: AnyEncoder, dataset: Dataset, wanted: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Sensor combinations to evaluate, in the order of the table of sensors.

    Raises FeatureError when the weights and the data set share no sensor.
    """
    shared = [k for k in dataset.info.inputs if _takes(encoder, (k,))]
    if not shared:
        has = list(dataset.info.inputs)
        raise FeatureError(f"{encoder.name}: takes none of the sensors of {dataset.info.name} {has}")
    together = tuple(encoder.check(shared)) if len(shared) > 1 and _takes(encoder, shared) else ()
    if not wanted:
        wanted = ("each", "fused") if together else ("each",)
    found: list[tuple[str, ...]] = []
    for text in wanted:
        if text == "each":
            found += [(k,) for k in shared]
        elif text == "fused":
            found += [together] if together else []
        else:
            found.append(encoder.check(dataset.info.select(text.split("+"))))
    return list(dict.fromkeys(found))


def note(dataset: Dataset, keys: Sequence[str], doubts: Sequence[str], limit: int) -> str:
    """What stands beside the numbers of a data set: its traps, what was doubted, bands it lacks, how much was cut."""
    parts = [dataset.info.note] if dataset.info.note else []
    name = dataset.info.name  # which the table of notes says already
    parts += [text.removeprefix(f"{name}: ").removeprefix(f"{name}, ") for text in doubts]
    for k in keys:
        missing = dataset.info.inputs[k].missing
        parts += [f"{k} lacks {', '.join(missing)}"] if missing else []
    parts += [f"at most {limit} samples per split"] if limit else []
    return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """What becomes one row: an encoder on sensors of a data set, under one protocol, with some of the labels."""

    encoder: AnyEncoder
    dataset: Dataset
    keys: tuple[str, ...]
    protocol: str
    options: Options

    def __str__(self) -> str:
        return f"{self.dataset.info.name} {'+'.join(self.keys)} {self.protocol}"


def _takes(encoder: AnyEncoder, keys: Sequence[str]) -> bool:
    try:
        return bool(encoder.check(keys))
    except FeatureError:
        return False


@dataclasses.dataclass
class Session:
    """Runs the settings and keeps ``results.jsonl``; rows that are there already are not computed again."""

    settings: Settings
    say: Callable[[str], None] = print
    progress: Callable[[str], Callable[[int, int], None] | None] = lambda text: None

    def __post_init__(self) -> None:
        self.out = Path(self.settings.out)
        self.rows_file = self.out / "results.jsonl"
        s = self.settings
        self.cache = None if s.cache == "none" else Path(s.cache) if s.cache else self.out / "cache"

    def run(self) -> list[dict[str, Any]]:
        """All rows, new and old. A data set or protocol that fails becomes a row with "error", the rest goes on."""
        s = self.settings
        for name in s.protocols:
            protocols.check(name)
        datasets = open_suite(s.suite, s.data, s.names, **s.options)
        if s.tile:
            datasets = [store.tiled(d, s.tile) for d in datasets]
        self._doubts = {d.info.name: doubts(d) + unseen(d.info.name, d.info.classes, d.splits) for d in datasets}
        for text in (t for found in self._doubts.values() for t in found):
            self.say(f"WARNING {text}")
        self.out.mkdir(parents=True, exist_ok=True)
        done = {r["key"] for r in report.read_rows(self.rows_file) if "error" not in r}
        for text in s.checkpoints:
            encoder = open_encoder(text, s.image_size, s.dtype, s.upstream_l2a_stem)
            for dataset in datasets:
                self._evaluate(encoder, dataset, done)
        rows = report.read_rows(self.rows_file)
        self._write_report(rows, {d.info.name: d for d in datasets})
        return rows

    def _evaluate(self, encoder: AnyEncoder, dataset: Dataset, done: set[str]) -> None:
        try:
            inputs = combinations(encoder, dataset, self.settings.inputs)
        except (FeatureError, DatasetError) as e:
            self._fail(_Evaluation(encoder, dataset, (), "", Options()), e)
            return
        task = dataset.info.task
        wanted = [p for p in self.settings.protocols or protocols.DEFAULTS[task] if task in protocols.TASKS_OF[p]]
        for what in itertools.product(inputs, wanted, self._options()):
            evaluation = _Evaluation(encoder, dataset, *what)
            key = self._key(evaluation)
            if key in done:
                self.say(f"{evaluation}: already there")
                continue
            try:
                self._one(evaluation, key)
                done.add(key)
            except (DatasetError, FeatureError, ProtocolError, ValueError) as e:
                self._fail(evaluation, e)

    def _options(self) -> Iterator[Options]:
        s = self.settings
        amounts = [(f, 0) for f in s.fractions] + [(1.0, k) for k in s.shots]
        for fraction, shots in amounts:
            drawn = fraction < 1 or shots > 0
            for seed in range(s.seeds if drawn else 1):
                yield Options(fraction, shots, seed, s.runs, s.resamples, s.epochs)

    def _key(self, e: _Evaluation) -> str:
        s = self.settings
        prints = [e.dataset.fingerprint(k, e.keys) for k in e.dataset.splits]
        text = json.dumps([
            e.encoder.cache_key, e.encoder.image_size, prints, e.protocol, dataclasses.asdict(e.options), s.limit,
            s.dtype, (s.folds, s.repeats) if s.folds else 0,
        ])  # fmt: skip
        return hashlib.sha256(text.encode()).hexdigest()[:20]

    def _one(self, e: _Evaluation, key: str) -> None:
        s, info, encoder, start = self.settings, e.dataset.info, e.encoder, time.monotonic()
        dense = protocols.is_dense(info.task)
        layers = protocols.layers_for(e.protocol, encoder.depth) if dense else ()
        request = store.Request(e.keys, dense, layers, s.batch_size, s.limit)
        splits = {}
        for name in e.dataset.splits:
            shown = self.progress(f"{encoder.name} · {info.name} · {'+'.join(e.keys)} · {name}")
            splits[name] = store.extract(encoder, e.dataset, name, request, self.cache, shown)
        scale = encoder.standardize
        if s.folds:
            whole = store.joined(list(splits.values()))
            result = protocols.run_folds(e.protocol, whole, info, e.options, s.folds, s.repeats, scale=scale)
            splits = {"test": whole}
        else:
            result = protocols.run(e.protocol, splits, info, e.options, patch=encoder.patch, scale=scale)
        self._keep(e, key, result, splits["test"], time.monotonic() - start)

    def _keep(self, e: _Evaluation, key: str, result: Result, test: Extracted, seconds: float) -> None:
        """Writes the row and its predictions."""
        encoder, info, options, limit = e.encoder, e.dataset.info, e.options, self.settings.limit
        row = {
            "key": key, "model": encoder.name, "weights": encoder.weights_hash, "suite": self.settings.suite,
            "dataset": info.name, "task": info.task, "inputs": list(e.keys), **info.printed,
            "image_size": encoder.image_size, "protocol": result.protocol,
            "fraction": info.share * options.fraction, "shots": options.shots, "seed": options.seed,
            "samples": {k: min(len(v), limit or len(v)) for k, v in e.dataset.splits.items()},
            "metrics": report.as_entry(result.metrics), "per_class": result.per_class, "classes": list(info.classes),
            "confusion": result.confusion, "settings": result.settings,
            "note": note(e.dataset, e.keys, self._doubts[info.name], limit), "seconds": round(seconds, 2),
        }  # fmt: skip
        if result.predictions.size:
            folder = self.out / "predictions"
            folder.mkdir(exist_ok=True)
            count = len(result.predictions)
            more = {"right": result.scores} if self.settings.folds else {}
            more |= {} if result.runs is None else {"runs": result.runs}
            np.savez_compressed(
                folder / f"{key}.npz", predictions=result.predictions, targets=test.targets[:count],
                ids=np.array(test.ids[:count]), **more,
            )  # fmt: skip
        self._append(row)
        headline = protocols.headline(result.protocol.split("/")[0], info.task)
        drawn = ""
        if options.fraction < 1 or options.shots:
            drawn = f", {report.amount(options.fraction, options.shots)}, draw {options.seed}"
        shown = f"{info.name} {'+'.join(e.keys)} {result.protocol} {encoder.name}{drawn}"
        self.say(f"{shown}: {headline} {result.metrics[headline]}")

    def _fail(self, e: _Evaluation, error: Exception) -> None:
        text = f"{e} {e.encoder.name}: {error}"
        log.error(text)
        self.say(f"FAILED {text}")
        key = hashlib.sha256(text.encode()).hexdigest()[:20]
        self._append({
            "key": key, "model": e.encoder.name, "dataset": e.dataset.info.name, "inputs": list(e.keys),
            "protocol": e.protocol, "fraction": e.dataset.info.share * e.options.fraction, "shots": e.options.shots,
            "seed": e.options.seed, "error": str(error),
        })  # fmt: skip

    def _append(self, row: dict[str, Any]) -> None:
        append_line(self.rows_file, json.dumps(row, default=store.plain))

    # --- report ---

    def _write_report(self, rows: list[dict[str, Any]], datasets: dict[str, Dataset]) -> None:
        failed = [f"- {r['dataset']} {r['protocol']} {r['model']}: {r['error']}" for r in report.failures(rows)]
        text = report.markdown(rows) + "\n" + report.paired_table(rows, self.out)
        if failed:
            text += "\n## Failed\n\n" + "\n".join(failed) + "\n"
        (self.out / "results.md").write_text(text)
        if not self.settings.figures:
            return
        charts.bars(rows, self.out / "figures" / "scores.png")
        charts.radar(rows, self.out / "figures" / "radar.png")
        for row in rows:
            known = "error" not in row and row["dataset"] in datasets
            if known and row["fraction"] == datasets[row["dataset"]].info.share and not row["shots"]:
                self._figures(row, datasets[row["dataset"]])

    def _figures(self, row: dict[str, Any], dataset: Dataset) -> None:
        protocol = row["protocol"].split("/")[0]
        name = f"{row['dataset']}-{protocol}-{row['model']}-{'+'.join(row['inputs'])}-{row['key'][:6]}"
        name = name.replace("/", "_").replace(" ", "_")
        if row.get("confusion") is not None:
            charts.confusion_figure(row, self.out / "figures" / f"confusion-{name}.png")
        path = self.out / "predictions" / f"{row['key']}.npz"
        if path.exists():
            with np.load(path, allow_pickle=False) as f:
                if "right" not in f:  # of folds: samples come from all splits, each tested several times
                    self._errors(row, dataset, f["predictions"], f["targets"], f["ids"].tolist(), name)

    def _errors(
        self, row: Mapping[str, Any], dataset: Dataset, predictions: np.ndarray, targets: np.ndarray, ids: list[str],
        name: str,
    ) -> None:  # fmt: skip
        """Pictures of what went wrong; reads only the samples it shows, of rows of earlier calls those still there."""
        test, info, classes = dataset.split("test"), dataset.info, row["classes"]
        place = {sample: i for i, sample in enumerate(test.ids)}
        path = self.out / "figures" / f"errors-{name}.png"
        title = f"{row['dataset']}: {row['model']}, {row['protocol']}"
        if row["task"] == "segmentation":
            rows = [i for i, sample in enumerate(ids) if sample in place][:6]
            if rows:  # none where an earlier call cut the images otherwise
                charts.mask_sheet(info, [(test[place[ids[i]]], predictions[i]) for i in rows], path, title)
        elif row["task"] == "classification":
            wrong = [i for i in np.nonzero(predictions != targets)[0] if ids[i] in place]
            shown = [(test[place[ids[i]]], f"{classes[targets[i]]}\n→ {classes[predictions[i]]}") for i in wrong[:24]]
            first = f", first of {runs} runs" if (runs := row["settings"].get("runs", 1)) > 1 else ""
            charts.error_sheet(info, shown, path, f"{title}{first}: {len(wrong)} of {len(ids)} wrong")
