"""Fine-tuning runs: what they keep, exact resume, sharding, every task, configs."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import labelled_fake as fake
import numpy as np
import pytest
from weights_samples import images, sample

import terrafm_jax
from terrafm_jax import weights
from terrafm_jax.config import ConfigError
from terrafm_jax.evals import encoders, heads
from terrafm_jax.evals.features import ImageBatch
from terrafm_jax.export.formats import write_state
from terrafm_jax.finetuning import config as schema
from terrafm_jax.finetuning import job as job_lib
from terrafm_jax.finetuning.job import Job
from terrafm_jax.finetuning.network import TuneSpec
from terrafm_jax.finetuning.trainer import TuningError, init_state, make_predict, make_step, to_device
from terrafm_jax.finetuning.tuned import Tuned
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import SENSORS, Statistics
from terrafm_jax.training.sharding import ShardingError

pytest.importorskip("rasterio")
TINY = ModelSpec(
    width=32, depth=2, heads=2, grid=2, prototypes=16, head_hidden=16, head_bottleneck=8, fusion_heads=4, drop_path=0.1
)
SPEC = TuneSpec(TINY, ("s2_l2a",), "classification", 3, "linear", image_size=32)


@pytest.fixture(autouse=True, scope="module")
def tiny_weights():
    """``random:s`` means a tiny network here."""

    def open_tiny(text, image_size=224, dtype="", upstream_l2a_stem=False):
        return encoders.random_encoder(TINY, 0, image_size, Statistics.published(), "tiny")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_lib, "open_encoder", open_tiny)
        yield


def config(folder, **overrides):
    c = schema.base()
    c.init_from, c.data.dir, c.image_size, c.epochs = "random:s", str(folder), 32, 16
    c.head_norm = True
    c.batch_size, c.eval_batch_size, c.rates, c.resamples, c.data.threads = 8, 8, (3e-3,), 20, 2
    for key, value in overrides.items():
        section, _, field = key.rpartition("__")
        (c[section] if section else c)[field] = value
    return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yaml = "splits: {train: 0.6, val: 0.2, test: 0.2}\n"
    return fake.eurosat_like(tmp_path_factory.mktemp("data") / "tiny", per_class=12, size=24, yaml=yaml)


@pytest.fixture(scope="module")
def straight(folder, tmp_path_factory):
    """One run without interruption: (row, workdir); the others are compared with it."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    return Job(config(folder), str(workdir), quiet).run(), workdir


def quiet(*_):
    """No output."""


# --- runs ---


@pytest.mark.slow
def test_learns_keeps_the_best_and_reports(straight):
    row, run = straight
    assert row["metrics"]["top1"]["value"] > 0.6
    assert json.loads((run / "results.jsonl").read_text())["settings"]["split"] == "test"
    lines = (run / "predictions/predictions.csv").read_text().splitlines()
    assert lines[0] == "id,predicted,class_0,class_1,class_2"
    assert len(lines) == 1 + np.sum(row["confusion"])
    _, meta = weights.load_npz(run / "best")
    assert meta["finetuned"]["classes"] == ["class_0", "class_1", "class_2"]
    assert meta["finetuned"]["image_px"] == 24  # the network saw 32
    assert meta["finetuned"]["gsd"] == pytest.approx(10, rel=0.01)
    assert meta["finetuned"]["bands"] == {"s2_l2a": list(SENSORS["s2_l2a"].band_names)}
    assert weights.load_npz(run / "best/head")[0]["head"]["linear"]["kernel"].shape == (32, 3)
    scores = [json.loads(line).get("val_top1") for line in (run / "lr_0.003/metrics.jsonl").read_text().splitlines()]
    assert meta["score"] == pytest.approx(max(scores))
    for given_away in (run / "results.jsonl", run / "results.md", run / "predictions/predictions.csv"):
        assert str(run.parents[1]) not in given_away.read_text()
    assert str(run.parents[1]) not in json.dumps(meta)


