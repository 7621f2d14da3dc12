"""Pictures of a run: learning curves, features as colors, comparisons.

matplotlib is imported inside the functions: a training host does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from terrafm_jax.evals.charts import pyplot
from terrafm_jax.training import report

CURVES = (  # name, title, unit
    ("loss", "loss", "nats"),
    ("teacher_entropy", "teacher entropy", "nats"),
    ("center_distance", "distance of the two centers", ""),
    ("feature_std", "spread of class tokens", "1 = random directions"),
    ("grad_norm", "gradient norm", "logarithmic"),
    ("knn_top1", "kNN top-1", "%"),
)
_FROM_ZERO = ("teacher_entropy", "feature_std")  # monitors of a collapse: how far above zero has to be seen


def learning_curves(path: Any, workdir: Any) -> None:
    """Loss and collapse monitors over the steps of a run, as a PNG."""
    plt = pyplot()
    rows = report.read_rows(workdir)
    figure, axes = plt.subplots(2, 3, figsize=(12, 5.6), constrained_layout=True)
    for axis, (name, title, unit) in zip(axes.flat, CURVES, strict=True):
        if points := report.series(rows, name):
            steps, values = np.array(points).T
            factor = 100 if unit == "%" else 1
            axis.plot(steps, factor * values, color="#0b6e4f", marker="o" if len(steps) < 12 else None)
            axis.set_ylabel(unit, fontsize=8)
            if name in _FROM_ZERO:
                axis.set_ylim(bottom=0)
            if unit == "logarithmic":  # the first steps' gradients are ten times all later ones
                axis.set_yscale("log")
        else:  # an empty frame from 0 to 1 would look like a measurement
            axis.text(0.5, 0.5, "not measured", ha="center", color="#888888", transform=axis.transAxes)
            axis.set_yticks([])
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
    # The loss of a student that has learnt nothing from the teacher is no lower than its entropy.
    if entropy := report.series(rows, "teacher_entropy"):
        axes[0, 0].plot(*zip(*entropy, strict=True), color="#888888", linewidth=1, label="teacher entropy")
        axes[0, 0].legend(fontsize=8)
    _save(figure, path)


def principal_colors(patches: np.ndarray) -> np.ndarray:
    """First three principal components of patch features [N, h, w, d] as RGB in 0..1, one basis for all N."""
    flat = patches.reshape(-1, patches.shape[-1]).astype(np.float64)
    flat = flat - flat.mean(0)
    _, _, basis = np.linalg.svd(flat, full_matrices=False)
    basis = basis[:3] * np.where(np.abs(basis[:3]).max(1) == basis[:3].max(1), 1, -1)[:, None]  # a stable sign
    parts = flat @ basis.T
    low, high = np.percentile(parts, [2, 98], axis=0)
    return np.clip((parts - low) / np.maximum(high - low, 1e-9), 0, 1).reshape(*patches.shape[:3], 3)


def features_beside_images(
    path: Any, images: np.ndarray, patches: Mapping[str, np.ndarray], titles: Sequence[str]
) -> None:
    """Tiles [N, H, W, 3] in 0..1 in the first row, below them the PCA of the patch features of each encoder."""
    plt = pyplot()
    rows = [("image", images), *((name, principal_colors(p)) for name, p in patches.items())]
    figure, axes = plt.subplots(
        len(rows), len(images), figsize=(1.5 * len(images), 1.6 * len(rows) + 0.3), squeeze=False
    )
    for r, (name, pictures) in enumerate(rows):
        for c, picture in enumerate(pictures):
            axes[r, c].imshow(picture, interpolation="nearest")
            axes[r, c].set_xticks([])
            axes[r, c].set_yticks([])
            if r == 0:
                axes[r, c].set_title(titles[c], fontsize=8)
        axes[r, 0].set_ylabel(name, fontsize=9)
    figure.tight_layout()
    _save(figure, path)


def comparison(path: Any, results: Mapping[str, Any], title: str) -> None:
    """Horizontal bars of (value, low, high) per name: point estimates with their 95 % intervals."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(7, 0.5 * len(results) + 1.3), constrained_layout=True)
    names = list(results)
    for i, name in enumerate(names):
        value, low, high = results[name]
        axis.barh(i, value, color="#0b6e4f" if name == names[-1] else "#9bbfb2")
        axis.plot([low, high], [i, i], color="black", linewidth=1.2)
        axis.text(high + 0.01, i, f"{100 * value:.1f}", va="center", fontsize=9)
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, min(1.0, max(r[2] for r in results.values()) + 0.12))
    axis.set_title(title, fontsize=10)
    _save(figure, path)


def _save(figure: Any, path: Any) -> None:
    figure.savefig(path, dpi=110)
    pyplot().close(figure)
