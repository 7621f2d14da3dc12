"""Fine-tuning around the runs: order and split of the data, configs, what predictions are written as."""

from __future__ import annotations

import re
from types import SimpleNamespace

import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax.config import ConfigError
from terrafm_jax.evals import features, store
from terrafm_jax.evals.datasets.base import Dataset, DatasetError, DatasetInfo, Input, Sample, Split
from terrafm_jax.finetuning import config as schema
from terrafm_jax.finetuning import job as job_lib
from terrafm_jax.finetuning.data import Source, class_weights
from terrafm_jax.finetuning.job import Job
from terrafm_jax.finetuning.predict import write_predictions

rasterio = pytest.importorskip("rasterio")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    yaml = "splits: {train: 0.6, val: 0.2, test: 0.2}\n"
    return fake.eurosat_like(tmp_path_factory.mktemp("data") / "tiny", per_class=12, size=24, yaml=yaml)


# --- data -------------------------------------------------------------------------------------


def test_batches_cover_every_epoch_once(folder):
    (dataset,) = job_lib.open_suite("folder", folder)
    source = Source(dataset.info, dataset.split("train"), ("s2_l2a",))
    count = len(source)
    rows = np.concatenate([source.rows(s, 8, seed=1) for s in range(-(-count // 8))])
    assert set(rows) == set(range(count))
    assert not np.array_equal(source.rows(0, 8, 1), source.rows(0, 8, 2))
    np.testing.assert_array_equal(source.rows(5, 8, 1), source.rows(5, 8, 1))
    np.testing.assert_allclose(class_weights(source, 3, -1), 1.0, atol=0.2)
    source.close()


def test_images_of_several_sizes_are_resized_as_the_network_would(tmp_path):
    rng = np.random.default_rng(3)
    for i, (rows, columns) in enumerate([(40, 40), (24, 70), (33, 32)]):
        image = rng.uniform(500, 3000, (rows, columns, 2)).astype(np.float32)
        image[:9, 3:9] = 0  # nodata
        fake.tiff(tmp_path / f"{'ab'[i % 2]}/p{i}.tif", image)
    inputs = "inputs: {s2_l2a: {bands: [B04, B08]}}\nsplits: {train: 1.0}\n"
    (tmp_path / "dataset.yaml").write_text(inputs)
    (dataset,) = job_lib.open_suite("folder", tmp_path)
    source = Source(dataset.info, dataset.split("train"), ("s2_l2a",), side=32)
    together, alone = source.batch([0, 1, 2]), [source.batch([i]) for i in range(3)]
    assert together["images"]["s2_l2a"].shape == (3, 32, 32, 12)
    assert {a["images"]["s2_l2a"].shape[1:3] for a in alone} == {(40, 40), (33, 32), (24, 70)}
    assert np.isnan(together["images"]["s2_l2a"]).any()
    for i in range(3):
        seen = [
            features.prepare_image(
                batch["images"]["s2_l2a"], np.full(12, 1500.0), np.full(12, 800.0), np.zeros(1),
                batch["bands"]["s2_l2a"], (32, 32),
            )[0]
            for batch in ({**together, "images": {"s2_l2a": together["images"]["s2_l2a"][i : i + 1]}}, alone[i])
        ]  # fmt: skip
        np.testing.assert_allclose(seen[0], seen[1], atol=1e-5)
    own = Source(dataset.info, dataset.split("train"), ("s2_l2a",))
    with pytest.raises(DatasetError, match=r"images differ in size: .*24x70 px.*; give config.image_size, e.g. 224"):
        own.batch([0, 1, 2])
    for s in (source, own):
        s.close()


@pytest.mark.parametrize(("crs", "step"), [("EPSG:32632", 20.0), ("EPSG:4326", 20.0 / 111_195), (None, 20.0)])
@pytest.mark.parametrize("tile", [0, 16])
def test_sampling_of_the_images_is_measured_on_the_ground(tmp_path, crs, step, tile):
    for folder, size, channels in (("images", 32, 2), ("masks", 64, 1)):  # masks finer than images
        image = np.ones((size, size, channels), np.uint8 if channels == 1 else np.uint16)
        corner = rasterio.Affine(
            step * 32 / size, 0, 4e5 if step > 1 else 9.0, 0, -step * 32 / size, 5e6 if step > 1 else 45
        )
        with rasterio.open(fake.tiff(tmp_path / folder / "a.tif", image, crs=crs), "r+") as file:
            file.transform = corner
    (tmp_path / "dataset.yaml").write_text(
        "task: segmentation\nclasses: [x, y]\ninputs: {s2_l2a: {folder: images, bands: [B04, B08]}}\nmasks: masks\n"
        "splits: {train: 1.0}\n"
    )
    (dataset,) = job_lib.open_suite("folder", tmp_path)
    dataset = store.tiled(dataset, tile) if tile else dataset
    source = Source(dataset.info, dataset.split("train"), ("s2_l2a",))
    assert source.gsd() == pytest.approx(20.0 if crs else 0.0, rel=0.01)
    source.close()


def test_images_of_several_sizes_under_masks_are_told_to_be_cut():
    info = DatasetInfo("mixed", "segmentation", ("a", "b"), {"s1": Input("s1", ("VV", "VH"))})

    def read(i):
        return Sample(str(i), {"s1": np.full((16 + i, 16, 2), -10.0)}, np.zeros((16 + i, 16), int))

    source = Source(info, Split(["0", "1"], read), ("s1",), side=32)
    with pytest.raises(DatasetError, match=r"0 16x16 px, 1 17x16 px; cut them alike with config.data.tile"):
        source.batch([0, 1])
    source.close()


def test_windows_of_an_image_are_held_out_together():
    windows = Split([f"image{i}/r{r}_c0" for i in range(10) for r in range(4)],
                    lambda i: Sample(str(i), {}, np.zeros((4, 4), int)))  # fmt: skip
    rest, held = job_lib._hold_out(windows, 0)
    assert sorted(rest.ids + held.ids) == sorted(windows.ids)
    assert len(held) == 8
    assert {i.split("/")[0] for i in rest.ids}.isdisjoint(i.split("/")[0] for i in held.ids)


# --- predictions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "scores", "expected"),
    [
        ("regression", [[3.25], [-1.0]], ["id,predicted", "p0,3.25", "p1,-1"]),
        ("classification", [[0.25, 0.75], [0.5, 0.5]], ["id,predicted,a,b", "p0,b,0.25,0.75", "p1,a,0.5,0.5"]),
        ("multilabel", [[0.75, 0.875], [0.25, 0.5]], ["id,predicted,a,b", "p0,a;b,0.75,0.875", "p1,,0.25,0.5"]),
    ],
)
def test_predictions_hold_every_number_once(tmp_path, task, scores, expected):
    source = SimpleNamespace(split=SimpleNamespace(ids=["p0", "p1"]))
    run = SimpleNamespace(sources={"test": source}, outputs=lambda state, split: [(np.array(scores), None)])
    write_predictions(tmp_path, run, None, "test", SimpleNamespace(task=task, classes=("a", "b")))
    assert (tmp_path / "predictions.csv").read_text().splitlines() == expected


@pytest.mark.parametrize(("size", "finer"), [(0, 1), (8, 1), (0, 2), (16, 2)])
def test_masks_lie_where_their_image_lies(tmp_path, size, finer):
    """Windows (config.data.tile) and masks that are finer than their image, too."""
    import rasterio

    image = fake.tiff(tmp_path / "image.tif", np.full((16, 12, 2), -10, np.float32))
    sample = Sample(
        "image.tif", {"s1": np.full((16, 12, 2), -10.0)}, np.zeros((16 * finer, 12 * finer), int), path=str(image)
    )
    info = DatasetInfo("x", "segmentation", ("a", "b"), {"s1": Input("s1", ("VV", "VH"))})
    dataset = Dataset(info, {"test": Split(["image.tif"], lambda i: sample)})
    split = (store.tiled(dataset, size) if size else dataset).split("test")
    source = SimpleNamespace(split=split, read=lambda i: split[i])
    outputs = [(np.stack([np.zeros(split[i].target.shape, np.uint8) for i in range(len(split))]), None)]
    run = SimpleNamespace(sources={"test": source}, outputs=lambda state, name: outputs)
    write_predictions(tmp_path / "out", run, None, "test", info)
    with rasterio.open(image) as whole:
        for path in (tmp_path / "out").glob("*.tif"):
            row, column = map(int, re.findall(r"[rc](\d+)", path.stem)) if size else (0, 0)
            with rasterio.open(path) as part:
                assert part.crs == whole.crs
                assert part.transform * (0, 0) == whole.transform * (column / finer, row / finer)
                assert part.transform.a == whole.transform.a / finer
    places = [f"_r{r}_c{c}" for r in (0, size) for c in (0, size)] if size else [""]
    assert sorted(p.name for p in (tmp_path / "out").glob("*.tif")) == [f"image{place}.tif" for place in places]


# --- configs ----------------------------------------------------------------------------------


def config(folder, **overrides):
    c = schema.base()
    c.init_from, c.data.dir, c.batch_size = "random:s", str(folder), 8
    for key, value in overrides.items():
        section, _, field = key.rpartition("__")
        (c[section] if section else c)[field] = value
    return c


def test_bad_configs_are_named(folder, tmp_path):
    for overrides, message in (
        ({"mode": "half"}, "config.mode: found 'half', expected one of"),
        ({"rates": ()}, "config.rates"),
        ({"microbatches": 3}, "does not divide batch_size 8"),
        ({"data__dir": ""}, "config.data.dir: empty"),
        ({"head": "upernet"}, "'upernet' does not do classification"),
        ({"mixup": -1.0}, "config.mixup: found -1.0, expected 0"),
        ({"stop_at_epoch": -1}, "config.stop_at_epoch: found -1, expected 0"),  # would stop after the first one
        ({"patience": -1}, "config.patience: found -1, expected 0"),
        ({"eval_batch_size": 0}, "config.eval_batch_size: found 0, expected at least 1"),  # failed after an epoch
        ({"label_smoothing": 2.0}, "config.label_smoothing: found 2.0, expected 0..1"),
        ({"drop_path": 1.0}, "config.drop_path: found 1.0, expected 0..1"),
    ):
        c = config(folder, **overrides)
        with pytest.raises((ConfigError, ValueError), match=message):
            Job(c, str(tmp_path / "run"), lambda *_: None).run()
    c = config(folder)
    c.leraning_rate = 1.0
    with c.ignore_type():
        c.epochs = "10"
    with pytest.raises(
        ConfigError, match=r"(?s)config.epochs: found '10' \(str\), expected int.*config.leraning_rate: unknown"
    ):
        Job(c, str(tmp_path / "run"), lambda *_: None)


@pytest.mark.parametrize(
    "name", ["classification", "quick", "segmentation_linear", "segmentation_upernet", "regression"]
)
def test_shipped_configs_fit_the_schema(name):
    import importlib

    module = importlib.import_module(f"configs.finetune.{name}")
    for argument in (None, "runlocal"):
        c = module.get_config(argument)
        c.init_from, c.data.dir = "random:s", "somewhere"
        schema.check(c)
    assert "terrafm_jax.finetune" in module.__doc__
    job = object.__new__(Job)
    job.config = module.get_config()
    named = {"classification": "galileo-finetune/1", "segmentation_upernet": "upernet-finetune/2"}
    assert job.protocol() == named.get(name, f"finetune: {job.config.mode}, {job.config.epochs} epochs")
    with pytest.raises(ConfigError, match="unknown argument 'x'"):
        module.get_config("x")


@pytest.mark.parametrize(
    "change", [{"label_smoothing": 0.1}, {"head_norm": True}, {"flips": False}, {"drop_path": 0.0}, {"epochs": 10}]
)
def test_a_published_name_is_for_its_own_settings(change):
    """Beside the published numbers nothing may stand that was trained otherwise."""
    from configs.finetune.classification import get_config

    job = object.__new__(Job)
    job.config = get_config()
    job.config.update(change)
    assert job.protocol() == f"finetune: full, {job.config.epochs} epochs"
