"""Figures of results: bars with intervals, radar, confusion, sheets of wrong samples and of masks.

matplotlib is imported inside the functions: a training host does not need it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax import palette
from terrafm_jax.evals import report
from terrafm_jax.evals.datasets.base import DatasetInfo, Sample, canonical
from terrafm_jax.evals.protocols import headline
from terrafm_jax.evals.report import Row
from terrafm_jax.sensors import SENSORS

COLORS = ("#0b6e4f", "#e08e1a", "#3d6fb4", "#b0413e", "#7a5195", "#5f6b73", "#86a83c", "#c77da0")
CALM = {"s1": 6.0, "s2": 600.0}  # dB, DN: what a picture spans at least, so that noise of calm scenes stays dark


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg", force=False)
    import matplotlib.pyplot as plt

    return plt


def save(figure: Any, path: Path, **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, **options)
    pyplot().close(figure)


def _series(rows: Sequence[Row]) -> tuple[list[str], dict[str, dict[str, list[Row]]]]:
    """Labels of the bars and, per model with its inputs, the rows behind each."""
    labels: list[str] = []
    found: dict[str, dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    rows = [r for r in report.newest(rows) if r["task"] != "regression"]
    sizes = {r.get("image_size") for r in rows}
    for r in rows:
        label = f"{r['dataset']}\n{r['protocol']}\n{report.amount(r['fraction'], r['shots'])}"
        labels += [] if label in labels else [label]
        size = f", {r['image_size'] or 'own'} px" if len(sizes) > 1 else ""
        found[f"{r['model']}{report.variant(r, rows)} ({'+'.join(r['inputs'])}{size})"][label].append(r)
    return labels, found


def bars(rows: Sequence[Row], path: Path) -> bool:
    """Grouped bars of the headline metrics with their intervals. False when there is nothing to draw."""
    labels, series = _series(rows)
    if not labels:
        return False
    plt = pyplot()
    width = 0.8 / len(series)
    size = (max(6.0, 1.8 + len(labels) * max(1.6, 0.34 * len(series))), 4.2)
    figure, axis = plt.subplots(figsize=size, constrained_layout=True)
    for i, (model, by_label) in enumerate(series.items()):
        places, values, errors = [], [], []
        for k, label in enumerate(labels):
            if label not in by_label:
                continue
            value, low, high = _span(by_label[label])
            places.append(k + (i - (len(series) - 1) / 2) * width)
            values.append(value)
            errors.append((value - low, high - value))
        axis.bar(places, values, width * 0.92, label=model, color=COLORS[i % len(COLORS)],
                 yerr=np.maximum(np.array(errors).T, 0), ecolor="#333333", capsize=2)  # fmt: skip
    axis.set_xticks(range(len(labels)), labels, fontsize=7)
    axis.set_ylabel("%")
    axis.set_ylim(0, 100)
    axis.set_title("lines: 95 % interval over test samples, and over draws where labels were drawn", fontsize=7)
    axis.grid(axis="y", alpha=0.3)
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=min(3, len(series)), frameon=False)
    save(figure, path)
    return True


def _span(rows: Sequence[Row]) -> tuple[float, float, float]:
    metric = headline(rows[0]["protocol"].split("/")[0], rows[0]["task"])
    i = report.interval(rows, metric)
    low, high = (i.value if np.isnan(end) else end for end in (i.low, i.high))
    return 100 * i.value, 100 * low, 100 * high


def radar(rows: Sequence[Row], path: Path) -> bool:
    """One axis per data set and protocol, one line per model; drawn from three axes on."""
    labels, series = _series(rows)
    if len(labels) < 3:
        return False
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(6.4, 6), subplot_kw={"projection": "polar"}, constrained_layout=True)
    angles = np.linspace(0, 2 * np.pi, len(labels), endpoint=False)
    around = [*range(len(labels)), 0]
    for i, (model, by_label) in enumerate(series.items()):
        values = np.array([_span(by_label[k])[0] if k in by_label else np.nan for k in labels])  # nan: a gap
        color = COLORS[i % len(COLORS)]
        axis.plot(angles[around], values[around], "o-", color=color, label=model, markersize=3)
    axis.set_xticks(angles, labels, fontsize=7)
    for text, angle in zip(axis.get_xticklabels(), angles, strict=True):  # outwards: not across the circle
        side = np.cos(angle)
        text.set_horizontalalignment("center" if abs(side) < 0.1 else "left" if side > 0 else "right")
    axis.tick_params(labelsize=7)
    axis.set_ylim(0, 100)
    axis.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, -0.25), frameon=False)
    save(figure, path, bbox_inches="tight")  # the labels reach beyond what the layout reserves
    return True


def confusion_figure(row: Row, path: Path) -> None:
    """Rows are normalized: each cell is the share of a true class."""
    plt = pyplot()
    matrix = np.asarray(row["confusion"], float)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    count = len(matrix)
    figure, axis = plt.subplots(figsize=(2.4 + 0.42 * count, 2.0 + 0.42 * count), constrained_layout=True)
    axis.imshow(shares, cmap="Greens", vmin=0, vmax=1)
    names = [c if len(c) < 24 else c[:22] + "…" for c in row["classes"]]
    axis.set_xticks(range(count), names, rotation=90, fontsize=7)
    axis.set_yticks(range(count), names, fontsize=7)
    if count <= 20:
        for i, j in zip(*np.nonzero(matrix), strict=True):
            color = "white" if shares[i, j] > 0.6 else "black"
            axis.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", fontsize=6, color=color)
    axis.set_xlabel("predicted", fontsize=8)
    axis.set_ylabel("true (cells: % of the row)", fontsize=8)
    axis.set_title(f"{row['dataset']}: {row['model']}\n{row['protocol']}, {'+'.join(row['inputs'])}", fontsize=8)
    save(figure, path)


def thumbnail(info: DatasetInfo, sample: Sample) -> np.ndarray:
    """uint8 [H, W, 3] for people: red, green, blue of Sentinel-2, or VV, VH, VV of Sentinel-1.

    Each band loses its own 2nd percentile (haze lifts blue most), then all share one stretch, so that colors stay.
    """
    key = next((k for k in ("s2_l2a", "s2_l1c", "s1") if k in sample.images), None)
    source = info.inputs[key]
    image = canonical(source, sample.images[key])
    wanted = ["VV", "VH", "VV"] if key == "s1" else ["B04", "B03", "B02"]
    order = [SENSORS[key].band_names.index(b) for b in wanted]
    order = [i if source.mask[i] else int(np.nonzero(source.mask)[0][0]) for i in order]
    rgb = image[..., order]
    if not np.isfinite(rgb).any():
        return np.zeros(rgb.shape, np.uint8)
    rgb = rgb - np.nanpercentile(rgb, 2, axis=(0, 1))
    span = max(float(np.nanpercentile(rgb, 98)), CALM[key[:2]])
    return (255 * np.clip(np.nan_to_num(rgb) / span, 0, 1)).astype(np.uint8)


def error_sheet(info: DatasetInfo, samples: Iterable[tuple[Sample, str]], path: Path, title: str) -> None:
    """Pictures of misclassified samples with "true → predicted" below each."""
    plt = pyplot()
    samples = list(samples)
    columns = min(6, max(3, len(samples)))  # one picture alone is narrower than the title
    rows = -(-len(samples) // columns) or 1
    figure, axes = plt.subplots(rows, columns, figsize=(1.9 * columns, 2.25 * rows + 0.4), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (sample, text) in zip(axes.flat, samples, strict=False):
        axis.imshow(thumbnail(info, sample), interpolation="nearest")
        axis.set_title(text, fontsize=6)
    figure.suptitle(title, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def mask_sheet(info: DatasetInfo, samples: Sequence[tuple[Sample, np.ndarray]], path: Path, title: str) -> None:
    """Image, labels and prediction side by side, in the colors that maps have; ignored pixels are white."""
    plt = pyplot()
    from matplotlib.colors import ListedColormap

    paints = [tuple(v / 255 for v in color) for color in palette.colors(info.classes)]
    how = {"cmap": ListedColormap(paints), "vmin": -0.5, "vmax": len(paints) - 0.5, "interpolation": "nearest"}
    lines = -(-len(paints) // 4)
    size = (6, 2.05 * len(samples) + 0.4 + 0.16 * lines)
    figure, axes = plt.subplots(len(samples), 3, figsize=size, squeeze=False, constrained_layout=True)
    for row, (sample, prediction) in zip(axes, samples, strict=True):
        labels = np.ma.masked_equal(np.asarray(sample.target), info.ignore)
        row[0].imshow(thumbnail(info, sample))
        for axis, values in ((row[1], labels), (row[2], prediction)):
            axis.imshow(values, **how)
        for axis in row:
            axis.axis("off")
    for axis, name in zip(axes[0], ("image", "labels", "prediction"), strict=True):
        axis.set_title(name, fontsize=7)
    figure.suptitle(title, fontsize=8)
    patches = [plt.Rectangle((0, 0), 1, 1, facecolor=p, edgecolor="#555555", linewidth=0.4) for p in paints]
    figure.legend(patches, info.classes, loc="outside lower center", ncols=4, fontsize=6, frameon=False)
    save(figure, path)
