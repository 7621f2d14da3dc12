"""Speed of scene embedding: km2/s, images/s, share of the encoder alone; and our PyTorch module on the same windows.

    python -m benchmarks.embed_scene [--checkpoint PATH | --size b] [--pixels 1068] [--sensors s2_l2a,s1] [--torch]

Three contenders take turns in one run, on a scene written for the occasion; the last line is JSON:

* ``scene``: reading, warping, encoding, blending, writing rows (not the final copy to a COG).
* ``encode``: the same windows, already read, through ``Model.encode`` alone.
* ``torch``: the same windows through the single-file PyTorch module of the hub folder (with ``--torch``).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import resource
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

from benchmarks.timing import Turn, circumstances, repeat
from terrafm_jax.inference import Model
from terrafm_jax.scenes import inputs, read, run, store
from terrafm_jax.scenes.encoder import WindowEncoder
from terrafm_jax.scenes.grid import Plan, target_grid
from terrafm_jax.scenes.layers import Acquisition
from terrafm_jax.sensors import SENSORS


def write_scene(folder: Path, pixels: int, sensors: Sequence[str]) -> list[Acquisition]:
    """One tiled GeoTIFF per sensor and resolution group, as delivered products are."""
    found, rng = [], np.random.default_rng(0)
    for key in sensors:
        paths = []
        for group, names in SENSORS[key].groups.items():
            gsd = int(group[:-1])
            n = pixels * 10 // gsd
            coarse = rng.integers(500, 3000, (len(names), n // 16 + 1, n // 16 + 1))
            data = np.repeat(np.repeat(coarse, 16, 1), 16, 2)[:, :n, :n] + rng.integers(0, 60, (len(names), n, n))
            data = (data / 200 - 20).astype(np.float32) if key == "s1" else data.astype(np.uint16)
            path = folder / f"{key}_{group}.tif"
            with rasterio.open(
                path, "w", driver="GTiff", height=n, width=n, count=len(names), dtype=data.dtype.name, tiled=True,
                crs="EPSG:32632", transform=from_origin(6e5, 5.1e6, gsd, gsd), compress="deflate",
            ) as file:  # fmt: skip
                file.write(data)
                file.descriptions = tuple(names)
            paths.append(str(path))
        found.append(inputs.resolve(f"{key}={','.join(paths)}", inputs.Declared()))
    return found


def open_weights(args: argparse.Namespace) -> Any:
    """The weights of --checkpoint, or fresh ones of --size, computing in --dtype."""
    import jax

    from terrafm_jax.loader import Loaded, read
    from terrafm_jax.models import ModelSpec, init_params
    from terrafm_jax.sensors import Statistics

    if args.checkpoint:
        loaded = read(args.checkpoint)
        return dataclasses.replace(loaded, spec=dataclasses.replace(loaded.spec, dtype=args.dtype))
    spec = ModelSpec.of_size(args.size, dtype=args.dtype)
    params = jax.tree.map(np.asarray, jax.jit(lambda key: init_params(spec, key))(jax.random.key(0)))
    return Loaded({"backbone": params["backbone"]}, spec, Statistics.published(), {}, "fresh")


class Contenders:
    """The three contenders, each a method that processes the scene once."""

    def __init__(self, args: argparse.Namespace, folder: Path, loaded: Any):
        self.sensors, self.loaded, self.threads = args.sensors.split(","), loaded, args.threads
        acquisitions = write_scene(folder, args.pixels, self.sensors)
        grid = target_grid(acquisitions, args.gsd)
        self.reader, self.plan = read.SceneReader(acquisitions, grid), Plan(grid, 224, 112, 16, batch=args.batch)
        self.encoder = WindowEncoder(Model(loaded), self.reader.bands, self.plan.fill)
        self.works = [run.prepare(self.reader, self.plan, chunk) for chunk in self.plan.chunks()]
        self.unfinished = store.Unfinished(folder / "e.tif", self.plan, self.encoder.width, "bench")
        self.waited = 0.0

    def encode(self) -> None:
        for work in self.works:
            self.encoder(work.windows).result()

    def scene(self) -> None:
        (self.unfinished.folder / "snapshot.npz").unlink(missing_ok=True)
        job = run.Job(self.encoder, self.reader, self.plan, self.encoder.width, self.unfinished)
        self.waited = job.run(threads=self.threads).reading

    @functools.cached_property
    def network(self) -> Any:
        from terrafm_jax.export.formats import torch_module

        return torch_module(self.loaded)

    def torch(self) -> None:
        import torch

        with torch.inference_mode():
            for work in self.works:
                self.network(
                    {k: torch.from_numpy(np.moveaxis(work.windows[k].values, -1, 1).copy()) for k in self.sensors}
                )


def report(found: Contenders, turns: Mapping[str, Sequence[Turn]]) -> dict[str, Any]:
    """Medians of the turns; shares of wall and of processor time."""
    wall = {name: statistics.median(t.wall for t in each) for name, each in turns.items()}
    cpu = {name: statistics.median(t.cpu for t in each) for name, each in turns.items()}
    windows, grid = found.plan.count(), found.plan.grid
    result = {
        "windows": windows,
        "encoded_with_padding": len(found.works) * found.plan.fill,
        "square_kilometers": run.area(grid),
        "gsd": grid.gsd,
        "square_kilometers_per_second": run.area(grid) / wall["scene"],
        "images_per_second": windows / wall["scene"],
        "encoder_share": wall["encode"] / wall["scene"],
        "encoder_share_of_processor_time": cpu["encode"] / cpu["scene"],
        "waited_for_pixels_seconds": found.waited,
        "wall_seconds": {name: [t.wall for t in each] for name, each in turns.items()},
        "cpu_seconds": {name: [t.cpu for t in each] for name, each in turns.items()},
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    if "torch" in wall:
        result |= {name: wall["torch"] / wall[key] for name, key in (("encoder_times_torch", "encode"),
                   ("scene_times_torch", "scene"))}  # fmt: skip
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default="")
    parser.add_argument("--size", default="b", help="of fresh weights: s, b, l")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--pixels", type=int, default=1068)
    parser.add_argument("--sensors", default="s2_l2a", help="by comma")
    parser.add_argument("--gsd", type=float, default=None)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="terrafm_bench_") as name:
        found = Contenders(args, Path(name), open_weights(args))
        runs = {"encode": found.encode, "scene": found.scene, **({"torch": found.torch} if args.torch else {})}
        for once in (found.encode, *([found.torch] if args.torch else [])):  # compiles, and warms caches
            works, found.works = found.works, found.works[:1]
            once()
            found.works = works
        turns: dict[str, list[Turn]] = {name: [] for name in runs}
        for _ in range(args.repeats):  # in turns: whatever slows the machine down slows all alike
            for name, once in runs.items():
                turns[name] += repeat(lambda _, once=once: once(), 1, 1)
        about = circumstances("benchmarks.embed_scene", "jax", "torch", "numpy", "rasterio")
        print(json.dumps(about | report(found, turns)))


if __name__ == "__main__":
    main()
