"""Few labels: fine-tuning within folds, arms and their paired intervals, the command that joins them."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import labelled_fake as fake
import numpy as np
import pytest
from conftest import run_module

from terrafm_jax import weights
from terrafm_jax.evals import arms, encoders
from terrafm_jax.evals.arms import RANDOM, RAW, Score
from terrafm_jax.evals.datasets import open_suite
from terrafm_jax.evals.datasets.base import DatasetError, collate
from terrafm_jax.finetuning.experiment import Experiment
from terrafm_jax.finetuning.folds import Recipe, Tuner, order
from terrafm_jax.models import init_params
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import Statistics

pytest.importorskip("rasterio")
TINY = ModelSpec(
    width=32, depth=2, heads=2, grid=2, prototypes=16, head_hidden=16, head_bottleneck=8, fusion_heads=4,
    drop_path=0.0, init_std=0.1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return fake.eurosat_like(tmp_path_factory.mktemp("data") / "tiny", per_class=8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """A teacher's export of a tiny network."""
    path = tmp_path_factory.mktemp("weights") / "tiny"
    statistics = json.loads(Statistics.published().to_json())
    meta = {"step": 0, "model": dataclasses.asdict(TINY), "statistics": statistics, "config": {}}
    weights.save_npz(path, jax.device_get(init_params(TINY, jax.random.key(3))), meta)
    return path


def experiment(folder, checkpoint, out, **fields) -> Experiment:
    chosen = {"protocols": ("torchgeo-bench-knn5", "fold-finetune"), "folds": 2, "repeats": 3, "tune_repeats": 1,
              "random_seeds": 1, "rates": (3e-3,), "epochs": 2, **fields}  # fmt: skip
    return Experiment((str(checkpoint),), "folder", str(folder), out, **chosen)


def test_every_epoch_shows_every_row():
    rows = np.array([3, 5, 8, 13, 21])
    found = order(rows, 2, 4, seed=0)
    assert found.shape == (12, 2)
    for epoch in found.reshape(4, -1):
        assert set(epoch) == set(rows)
    np.testing.assert_array_equal(found, order(rows, 2, 4, seed=0))
    assert not np.array_equal(found, order(rows, 2, 4, seed=1))


def test_tuning_learns_and_never_sees_the_labels_it_is_tested_on(folder):
    (dataset,) = open_suite("folder", folder)
    samples = [s[i] for s in dataset.splits.values() for i in range(len(s))]
    labels = np.array([s.target for s in samples])
    images = collate(dataset.info, samples, ["s2_l2a"])
    encoder = encoders.random_encoder(TINY, 0, 32, Statistics.published())
    train, test = np.arange(len(labels))[::2], np.arange(len(labels))[1::2]
    recipe = Recipe(rates=(1e-9, 3e-3), epochs=60, batch_size=8)
    tuner = Tuner(encoder, images, labels, ("s2_l2a",), dataset.info, recipe)
    predicted = tuner.classify(train, test)
    assert (predicted == labels[test]).mean() > 0.9  # only the second rate moves anything: it was chosen
    hidden = labels.copy()
    hidden[test] = 0
    blind = dataclasses.replace(tuner, targets=hidden)
    np.testing.assert_array_equal(blind.classify(train, test), predicted)


def test_a_run_cut_short_while_it_writes_goes_on(folder, checkpoint, tmp_path, monkeypatch):
    def cut_short(target, array, **_):
        (target.write_bytes if isinstance(target, Path) else target.write)(b"\x93NUM")
        raise KeyboardInterrupt

    found = experiment(folder, checkpoint, tmp_path, protocols=("torchgeo-bench-knn5",))
    with monkeypatch.context() as patched:
        patched.setattr(np, "save", cut_short)
        with pytest.raises(KeyboardInterrupt):
            found.run(lambda text: None)
    assert len(found.run(lambda text: None)) == 3


def test_a_name_before_a_path_that_has_an_equals_sign(tmp_path, monkeypatch):
    (tmp_path / "runs" / "lr=0.1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for text, expected in (
        ("runs/lr=0.1", ("", "runs/lr=0.1")),
        ("ours=runs/lr=0.1", ("ours", "runs/lr=0.1")),
        ("a=b=runs", ("a=b", "runs")),
        ("ours=raw", ("ours", "raw")),
        ("ours=random@runs/lr=0.1:3", ("ours", "random@runs/lr=0.1:3")),
        ("ours=hf://owner/name", ("ours", "hf://owner/name")),
        ("gs://bucket/lr=0.1", ("", "gs://bucket/lr=0.1")),
        ("gone=not/there", ("gone", "not/there")),
    ):
        assert encoders.split_name(text) == expected


