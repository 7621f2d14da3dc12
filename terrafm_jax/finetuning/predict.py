"""Predictions of a fine-tuned network written back: masks as GeoTIFF on the images' grid, the rest as CSV."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals.datasets.base import DatasetInfo
from terrafm_jax.finetuning import legend
from terrafm_jax.finetuning.trainer import Run, TuneState


def write_predictions(folder: Path, run: Run, state: TuneState, split: str, info: DatasetInfo) -> None:
    """``predictions.csv`` for whole images; one ``<id>.tif`` a mask, georeferenced where the image file is."""
    found = [p for batch, _ in run.outputs(state, split) for p in batch]
    folder.mkdir(parents=True, exist_ok=True)
    source = run.sources[split]
    if info.task == "segmentation":
        for i, classes in enumerate(found):
            sample = source.read(i)
            name = re.sub(r"\.tiff?(?=/|$)", "", sample.id).replace("/", "_")
            write_mask(folder / f"{name}.tif", np.asarray(classes), sample.path, info.classes, sample.window)
        return
    with (folder / "predictions.csv").open("w", newline="") as f:
        writer = csv.writer(f)
        scored = info.task != "regression"  # a number needs no scores beside it
        writer.writerow(["id", "predicted", *(info.classes if scored else ())])
        for i, scores in enumerate(found):
            shown = (f"{s:.5g}" for s in np.ravel(scores)) if scored else ()
            writer.writerow([source.split.ids[i], _answer(scores, info), *shown])


def _answer(scores: np.ndarray, info: DatasetInfo) -> str:
    if info.task == "regression":
        return f"{float(scores[0]):.6g}"
    if info.task == "multilabel":
        return ";".join(c for c, s in zip(info.classes, scores, strict=True) if s > 0.5)
    return info.classes[int(np.argmax(scores))]


def write_mask(
    path: Path, classes: np.ndarray, like: str, names: Any, window: tuple[int, int, tuple[int, int]] | None = None
) -> None:
    """uint8 GeoTIFF of class numbers [H, W], with colors and names.

    CRS and extent are those of the raster ``like``, or of the ``window`` of it that the mask covers
    (``Sample.window``); a mask whose sides are in another proportion gets neither.
    """
    import rasterio

    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "nodata": legend.NODATA, "compress": "deflate",
               "height": classes.shape[0], "width": classes.shape[1]}  # fmt: skip
    if like.lower().endswith((".tif", ".tiff")) and Path(like).exists():
        with rasterio.open(like) as src:
            row, column, whole = window or (0, 0, classes.shape)
            if src.height * whole[1] == src.width * whole[0] and src.crs is not None:
                pixel = rasterio.Affine.scale(src.height / whole[0])
                corner = src.transform @ pixel @ rasterio.Affine.translation(column, row)
                profile |= {"crs": src.crs, "transform": corner}
    with rasterio.open(path, "w", **profile) as dst:
        legend.write_palette(dst, names)
        dst.write(classes.astype(np.uint8), 1)
        dst.update_tags(classes=legend.as_tag(names))
    legend.write_names(path, names)