def same_weights(a, b):
    for part in ("best", "best/head"):
        first, second = (weights.flatten(weights.load_npz(folder / part)[0]) for folder in (a, b))
        assert first.keys() == second.keys()
        for path in first:
            np.testing.assert_array_equal(first[path], second[path], err_msg=path)


@pytest.mark.slow
def test_resume_is_bitwise(folder, straight, tmp_path):
    first = config(folder, stop_at_epoch=2)
    first.lock()  # as flags hand it over
    assert Job(first, str(tmp_path / "b"), quiet).run() is None
    resumed = Job(config(folder), str(tmp_path / "b"), quiet).run()
    assert resumed["metrics"] == straight[0]["metrics"]
    same_weights(straight[1], tmp_path / "b")


@pytest.mark.slow
def test_stopping_in_the_middle_of_an_epoch_resumes_bitwise(folder, straight, tmp_path):
    class Stop:
        """Asks to stop at step 4, in the middle of the second epoch."""

        calls = 0

        def reached(self):
            self.calls += 1
            return self.calls == 5

    job = Job(config(folder), str(tmp_path / "b"), quiet)
    sources = job.sources()
    run = job_lib.Run(job.plan(sources, 3e-3), tmp_path / "b/lr_0.003", sources, say=quiet)
    assert not run.train(job.encoder.params, stop=Stop())
    assert run.checkpoints.latest() == 5
    run.close()
    (tmp_path / "b/config.json").write_text((straight[1] / "config.json").read_text())
    assert Job(config(folder), str(tmp_path / "b"), quiet).run()["metrics"] == straight[0]["metrics"]
    same_weights(straight[1], tmp_path / "b")


