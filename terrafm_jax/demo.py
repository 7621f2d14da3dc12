"""``make demo``: cells, preparation, a short pretraining, what it learnt, export, pictures.

    python -m terrafm_jax.demo --out demo_out [--seed 0] [--cells 300] [--steps 575]

Every step runs a public command or function that real data use as well. What is there already is not
made again, so an interrupted demo continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROTOCOL = "galileo-knn20"
CELL, TILE = 240, 120  # px at 10 m; a cell gives four tiles
INPUT = 128  # px that a whole tile is compared at: its own sampling, rounded to patches


def main() -> int:
    arguments = _arguments()
    begun, out = time.monotonic(), arguments.out
    out.mkdir(parents=True, exist_ok=True)
    _say(1, "synthetic Sentinel cells in Major-TOM's layout, with known land cover")
    raw = _once(out / "cells", lambda to: _make_cells(to, arguments))
    _say(2, "preparation: offsets, grids, quality, tiles -> a TFDS data set")
    data = _once(out / "tiles", lambda to: _prepare(raw, to, arguments.workers))
    _say(3, f"pretraining: {arguments.steps} steps of a tiny model")
    run = out / "run"
    _module(
        "terrafm_jax.main", "--config=configs/demo.py", f"--workdir={run}", f"--config.data.dir={data}",
        f"--config.seed={arguments.seed}", f"--config.total_steps={arguments.steps}",
    )  # fmt: skip
    _say(4, f"what it learnt: {PROTOCOL}, held-out tiles against other held-out tiles, label = majority class")
    evaluate(data, run, out)
    _say(5, "export")
    weights = out / "terrafm-demo.safetensors"
    _module("terrafm_jax.export", "--checkpoint", run, "--out", weights)
    _summary(out, run, weights, time.monotonic() - begun)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=int, default=300, help="training cells; a cell gives four tiles")
    parser.add_argument("--heldout", type=int, default=300, help="cells to label and as many to be classified")
    parser.add_argument("--steps", type=int, default=575)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    return parser.parse_args()


def _say(number: int, text: str) -> None:
    print(f"\n=== {number}/5 {text}", flush=True)


def _module(*arguments: object) -> None:
    command = [sys.executable, "-m", *map(str, arguments)]
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(f"demo: {' '.join(command[2:])} ended with exit code {code}")


def _once(folder: Path, make: Any) -> Path:
    """Makes a folder unless it is complete already; its marker is written last."""
    marker = folder.with_name(folder.name + ".complete")
    if not marker.exists():
        make(folder)
        marker.touch()
    return folder


def _make_cells(to: Path, a: argparse.Namespace) -> None:
    shutil.rmtree(to, ignore_errors=True)  # of an interrupted run
    _module(
        "data_prep.synthetic", "--out", to, "--cells", a.cells, "--heldout", a.heldout,
        "--validation", a.heldout, "--seed", a.seed, "--cell-size", CELL, "--workers", a.workers,
    )  # fmt: skip


def _prepare(raw: Path, to: Path, workers: int) -> None:
    _module(
        "data_prep.majortom", "--source", raw, "--worldcover", raw / "worldcover", "--splits", raw / "splits.csv",
        "--tile-size", TILE, "--out", to, "--workers", workers, "--tolerate", "0.05",
    )  # fmt: skip


@dataclasses.dataclass
class Comparison:
    """The encoders that are compared and the tiles they are compared on."""

    data: Path
    config: Any
    spec: Any
    stats: Any
    backbones: Mapping[str, Any]

    @classmethod
    def of(cls, data: Path, run: Path) -> Comparison:
        import jax

        from configs.demo import get_config
        from terrafm_jax import weights
        from terrafm_jax.config import model_spec
        from terrafm_jax.data import pipeline
        from terrafm_jax.models.terrafm import init_params

        config = get_config()
        spec, stats = model_spec(config), pipeline.load_statistics(data)
        trained, _ = weights.load_npz(weights.newest_teacher(run))
        backbones = {
            "random init": init_params(spec, jax.random.key(1))["backbone"],
            "pretrained": trained["backbone"],
        }
        return cls(data, config, spec, stats, backbones)

    def knn(self) -> tuple[dict[str, Any], int, int]:
        """Top-1 with interval by name, number of held-out tiles, number of their classes."""
        from terrafm_jax.evals import landcover_knn
        from terrafm_jax.evals.features import tile_encoder
        from terrafm_jax.evals.knn import majority_class

        canvases = self.config.data.canvases
        sets = landcover_knn.TileSets(
            str(self.data), ("validation", 0), ("holdout", 0), self.spec.sensors, 64, canvases
        )
        gallery, queries = sets.band_statistics()
        results = {
            "majority class": majority_class(gallery.landcover, queries.landcover),
            "raw band statistics": landcover_knn.score(gallery, queries, PROTOCOL).metrics["top1"],
        }
        encode = tile_encoder(self.spec, self.stats, size=INPUT)
        for name, backbone in self.backbones.items():
            features = sets.encode(lambda batch, b=backbone: encode(b, batch))
            results[name] = landcover_knn.score(*features, PROTOCOL).metrics["top1"]
        return results, len(queries.index), len(set(queries.landcover.tolist()))

    def patch_features(self, tiles: int = 9) -> tuple[Any, dict[str, Any], list[str]]:
        """RGB images [N, H, W, 3], patch features [N, h, w, d] by encoder and titles, one tile a class."""
        import numpy as np

        from terrafm_jax import landcover
        from terrafm_jax.data import pipeline
        from terrafm_jax.evals.features import tile_patches
        from terrafm_jax.models.terrafm import encode
        from terrafm_jax.sensors import SENSOR_KEYS

        labels = np.asarray(pipeline.load_index(self.data, "holdout")["landcover"])
        chosen = np.unique(labels, return_index=True)[1][:tiles]
        (batch,) = pipeline.iterate_split(
            self.data, "holdout", len(chosen), sensors=self.spec.sensors, canvases=1, records=chosen
        )
        shown = {key: value for key, value in batch.items() if key != "mask"}
        dn = batch["s2_l2a"]["10m"]["dn"][..., [2, 1, 0]].astype(np.float32)
        dn -= batch["offset"][:, SENSOR_KEYS.index("s2_l2a"), None, None, None]
        images = np.clip(dn / np.percentile(dn, 98, axis=(1, 2, 3), keepdims=True), 0, 1)
        size = 4 * self.config.views.global_size  # a finer grid of patches than in training: prettier maps
        found = {}
        for name, backbone in self.backbones.items():
            patches, present = tile_patches(shown, self.spec.sensors, self.stats, size=size)
            found[name] = np.asarray(encode(self.spec, backbone, patches, present).patches)
        return images, found, [landcover.NAMES[k] for k in batch["landcover"]]


def evaluate(data: Path, run: Path, out: Path) -> None:
    """Majority class, raw band statistics, random init and the trained teacher side by side; tables and pictures."""
    from terrafm_jax import figures

    compared = Comparison.of(data, run)
    results, count, classes = compared.knn()
    for name, value in results.items():
        print(
            f"  {name:22s} {100 * value.value:5.1f} %   95 % interval {100 * value.low:.1f} to {100 * value.high:.1f}"
        )
    print(f"  {count} held-out tiles of {classes} classes, chance {100 / classes:.1f} %")
    plain = {name: (value.value, value.low, value.high) for name, value in results.items()}
    (out / "results.json").write_text(json.dumps({"protocol": PROTOCOL, "tiles": count, "top1": plain}, indent=2))

    pictures = out / "pictures"
    pictures.mkdir(exist_ok=True)
    for name in ("views.png", "landcover.png"):
        shutil.copyfile(run / name, pictures / name)
    figures.learning_curves(pictures / "curves.png", run)
    figures.comparison(pictures / "knn.png", plain, f"kNN on held-out tiles ({PROTOCOL}, top-1, 95 % interval)")
    figures.features_beside_images(pictures / "features.png", *compared.patch_features())


def _summary(out: Path, run: Path, weights: Path, seconds: float) -> None:
    # What to type next, ready to be pasted: `python` need not be the environment that make has built.
    python = shlex.quote(min(sys.executable, os.path.relpath(sys.executable), key=len))
    tiles, workdir = shlex.quote(str(out / "tiles")), shlex.quote(str(run))
    print(f"""
=== done in {seconds / 60:.1f} minutes
  prepared tiles   {out / "tiles"}
  run              {run}        metrics.jsonl, checkpoints/, teacher/, config_resolved.json, parameters.txt
  weights          {weights}
  pictures         {out / "pictures"}
  results          {out / "results.json"}

next
  look at the tiles
{python} -m data_prep.inspect {tiles}
  go on training this one
{python} -m terrafm_jax.main --config=configs/demo.py --workdir={workdir} --config.data.dir={tiles} \\
    --config.total_steps=2000 --config.allow_config_change=True
  your own tiles   docs/data.md, then {python} -m terrafm_jax.main --config=configs/vits.py ...
  use it           import terrafm_jax; model = terrafm_jax.load("{run}"); model.encode(s2_l2a=..., s1=...)""")


if __name__ == "__main__":
    raise SystemExit(main())
