"""Repeated stratified cross-validation and its paired intervals."""

from __future__ import annotations

import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax.evals import crossval, protocols
from terrafm_jax.evals.datasets.base import DatasetInfo, Input
from terrafm_jax.evals.session import Session, Settings
from terrafm_jax.evals.store import Extracted


def test_folds_are_stratified_and_cover_everything():
    y = np.repeat([0, 1, 2], [20, 11, 4])
    fold = crossval.stratified_folds(y, 5, seed=0)
    np.testing.assert_array_equal(np.bincount(fold), 7)
    assert {tuple(sorted(np.bincount(fold[y == 0]))), tuple(sorted(np.bincount(fold[y == 1])))} == {
        (4,) * 5,
        (2, 2, 2, 2, 3),
    }
    assert not np.array_equal(fold, crossval.stratified_folds(y, 5, seed=1))
    for _, train, test in crossval.splits(y, 5, 2):
        assert not set(train) & set(test)
        assert len(train) + len(test) == len(y)
    with pytest.raises(ValueError, match="folds = 1"):
        crossval.stratified_folds(y, 1, 0)


def test_intervals_and_pairs():
    y = np.arange(200) % 2
    predictions = crossval.cross_validate(
        lambda train, test: np.where(test % 10 == 0, 1 - y[test], y[test]), y, repeats=3
    )
    found = crossval.result("x", predictions, y, 2, {}, 500)
    assert found.top1 == pytest.approx(0.9)
    assert found.metrics["top1"].low < 0.9 < found.metrics["top1"].high
    assert found.macro == pytest.approx(0.9)
    assert found.confusion.sum() == 600
    worse = found.scores.copy()
    worse[1::20] = 0
    d = crossval.paired(found.scores, worse)
    assert d.value == pytest.approx(-0.05)
    assert d.low < -0.05 < d.high < 0
    assert crossval.paired(worse, worse).high == 0


def test_session_cross_validates_all_splits(tmp_path):
    pytest.importorskip("rasterio")
    fake.eurosat_like(tmp_path / "tiny", per_class=8)
    settings = Settings(
        checkpoints=("raw",), suite="folder", data=str(tmp_path / "tiny"), out=str(tmp_path / "out"), image_size=32,
        protocols=("torchgeo-bench-knn5",), folds=4, repeats=2, resamples=50,
    )  # fmt: skip
    (row,) = Session(settings, say=lambda text: None).run()
    assert row["protocol"] == "torchgeo-bench-knn5/1, 4-fold x 2"
    assert np.sum(row["confusion"]) == 2 * 24
    assert row["settings"]["samples"] == 24


def test_other_epochs_than_published_are_said():
    """Also over folds; not by what has no epochs."""
    info = DatasetInfo("x", "classification", ("a", "b"), {"s1": Input("s1", ("VV", "VH"))})
    labels = np.arange(24) % 2
    rows = (np.random.default_rng(0).normal(size=(24, 4)) + labels[:, None]).astype(np.float32)
    whole, short = Extracted(rows, labels, []), protocols.Options(resamples=0, epochs=2)

    def label(protocol, folds):
        if folds:
            return protocols.run_folds(protocol, whole, info, short, folds, 1).protocol
        return protocols.run(protocol, {"train": whole, "test": whole}, info, short).protocol

    assert label("copernicus-linear", 0) == "copernicus-linear/1 (epochs=2)"
    assert label("copernicus-linear", 2) == "copernicus-linear/1 (epochs=2), 2-fold x 1"
    assert label("logreg", 0) == "logreg/1"
    assert label("galileo-knn20", 2) == "galileo-knn20/1, 2-fold x 1"


def test_progress_counts_the_folds_of_all_repetitions():
    labels, seen = np.arange(20) % 2, []
    crossval.cross_validate(
        lambda train, test: labels[test], labels, folds=4, repeats=2, progress=lambda *at: seen.append(at)
    )
    assert seen == [(k, 8) for k in range(1, 9)]
