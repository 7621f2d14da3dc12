"""Fused Sentinel-1 + Sentinel-2 in every protocol: each sensor tells half of the answer, so one alone cannot win."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from terrafm_jax.evals import protocols, segmentation, store
from terrafm_jax.evals.datasets.base import Dataset, DatasetInfo, Input, Sample, Split
from terrafm_jax.evals.encoders import random_encoder
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import Statistics

pytest.importorskip("sklearn")
LIVELY = ModelSpec(
    width=32, depth=2, heads=2, grid=2, prototypes=16, head_hidden=16, head_bottleneck=8, fusion_heads=4, init_std=0.2
)
INPUTS = {"s1": Input("s1", ("VV", "VH")), "s2_l2a": Input("s2_l2a", ("B04", "B03", "B02", "B08"))}
CLASSES = {"classification": "abcd", "multilabel": "abc", "segmentation": "abcd", "regression": "", "change": "no"}
# What is compared, and a floor above what the better sensor can reach alone.
MEASURES = {"classification": ("top1", 0.75), "multilabel": ("map_micro", 0.9), "segmentation": ("miou", 0.5),
            "regression": ("r2", 0.75), "change": ("f1_change", 0.8)}  # fmt: skip
CASES = [(name, task) for name, tasks in sorted(protocols.TASKS_OF.items()) for task in tasks]


def images(radar: np.ndarray, optical: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two sensors of 32 px whose 2 x 2 patches are dark or bright, each as its own mask bool [2, 2] says."""
    s1, s2 = (m.repeat(16, 0).repeat(16, 1)[..., None] for m in (radar, optical))
    return {
        "s1": (-18 + 10 * s1 + rng.normal(0, 1, (32, 32, 2))).astype(np.float32),
        "s2_l2a": (1000 + 3000 * s2 + rng.normal(0, 100, (32, 32, 4))).clip(1).astype(np.uint16),
    }


def sample(task: str, i: int) -> Sample:
    """The label joins what radar shows (a) with what the optical image shows (b)."""
    rng = np.random.default_rng(i)
    if task in ("segmentation", "change"):
        a, b = rng.random((2, 2, 2)) < (0.5 if task == "segmentation" else 0.25)
    else:
        a, b = (np.full((2, 2), bool(i & bit)) for bit in (1, 2))
    if task == "change":  # from all dark to the masks: radar changed here, the optical image there
        nothing, mask = np.zeros((2, 2), bool), (a | b).astype(int).repeat(16, 0).repeat(16, 1)
        return Sample(str(i), images(nothing, nothing, rng), mask, after=images(a, b, rng))
    target = {
        "classification": lambda: int(2 * a[0, 0] + b[0, 0]),
        "multilabel": lambda: np.array([a[0, 0], b[0, 0], a[0, 0] & b[0, 0]]),
        "segmentation": lambda: (2 * a + b).repeat(16, 0).repeat(16, 1),
        "regression": lambda: float(10 + 3 * a[0, 0] + 3 * b[0, 0] + 0.01 * rng.normal()),
    }[task]()
    return Sample(str(i), images(a, b, rng), target)


def dataset(task: str, train: int = 96, test: int = 48) -> Dataset:
    whole = Split([str(i) for i in range(train + test)], lambda i: sample(task, i))
    info = DatasetInfo(f"joint {task}", task, tuple(CLASSES[task]), INPUTS)
    return Dataset(info, {"train": whole.subset(range(train)), "test": whole.subset(range(train, train + test))})


@functools.cache
def encoder():
    return random_encoder(LIVELY, 0, 32, Statistics.published())


@functools.cache
def features(task: str, keys: tuple[str, ...], layers: tuple[int, ...]) -> dict[str, store.Extracted]:
    request = store.Request(keys, protocols.is_dense(task), layers)
    data = dataset(task)
    return {name: store.extract(encoder(), data, name, request) for name in data.splits}


def score(protocol: str, task: str, keys: tuple[str, ...]) -> float:
    found = features(task, keys, protocols.layers_for(protocol, LIVELY.depth))
    short = protocols.Options(resamples=0, runs=1, epochs=0 if protocol in protocols.knn.PROTOCOLS else 15)
    return protocols.run(protocol, found, dataset(task).info, short).metrics[MEASURES[task][0]].value


@pytest.mark.parametrize(("protocol", "task"), CASES)
def test_two_sensors_tell_what_neither_does_alone(protocol, task, monkeypatch):
    for name in segmentation.DENSE:
        small = dataclasses.replace(segmentation.DENSE[name], channels=8, rates=(1e-2,))
        monkeypatch.setitem(segmentation.DENSE, name, small)
    alone = max(score(protocol, task, (key,)) for key in INPUTS)
    fused = score(protocol, task, tuple(INPUTS))
    assert fused > MEASURES[task][1] > alone
    assert fused > alone + 0.1
