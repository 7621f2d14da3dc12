"""Few labels: repeated cross-validation of several encoders under several protocols, for the crossvalidate command."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals import arms as arms_lib
from terrafm_jax.evals import crossval, store
from terrafm_jax.evals import protocols as protocols_lib
from terrafm_jax.evals.arms import RANDOM, RAW, Score
from terrafm_jax.evals.datasets import open_suite
from terrafm_jax.evals.datasets.base import DatasetError, collate
from terrafm_jax.evals.datasets.doubts import doubts
from terrafm_jax.evals.encoders import AnyEncoder, open_encoder, split_name
from terrafm_jax.evals.features import Encoder
from terrafm_jax.evals.session import combinations
from terrafm_jax.evals.store import Extracted
from terrafm_jax.finetuning.folds import PROTOCOL, Recipe, Tuner
from terrafm_jax.paths import save_array

Progress = Callable[[int, int], None]  # (folds done, folds in all)


@dataclasses.dataclass
class Experiment:
    """Scores of all arms under all protocols, on the same folds; fields are the flags of the command.

    Raises DatasetError, FeatureError, ProtocolError, WeightsError.
    """

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
        for name in self.protocols:
            if name != PROTOCOL:
                protocols_lib.check(name, "classification")
        found = open_suite(self.suite, self.data, (self.name,) if self.name else ())
        if len(found) != 1 or found[0].info.task != "classification":
            raise DatasetError(f"{self.data}: give --name of one data set with one class per image, found "
                               f"{[(d.info.name, d.info.task) for d in found]}")  # fmt: skip
        self.dataset, self.info = found[0], found[0].info
        chosen = {"rates": self.rates, "epochs": self.epochs}
        self.recipe = Recipe(**{k: v for k, v in chosen.items() if v})
        samples = [s[i] for s in self.dataset.splits.values() for i in range(len(s))]
        self.labels = np.array([s.target for s in samples])
        self.images = collate(
            self.info, samples, list(self.info.inputs), side=self.image_size, remedy="give --image_size, e.g. 224"
        )
        self.out.mkdir(parents=True, exist_ok=True)

    def arms(self) -> Iterator[tuple[str, int, AnyEncoder]]:
        """(arm, seed, encoder): raw, untrained, then the checkpoints by name."""
        yield RAW, 0, open_encoder("raw", self.image_size)
        named = [(name or "pretrained", path) for name, path in map(split_name, self.checkpoints)]
        for seed in range(self.random_seeds):
            yield RANDOM, seed, open_encoder(f"random@{named[seed % len(named)][1]}:{seed}", self.image_size)
        counts: dict[str, int] = {}
        for name, path in named:
            counts[name] = counts.get(name, -1) + 1
            yield name, counts[name], open_encoder(path, self.image_size)

    def keys(self, encoder: AnyEncoder) -> tuple[str, ...]:
        """The sensors that an encoder gets: those asked for, else all that it shares with the data."""
        return combinations(encoder, self.dataset, (self.inputs,) if self.inputs else ())[-1]

    def run(
        self, say: Callable[[str], None] = print, progress: Callable[[str], Progress | None] = lambda text: None
    ) -> list[Score]:
        """All scores; writes the report. ``progress``: what is computed -> a function of (folds done, in all)."""
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
        self, encoder: AnyEncoder, protocol: str, keys: tuple[str, ...], seed: int, progress: Progress | None
    ) -> tuple[str, np.ndarray | None]:
        """The protocol's label, and how often [N] each image was classified rightly; None if nothing can be tuned."""
        if protocol == PROTOCOL:
            label = f"{self.recipe.label}, {self.folds}-fold x {self.tune_repeats}"
            return label, self._tuned(encoder, keys, seed, progress) if isinstance(encoder, Encoder) else None

        def shares() -> np.ndarray:
            found = protocols_lib.run_folds(
                protocol, self._features(encoder, keys), self.info, protocols_lib.Options(resamples=0), self.folds,
                self.repeats, scale=encoder.standardize, progress=progress,
            )  # fmt: skip
            return found.scores[:, 0]

        found = self._once(self._file(encoder, keys, protocol, self.repeats), shares)
        return f"{protocol}/1, {self.folds}-fold x {self.repeats}", found

    def _features(self, encoder: AnyEncoder, keys: tuple[str, ...]) -> Extracted:
        request = store.Request(keys)
        return store.joined([store.extract(encoder, self.dataset, s, request) for s in self.dataset.splits])

    def _tuned(self, encoder: Encoder, keys: tuple[str, ...], seed: int, progress: Progress | None) -> np.ndarray:
        """One file per repetition: an interrupted run loses at most one."""
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

    def _file(self, encoder: AnyEncoder, keys: tuple[str, ...], *settings: Any) -> Path:
        prints = [self.dataset.fingerprint(s, keys) for s in self.dataset.splits]
        text = json.dumps([encoder.cache_key, encoder.image_size, prints, keys, self.folds, settings], default=str)
        folder = self.out / "parts"
        folder.mkdir(exist_ok=True)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.npy"

    def _report(self, scores: list[Score]) -> None:
        found = arms_lib.as_json(scores, self.info.classes, self.labels)
        settings = {
            "dataset": self.info.name, "samples": len(self.labels), "classes": len(self.info.classes),
            "image_size": self.image_size or "own", "folds": self.folds, "repeats": self.repeats,
            "note": self.info.note, **self.info.printed,
        }  # fmt: skip
        if PROTOCOL in self.protocols:
            settings |= {"tune_repeats": self.tune_repeats, "recipe": dataclasses.asdict(self.recipe)}
        store.write_json(self.out / "results.json", {"settings": settings, **found})
        title = f"{self.info.name}: {len(self.labels)} images, {len(self.info.classes)} classes"
        license = f"License of the data: {self.info.license}" if self.info.license else ""
        parts = [title, arms_lib.markdown(scores).rstrip(), self.info.note, license]
        (self.out / "results.md").write_text("\n\n".join(part for part in parts if part) + "\n")
        chance = np.bincount(self.labels).max() / len(self.labels)
        arms_lib.figure(scores, self.out / "results.png", title, chance)
