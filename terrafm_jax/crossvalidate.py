"""Few labels: ``python -m terrafm_jax.crossvalidate --checkpoint RUN --data FOLDER --out OUT``.

Repeated stratified cross-validation of a small labelled data set (one class per image, a few hundred images), for
raw band statistics, the checkpoint's network untrained, and the checkpoint: kNN, linear probes and fine-tuning on the
same folds, with paired intervals. Several ``--checkpoint`` of one name (``NAME=PATH``) are seeds of one arm. Writes
``results.md``, ``results.json`` and ``results.png``; a second call continues. Exit codes: 0, 1 an error, 2 wrong flags,
130 interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from terrafm_jax.paths import save_array
from terrafm_jax.startup import begin, list_flag, one_line, parse_flags

Progress = Callable[[int, int], None]  # (folds done, folds in all)

_CHECKPOINT = flags.DEFINE_multi_string("checkpoint", None, "[NAME=]PATH, one per seed; default name: pretrained")
_SUITE = flags.DEFINE_string("suite", "folder", "as evaluate's")
_DATA = flags.DEFINE_string("data", None, "folder of the suite (folder: or a YAML file)")
_NAME = flags.DEFINE_string("name", "", "data set of the suite; may be left out when there is only one")
_OUT = flags.DEFINE_string("out", None, "folder for results")
_INPUTS = flags.DEFINE_string("inputs", "", "sensors, e.g. s2_l1c or s1+s2_l2a; default: all shared ones, fused")
_PROTOCOL = list_flag(
    "protocol", ["galileo-knn20", "torchgeo-bench-knn5", "logreg", "galileo-linear", "fold-finetune"],
    "protocols of evaluate, and fold-finetune",
)  # fmt: skip
_FOLDS = flags.DEFINE_integer("folds", 5, "folds")
_REPEATS = flags.DEFINE_integer("repeats", 10, "repetitions with other folds")
_TUNE_REPEATS = flags.DEFINE_integer("tune_repeats", 2, "repetitions of fold-finetune, the first ones of the others")
_RANDOM = flags.DEFINE_integer("random_seeds", 3, "untrained networks")
_RATES = list_flag("rates", None, "learning rates of fold-finetune; default: its recipe's")
_EPOCHS = flags.DEFINE_integer("epochs", 0, "epochs of fold-finetune; default: its recipe's")
_IMAGE_SIZE = flags.DEFINE_integer("image_size", 0, "network input in px; 0: the images' own")


@dataclasses.dataclass
class Experiment:
    """What the flags say, as objects. Raises DatasetError, FeatureError, ProtocolError, WeightsError."""

    checkpoints: tuple[str, ...]
    suite: str
    data: str
    out: Path
    name: str = ""
    inputs: str = ""
    protocols: tuple[str, ...] = ()
    folds: int = 5
    repeats: int = 10
    tune_repeats: int = 2
    random_seeds: int = 3
    image_size: int = 0
    rates: tuple[float, ...] = ()
    epochs: int = 0

    def __post_init__(self) -> None:
        from terrafm_jax.evals import protocols
        from terrafm_jax.evals.datasets import open_suite
        from terrafm_jax.evals.datasets.base import DatasetError, collate
        from terrafm_jax.finetuning.folds import PROTOCOL, Recipe

        for name in self.protocols:
            if name != PROTOCOL:
                protocols.check(name, "classification")
        found = open_suite(self.suite, self.data, (self.name,) if self.name else ())
        if len(found) != 1 or found[0].info.task != "classification":
            raise DatasetError(f"{self.data}: give --name of one data set with one class per image, found "
                               f"{[(d.info.name, d.info.task) for d in found]}")  # fmt: skip
        self.dataset, self.info = found[0], found[0].info
        chosen = {"rates": self.rates, "epochs": self.epochs}
        self.recipe = Recipe(**{k: v for k, v in chosen.items() if v})
        samples = [s[i] for s in self.dataset.splits.values() for i in range(len(s))]
        self.labels = np.array([s.target for s in samples])
        self.images = collate(self.info, samples, list(self.info.inputs))
        self.out.mkdir(parents=True, exist_ok=True)

    def arms(self) -> Iterator[tuple[str, int, Any]]:
        """(arm, seed, encoder): raw, untrained, then the checkpoints by name."""
        from terrafm_jax.evals.arms import RANDOM, RAW
        from terrafm_jax.evals.encoders import open_encoder, split_name

        yield RAW, 0, open_encoder("raw", self.image_size)
        named = [(name or "pretrained", path) for name, path in map(split_name, self.checkpoints)]
        for seed in range(self.random_seeds):
            yield RANDOM, seed, open_encoder(f"random@{named[seed % len(named)][1]}:{seed}", self.image_size)
        counts: dict[str, int] = {}
        for name, path in named:
            counts[name] = counts.get(name, -1) + 1
            yield name, counts[name], open_encoder(path, self.image_size)

    def keys(self, encoder: Any) -> tuple[str, ...]:
        """Sensors of an encoder."""
        from terrafm_jax.evals.session import combinations

        wanted = tuple(self.inputs.split("+")) if self.inputs else ()
        found = combinations(encoder, self.dataset, ("+".join(wanted),) if wanted else ())
        return found[-1]

    def run(self, say: Any = print, progress: Callable[[str], Progress | None] = lambda text: None) -> list[Any]:
        """All scores; writes the report. ``progress``: what is computed -> a function of (folds done, in all)."""
        from terrafm_jax.evals.arms import Score
        from terrafm_jax.evals.datasets.doubts import doubts

        for text in doubts(self.dataset):
            say(f"WARNING {text}")
        rows: dict[tuple[str, str], list[np.ndarray]] = {}
        for arm, seed, encoder in self.arms():
            keys = self.keys(encoder)
            for protocol in self.protocols:
                shown = progress(f"{arm}, seed {seed}, {protocol}, folds")
                label, right = self._one(encoder, protocol, keys, seed, shown)
                if right is not None:
                    rows.setdefault((arm, label), []).append(right)
                    say(f"{arm}, seed {seed}, {'+'.join(keys)}, {label}: {100 * right.mean():.1f}")
        scores = [Score(arm, label, np.stack(found)) for (arm, label), found in rows.items()]
        self._report(scores)
        return scores

    def _one(
        self, encoder: Any, protocol: str, keys: tuple[str, ...], seed: int, progress: Progress | None
    ) -> tuple[str, np.ndarray | None]:
        from terrafm_jax.evals import protocols
        from terrafm_jax.finetuning.folds import PROTOCOL

        if protocol == PROTOCOL:
            label = f"{self.recipe.label}, {self.folds}-fold x {self.tune_repeats}"
            return label, self._tuned(encoder, keys, seed, progress) if hasattr(encoder, "spec") else None

        def shares() -> np.ndarray:
            found = protocols.run_folds(
                protocol, self._features(encoder, keys), self.info, protocols.Options(resamples=0), self.folds,
                self.repeats, scale=encoder.standardize, progress=progress,
            )  # fmt: skip
            return found.scores[:, 0]

        found = self._once(self._file(encoder, keys, protocol, self.repeats), shares)
        return f"{protocol}/1, {self.folds}-fold x {self.repeats}", found

    def _features(self, encoder: Any, keys: tuple[str, ...]) -> Any:
        from terrafm_jax.evals import store

        request = store.Request(keys)
        return store.joined([store.extract(encoder, self.dataset, s, request) for s in self.dataset.splits])

    def _tuned(self, encoder: Any, keys: tuple[str, ...], seed: int, progress: Progress | None) -> np.ndarray:
        """One file per repetition: an interrupted run loses at most one."""
        from terrafm_jax.evals import crossval
        from terrafm_jax.finetuning.folds import Tuner

        tuner = Tuner(encoder, self.images, self.labels, keys, self.info, self.recipe)

        def right(repeat: int) -> np.ndarray:
            (found,) = crossval.cross_validate(
                lambda train, test: tuner.classify(train, test, seed), self.labels, folds=self.folds, repeats=1,
                seed=repeat,
                progress=progress and (lambda done, n: progress(repeat * n + done, self.tune_repeats * n)),
            )  # fmt: skip
            return found == self.labels

        parts = []
        for repeat in range(self.tune_repeats):
            file = self._file(encoder, keys, repr(self.recipe), ("seed", seed, "repeat", repeat))
            parts.append(self._once(file, functools.partial(right, repeat)))
        return np.mean(parts, axis=0)

    @staticmethod
    def _once(file: Path, make: Callable[[], np.ndarray]) -> np.ndarray:
        """The array in a file, made if it is not there."""
        if not file.exists():
            save_array(file, make())
        return np.load(file)

    def _file(self, encoder: Any, keys: tuple[str, ...], *settings: Any) -> Path:
        prints = [self.dataset.fingerprint(s, keys) for s in self.dataset.splits]
        text = json.dumps([encoder.cache_key, encoder.image_size, prints, keys, self.folds, settings], default=str)
        folder = self.out / "parts"
        folder.mkdir(exist_ok=True)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.npy"

    def _report(self, scores: list[Any]) -> None:
        from terrafm_jax.evals import arms, store
        from terrafm_jax.finetuning.folds import PROTOCOL

        found = arms.as_json(scores, self.info.classes, self.labels)
        settings = {
            "dataset": self.info.name, "samples": len(self.labels), "classes": len(self.info.classes),
            "image_size": self.image_size or "own", "folds": self.folds, "repeats": self.repeats,
            "note": self.info.note,
        }  # fmt: skip
        if PROTOCOL in self.protocols:
            settings |= {"tune_repeats": self.tune_repeats, "recipe": dataclasses.asdict(self.recipe)}
        store.write_json(self.out / "results.json", {"settings": settings, **found})
        title = f"{self.info.name}: {len(self.labels)} images, {len(self.info.classes)} classes"
        (self.out / "results.md").write_text(f"{title}\n\n{arms.markdown(scores)}")
        chance = np.bincount(self.labels).max() / len(self.labels)
        arms.figure(scores, self.out / "results.png", title, chance)


def main(_argv: list[str]) -> None:
    begin()

    from terrafm_jax.evals.datasets.base import DatasetError
    from terrafm_jax.evals.features import FeatureError
    from terrafm_jax.evals.progress import bar
    from terrafm_jax.evals.protocols import ProtocolError
    from terrafm_jax.weights import WeightsError

    with one_line(DatasetError, FeatureError, ProtocolError, WeightsError, ValueError):
        experiment = Experiment(
            tuple(_CHECKPOINT.value), _SUITE.value, _DATA.value, Path(_OUT.value), _NAME.value, _INPUTS.value,
            tuple(_PROTOCOL.value), _FOLDS.value, _REPEATS.value, _TUNE_REPEATS.value, _RANDOM.value,
            _IMAGE_SIZE.value, tuple(float(r) for r in _RATES.value or ()), _EPOCHS.value,
        )  # fmt: skip
        experiment.run(lambda text: print(text, flush=True), bar)
    print((experiment.out / "results.md").read_text())
    print(f"written to {experiment.out}: results.md, results.json, results.png")


if __name__ == "__main__":
    flags.mark_flags_as_required(["checkpoint", "data", "out"])
    app.run(main, flags_parser=parse_flags)
