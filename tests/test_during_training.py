"""What is evaluated while pretraining: kNN on land cover as scikit-learn finds it; labelled data sets as the evaluate
command finds them for the same weights.
"""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import labelled_fake as fake
import numpy as np
import pytest
from tiles_fake import fake_record, write_dataset

from terrafm_jax import landcover
from terrafm_jax.config import base
from terrafm_jax.data.source import DataError
from terrafm_jax.evals import landcover_knn
from terrafm_jax.evals.datasets.base import DatasetError
from terrafm_jax.evals.during_training import LabelledSets, LandCoverKnn, during_training
from terrafm_jax.evals.encoders import random_encoder
from terrafm_jax.evals.protocols import ProtocolError
from terrafm_jax.evals.session import Session, Settings
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import SENSORS, Statistics

pytest.importorskip("rasterio")
TINY = ModelSpec(width=24, depth=2, heads=2, grid=2, prototypes=16, head_hidden=16, head_bottleneck=8, fusion_heads=4)


def a_run(folder, **knn) -> SimpleNamespace:
    config = base()
    config.knn.labelled = str(folder)
    for key, value in knn.items():
        config.knn[key] = value
    spec = SimpleNamespace(model=TINY, views=SimpleNamespace(global_size=32), stats=Statistics.published())
    return SimpleNamespace(config=config, spec=spec, steps={"knn.every": 1})


def test_equals_the_command_on_the_same_weights(tmp_path, monkeypatch):
    fake.eurosat_like(tmp_path / "tiny", per_class=8)
    encoder = random_encoder(TINY, 1, 32, Statistics.published())
    backbone = jax.device_get(encoder.params)
    polls: list[int] = []
    evaluator = LabelledSets(a_run(tmp_path / "tiny", protocol="torchgeo-bench-knn5"))
    state = SimpleNamespace(teacher={"backbone": backbone})
    found = dict(evaluator(7, state, lambda: polls.append(1)))
    monkeypatch.setattr("terrafm_jax.evals.session.open_encoder", lambda *_: encoder)
    settings = Settings(
        checkpoints=("x",), suite="folder", data=str(tmp_path / "tiny"), out=str(tmp_path / "out"), image_size=32,
        protocols=("torchgeo-bench-knn5",), resamples=0, cache="none", figures=False,
    )  # fmt: skip
    (row,) = Session(settings, say=lambda text: None).run()
    assert found == {"labelled/tiny/top1": pytest.approx(row["metrics"]["top1"]["value"])}
    assert len(polls) == 3  # one batch of each split


def test_faults_are_found_before_training(tmp_path):
    with pytest.raises(DatasetError, match=r"dataset.yaml: not found"):
        LabelledSets(a_run(tmp_path))
    fake.eurosat_like(tmp_path / "tiny", per_class=2)
    with pytest.raises(ProtocolError, match=r"config.knn.labelled: nothing in .* that segmentation-linear can do"):
        LabelledSets(a_run(tmp_path / "tiny", protocol="segmentation-linear"))


# --- land cover of prepared tiles ---


def land(number: int) -> tuple[int, dict]:
    """Category and record of a tile whose brightness tells a little of its category; every ninth is unknown."""
    category = landcover.UNKNOWN if number % 9 == 0 else number % 5
    record = fake_record(number, 24, category=category)
    gain = 0.2 + 0.15 * (number % 5) + 0.2 * np.random.default_rng(number).random()
    for key, sensor in SENSORS.items():
        for group in sensor.groups:
            record[key][group]["dn"] = (gain * record[key][group]["dn"]).astype(sensor.dtype)
    return category, record


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """A data set of two splits, and the categories of their tiles."""
    folder, labels, infos = tmp_path_factory.mktemp("splits"), {}, []
    for name, numbers in (("train", range(80)), ("holdout", range(100, 140))):
        labels[name], records = map(list, zip(*map(land, numbers), strict=True))
        written = write_dataset(folder / name, records, split=name, per_shard=40)
        infos.append(json.loads((written / "dataset_info.json").read_text()))
        for path in written.iterdir():
            path.rename(folder / path.name)
    infos[0]["splits"] += infos[1]["splits"]
    (folder / "dataset_info.json").write_text(json.dumps(infos[0]))
    return folder, labels


def test_splits_that_are_not_there_are_named_before_training(splits):
    run = a_run("", split="validation", gallery="all")
    run.config.data.dir = str(splits[0])
    gallery, queries = r"config.knn.gallery: .*no split 'all', .*", r"config.knn.split: .*no split 'validation', .*"
    with pytest.raises(DataError, match=f"^{gallery}; {queries}; .*--config.knn.every=0$"):
        during_training(run)