@pytest.mark.slow
def test_microbatches_give_the_same_step(folder, tmp_path):
    job = Job(config(folder, drop_path=0.0, flips=False, head_norm=False), str(tmp_path), quiet)
    sources = job.sources()
    plan = job.plan(sources, 1e-3)
    batch = to_device(plan, next(sources["train"].train(0, 1, 8, 0)))
    results = []
    for count in (1, 2):
        changed = dataclasses.replace(plan, microbatches=count)
        state, metrics = make_step(changed)(init_state(changed, job.encoder.params), batch)
        results.append((state, float(metrics["loss"])))
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    for path, value in results[0][0].mu.items():
        np.testing.assert_allclose(value, results[1][0].mu[path], atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_any_mesh_gives_the_same_step(folder, tmp_path):
    losses = []
    for mesh in ({"mesh__data": 8}, {"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}):
        job = Job(config(folder, drop_path=0.0, **mesh), str(tmp_path), quiet)
        sources = job.sources()
        plan = job.plan(sources, 1e-3)
        state = init_state(plan, job.encoder.params)
        step = make_step(plan)
        for batch in sources["train"].train(0, 2, 8, 0):
            state, metrics = step(state, to_device(plan, batch))
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    job = Job(config(folder, batch_size=9), str(tmp_path), quiet)
    with pytest.raises(ShardingError, match="batch_size = 9 is not a multiple"):
        job.plan(sources, 1e-3)


@pytest.mark.slow
def test_learning_rate_sweep_takes_the_best_on_validation(folder, tmp_path):
    row = Job(config(folder, rates=(1e-7, 3e-3)), str(tmp_path / "run"), quiet).run()
    assert row["settings"]["rate"] == 3e-3
    assert (tmp_path / "run/lr_1e-07/DONE").exists()
    assert not (tmp_path / "run/predictions").is_file()
    with pytest.raises(ConfigError, match="belongs to a run with another config"):
        Job(config(folder, rates=(1e-7, 3e-3), epochs=7), str(tmp_path / "run"), quiet).run()


@pytest.mark.slow
def test_early_stopping_counts_epochs_without_progress(folder, tmp_path):
    said: list[str] = []
    overrides = {"rates": (1e-9,), "epochs": 5, "patience": 1, "mode": "frozen", "head_norm": False}
    Job(config(folder, **overrides), str(tmp_path / "run"), said.append).run()
    assert len([s for s in said if " epoch " in s]) == 2  # the first is the best, one more without progress
    said.clear()
    Job(config(folder, **overrides), str(tmp_path / "run"), said.append).run()
    assert not [s for s in said if " epoch " in s]  # a finished run is not continued


@pytest.mark.slow
def test_patience_does_not_count_an_epoch_that_was_cut_short(folder, tmp_path):
    """Told to stop in the first epoch, a run that waits one epoch for progress is not over."""
    overrides = {"rates": (3e-3,), "epochs": 2, "patience": 1}
    job = Job(config(folder, **overrides), str(tmp_path / "run"), quiet)
    sources = job.sources()
    run = job_lib.Run(job.plan(sources, 3e-3), tmp_path / "run/lr_0.003", sources, say=quiet)
    assert not run.train(job.encoder.params, stop=SimpleNamespace(reached=lambda: True))
    assert run.checkpoints.latest() == 1
    assert run.train(job.encoder.params)
    assert run.checkpoints.latest() == 2 * run.per_epoch
    assert run.best[1] > 0
    run.close()


@pytest.mark.slow
def test_validation_that_scores_nothing_keeps_the_last_epoch(tmp_path):
    """No image of the validation split has a label, so that there is no average precision to choose by."""
    root = labelled_pairs(tmp_path / "data", "multilabel")
    names = [f"p{i}.tif" for i in range(20)]
    splits = ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    rows = [f"{n},{'' if s == 'val' else 'ab'[i % 2]}" for i, (n, s) in enumerate(zip(names, splits, strict=True))]
    (root / "t.csv").write_text("\n".join(["file,labels", *rows]) + "\n")
    (root / "s.csv").write_text("\n".join(["file,split", *map(",".join, zip(names, splits, strict=True))]) + "\n")
    yaml = (root / "dataset.yaml").read_text().replace("{train: 0.6, val: 0.2, test: 0.2}", "s.csv")
    (root / "dataset.yaml").write_text(yaml)
    row = Job(config(root, epochs=2), str(tmp_path / "run"), quiet).run()
    assert row["settings"]["best epoch"] == 2
    assert 0 <= row["metrics"]["map_micro"]["value"] <= 1


@pytest.mark.slow
def test_non_finite_loss_is_one_clear_error(folder, tmp_path):
    with pytest.raises(TuningError, match=r"loss is (nan|inf) at epoch 1; lower config.rates"):
        Job(config(folder, rates=(1e30,), clip=0.0), str(tmp_path / "run"), quiet).run()


@pytest.mark.slow
def test_a_rate_that_diverges_does_not_end_the_sweep(folder, tmp_path):
    said = []
    row = Job(config(folder, rates=(1e30, 3e-3), clip=0.0, epochs=1), str(tmp_path / "run"), said.append).run()
    assert row["settings"]["rate"] == 3e-3
    assert row["settings"]["diverged"] == [1e30]
    assert any(text.startswith("left out: ") and "lr_1e+30: loss is " in text for text in said)


# --- other tasks ---


def labelled_pairs(root, task):
    rng = np.random.default_rng(0)
    for i in range(20):
        level = i % 2
        fake.tiff(root / "S1" / f"p{i}.tif", rng.normal(-18 + 8 * level, 1, (32, 32, 2)).astype("f4"))
        fake.tiff(root / "S2" / f"p{i}.tif", (1500 + 1500 * level + rng.normal(0, 200, (32, 32, 3))).astype(np.uint16))
        fake.tiff(root / "M" / f"p{i}.tif", np.full((32, 32), level, np.uint8))
    rows = "" if task == "segmentation" else "labels: t.csv\n"
    values = {"regression": ("value", lambda i: 10 + 5 * (i % 2)), "multilabel": ("labels", lambda i: "ab"[i % 2]),
              "classification": ("label", lambda i: "ab"[i % 2])}  # fmt: skip
    if task in values:
        column, text = values[task]
        table = [f"p{i}.tif,{text(i)}" for i in range(20)]
        (root / "t.csv").write_text("\n".join([f"file,{column}", *table]) + "\n")
    extra = "masks: M\nclasses: [low, high]\n" if task == "segmentation" else ""
    (root / "dataset.yaml").write_text(
        f"task: {task}\n{rows}{extra}splits: {{train: 0.6, val: 0.2, test: 0.2}}\ninputs:\n"
        "  s1: {folder: S1, bands: [VV, VH]}\n  s2_l2a: {folder: S2, bands: [B04, B03, B02]}\n"
    )
    return root


@pytest.mark.parametrize(
    ("task", "overrides"),
    [
        ("segmentation", {"mode": "frozen", "class_weights": "balanced", "rates": (3e-2,), "epochs": 2}),
        ("segmentation", {"head": "upernet", "upernet_channels": 8, "layer_decay": 0.75, "epochs": 1}),
        ("multilabel", {"mode": "lora", "mixup": 0.1, "epochs": 2}),
        ("regression", {"layer_decay": 0.75, "epochs": 2}),
        ("classification", {"epochs": 24}),
    ],
)
@pytest.mark.slow
def test_every_task_and_mode_with_fused_sensors(tmp_path, task, overrides):
    root = labelled_pairs(tmp_path / "data", task)
    row = Job(config(root, **overrides), str(tmp_path / "run"), quiet).run()
    assert row["inputs"] == ["s1", "s2_l2a"]
    if task == "segmentation":
        rasterio = pytest.importorskip("rasterio")
        written = sorted((tmp_path / "run/predictions").glob("*.tif"))
        assert len(written) == 4
        with rasterio.open(written[0]) as found, rasterio.open(root / "S1" / written[0].name) as image:
            assert (found.crs, found.transform, found.shape) == (image.crs, image.transform, image.shape)
            assert found.tags()["classes"] == "0=low;1=high"
        assert 0 <= row["metrics"]["miou"]["value"] <= 1
    elif task == "multilabel":
        assert row["metrics"]["map_micro"]["value"] >= 0.5
    elif task == "classification":
        assert row["metrics"]["top1"]["value"] >= 0.75  # chance 0.5
    else:
        assert row["metrics"]["rmse"]["value"] < 6  # deviation of the targets: 2.5


@pytest.mark.slow
def test_best_weights_predict_like_the_run(folder, straight):
    job = Job(config(folder, head_norm=True), str(straight[1]), quiet)
    sources = job.sources()
    plan = job.plan(sources, 3e-3)
    run = job_lib.Run(plan, straight[1] / "lr_0.003", sources, say=quiet)
    state = run.best_state(job.encoder.params)
    batch, _ = next(sources["test"].evaluate(8))
    found = np.asarray(make_predict(plan)(state, to_device(plan, batch)))
    encoder = encoders.open_encoder(str(straight[1] / "best"), 32)  # the usual loader reads a fine-tuned encoder
    head = weights.load_npz(straight[1] / "best/head")[0]
    cls, _ = encoder(ImageBatch(batch["images"], batch["bands"], batch["offset"]))
    (logits,), _ = plan.spec.make_head().apply(head["head"], head["head_state"], heads.Features(jnp.asarray(cls)))
    np.testing.assert_allclose(found, jax.nn.softmax(logits), atol=1e-4)
    np.testing.assert_allclose(found, Tuned(straight[1])(batch["images"]), atol=1e-4)
    run.close()


@pytest.mark.slow
def test_batch_norm_statistics_are_those_of_the_kept_weights(folder, straight):
    """Running ones lag behind: with few steps an epoch validation saw one class only, and training stopped early."""
    job = Job(config(folder), str(straight[1]), quiet)
    source = job.sources()["train"]
    encoder = encoders.open_encoder(str(straight[1] / "best"), 32)
    norm = weights.load_npz(straight[1] / "best/head")[0]["head_state"]["norm"]
    means, variances = [], []
    for batch in source.train(0, -(-len(source) // 8), 8, job.config.seed):
        cls = np.asarray(encoder(ImageBatch(batch["images"], batch["bands"], batch["offset"]))[0], np.float64)
        means.append(cls.mean(0))
        variances.append(cls.var(0, ddof=1))
    np.testing.assert_allclose(norm["mean"], np.mean(means, 0), atol=1e-4)
    np.testing.assert_allclose(norm["var"], np.mean(variances, 0), rtol=1e-2, atol=1e-4)


@pytest.mark.slow
def test_upstream_stem_of_level_2a_needs_no_flag_afterwards(folder, tmp_path, monkeypatch):
    path = tmp_path / "released.safetensors"
    write_state(sample(head=False), path)
    monkeypatch.setattr(job_lib, "open_encoder", encoders.open_encoder)
    overrides = {"mode": "frozen", "epochs": 1, "data__limit": 8, "upstream_l2a_stem": True, "init_from": str(path)}
    row = Job(config(folder, **overrides), str(tmp_path / "run"), quiet).run()
    assert row["note"].endswith("at most 8 samples per split")
    released, tuned = terrafm_jax.load(path), terrafm_jax.load(tmp_path / "run/best")
    x = images((32, 32), sensors=("s2_l2a",))
    plain = released.encode(**x).cls
    released.upstream_l2a_stem = True
    np.testing.assert_allclose(tuned.encode(**x).cls, released.encode(**x).cls, atol=1e-4)
    assert np.abs(tuned.encode(**x).cls - plain).max() > 1e-2


# --- what a workdir began with ---


@pytest.fixture
def begun(tmp_path):
    """A data set that may be changed, and a complete run on it."""
    yaml = "splits: {train: 0.6, val: 0.2, test: 0.2}\n"
    data = fake.eurosat_like(tmp_path / "data", per_class=6, size=24, yaml=yaml)
    Job(config(data, epochs=1), str(tmp_path / "run"), quiet).run()
    return data, str(tmp_path / "run")


@pytest.mark.slow
def test_a_run_is_not_continued_with_other_labels(begun):
    data, run = begun
    (data / "class_0").rename(data / "moved")
    (data / "class_1").rename(data / "class_0")
    (data / "moved").rename(data / "class_1")
    with pytest.raises(ConfigError, match=r"lr_0.003: was tuned with another content of config.data.dir "):
        Job(config(data, epochs=1), run, quiet).run()
    assert Job(config(data, epochs=1, allow_config_change=True), run, quiet).run()


@pytest.mark.slow
def test_a_run_is_not_continued_with_other_weights(begun, monkeypatch):
    data, run = begun
    other = encoders.random_encoder(TINY, 1, 32, Statistics.published(), "other")
    monkeypatch.setattr(job_lib, "open_encoder", lambda *_: other)
    with pytest.raises(ConfigError, match=r"lr_0.003: was tuned with another content of config.init_from "):
        Job(config(data, epochs=1), run, quiet).run()


@pytest.mark.slow
def test_an_empty_test_split_is_none(tmp_path):
    yaml = "splits: {train: 0.7, val: 0.3, test: 0.0}\n"
    data, said = fake.eurosat_like(tmp_path / "data", per_class=6, size=24, yaml=yaml), []
    row = Job(config(data, epochs=1), str(tmp_path / "run"), said.append).run()
    assert row["settings"]["split"] == "val"
    assert any("no test split" in line for line in said)
    assert "no test split: the result is that of validation" in (tmp_path / "run/results.md").read_text()


@pytest.mark.slow
def test_validation_on_what_is_trained_on_is_said(tmp_path):
    """One image a class: nothing can be held out. It was said that they were."""
    data, said = fake.eurosat_like(tmp_path / "data", per_class=1, size=24, yaml="splits: {train: 1.0}\n"), []
    Job(config(data, epochs=1), str(tmp_path / "run"), said.append).run()
    assert not any("are held out" in line for line in said)
    assert "validation is on those trained on" in (tmp_path / "run/results.md").read_text()
