"""Every metric against scikit-learn, with and without weights; intervals cover; paired differences are narrower."""

from __future__ import annotations

import numpy as np
import pytest

from terrafm_jax.evals import metrics

sk = pytest.importorskip("sklearn.metrics")


@pytest.fixture(scope="module")
def single():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 300)
    predictions = np.where(rng.random(300) < 0.6, labels, rng.integers(0, 6, 300))
    return labels, predictions, rng.integers(0, 4, 300).astype(float)


def test_single_label_metrics(single):
    labels, predictions, weights = single
    for w in (np.ones(300), weights):
        found = metrics.classification_metric(labels, predictions, 6)(w)
        assert found["top1"] == pytest.approx(sk.accuracy_score(labels, predictions, sample_weight=w))
        assert found["macro"] == pytest.approx(sk.balanced_accuracy_score(labels, predictions, sample_weight=w))
        assert found["f1_macro"] == pytest.approx(sk.f1_score(labels, predictions, average="macro", sample_weight=w))
    matrix = metrics.confusion_matrix(labels, predictions, 6)
    np.testing.assert_array_equal(matrix, sk.confusion_matrix(labels, predictions))
    np.testing.assert_allclose(metrics.recalls(matrix), sk.recall_score(labels, predictions, average=None))
    np.testing.assert_allclose(metrics.ious(matrix), sk.jaccard_score(labels, predictions, average=None))