def test_scores_pairs_and_tables():
    rng = np.random.default_rng(0)
    base = (rng.random(200) < 0.5).astype(float)
    better = np.maximum(base, rng.random(200) < 0.2)
    scores = [Score(RAW, "p", base[None]), Score(RANDOM, "p", np.stack([base, base])), Score("ours", "p", better[None]),
              Score("ours", "q", better[None])]  # fmt: skip
    assert [(a.arm, b.arm) for a, b in arms.pairs(scores)] == [(RANDOM, RAW), ("ours", RAW), ("ours", RANDOM)]
    gain = scores[2].over(scores[0])
    assert gain.value == pytest.approx(better.mean() - base.mean())
    assert 0 < gain.low < gain.value < gain.high
    assert scores[1].over(scores[0]).high == 0
    own = scores[2].interval()
    assert own.high - own.low > gain.high - gain.low  # pairing narrows
    text = arms.markdown(scores)
    assert f"| {RAW} | {100 * base.mean():.1f} [" in text
    assert "| ours − random init | +" in text
    assert "seeds" in text.split(RANDOM)[1].split("\n")[0]


def test_fine_tuning_is_held_against_the_linear_probe_of_raw_statistics():
    right = {name: np.linspace(0, level, 50) for name, level in (("raw", 0.8), ("tuned", 1.0), ("knn", 0.5))}
    tuned = Score("ours", "fold-finetune/2", right["tuned"][None])
    probe, neighbors = Score(RAW, "logreg/1", right["raw"][None]), Score(RAW, "galileo-knn20/1", right["knn"][None])
    assert arms.pairs([neighbors, probe, tuned]) == [(tuned, probe)]
    assert arms.pairs([neighbors, tuned]) == []
    assert arms.pairs([probe, Score("ours", "galileo-linear/1", right["knn"][None])]) == []
    assert f"({RAW}: logreg) |" in arms.markdown([neighbors, probe, tuned])
    found = arms.as_json([neighbors, probe, tuned], ["a"], np.zeros(50, int))["differences"]
    assert [d["over protocol"] for d in found] == ["logreg/1"]


def test_more_arms_than_colors_are_drawn(tmp_path):
    """A curve over checkpoints: seven arms and their eleven differences."""
    right = (np.random.default_rng(0).random((1, 40)) < 0.5).astype(float)
    scores = [Score(arm, "p", right) for arm in (RAW, RANDOM, *(f"step {i}" for i in range(5)))]
    arms.figure(scores, tmp_path / "many.png", "many", 0.1)
    assert (tmp_path / "many.png").stat().st_size > 10_000


def test_writes_resumes_and_keeps_folds_paired(folder, checkpoint, tmp_path, monkeypatch):
    scores = experiment(folder, checkpoint, tmp_path).run(lambda text: None)
    assert {s.arm for s in scores} == {RAW, RANDOM, "pretrained"}
    assert {s.protocol for s in scores} == {"torchgeo-bench-knn5/1, 2-fold x 3", "fold-finetune/2, 2-fold x 1"}
    assert not [s for s in scores if s.arm == RAW and "finetune" in s.protocol]
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["settings"]["samples"] == 24
    assert found["settings"]["recipe"]["epochs"] == 2
    assert len(found["scores"]) == 5
    assert (tmp_path / "results.png").stat().st_size > 10_000
    assert "| pretrained − random init |" in (tmp_path / "results.md").read_text()

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(Tuner, "logits", fail)
    monkeypatch.setattr(Experiment, "_features", fail)
    again = experiment(folder, checkpoint, tmp_path).run(lambda text: None)
    assert [s.by_seed for s in again] == [s.by_seed for s in scores]


def test_images_of_several_sizes_need_a_size(folder, checkpoint, tmp_path):
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    fake.tiff(mixed / "class_0/other.tif", np.ones((20, 30, 12), np.uint16))
    with pytest.raises(DatasetError, match=r"images differ in size: .*20x30 px.*; give --image_size, e.g. 224"):
        experiment(mixed, checkpoint, tmp_path / "out")
    assert experiment(mixed, checkpoint, tmp_path / "out", image_size=32).images.images["s2_l2a"].shape[1:3] == (32, 32)


