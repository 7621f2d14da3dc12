"""Repeated stratified cross-validation: for data sets too small for one split to say anything.

Every sample is tested once per repetition. Intervals come from resampling samples, with each sample's correctness
averaged over the repetitions; differences between encoders pair the same samples and folds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from terrafm_jax.evals import metrics
from terrafm_jax.evals.metrics import Interval, Result


def stratified_folds(labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """int [N]: the fold of every sample; every class is spread as evenly as it can be.

    Raises ValueError for fewer than two folds or more folds than samples.
    """
    labels = np.asarray(labels)
    if not 2 <= folds <= len(labels):
        raise ValueError(f"folds = {folds}: expected 2 to the number of samples, {len(labels)}")
    rng, out, start = np.random.default_rng(seed), np.empty(len(labels), int), 0
    for c in np.unique(labels):
        members = rng.permutation(np.nonzero(labels == c)[0])
        out[members] = (start + np.arange(len(members))) % folds
        start += len(members)
    return out


def splits(labels: np.ndarray, folds: int, repeats: int, seed: int = 0) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(repetition, train rows, test rows)."""
    for r in range(repeats):
        fold = stratified_folds(labels, folds, seed + r)
        for k in range(folds):
            yield r, np.nonzero(fold != k)[0], np.nonzero(fold == k)[0]


def cross_validate(
    classify: Callable[[np.ndarray, np.ndarray], np.ndarray], labels: np.ndarray, *, folds: int = 5, repeats: int = 10,
    seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:  # fmt: skip
    """Predicted classes int [repeats, N]; ``classify(train rows, test rows)`` returns those of the test rows.

    ``progress`` is called with (folds done, folds in all).
    """
    predictions = np.full((repeats, len(labels)), -1)
    for done, (r, train, test) in enumerate(splits(labels, folds, repeats, seed), 1):
        predictions[r, test] = classify(train, test)
        if progress:
            progress(done, folds * repeats)
    return predictions


def result(
    label: str, predictions: np.ndarray, labels: np.ndarray, classes: int, settings: dict, resamples: int
) -> Result:
    """Top-1 and macro accuracy over the repetitions with intervals over samples; ``predictions [repeats, N]``.

    ``scores`` holds each sample's share of repetitions in which it was right, [N, 1], for paired comparisons.
    """
    labels = np.asarray(labels)
    right = (predictions == labels).mean(0)

    def metric(weights: np.ndarray) -> dict[str, float]:
        by_class = [np.average(right[labels == c], weights=weights[labels == c]) for c in np.unique(labels)
                    if weights[labels == c].sum() > 0]  # fmt: skip
        return {"top1": float(np.average(right, weights=weights)), "macro": float(np.mean(by_class))}

    found = metrics.bootstrap(metric, len(labels), resamples=resamples)
    matrix = sum(metrics.confusion_matrix(labels, p, classes) for p in predictions)
    spread = metrics.summarize_seeds([(p == labels).mean() for p in predictions])[1]
    settings = settings | {"repeats": len(predictions), "samples": len(labels), "sd over repeats": spread}
    return Result(
        label, "classification", found, metrics.recalls(matrix), predictions[0], matrix, right[:, None], settings
    )


def paired(first: np.ndarray, second: np.ndarray, resamples: int = 2000, seed: int = 0) -> Interval:
    """Difference of mean correctness, ``second - first``, of the same samples [N], with its 95 % interval."""
    difference = np.asarray(second, np.float64).ravel() - np.asarray(first, np.float64).ravel()

    def metric(weights: np.ndarray) -> dict[str, float]:
        return {"top1": float(np.average(difference, weights=weights))}

    return metrics.bootstrap(metric, len(difference), resamples=resamples, seed=seed)["top1"]
