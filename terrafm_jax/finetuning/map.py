"""Maps of whole scenes with a fine-tuned network: ``python -m terrafm_jax.finetuning.map --workdir RUN --sensor ...``.

Runs through the scene engine: windowed reads, overlapping windows blended by their probabilities, resumable.
Segmentation writes one class per scene pixel, image-level tasks one class (or value) per 16 px from the windows
around it. ``MAP.tif`` holds the classes (255: no data) with their colors, ``MAP.tif.aux.xml`` their names,
``MAP_probability.tif`` the probability of the class in percent; regression writes one float32 file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals import progress
from terrafm_jax.evals.datasets.base import MOST_CLASSES
from terrafm_jax.finetuning import legend
from terrafm_jax.finetuning.tuned import Tuned
from terrafm_jax.sensors import SENSORS


class WindowClassifier:
    """The tuned network in the shape that ``scenes.run.Job`` expects of an encoder: tokens that carry probabilities.

    A token of a segmentation network holds the probabilities of its patch x patch pixels, else those of its window.
    ``window``: side in px that smaller windows, those of a scene smaller than one, are mirrored up to. Windows are
    stretched to the network's size, and so would be such a scene: to another scale and other proportions.
    """

    def __init__(self, tuned: Tuned, bands: Mapping[str, Sequence[str]], window: int):
        tuned.check_bands(bands)
        self.tuned, self.bands, self.window = tuned, bands, window
        self.dense = tuned.spec.task == "segmentation"
        patch = tuned.spec.model.patch
        self.width = tuned.spec.outputs * (patch * patch if self.dense else 1)
        self._pool = ThreadPoolExecutor(1, "terrafm-map")

    def __call__(self, windows: Mapping[str, Any]) -> Future[tuple[np.ndarray, np.ndarray]]:
        return self._pool.submit(self._run, windows)

    def _run(self, windows: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        images = {}
        for key in self.tuned.spec.inputs:
            given = windows[key]
            image = np.zeros((*given.values.shape[:3], len(SENSORS[key].bands)), np.float32)
            image[..., list(SENSORS[key].indices(self.bands[key]))] = given.values
            image[~given.valid] = np.nan
            batch, height, width = image.shape[:3]
            beyond = [(0, max(0, self.window - side)) for side in (height, width)]
            images[key] = np.pad(image, ((0, 0), *beyond, (0, 0)), "symmetric")
        scores = self.tuned(images)
        p = self.tuned.spec.model.patch
        h, w = height // p, width // p
        if self.dense:
            measured = np.any([windows[key].valid for key in self.tuned.spec.inputs], axis=0)
            scores = np.where(measured[..., None], scores[:, :height, :width], np.nan)
            tokens = scores.reshape(batch, h, p, w, p, -1).transpose(0, 1, 3, 2, 4, 5).reshape(batch, h, w, self.width)
        else:
            tokens = np.broadcast_to(scores[:, None, None], (batch, h, w, self.width))
        return np.zeros((batch, self.width), np.float32), np.ascontiguousarray(tokens, np.float32)


def probability_file(out: Path) -> Path:
    """Where the probabilities of a class map lie: a file of their own, since a GIS shows two bands as a composite."""
    return out.with_name(f"{out.stem}_probability{out.suffix}")


def write_map(out: Path, tokens: np.ndarray, plan: Any, tuned: Tuned, tags: Mapping[str, str]) -> None:
    """Blended tokens [rows, columns, width] as GeoTIFF, one row of tokens at a time."""
    import rasterio
    from rasterio.windows import Window

    dense, patch = tuned.spec.task == "segmentation", tuned.spec.model.patch
    grid = plan.grid if dense else plan.output
    step = patch if dense else 1
    regression = tuned.spec.task == "regression"
    profile = {
        "driver": "GTiff", "height": grid.height, "width": grid.width, "crs": grid.crs, "transform": grid.transform,
        "count": 1, "dtype": "float32" if regression else "uint8", "compress": "deflate",
        "nodata": np.nan if regression else legend.NODATA, "tiled": True, "blockxsize": 256, "blockysize": 256,
    }  # fmt: skip
    paths = {"regression": out} if regression else {"class": out, "probability (%)": probability_file(out)}
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(rasterio.open(path, "w", **profile)) for path in paths.values()]
        for dst, name in zip(files, paths, strict=True):
            dst.descriptions = (name,)
            dst.update_tags(classes=legend.as_tag(tuned.classes), **tags)
        if not regression:
            legend.write_palette(files[0], tuned.classes)
        elif tuned.unit:
            files[0].units = (tuned.unit,)
        for row in range(len(tokens)):
            lines = _lines(np.asarray(tokens[row]), dense, patch, tuned.spec.outputs)
            height = min(step, grid.height - row * step)
            if height <= 0:
                break
            planes = _planes(lines[:height, : grid.width], regression)
            for dst, plane in zip(files, planes, strict=True):
                dst.write(plane, 1, window=Window(0, row * step, plane.shape[1], height))
    if not regression:
        legend.write_names(out, tuned.classes)


def _lines(tokens: np.ndarray, dense: bool, patch: int, classes: int) -> np.ndarray:
    """One row of tokens [columns, width] -> pixels [rows, columns, classes]."""
    if not dense:
        return tokens[None]
    pixels = tokens.reshape(len(tokens), patch, patch, classes).transpose(1, 0, 2, 3)
    return pixels.reshape(patch, len(tokens) * patch, classes)


def _planes(scores: np.ndarray, regression: bool) -> np.ndarray:
    if regression:
        return scores[None, ..., 0].astype(np.float32)
    empty = np.isnan(scores).any(-1)
    filled = np.nan_to_num(scores, nan=0.0)
    classes = np.where(empty, legend.NODATA, filled.argmax(-1))
    sure = np.where(empty, legend.NODATA, np.round(100 * filled.max(-1)))
    return np.stack([classes, sure]).astype(np.uint8)


def _shown(out: Path, windows: int) -> Callable[[int], None]:
    """Shows how many windows of a map are done; called with the number since the last call."""
    show, done = progress.bar(f"{out.name}, windows"), 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        show(done, windows)

    return more


def predict_scene(
    tuned: Tuned,
    sensors: Sequence[str],
    out: Path,
    *,
    window: int = 0,
    overlap: int | None = None,
    gsd: float | None = None,
    batch: int = 8,
    declared: Any = None,
    overwrite: bool = False,
) -> str:
    """Maps a scene.

    Args:
      sensors: ``NAME=FILE`` as ``terrafm_jax.embed --sensor`` takes them.
      window, overlap: pixels; the size of the images that the network was tuned on and half of it by default.
      gsd: meters per pixel of the work grid; the finest band's by default. Should be that of the tuning images.
      overwrite: replace ``out``, which holds something else.

    Returns:
      What the last line of a command should say: what was done, and what was warned of.

    Raises:
      SceneError: unreadable or unfitting files. ValueError: sensors or bands missing.
    """
    from terrafm_jax.scenes import finish, run, store
    from terrafm_jax.scenes import tags as tags_lib
    from terrafm_jax.scenes.grid import Plan, target_grid
    from terrafm_jax.scenes.inputs import Declared, resolve_all
    from terrafm_jax.scenes.read import SceneReader

    if len(tuned.classes) > MOST_CLASSES:  # it would be told by another's name
        raise ValueError(
            f"{tuned.folder}: {len(tuned.classes)} classes; a map holds a byte a pixel, at most {MOST_CLASSES}"
        )
    acquisitions = resolve_all(sensors, declared or Declared())
    grid = target_grid(acquisitions, gsd)
    patch = tuned.spec.model.patch
    window = window or tuned.window
    overlap = window // 2 // patch * patch if overlap is None else overlap
    plan = Plan(grid, window, overlap, patch, batch=batch)
    reader = SceneReader(acquisitions, grid)
    if text := tuned.other_sampling(grid.gsd):
        reader.warn(text)
    classify = WindowClassifier(tuned, reader.bands, window)
    said = dataclasses.asdict(declared or Declared())
    mark = run.signature(plan, reader, None, weights=tuned.weights_hash, sensors=list(sensors), declared=said)
    this = finish.digest(mark)
    if finish.done_already(out, this, overwrite):
        return f"done already: {out}"
    unfinished = store.Unfinished(out, plan, classify.width, mark)
    ground = 1e-6 if classify.dense else 0.5  # dense maps know of every pixel whether it was measured
    job = run.Job(
        classify, reader, plan, classify.width, unfinished, min_ground=ground, progress=_shown(out, plan.count())
    )
    job.run()
    finish.refuse_nothing(unfinished.tokens(), unfinished, out)
    tags = {**tuned.tags(), tags_lib.WEIGHTS: tuned.weights_hash, **finish.closing_tags(this, reader.warnings)}
    write_map(out, unfinished.tokens(), plan, tuned, tags)
    unfinished.remove()
    return f"written {out}{finish.closing_words(reader.warnings)}"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; bad input, or a signal, ends in one line and exit code 1."""
    from terrafm_jax.scenes.flags import add_declarations, declared, quiet_libraries
    from terrafm_jax.scenes.run import Stopped

    quiet_libraries()
    parser = argparse.ArgumentParser("python -m terrafm_jax.finetuning.map", description=__doc__)
    parser.add_argument("--workdir", required=True, help="of terrafm_jax.finetune")
    parser.add_argument("--sensor", action="append", required=True, metavar="NAME=FILE")
    parser.add_argument("--out", required=True, type=Path, help="MAP.tif")
    add_declarations(parser)
    parser.add_argument("--window", type=int, default=0, help="pixels; default: the size of the images it was tuned on")
    parser.add_argument("--overlap", type=int, default=None, help="pixels; default: half a window")
    parser.add_argument("--gsd", type=float, default=None, help="meters a pixel; default: the finest band's")
    parser.add_argument("--batch", type=int, default=8, help="windows at once")
    parser.add_argument("--overwrite", action="store_true", help="replace MAP.tif, which holds something else")
    args = parser.parse_args(argv)
    try:
        said = predict_scene(
            Tuned(args.workdir), args.sensor, args.out, declared=declared(args), window=args.window,
            overlap=args.overlap, gsd=args.gsd, batch=args.batch, overwrite=args.overwrite,
        )  # fmt: skip
    except (ValueError, OSError, Stopped) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # the second one: the first waits for a snapshot
        from terrafm_jax.startup import interrupted

        interrupted()
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main())