def test_checkpoints_of_one_name_are_seeds_of_one_arm(folder, checkpoint, tmp_path):
    e = experiment(folder, checkpoint, tmp_path, random_seeds=2)
    e = dataclasses.replace(e, checkpoints=(f"a={checkpoint}", f"b={checkpoint}", f"a={checkpoint}"))
    named = [(name, seed) for name, seed, _ in e.arms()]
    assert named == [(RAW, 0), (RANDOM, 0), (RANDOM, 1), ("a", 0), ("b", 0), ("a", 1)]


def test_several_checkpoints_make_one_row_that_shows_its_seeds(folder, checkpoint, tmp_path):
    other = tmp_path / "other"
    tree, meta = weights.load_npz(checkpoint)
    weights.save_npz(other, jax.tree.map(lambda x: 1.3 * x, tree), meta)
    e = experiment(folder, checkpoint, tmp_path / "out", protocols=("logreg",))
    scores = dataclasses.replace(e, checkpoints=(str(checkpoint), str(other))).run(lambda text: None)
    ours = next(s for s in scores if s.arm == "pretrained")
    assert ours.right.shape == (2, 24)
    assert "recipe" not in json.loads((tmp_path / "out/results.json").read_text())["settings"]  # nothing was tuned
    shown = ", ".join(f"{100 * v:.1f}" for v in ours.by_seed)
    assert f"; seeds {shown} |" in (tmp_path / "out/results.md").read_text().split("| pretrained |")[1]
    alone = [dataclasses.replace(e, checkpoints=(str(c),)).run(lambda text: None)[-1] for c in (checkpoint, other)]
    assert ours.by_seed == [a.by_seed[0] for a in alone]


def test_several_sensors_are_fused_in_probes_and_fine_tuning(checkpoint, tmp_path):
    """Radar tells two of four classes apart, the optical image the other two: one sensor reaches half at most."""
    rng, root = np.random.default_rng(0), tmp_path / "pairs"
    for i in range(40):
        name, a, b = f"{'abcd'[i % 4]}/{i}.tif", i % 2, i // 2 % 2
        fake.tiff(
            root / "S1" / name, (np.array([-18, -24]) + 10 * a + rng.normal(0, 1, (32, 32, 2))).astype(np.float32)
        )
        fake.tiff(root / "S2" / name, (500 + 3000 * b + rng.normal(0, 100, (32, 32, 3))).astype(np.uint16))
    inputs = "  s1: {folder: S1, bands: [VV, VH]}\n  s2_l2a: {folder: S2, bands: [B04, B03, B02]}\n"
    (root / "dataset.yaml").write_text(f"name: pairs\ninputs:\n{inputs}")
    said: list[str] = []
    chosen = {"protocols": ("galileo-linear", "fold-finetune"), "repeats": 1, "epochs": 30}
    shown: dict[str, list[tuple[int, int]]] = {}
    whole = experiment(root, checkpoint, tmp_path / "out", **chosen)
    scores = whole.run(said.append, lambda text: lambda *at: shown.setdefault(text, []).append(at))
    assert len(said) == len(shown) == 5
    assert all(at == [(k, len(at)) for k in range(1, len(at) + 1)] for at in shown.values()), shown
    assert all(", s1+s2_l2a, " in text for text in said)
    assert all(s.right.mean() > 0.7 for s in scores if s.arm != RANDOM), [
        (s.arm, s.protocol, s.by_seed) for s in scores
    ]


def test_refuses_what_cannot_be_cross_validated(folder, checkpoint, tmp_path):
    masks = tmp_path / "masks.yaml"
    masks.write_text(f"root: {folder}\ntask: multilabel\nlabels: x.csv\ninputs: {{s2_l2a: {{bands: [B02]}}}}\n")
    with pytest.raises(DatasetError):
        experiment(masks, checkpoint, tmp_path / "out")


@pytest.mark.slow
def test_command_line(folder, checkpoint, tmp_path):
    done = run_module(
        "terrafm_jax.crossvalidate", f"--checkpoint={checkpoint}", f"--data={folder}", f"--out={tmp_path / 'out'}",
        "--protocol=torchgeo-bench-knn5", "--folds=2", "--repeats=1", "--random_seeds=1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "| raw band statistics |" in done.stdout
    bad = run_module(
        "terrafm_jax.crossvalidate", f"--checkpoint={tmp_path / 'none'}", f"--data={folder}", f"--out={tmp_path / 'x'}"
    )
    assert bad.returncode == 1
    assert "not found" in bad.stderr.strip().splitlines()[-1]
