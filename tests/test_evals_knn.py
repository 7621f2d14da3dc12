"""kNN against scikit-learn on the same features, memory bound, protocols, raw statistics."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from terrafm_jax.evals import knn, raw
from terrafm_jax.evals.metrics import Result

sklearn_neighbors = pytest.importorskip("sklearn.neighbors")


def clusters(n: int, classes: int, seed: int = 0, d: int = 12, spread: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(99).normal(size=(classes, d)) + 2.0
    labels = rng.integers(0, classes, n)
    return (centers[labels] + spread * rng.normal(size=(n, d))).astype(np.float32), labels


@pytest.mark.parametrize("memory_bytes", [1, 1 << 20, 1 << 27])
@pytest.mark.parametrize("similarity", ["cosine", "euclidean"])
def test_neighbors_equal_scikit_learn(similarity, memory_bytes):
    train, _ = clusters(3000, 7)
    test, _ = clusters(25, 7, seed=1)
    index, value = knn.neighbors(train, test, 20, similarity=similarity, memory_bytes=memory_bytes)
    reference = sklearn_neighbors.NearestNeighbors(n_neighbors=20, metric=similarity, algorithm="brute")
    distance, expected = reference.fit(train.astype(np.float64)).kneighbors(test.astype(np.float64))
    np.testing.assert_array_equal(index, expected)
    np.testing.assert_allclose(1 - value if similarity == "cosine" else -value, distance, atol=1e-6)


def test_euclidean_survives_a_large_common_offset():
    train, _ = clusters(500, 4)
    index, _ = knn.neighbors(train + 3000, train[:9] + 3000, 5, similarity="euclidean")
    expected = sklearn_neighbors.NearestNeighbors(n_neighbors=5, algorithm="brute").fit(
        (train + 3000).astype(np.float64)
    )
    np.testing.assert_array_equal(index, expected.kneighbors((train[:9] + 3000).astype(np.float64))[1])


def test_ties_go_to_the_lower_index_and_k_shrinks():
    train = np.ones((4, 3), np.float32)
    index, value = knn.neighbors(train, train[:2], 20)
    np.testing.assert_array_equal(index, [[0, 1, 2, 3]] * 2)
    np.testing.assert_allclose(value, 1.0)


@pytest.mark.parametrize("name", sorted(knn.PROTOCOLS))
def test_protocols_equal_scikit_learn_classifiers(name):
    protocol = knn.PROTOCOLS[name]
    (train, labels), (test, truth) = clusters(600, 9, spread=3.0), clusters(150, 9, seed=1, spread=3.0)

    def weigh(distance):
        return np.exp((1 - distance) / protocol.temperature)

    reference = sklearn_neighbors.KNeighborsClassifier(
        protocol.k, metric=protocol.similarity, algorithm="brute", weights=weigh if protocol.temperature else "uniform"
    ).fit(train, labels)
    result = knn.knn_classify(train, labels, test, truth, name)
    np.testing.assert_allclose(result.scores, reference.predict_proba(test), atol=1e-5)
    assert result.top1 == pytest.approx((result.scores.argmax(1) == truth).mean())
    assert result.metrics["top1"].low < result.top1 < result.metrics["top1"].high
    assert result.protocol == f"{name}/1"
    assert ("top5" in result.metrics) == protocol.top5
    assert result.confusion.sum() == len(truth)


def test_multilabel_is_one_binary_vote_per_class():
    (train, a), (test, b) = clusters(400, 5), clusters(80, 5, seed=1)
    labels, truth = np.stack([a == 0, a < 3, a != 4], 1), np.stack([b == 0, b < 3, b != 4], 1)
    result = knn.knn_classify(train, labels, test, truth, "galileo-knn20")
    for c in range(3):
        alone = knn.knn_classify(train, labels[:, c].astype(int), test, truth[:, c].astype(int), "galileo-knn20")
        np.testing.assert_allclose(result.scores[:, c], alone.scores[:, 1], atol=1e-12)
    assert {"f1_micro", "f1_macro", "map_micro", "map_macro"} <= set(result.metrics)


def test_pangaea_marks_the_five_highest_classes():
    (train, a), (test, b) = clusters(300, 8), clusters(20, 8, seed=1)
    result = knn.knn_classify(train, np.eye(8, dtype=bool)[a], test, np.eye(8, dtype=bool)[b], "pangaea-knn200")
    np.testing.assert_array_equal(result.predictions.sum(1), 5)
    rows = np.arange(20)[:, None]
    assert result.scores[rows, np.argsort(-result.scores, 1)[:, :5]].min() >= 0
    assert result.predictions[np.arange(20), result.scores.argmax(1)].all()


def test_few_train_samples_shrink_k_and_say_so():
    (train, labels), (test, truth) = clusters(12, 3), clusters(30, 3, seed=1)
    assert knn.knn_classify(train, labels, test, truth, "pangaea-knn200").settings["k"] == 12


def test_bad_input_is_named():
    train, labels = clusters(30, 3)
    with pytest.raises(ValueError, match="unknown kNN protocol 'knn'"):
        knn.knn_classify(train, labels, train, labels, "knn")
    broken = train.copy()
    broken[4, 2] = np.nan
    with pytest.raises(ValueError, match=r"test features: 1 rows are not finite, first \[4\]"):
        knn.knn_classify(train, labels, broken, labels)
    with pytest.raises(ValueError, match=r"expected \[N > 0, 12\]"):
        knn.knn_classify(train, labels, train[:, :3], labels)
    with pytest.raises(ValueError, match="30 train features but 29 labels"):
        knn.knn_classify(train, labels[1:], train, labels)


def test_majority_class_is_the_floor():
    assert knn.majority_class(np.array([2, 2, 1]), np.array([2, 1, 2, 0])).value == 0.5


def test_band_statistics_ignore_invalid_pixels_and_standardize():
    rng = np.random.default_rng(0)
    images, valid = rng.normal(5, 2, (3, 8, 9, 4)), rng.random((3, 8, 9)) > 0.3
    features = raw.band_statistics(images, valid)
    for i in range(3):
        pixels = images[i][valid[i]]
        np.testing.assert_allclose(features[i], np.r_[pixels.mean(0), pixels.std(0)], rtol=1e-5)
    (train,) = raw.standardize(np.c_[features, np.ones(3)])
    np.testing.assert_allclose(train.mean(0), 0, atol=1e-5)
    np.testing.assert_array_equal(train[:, -1], 0)


@pytest.mark.real
def test_raw_statistics_reach_the_known_number_on_real_eurosat(real_data):
    rasterio = pytest.importorskip("rasterio")
    rows = list(csv.DictReader((real_data / "eval_labelled/eurosat_ms/split.csv").open()))
    images = []
    for row in rows:
        with rasterio.open(real_data / row["file"]) as src:
            images.append(src.read().transpose(1, 2, 0))
    labels, train = np.array([int(r["label"]) for r in rows]), np.array([r["split"] == "train" for r in rows])
    features = raw.band_statistics(np.stack(images))
    a, b = raw.standardize(features[train], features[~train])
    result = knn.knn_classify(a, labels[train], b, labels[~train], "torchgeo-bench-knn5")
    assert isinstance(result, Result)
    assert result.top1 == pytest.approx(0.675)  # measured independently when the tiles were collected
