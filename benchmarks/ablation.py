"""The four rows of the published ablation with a small model: trains, scores, plots; resumes where it stopped.

    python -m benchmarks.ablation --data TILES --out DIR [--seeds 0 1 2] [--rows single modality fusion full]
        [--config configs/demo.py] [--set config.total_steps=900 ...]

Each run is ``terrafm_jax.main --config=CONFIG:ROW``. kNN (galileo-knn20) of class tokens, label = WorldCover majority
class of the tile, gallery = split validation, queries = split holdout. Every row is scored with Sentinel-2 L2A alone,
the one input all rows take; rows with fusion also with all sensors. Writes ``ablation.json``, ``.md`` and ``.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.train_step import versions
from terrafm_jax import landcover, weights
from terrafm_jax.config import ABLATIONS
from terrafm_jax.data import pipeline
from terrafm_jax.evals import crossval, landcover_knn, metrics
from terrafm_jax.evals.features import TileFeatures, tile_patches
from terrafm_jax.models import terrafm
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import SENSOR_KEYS

PROTOCOL = "galileo-knn20"
INPUTS = {"S2 L2A": "s2_l2a", "all sensors": ""}
RARE = 0.05  # of the training tiles
ROWS = {
    "single": "single sensor", "modality": "+ sensors as augmentation", "fusion": "+ fusion",
    "full": "+ dual centering",
}  # fmt: skip


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared tiles with validation and holdout")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument("--rows", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="config.KEY=VALUE", help="for every run")
    parser.add_argument("--size", type=int, default=128, help="px that a whole tile is resampled to for scoring")
    parser.add_argument("--queries", type=int, default=0, help="largest number of held-out tiles; 0 = all")
    return parser.parse_args(argv)


def train(args: argparse.Namespace, row: str, seed: int) -> Path:
    """The finished run of a row and seed; raises SystemExit when training fails."""
    workdir = args.out / f"{row}-{seed}"
    if not (workdir / "DONE").exists():
        command = [
            sys.executable, "-m", "terrafm_jax.main", f"--config={args.config}:{row}", f"--workdir={workdir}",
            f"--config.data.dir={args.data}", f"--config.seed={seed}", *(f"--{word}" for word in args.set),
        ]  # fmt: skip
        if code := subprocess.run(command, check=False).returncode:
            raise SystemExit(f"ablation: {' '.join(command[2:])} ended with exit code {code}")
    return workdir


@dataclasses.dataclass(frozen=True)
class Encoder:
    """A network and the input it is scored with: a row of the table."""

    row: str
    given: str
    spec: ModelSpec
    backbone: Any

    def __call__(self, patches: Mapping[str, Any], present: Any) -> Any:
        sensor = INPUTS[self.given]
        if sensor:
            return _cls(self.spec, self.backbone, {sensor: patches[sensor]}, None)
        return _cls(self.spec, self.backbone, {k: patches[k] for k in self.spec.sensors}, present)


@partial(jax.jit, static_argnums=0)
def _cls(spec: ModelSpec, backbone: Any, patches: Mapping[str, Any], present: Any) -> Any:
    return terrafm.encode(spec, backbone, patches, present).cls


class Bench:
    """Gallery and queries, and the scores of encoders on them."""

    def __init__(self, data: Path, queries: int, size: int):
        self.sets = landcover_knn.TileSets(str(data), ("validation", 0), ("holdout", queries), SENSOR_KEYS, 64, 1)
        counts = np.bincount(pipeline.load_index(str(data), "train")["landcover"], minlength=landcover.NUM_CATEGORIES)
        self.rare = np.flatnonzero(counts < RARE * counts.sum())
        self.labels = np.zeros(0, int)
        statistics = pipeline.load_statistics(data)
        self._cut = jax.jit(lambda batch: tile_patches(batch, SENSOR_KEYS, statistics, size=size))

    def _right(self, gallery: TileFeatures, queries: TileFeatures) -> np.ndarray:
        self.labels = queries.landcover
        return landcover_knn.score(gallery, queries, PROTOCOL).predictions == queries.landcover

    def raw(self, sensors: tuple[str, ...]) -> np.ndarray:
        """bool [N]: which queries the band statistics get right."""
        return self._right(*dataclasses.replace(self.sets, sensors=sensors).band_statistics())

    def encoders(self, encoders: Sequence[Encoder]) -> list[np.ndarray]:
        """The same per encoder; tiles are read and resampled once for all of them."""

        def together(batch: Mapping[str, Any]) -> np.ndarray:
            patches, present = self._cut(batch)
            return np.concatenate([np.asarray(e(patches, present)) for e in encoders], axis=1)

        gallery, queries = self.sets.encode(together)
        ends = np.cumsum([e.spec.width for e in encoders])
        found = []
        for end, encoder in zip(ends, encoders, strict=True):
            columns = slice(end - encoder.spec.width, end)
            found.append(self._right(*(dataclasses.replace(f, cls=f.cls[:, columns]) for f in (gallery, queries))))
        return found

    def scores(self, right: np.ndarray) -> dict[str, float]:
        """Top-1, the mean over classes, and the mean over the classes that are rare in training; percent."""
        by_class = {c: right[self.labels == c].mean() for c in np.unique(self.labels)}
        rare = [by_class[c] for c in self.rare if c in by_class]
        found = {"top1": right.mean(), "macro": np.mean(list(by_class.values())), "rare": np.mean(rare)}
        return {k: 100 * float(v) for k, v in found.items()}


def trained(workdir: Path, row: str) -> list[Encoder]:
    """A run's teacher, once per input that it can take."""
    arrays, meta = weights.load_npz(weights.newest_teacher(workdir))
    spec = ModelSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["model"].items()})
    fuses = spec.fusion and len(spec.sensors) > 1
    return [Encoder(ROWS[row], given, spec, arrays["backbone"]) for given, one in INPUTS.items() if one or fuses]