def test_ignored_and_impossible_labels():
    labels, predictions = np.array([0, 1, 255, 1]), np.array([0, 1, 0, 0])
    matrix = metrics.confusion_matrix(labels, predictions, 3, ignore=255)
    np.testing.assert_array_equal(matrix, [[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert metrics.from_confusion(matrix)["miou"] == pytest.approx((1 / 2 + 1 / 2) / 2)  # class 2 never occurs
    assert np.isnan(metrics.ious(matrix)[2])
    with pytest.raises(ValueError, match=r"expected classes 0..2 \(ignore -1\), found \[255\]"):
        metrics.confusion_matrix(labels, predictions, 3)


def test_multilabel_metrics():
    rng = np.random.default_rng(1)
    labels = rng.random((200, 7)) < 0.3
    scores = np.round(np.clip(0.5 * labels + 0.6 * rng.random((200, 7)), 0, 1), 1)  # rounded: many ties
    predictions, weights = scores > 0.5, rng.integers(0, 3, 200).astype(float)
    for w in (np.ones(200), weights):
        found = metrics.multilabel_metric(labels, predictions, scores)(w)
        for average in ("micro", "macro"):
            expected = sk.f1_score(labels, predictions, average=average, sample_weight=w)
            assert found[f"f1_{average}"] == pytest.approx(expected)
            expected = sk.average_precision_score(labels, scores, average=average, sample_weight=w)
            assert found[f"map_{average}"] == pytest.approx(expected)


def test_classes_without_positives_do_not_lower_map():
    labels = np.array([[1, 0], [0, 0], [1, 0]], bool)
    found = metrics.mean_average_precision(labels, np.array([[0.9, 0.1], [0.1, 0.9], [0.8, 0.3]]))
    assert found["map_macro"] == 1.0
    assert np.isnan(metrics.average_precision(np.zeros(3, bool), np.ones(3)))


def test_regression_metrics():
    rng = np.random.default_rng(2)
    y = rng.normal(10, 3, 100)
    z, w = y + rng.normal(size=100), rng.integers(0, 3, 100).astype(float)
    found = metrics.regression_metrics(y, z, w)
    assert found["rmse"] == pytest.approx(np.sqrt(sk.mean_squared_error(y, z, sample_weight=w)))
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(y, z, sample_weight=w))
    assert found["r2"] == pytest.approx(sk.r2_score(y, z, sample_weight=w))
    assert np.isnan(metrics.regression_metrics(np.ones(3), np.ones(3), np.ones(3))["r2"])


def test_segmentation_metric_equals_pooled_pixels():
    rng = np.random.default_rng(3)
    labels, predictions = rng.integers(-1, 4, (5, 8, 8)), rng.integers(0, 4, (5, 8, 8))
    stack = np.stack([metrics.confusion_matrix(a, b, 4) for a, b in zip(labels, predictions, strict=True)])
    found = metrics.segmentation_metric(stack)(np.ones(5))
    keep = labels >= 0
    expected = sk.jaccard_score(labels[keep], predictions[keep], average="macro")
    assert found["miou"] == pytest.approx(expected)
    assert found["pixel_accuracy"] == pytest.approx((labels == predictions)[keep].mean())


def test_bootstrap_matches_the_binomial_and_pairing_narrows():
    rng = np.random.default_rng(4)
    labels = np.zeros(400, int)
    first = (rng.random(400) < 0.2).astype(int)  # accuracy near 0.8
    second = np.where(rng.random(400) < 0.05, 1 - first, first)
    a, b = (metrics.classification_metric(labels, p, 2) for p in (first, second))
    interval = metrics.bootstrap(a, 400)["top1"]
    half = 1.96 * np.sqrt(interval.value * (1 - interval.value) / 400)
    assert interval.high - interval.low == pytest.approx(2 * half, rel=0.15)
    assert interval.value == pytest.approx((first == 0).mean())
    difference = metrics.paired_difference(a, b, 400)["top1"]
    assert difference.value == pytest.approx((second == 0).mean() - (first == 0).mean())
    assert difference.high - difference.low < 0.7 * (interval.high - interval.low)
    assert metrics.bootstrap(a, 400) == metrics.bootstrap(a, 400)  # same seed, same interval


def test_seed_summary():
    assert metrics.summarize_seeds([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    assert metrics.summarize_seeds([1.0]) == (1.0, 0.0)


def test_interval_over_draws_and_samples():
    images = metrics.Interval(0.8, 0.77, 0.82)
    alone = metrics.over_draws([0.8, 0.8, 0.8], images)  # draws that agree: the samples alone
    assert (alone.value, alone.low, alone.high) == pytest.approx((0.8, 0.77, 0.82))
    draws = metrics.over_draws([0.78, 0.8, 0.82], metrics.Interval(0.8, 0.8, 0.8))
    assert draws.high - draws.value == pytest.approx(4.302653 * 0.02 / np.sqrt(3), rel=1e-6)  # Student's t, 2 degrees
    both = metrics.over_draws([0.78, 0.8, 0.82], images)
    assert both.value - both.low == pytest.approx(np.hypot(draws.high - draws.value, 0.03))
    assert both.high - both.value == pytest.approx(np.hypot(draws.high - draws.value, 0.02))
    assert np.isnan(metrics.over_draws([0.7, 0.8], metrics.Interval(0.75)).low)  # no resampling: no interval


def test_interval_over_draws_covers_the_truth():
    """Draws differ, images differ in difficulty: as often as promised the interval holds the expected accuracy."""
    rng = np.random.default_rng(0)
    truth, hits, narrow, runs = 0.8, 0, 0, 300
    for _ in range(runs):
        difficulty = rng.normal(0, 0.1, 200)
        chance = np.clip(truth + rng.normal(0, 0.03, (4, 1)) + difficulty, 0, 1)  # 4 draws, the same 200 images
        right = rng.random((4, 200)) < chance
        parts = []
        for r in right:
            half = 1.96 * np.sqrt(r.mean() * (1 - r.mean()) / 200)
            parts.append(metrics.Interval(r.mean(), r.mean() - half, r.mean() + half))
        found = metrics.over_draws([p.value for p in parts], metrics.mean_interval(parts))
        hits += found.low <= truth <= found.high
        spread = right.mean(1).std(ddof=1)
        narrow += abs(right.mean() - truth) <= spread  # what mean ± sd would promise
    assert hits / runs >= 0.95
    assert narrow < hits
