"""Labelled data sets while pretraining: the same numbers as the evaluate command finds for the same weights."""

from __future__ import annotations

from types import SimpleNamespace

import jax
import labelled_fake as fake
import pytest

from terrafm_jax.config import base
from terrafm_jax.evals.datasets.base import DatasetError
from terrafm_jax.evals.during_training import LabelledSets
from terrafm_jax.evals.encoders import random_encoder
from terrafm_jax.evals.protocols import ProtocolError
from terrafm_jax.evals.session import Session, Settings
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import Statistics

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