def untrained(spec: ModelSpec, seed: int) -> list[Encoder]:
    backbone = terrafm.init_params(spec, jax.random.key(1000 + seed))["backbone"]
    return [Encoder("random init", given, spec, backbone) for given in INPUTS]


def score(bench: Bench, runs: Mapping[tuple[str, int], Path]) -> dict[tuple[str, str], list[np.ndarray]]:
    """(row, input) -> per seed bool [N]; baselines first."""
    encoders = [e for (row, _), workdir in runs.items() for e in trained(workdir, row)]
    widest = max((e.spec for e in encoders), key=lambda spec: (spec.fusion, len(spec.sensors)))
    seeds = sorted({seed for _, seed in runs})
    encoders = [e for seed in seeds for e in untrained(widest, seed) if widest.fusion or INPUTS[e.given]] + encoders
    found = {
        ("raw band statistics", given): [bench.raw((sensor,) if sensor else SENSOR_KEYS)]
        for given, sensor in INPUTS.items()
    }
    for encoder, right in zip(encoders, bench.encoders(encoders), strict=True):
        found.setdefault((encoder.row, encoder.given), []).append(right)
    return found


def summarize(bench: Bench, found: Mapping[tuple[str, str], list[np.ndarray]]) -> list[dict[str, Any]]:
    rows = []
    for (name, given), rights in found.items():
        each = [bench.scores(r) for r in rights]
        row: dict[str, Any] = {"row": name, "input": given, "seeds": len(each), "each": each}
        for metric in each[0]:
            row[metric] = metrics.summarize_seeds([e[metric] for e in each])
        rows.append(row)
    return rows


def differences(bench: Bench, found: Mapping[tuple[str, str], list[np.ndarray]]) -> list[dict[str, Any]]:
    """Each row minus the one before it (and the first trained minus random init), paired by seed and by tile."""
    rows = []
    for given in INPUTS:
        order = [n for n in ("random init", *ROWS.values()) if (n, given) in found]
        for before, after in itertools.pairwise(order):
            pairs = list(zip(found[before, given], found[after, given], strict=False))
            scores = [(bench.scores(a), bench.scores(b)) for a, b in pairs]
            mean = [np.mean([p[i] for p in pairs], axis=0) for i in (0, 1)]
            interval = crossval.paired(*mean)
            row = {"row": after, "minus": before, "input": given, "pairs": len(pairs)}
            row["top1_tiles"] = [100 * v for v in (interval.value, interval.low, interval.high)]
            for metric in ("top1", "macro", "rare"):
                row[metric] = metrics.summarize_seeds([b[metric] - a[metric] for a, b in scores])
            rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]], changes: Sequence[Mapping[str, Any]]) -> str:
    def cell(value: Sequence[float], count: int, sign: str = "") -> str:
        return f"{value[0]:{sign}.1f} ± {value[1]:.1f}" if count > 1 else f"{value[0]:{sign}.1f}"

    lines = ["| row | input | top-1 | macro | rare classes |", "|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['row']} | {r['input']} | " + " | ".join(cell(r[m], r["seeds"]) for m in METRICS) + " |")
    lines += [
        "",
        "| difference | input | top-1 | 95 % over tiles | macro | rare classes |",
        "|---|---|---|---|---|---|",
    ]
    for c in changes:
        top1, macro, rare = (cell(c[m], c["pairs"], "+") for m in METRICS)
        low, high = c["top1_tiles"][1:]
        lines.append(
            f"| {c['row']} − {c['minus']} | {c['input']} | {top1} | {low:+.1f} to {high:+.1f} | {macro} | {rare} |"
        )
    return "\n".join(lines) + "\n"


METRICS = ("top1", "macro", "rare")


def draw(path: Path, rows: Sequence[Mapping[str, Any]], tiles: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(12, 0.36 * len(rows) + 1.4), sharey=True, constrained_layout=True)
    colors = dict(zip(INPUTS, ("#0b6e4f", "#d98e04"), strict=True))
    for axis, metric, title in zip(
        axes, METRICS, ("top-1", "mean over classes", "mean over rare classes"), strict=True
    ):
        for i, row in enumerate(rows):
            mean, spread = row[metric]
            axis.errorbar(mean, i, xerr=spread if row["seeds"] > 1 else None, color=colors[row["input"]], fmt="none")
            axis.scatter([e[metric] for e in row["each"]], [i] * row["seeds"], color=colors[row["input"]], s=14)
        axis.set_title(f"{title} (%)", fontsize=10)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(rows)), [f"{r['row']} ({r['input']})" for r in rows], fontsize=8)
    axes[0].invert_yaxis()
    figure.suptitle(
        f"kNN on {tiles} held-out synthetic tiles; a dot is a seed, a bar one standard deviation", fontsize=10
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    runs = {(row, seed): train(args, row, seed) for row in args.rows for seed in args.seeds}
    bench = Bench(args.data, args.queries, args.size)
    found = score(bench, runs)
    rows, changes = summarize(bench, found), differences(bench, found)
    classes = len(np.unique(bench.labels))
    record = {
        "benchmark": "ablation", "protocol": PROTOCOL, "tiles": len(bench.labels), "classes": classes,
        "rare": [landcover.NAMES[c] for c in bench.rare], "seeds": args.seeds, "config": args.config, "set": args.set,
        "size": args.size, "versions": versions(), "rows": rows, "differences": changes,
    }  # fmt: skip
    (args.out / "ablation.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    text = table(rows, changes)
    (args.out / "ablation.md").write_text(text, encoding="utf-8")
    draw(args.out / "ablation.png", rows, len(bench.labels))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
