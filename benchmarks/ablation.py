"""The four rows of the published ablation with a small model: trains, scores, draws; continues where it stopped.

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
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.train_step import versions
from terrafm_jax import landcover, weights
from terrafm_jax.config import ABLATIONS
from terrafm_jax.data import pipeline
from terrafm_jax.evals import crossval, landcover_knn, metrics
from terrafm_jax.evals.features import TileFeatures, tile_encoder
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.terrafm import init_params

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


class Bench:
    """Gallery and queries, and what an encoder scores on them."""

    def __init__(self, data: Path, queries: int):
        self.data, self.queries = str(data), queries
        counts = np.bincount(pipeline.load_index(self.data, "train")["landcover"], minlength=landcover.NUM_CATEGORIES)
        self.rare = np.flatnonzero(counts < RARE * counts.sum())
        self.labels = np.zeros(0, int)

    def sets(self, sensors: tuple[str, ...]) -> landcover_knn.TileSets:
        return landcover_knn.TileSets(self.data, ("validation", 0), ("holdout", self.queries), sensors, 64, 1)

    def right(self, features: tuple[TileFeatures, TileFeatures]) -> np.ndarray:
        """bool [N]: whether each query's class was found."""
        gallery, queries = features
        self.labels = queries.landcover
        return landcover_knn.score(gallery, queries, PROTOCOL).predictions == queries.landcover

    def raw(self, sensors: tuple[str, ...]) -> np.ndarray:
        return self.right(self.sets(sensors).band_statistics())

    def encoder(self, spec: ModelSpec, backbone: Any, sensor: str, size: int) -> np.ndarray:
        statistics = pipeline.load_statistics(self.data)
        sensors = (sensor,) if sensor else spec.sensors
        one = dataclasses.replace(spec, sensors=spec.sensors)
        encode = tile_encoder(one, {k: statistics.arrays(k) for k in sensors}, size=size, sensor=sensor)

        def of(batch: Mapping[str, Any]) -> Any:
            return encode(backbone, {k: v for k, v in batch.items() if k != "mask"})

        return self.right(self.sets(sensors).encode(of))

    def scores(self, right: np.ndarray) -> dict[str, float]:
        """Top-1, the mean over classes, and the mean over the classes that are rare in training; percent."""
        by_class = {c: right[self.labels == c].mean() for c in np.unique(self.labels)}
        rare = [by_class[c] for c in self.rare if c in by_class]
        found = {"top1": right.mean(), "macro": np.mean(list(by_class.values())), "rare": np.mean(rare)}
        return {k: 100 * float(v) for k, v in found.items()}


def score_run(bench: Bench, workdir: Path, config: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """bool [N] by input, of a run's teacher."""
    arrays, meta = weights.load_npz(weights.newest_teacher(workdir))
    spec = ModelSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["model"].items()})
    size = config["views.global_size"]
    return {
        name: bench.encoder(spec, arrays["backbone"], sensor, size)
        for name, sensor in INPUTS.items()
        if sensor or (spec.fusion and len(spec.sensors) > 1)
    }


def baselines(
    bench: Bench, spec: ModelSpec, seeds: Sequence[int], size: int
) -> dict[tuple[str, str], list[np.ndarray]]:
    """Raw band statistics and random weights, per (name, input) one entry a seed."""
    import jax

    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for name, sensor in INPUTS.items():
        found["raw band statistics", name] = [bench.raw((sensor,) if sensor else spec.sensors)]
        found["random init", name] = [
            bench.encoder(spec, init_params(spec, jax.random.key(1000 + s))["backbone"], sensor, size) for s in seeds
        ]
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
    runs = {(row, seed): train(args, row, seed) for seed in args.seeds for row in args.rows}
    bench = Bench(args.data, args.queries)
    config = json.loads((next(iter(runs.values())) / "config_resolved.json").read_text(encoding="utf-8"))["config"]
    scored = {key: score_run(bench, workdir, config) for key, workdir in runs.items()}
    _, meta = weights.load_npz(weights.newest_teacher(runs[args.rows[-1], args.seeds[0]]))
    spec = ModelSpec(**{k: tuple(v) if isinstance(v, list) else v for k, v in meta["model"].items()})
    found = baselines(bench, spec, args.seeds, config["views.global_size"])
    for row in args.rows:
        for given in INPUTS:
            rights = [scored[row, seed][given] for seed in args.seeds if given in scored[row, seed]]
            if rights:
                found[ROWS[row], given] = rights
    rows, changes = summarize(bench, found), differences(bench, found)
    classes = len(np.unique(bench.labels))
    record = {
        "benchmark": "ablation", "protocol": PROTOCOL, "tiles": len(bench.labels), "classes": classes,
        "rare": [landcover.NAMES[c] for c in bench.rare], "seeds": args.seeds, "config": args.config, "set": args.set,
        "versions": versions(), "rows": rows, "differences": changes,
    }  # fmt: skip
    (args.out / "ablation.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    text = table(rows, changes)
    (args.out / "ablation.md").write_text(text, encoding="utf-8")
    draw(args.out / "ablation.png", rows, len(bench.labels))
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
