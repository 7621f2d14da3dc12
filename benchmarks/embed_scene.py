"""Speed of scene embedding: km2/s, images/s, share of the encoder alone; and our PyTorch module on the same windows.

    python -m benchmarks.embed_scene [--checkpoint PATH | --size b] [--pixels 1068] [--sensors s2_l2a,s1] [--torch]

Three measurements in one run, on a scene written for the occasion; the last line is JSON:

* ``scene``: reading, warping, encoding, blending, writing rows (not the final copy to a COG).
* ``encoder``: the same windows, already read, through ``Model.encode`` alone.
* ``torch``: the same windows through the single-file PyTorch module of the hub folder (with ``--torch``).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.transform import from_origin

from terrafm_jax.inference import Model
from terrafm_jax.scenes import inputs, read, run, store
from terrafm_jax.scenes.encoder import WindowEncoder
from terrafm_jax.scenes.grid import Plan, target_grid
from terrafm_jax.sensors import SENSORS


def write_scene(folder: Path, pixels: int, sensors: Sequence[str]) -> list[inputs.Acquisition]:
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


def encoder_alone(encoder: WindowEncoder, works: Sequence[run.Work]) -> float:
    """Seconds that the encoder takes for windows that are in memory."""
    encoder(works[0].windows).result()
    began = time.perf_counter()
    for work in works:
        encoder(work.windows).result()
    return time.perf_counter() - began


def torch_alone(loaded: Any, works: Sequence[run.Work], sensors: Sequence[str]) -> float:
    """Seconds that the exported PyTorch module takes for the same windows (same machine, all its threads)."""
    import torch

    from terrafm_jax.export.formats import torch_module

    network, seconds = torch_module(loaded).eval(), 0.0
    with torch.inference_mode():
        for i, work in enumerate([works[0], *works]):
            images = {k: torch.from_numpy(np.moveaxis(work.windows[k].values, -1, 1).copy()) for k in sensors}
            began = time.perf_counter()
            network(images)
            seconds += time.perf_counter() - began if i else 0.0
    return seconds


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
    args = parser.parse_args()
    sensors = args.sensors.split(",")
    with tempfile.TemporaryDirectory(prefix="terrafm_bench_") as name:
        folder = Path(name)
        acquisitions = write_scene(folder, args.pixels, sensors)
        grid = target_grid(acquisitions, args.gsd)
        reader = read.SceneReader(acquisitions, grid)
        plan = Plan(grid, 224, 112, 16, batch=args.batch)
        loaded = open_weights(args)
        encoder = WindowEncoder(Model(loaded), reader.bands, args.batch)
        works = [run.prepare(reader, plan, chunk) for chunk in plan.chunks()]
        alone = encoder_alone(encoder, works)
        unfinished = store.Unfinished(folder / "e.tif", plan, encoder.width, "bench")
        summary = run.Job(encoder, reader, plan, encoder.width, unfinished).run(threads=args.threads)
        computed = sum(args.batch for w in works if w.kept)
        result = {
            "windows": summary.windows,
            "scene_seconds": summary.seconds,
            "encoder_seconds": alone,
            "encoder_share": alone / summary.seconds,
            "square_kilometers_per_second": summary.square_kilometers / summary.seconds,
            "images_per_second": summary.windows / summary.seconds,
            "waited_for_pixels_seconds": summary.reading,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "computed_windows": computed,
            "gsd": grid.gsd,
        }
        if args.torch:
            seconds = torch_alone(loaded, works, sensors)
            result |= {"torch_seconds": seconds, "times_torch": seconds / alone}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