@pytest.mark.parametrize("protocol", ["galileo-knn20", "torchgeo-bench-knn5"])
def test_land_cover_is_classified_as_scikit_learn_does(splits, protocol, monkeypatch):
    """20 neighbors by cosine, weighted exp(similarity / 0.07), or 5 by Euclidean distance with one vote each; features
    are the teacher's; a gallery of 60 tiles out of 80, all queries, and none whose category is unknown.
    """
    neighbors = pytest.importorskip("sklearn.neighbors")
    reference = {
        "galileo-knn20": neighbors.KNeighborsClassifier(
            20, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
        ),
        "torchgeo-bench-knn5": neighbors.KNeighborsClassifier(5, algorithm="brute"),
    }[protocol]
    folder, labels = splits
    run = a_run("", protocol=protocol, gallery="train", split="holdout", train_examples=60, test_examples=0)
    run.config.knn.batch_size, run.config.data.dir = 16, str(folder)
    evaluator = LandCoverKnn(run)
    read, encode, polls, center = [], evaluator._encode, [], []
    results, score = [], landcover_knn.score
    monkeypatch.setattr(landcover_knn, "score", lambda *arguments: results.append(score(*arguments)) or results[0])

    def noting(backbone, batch):
        """Features moved, as those of random weights all point the same way: no weighting would tell."""
        found = np.asarray(encode(backbone, batch))
        center.append(found.mean(0))
        found = found - center[0]
        real = batch["index"] >= 0  # the others fill the last batch
        read.append((batch["index"][real], found[real].astype(np.float64)))
        return found

    evaluator._encode = noting
    backbone = jax.device_get(random_encoder(TINY, 1, 32, Statistics.published()).params)
    found = dict(evaluator(7, SimpleNamespace(teacher={"backbone": backbone}), lambda: polls.append(1)))

    assert len(polls) == len(read) == 4 + 3
    (gallery, queries) = (tuple(map(np.concatenate, zip(*part, strict=True))) for part in (read[:4], read[4:]))
    known = [i for i, category in enumerate(labels["holdout"]) if category != landcover.UNKNOWN]
    assert (len(gallery[0]), queries[0].tolist()) == (60, known)
    seen, truth = np.array(labels["train"])[gallery[0]], np.array(labels["holdout"])[known]
    predicted = reference.fit(gallery[1], seen).predict(queries[1])
    recalls = {landcover.NAMES[c]: np.mean(predicted[truth == c] == c) for c in np.unique(truth)}
    np.testing.assert_allclose(results[0].scores, reference.predict_proba(queries[1]), atol=1e-5)
    assert 0.3 < np.mean(predicted == truth) < 0.9, "neither a guess nor trivial"
    assert found == {
        "knn_protocol": f"{protocol}/1",
        "knn_top1": pytest.approx(np.mean(predicted == truth)),
        "knn_macro": pytest.approx(np.mean(list(recalls.values()))),
        **{f"knn_class/{name}": pytest.approx(value) for name, value in recalls.items()},
    }


def test_without_known_land_cover_there_is_nothing_to_evaluate(tmp_path, caplog):
    """Tiles prepared with ``--worldcover none`` train all the same."""
    folder = write_dataset(tmp_path, [fake_record(i, category=landcover.UNKNOWN) for i in range(8)])
    run = a_run("", gallery="train", split="train")
    run.config.data.dir = str(folder)
    assert during_training(run) == []
    assert "no tile of train has a known land cover" in caplog.text
    run.config.knn.split = "validation"
    with pytest.raises(
        DataError, match=r"^config.knn.split: .*no split 'validation', found \['train'\]; .*--config.knn.every=0$"
    ):
        during_training(run)


def test_known_land_cover_is_evaluated(splits):
    run = a_run("", gallery="train", split="holdout")
    run.config.data.dir = str(splits[0])
    assert [type(evaluator) for evaluator in during_training(run)] == [LandCoverKnn]
    run.steps["knn.every"] = 0
    assert during_training(run) == []


@pytest.mark.parametrize("protocol", ["knn", "logreg"])
def test_a_protocol_that_is_not_knn_is_refused_before_training(splits, protocol):
    """A start that resumes would train for epochs before it fails at the next evaluation."""
    run = a_run("", gallery="train", split="holdout", protocol=protocol)
    run.config.data.dir = str(splits[0])
    with pytest.raises(
        ProtocolError, match=rf"^config.knn.protocol: found '{protocol}', expected one of \['galileo-knn"
    ):
        during_training(run)


def test_tiles_are_not_their_own_neighbors(splits):
    """With one split for both, random weights had 97 % right."""
    run = a_run("", gallery="holdout", split="holdout")
    run.config.data.dir = str(splits[0])
    with pytest.raises(DataError, match=r"both 'holdout', so each tile .* --config.knn.every=0$"):
        during_training(run)
    run.steps["knn.every"] = 0
    assert during_training(run) == []


def test_as_many_tiles_as_asked_for_show_a_sensor_of_the_model(tmp_path):
    """Those that lack all of them are not among the number, and none is left where all do."""
    records = [fake_record(i, sensors=("s2_l2a",) if i % 2 else ("s1",), category=i % 3) for i in range(20)]
    folder = str(write_dataset(tmp_path, records))
    sets = landcover_knn.TileSets(folder, ("train", 8), ("train", 0), ("s1",), 4)
    chosen = sets.records(sets.gallery)
    assert len(chosen) == 8
    assert not (chosen % 2).any()
    assert sets.records(sets.queries).tolist() == list(range(0, 20, 2))
    none = landcover_knn.TileSets(folder, ("train", 8), ("train", 8), ("s2_l1c",), 4)
    assert not len(none.records(none.gallery))
