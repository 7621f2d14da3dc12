"""Linear and dense probes: they learn, agree with references, select on validation, and are deterministic."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from terrafm_jax.evals import heads, linear, protocols, segmentation
from terrafm_jax.evals.datasets.base import DatasetInfo, Input
from terrafm_jax.evals.linear import PROBES, FeatureSplit
from terrafm_jax.evals.segmentation import DENSE, DenseSplit
from terrafm_jax.evals.store import Extracted

pytest.importorskip("sklearn")
SMALL = dataclasses.replace(PROBES["galileo-linear"], rates=(1e-4, 1e-2, 1e-1), epochs=15, runs=2, batch=32)


def blobs(n: int, seed: int, d: int = 16, classes: int = 4, spread: float = 0.7) -> FeatureSplit:
    rng = np.random.default_rng(seed)
    centers = np.random.default_rng(5).normal(size=(classes, d))
    y = rng.integers(0, classes, n)
    return FeatureSplit((centers[y] + spread * rng.normal(size=(n, d))).astype(np.float32), y)


def test_published_settings_stand_in_the_table():
    galileo, copernicus = PROBES["galileo-linear"], PROBES["copernicus-linear"]
    assert (len(galileo.rates), min(galileo.rates), max(galileo.rates)) == (16, 1e-4, 0.8)
    assert (galileo.epochs, galileo.runs, galileo.optimizer, galileo.schedule) == (50, 5, "adamw", "warmup-cosine")
    assert (copernicus.batch, copernicus.epochs, copernicus.affine) == (64, 50, False)
    assert (copernicus.rates, copernicus.multilabel_rates) == ((0.1,), (1.0,))
    curve = linear.schedule(galileo, 100)
    assert float(curve(0)) == 0
    assert float(curve(10)) == pytest.approx(1)
    assert float(curve(100)) == pytest.approx(0, abs=1e-6)
    assert float(linear.schedule(copernicus, 100)(30)) == pytest.approx(1, abs=1e-3)
    assert len(linear.LOGREG_C) == 11


def test_linear_probe_learns_and_chooses_on_validation():
    train, val, test = blobs(200, 0), blobs(80, 1), blobs(300, 2)
    result = linear.linear_probe(SMALL, train, val, test)
    assert result.top1 > 0.9
    assert result.protocol == "galileo-linear/1"
    assert result.settings["runs"] == 2
    assert set(result.settings["rates"]) <= {1e-2, 1e-1}  # 1e-4 cannot learn in 15 epochs
    assert result.metrics["top1"].low < result.top1 < result.metrics["top1"].high
    again = linear.linear_probe(SMALL, train, val, test)
    assert again.metrics == result.metrics
    lonely = linear.linear_probe(SMALL, train, None, test, runs=1, resamples=0)
    assert lonely.settings["rate chosen on"] == "a fifth of train"
    assert 155 <= lonely.settings["train"] <= 165


def test_confusion_and_classes_are_over_the_same_runs_as_the_number():
    test = blobs(40, 2)
    rng = np.random.default_rng(0)
    runs = [np.eye(4)[test.targets], rng.random((40, 4))]
    result = linear.mean_of_runs("x/1", "classification", runs, test.targets, {}, resamples=0)
    assert result.confusion.sum() == 80
    assert result.confusion.trace() / 80 == pytest.approx(result.top1)
    assert np.nanmean(result.per_class) == pytest.approx(result.macro)
    np.testing.assert_array_equal(result.runs, [s.argmax(1) for s in runs])
    several = np.eye(4, dtype=bool)[test.targets]
    result = linear.mean_of_runs("x/1", "multilabel", runs, several, {}, resamples=0)
    assert np.mean(result.per_class) == pytest.approx(result.metrics["f1_macro"].value)


def test_copernicus_probe_multilabel_and_regression():
    train, val, test = blobs(300, 0), blobs(80, 1), blobs(150, 2)
    protocol = dataclasses.replace(PROBES["copernicus-linear"], epochs=10)
    assert linear.linear_probe(protocol, train, val, test, resamples=0).top1 > 0.9

    def several(s):
        return FeatureSplit(s.features, np.stack([s.targets == 0, s.targets < 2, s.targets == 3], 1))

    result = linear.linear_probe(protocol, *map(several, (train, val, test)), resamples=50)
    assert result.settings["rates"] == [1.0]
    assert result.metrics["map_micro"].value > 0.9
    weights = np.random.default_rng(3).normal(size=16)

    def numbers(s):
        return FeatureSplit(s.features, 100 + 5 * (s.features @ weights))

    result = linear.linear_probe(SMALL, *map(numbers, (train, val, test)), resamples=50)
    assert result.metrics["r2"].value > 0.9
    assert result.metrics["rmse"].value < 6


def test_logistic_regression_equals_scikit_learn():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, val, test = blobs(120, 0, spread=1.5), blobs(60, 1, spread=1.5), blobs(200, 2, spread=1.5)
    result = linear.logistic_regression(train, val, test, resamples=0)
    both = np.concatenate([train.features, val.features])
    scaler = StandardScaler().fit(both)
    model = LogisticRegression(C=result.settings["C"], max_iter=1000)
    model.fit(scaler.transform(both), np.concatenate([train.targets, val.targets]))
    np.testing.assert_allclose(result.scores, model.predict_proba(scaler.transform(test.features)), atol=1e-6)
    truth = FeatureSplit(test.features, np.stack([test.targets == 0, test.targets == 1], 1))
    multi = FeatureSplit(train.features, np.stack([train.targets == 0, train.targets == 1], 1))
    found = linear.logistic_regression(multi, None, truth, cs=(0.1, 1.0), resamples=0)
    assert found.metrics["map_micro"].value > 0.7


@pytest.mark.parametrize("few", [{"shots": 2}, {"fraction": 0.1}])
def test_few_labels_are_not_joined_by_those_of_a_whole_validation_split(few):
    """They choose C; trained on as well, they would outnumber the labels that the row says it had."""
    parts = {"train": blobs(120, 0), "val": blobs(60, 1), "test": blobs(200, 2)}
    splits = {k: Extracted(s.features, s.targets, []) for k, s in parts.items()}
    info = DatasetInfo("x", "classification", tuple("abcd"), {"s1": Input("s1", ("VV", "VH"))})
    options = protocols.Options(resamples=0)
    drawn = len(protocols.subset(splits["train"], info.task, dataclasses.replace(options, **few)))
    found = protocols.run("logreg", splits, info, dataclasses.replace(options, **few))
    assert (found.protocol, found.settings["train"]) == ("logreg/1 (fitted on train alone)", drawn)
    whole = protocols.run("logreg", splits, info, options)
    assert (whole.protocol, whole.settings["train"]) == ("logreg/1", 180)
    del splits["val"]
    assert protocols.run("logreg", splits, info, dataclasses.replace(options, **few)).protocol == "logreg/1"


# --- heads ---


def test_batch_norm_equals_torch():
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x = rng.normal(2, 3, (8, 5, 6, 4)).astype(np.float32)
    reference = torch.nn.BatchNorm2d(4)
    params, state = heads.norm_init(4)
    for train in (True, False):
        reference.train(train)
        expected = reference(torch.tensor(x).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).detach().numpy()
        found, state = heads.batch_norm(params, state, jnp.asarray(x), train)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(state["var"], reference.running_var.numpy(), rtol=1e-5)


@pytest.mark.parametrize("size", [2, 5, 7, 12])
def test_pooling_equals_torch(size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(size, size)).astype(np.float32)
    for bins in heads.POOLS:
        expected = torch.nn.functional.adaptive_avg_pool2d(torch.tensor(x)[None], bins)[0].numpy()
        m = heads.pooling_matrix(size, bins)
        np.testing.assert_allclose(m @ x @ m.T, expected, atol=1e-6)


def test_losses_equal_torch():
    torch = pytest.importorskip("torch")
    F = torch.nn.functional
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(3, 4, 4, 5)).astype(np.float32), rng.integers(-1, 5, (3, 4, 4))
    weights = rng.random(5).astype(np.float32)
    expected = F.cross_entropy(
        torch.tensor(logits).permute(0, 3, 1, 2), torch.tensor(labels), ignore_index=-1, weight=torch.tensor(weights)
    )
    found = heads.cross_entropy(jnp.asarray(logits), jnp.asarray(labels), class_weights=jnp.asarray(weights))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    y = (rng.random((6, 5)) < 0.4).astype(np.float32)
    x = 3 * rng.normal(size=(6, 5)).astype(np.float32)
    expected = F.binary_cross_entropy_with_logits(torch.tensor(x), torch.tensor(y))
    assert float(heads.binary_cross_entropy(jnp.asarray(x), jnp.asarray(y))) == pytest.approx(float(expected), rel=1e-5)
    up = F.interpolate(torch.tensor(logits).permute(0, 3, 1, 2), (7, 9), mode="bilinear").permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(heads.resize(jnp.asarray(logits), (7, 9)), up, atol=1e-5)


def test_patch_linear_head_places_patches():
    head = heads.patch_linear_head(3, 2, 4)
    _, state = head.init(jax.random.key(0))
    kernel = jnp.zeros((3, 32)).at[0, jnp.arange(0, 32, 2)].set(1.0)
    maps = jnp.zeros((1, 2, 3, 3)).at[0, 1, 2, 0].set(1.0)
    (logits,), _ = head.apply(
        {"linear": {"kernel": kernel, "bias": jnp.zeros(32)}}, state, heads.Features(maps[:, 0, 0], (maps,))
    )
    assert logits.shape == (1, 8, 12, 2)
    assert float(logits[0, 4:, 8:, 0].sum()) == float(logits.sum()) == 16


def test_upernet_shapes_and_layers():
    head = heads.upernet_head(8, 3, channels=8)
    params, state = jax.eval_shape(head.init, jax.random.key(0))

    def run(params, state, maps):
        return head.apply(params, state, heads.Features(maps[0][:, 0, 0], maps), True, jax.random.key(1))

    for size in (3, 4):
        maps = tuple(jnp.ones((2, size, size, 8)) for _ in range(4))
        (logits, aux), new = jax.eval_shape(run, params, state, maps)
        assert logits.shape == (2, 4 * size, 4 * size, 3)
        assert aux.shape == (2, size, size, 3)
        assert jax.tree.structure(new) == jax.tree.structure(state)
    assert heads.upernet_layers(12) == (2, 5, 8, 11)
    assert heads.upernet_layers(24) == (5, 11, 17, 23)
    with pytest.raises(ValueError, match="4 layers, found 1"):
        head.apply(params, state, heads.Features(maps[0][:, 0, 0], maps[:1]))


# --- dense probes ---


def fields(n: int, seed: int, layers: int = 1, patch: int = 4, h: int = 4) -> DenseSplit:
    """Maps whose first channels tell the class of each quarter of a patch."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 3, (n, 2 * h, 2 * h))
    targets = coarse.repeat(patch // 2, 1).repeat(patch // 2, 2)
    onehot = np.eye(3)[coarse].reshape(n, h, 2, h, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(n, h, h, 12)
    maps = (onehot + 0.1 * rng.normal(size=onehot.shape)).astype(np.float16)
    targets = np.where(rng.random(targets.shape) < 0.1, -1, targets)
    return DenseSplit((maps,) * layers, targets)


def test_linear_segmentation_probe():
    protocol = dataclasses.replace(DENSE["segmentation-linear"], rates=(1e-5, 3e-2), epochs=12, runs=2, batch=8)
    result = segmentation.dense_probe(
        protocol, fields(24, 0), fields(8, 1), fields(12, 2), classes=3, patch=4, resamples=100
    )
    assert result.metrics["miou"].value > 0.95
    assert result.settings["rates"] == [3e-2, 3e-2]
    assert result.confusion.sum() == (fields(12, 2).targets >= 0).sum()
    assert result.protocol == "segmentation-linear/1"


def test_validation_masks_of_nothing_but_ignore_are_named():
    protocol = dataclasses.replace(DENSE["segmentation-linear"], rates=(1e-2,), epochs=1, runs=1)
    nothing = dataclasses.replace(fields(4, 1), targets=np.full_like(fields(4, 1).targets, 255))
    with pytest.raises(ValueError, match=r"no pixel of the validation images has a label but 255 \(ignore\)"):
        segmentation.dense_probe(protocol, fields(4, 0), nothing, fields(4, 2), classes=3, patch=4, ignore=255)


def test_upernet_probe_learns():
    protocol = dataclasses.replace(DENSE["copernicus-upernet"], epochs=10, channels=8, batch=8, rates=(1e-2,))
    result = segmentation.dense_probe(
        protocol, fields(24, 0, 4), None, fields(8, 2, 4), classes=3, patch=4, resamples=0
    )
    assert result.metrics["miou"].value > 0.6
    assert result.settings["rate chosen on"] == "a fifth of train"


def test_windows_of_an_image_are_not_parted_between_training_and_choosing(monkeypatch):
    shown = {"trained": [], "judged": []}
    train, judge = segmentation._train, segmentation.confusions

    def spy_train(fitted, split, *rest):
        shown["trained"] += split.ids
        train(fitted, split, *rest)

    def spy_judge(fitted, split, **how):
        shown["judged"] += split.ids
        return judge(fitted, split, **how)

    monkeypatch.setattr(segmentation, "_train", spy_train)
    monkeypatch.setattr(segmentation, "confusions", spy_judge)
    windows = [f"image{i}/r{r}_c{c}" for i in range(5) for r in (0, 16) for c in (0, 16)]
    protocol = dataclasses.replace(DENSE["segmentation-linear"], rates=(1e-2,), epochs=1, runs=1)
    cut = dataclasses.replace(fields(20, 0), ids=windows)
    segmentation.dense_probe(protocol, cut, None, fields(4, 1), classes=3, patch=4, resamples=0)
    assert sorted(shown["trained"] + shown["judged"]) == sorted(windows)
    images = {k: {w.split("/")[0] for w in v} for k, v in shown.items()}
    assert len(images["judged"]) == 1
    assert images["judged"].isdisjoint(images["trained"])


def test_intervals_of_windows_are_those_of_their_images():
    """Four windows that say the same four times are no more evidence than their image."""
    images = np.random.default_rng(0).integers(0, 50, (6, 3, 3))
    windows = images.repeat(4, 0)
    ids = [f"image{i}/r{r}_c{c}" for i in range(6) for r in (0, 16) for c in (0, 16)]
    wanted = segmentation.score_segmentation("x", [images, images], {}).metrics["miou"]
    found = segmentation.score_segmentation("x", [windows, windows], {}, 1000, ids).metrics["miou"]
    assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    alone = segmentation.score_segmentation("x", [windows], {}).metrics["miou"]
    assert found.high - found.low > 1.5 * (alone.high - alone.low)


def test_change_by_feature_difference():
    rng = np.random.default_rng(0)

    def pair(n):
        before = rng.normal(size=(n, 4, 4, 8)).astype(np.float32)
        changed = rng.random((n, 4, 4)) < 0.25
        after = np.where(changed[..., None], -before, before) + 0.05 * rng.normal(size=before.shape)
        masks = changed.repeat(4, 1).repeat(4, 2).astype(int)
        masks[:, 0] = -1
        return segmentation.feature_difference(before, after, (16, 16)), masks

    result = segmentation.change_detection(pair(6), pair(6), resamples=50)
    assert result.metrics["f1_change"].value > 0.7
    assert result.metrics["ap_change"].value > 0.8
    assert result.protocol == "change-difference/1"
    distance, truth = np.array([0.1, 0.2, 0.8, 0.9]), np.array([0, 0, 1, 1])
    assert 0.2 <= segmentation.best_threshold(distance, truth) < 0.8
