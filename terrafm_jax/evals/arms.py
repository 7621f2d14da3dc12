"""Comparison on few labels: how often each sample was right, by arm and seed; tables, figure, paired intervals."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals import crossval, metrics
from terrafm_jax.evals.charts import COLORS, pyplot, save
from terrafm_jax.evals.metrics import Interval

RAW, RANDOM = "raw band statistics", "random init"


@dataclasses.dataclass(frozen=True)
class Score:
    """One arm under one protocol: ``right [seeds, N]`` is how often each sample was classified rightly (0..1)."""

    arm: str
    protocol: str
    right: np.ndarray

    @property
    def by_seed(self) -> list[float]:
        return [float(v) for v in self.right.mean(1)]

    def interval(self, resamples: int = 5000) -> Interval:
        """Mean over seeds and samples with its 95 % bootstrap interval over the samples."""
        return crossval.paired(np.zeros(self.right.shape[1]), self.right.mean(0), resamples)

    def over(self, other: Score, resamples: int = 5000) -> Interval:
        """This minus the other on the same samples and folds, with the paired 95 % interval."""
        return crossval.paired(other.right.mean(0), self.right.mean(0), resamples)


def pairs(scores: Sequence[Score]) -> list[tuple[Score, Score]]:
    """(arm, baseline): every trained arm against raw and random init under its protocol, and those two.

    Raw statistics cannot be fine-tuned: fine-tuning is held against their best-known use, ``logreg``.
    """
    found = []
    for score in (s for s in scores if s.arm != RAW):
        for name in (RAW, RANDOM):
            same = [s for s in scores if (s.arm, s.protocol) == (name, score.protocol)]
            same += [s for s in scores if name == RAW and s.arm == RAW and s.protocol.startswith("logreg/")]
            if same and score.arm != name and (same[0].protocol == score.protocol or "finetune" in score.protocol):
                found.append((score, same[0]))
    return found


def _points(i: Interval, sign: str = "") -> str:
    return f"{100 * i.value:{sign}.1f} [{100 * i.low:{sign}.1f}, {100 * i.high:{sign}.1f}]"


def markdown(scores: Sequence[Score]) -> str:
    """Table of accuracies and table of paired differences."""
    names = list(dict.fromkeys(s.protocol for s in scores))
    lines = ["| features | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for arm in dict.fromkeys(s.arm for s in scores):
        cells = [next((s for s in scores if (s.arm, s.protocol) == (arm, p)), None) for p in names]
        lines.append(f"| {arm} | " + " | ".join("–" if s is None else _cell(s) for s in cells) + " |")
    lines += ["", "| difference (points) | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    found = pairs(scores)
    for title in dict.fromkeys(f"{a.arm} − {b.arm}" for a, b in found):
        cells = [next(((a, b) for a, b in found if (f"{a.arm} − {b.arm}", a.protocol) == (title, p)), None)
                 for p in names]  # fmt: skip
        lines.append(f"| {title} | " + " | ".join("–" if c is None else _over(*c) for c in cells) + " |")
    return "\n".join(lines) + "\n"


def _over(score: Score, base: Score) -> str:
    other = "" if base.protocol == score.protocol else f" ({base.arm}: {base.protocol.split('/')[0]})"
    return _points(score.over(base), "+") + other


def _cell(score: Score) -> str:
    seeds = f"; seeds {', '.join(f'{100 * v:.1f}' for v in score.by_seed)}" if len(score.right) > 1 else ""
    return _points(score.interval()) + seeds


def as_json(scores: Sequence[Score], classes: Sequence[str], labels: np.ndarray) -> dict[str, Any]:
    """Everything the tables show, and the accuracy of each class."""

    def plain(i: Interval) -> dict[str, float]:
        return {"value": i.value, "low": i.low, "high": i.high}

    rows = [
        {
            "arm": s.arm, "protocol": s.protocol, "top1": plain(s.interval()), "by_seed": s.by_seed,
            "sd over seeds": metrics.summarize_seeds(s.by_seed)[1] if len(s.right) > 1 else None,
            "per_class": {c: float(s.right[:, labels == i].mean()) for i, c in enumerate(classes) if i in labels},
        }
        for s in scores
    ]  # fmt: skip
    found = [
        {"arm": a.arm, "over": b.arm, "protocol": a.protocol, "over protocol": b.protocol, "top1": plain(a.over(b))}
        for a, b in pairs(scores)
    ]
    return {"scores": rows, "differences": found}


def figure(scores: Sequence[Score], path: Path, title: str, chance: float) -> None:
    """Left: accuracies with intervals, one small ring per seed. Right: paired differences."""
    plt = pyplot()
    names = list(dict.fromkeys(s.protocol for s in scores))
    arms = list(dict.fromkeys(s.arm for s in scores))
    found = pairs(scores)
    kinds = list(dict.fromkeys((a.arm, b.arm) for a, b in found))
    height = 1.6 + 0.26 * len(names) * max(len(arms), len(kinds))
    shades = list(itertools.islice(itertools.cycle(COLORS), len(arms) + len(kinds)))  # many checkpoints share them
    drawn, axes = plt.subplots(1, 2, figsize=(11, height), constrained_layout=True, sharey=True)
    for k, arm in enumerate(arms):
        for s in (s for s in scores if s.arm == arm):
            y = names.index(s.protocol) + 0.7 * (k - (len(arms) - 1) / 2) / len(arms)
            first = s is next(t for t in scores if t.arm == arm)
            _whisker(axes[0], s.interval(), y, shades[k], arm if first else None)
            if len(s.right) > 1:
                axes[0].plot(
                    100 * np.array(s.by_seed), [y] * len(s.right), "o", ms=8, mfc="none", mec=shades[k], mew=0.8
                )
    for k, kind in enumerate(kinds):
        for n, (a, b) in enumerate([p for p in found if (p[0].arm, p[1].arm) == kind]):
            y = names.index(a.protocol) + 0.7 * (k - (len(kinds) - 1) / 2) / len(kinds)
            label = f"{kind[0]} − {kind[1]}" if n == 0 else None
            _whisker(axes[1], a.over(b), y, shades[len(arms) + k], label)
    axes[0].axvline(100 * chance, color="0.6", ls=":", lw=1)
    axes[1].axvline(0, color="0.3", lw=1)
    axes[0].set_yticks(range(len(names)), [n.replace(", ", "\n") for n in names], fontsize=8)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("top-1 (%), bar: 95 % over images, rings: seeds, dotted: chance", fontsize=8)
    axes[1].set_xlabel("paired difference (points), bar: 95 %", fontsize=8)
    for axis in axes:
        axis.grid(axis="x", color="0.9")
        axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2, frameon=False)
    drawn.suptitle(title, fontsize=10)
    save(drawn, path)


def _whisker(axis: Any, i: Interval, y: float, color: str, label: str | None) -> None:
    axis.plot([100 * i.low, 100 * i.high], [y, y], color=color, lw=2.2, solid_capstyle="round")
    axis.plot([100 * i.value], [y], "o", color=color, ms=5, label=label)
