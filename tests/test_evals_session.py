"""Encoders, feature store, protocols and the evaluate command on tiny data; test_evals_rows.py has the rows."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import jax
import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax.evals import charts, datasets, features, protocols, store
from terrafm_jax.evals.datasets.base import Dataset, DatasetError, DatasetInfo, Input, Sample, Split, collate
from terrafm_jax.evals.encoders import RawStatistics, open_encoder, random_encoder
from terrafm_jax.evals.features import Encoder, FeatureError, ImageBatch
from terrafm_jax.evals.published import PUBLISHED, published
from terrafm_jax.evals.session import combinations
from terrafm_jax.models import terrafm
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import SENSORS, Statistics

pytest.importorskip("sklearn")
pytest.importorskip("rasterio")
TINY = ModelSpec(width=24, depth=2, heads=2, grid=2, prototypes=16, head_hidden=16, head_bottleneck=8, fusion_heads=4)
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(TINY, 0, 32, Statistics.published())


def images(count, size=20, key="s2_l2a"):
    mean, std = Statistics.published().arrays(key)
    return (mean + std * RNG.normal(size=(count, size, size, len(mean)))).astype(np.float32)


def test_encoder_is_independent_of_batch_size_and_devices(encoder):
    x = images(5)
    together, _ = encoder(ImageBatch({"s2_l2a": x}))
    alone = np.concatenate([encoder(ImageBatch({"s2_l2a": x[i : i + 1]}))[0] for i in range(5)])
    np.testing.assert_allclose(together, alone, atol=2e-5)
    assert together.shape == (5, 24)


def test_encoder_equals_the_model_on_normalized_pixels(encoder):
    x = images(2, size=32)
    found, maps = encoder(ImageBatch({"s2_l2a": x}), patches=True)
    mean, std = Statistics.published().arrays("s2_l2a")
    pixels = (x - (mean - 2 * std)) / (4 * std)
    expected = terrafm.encode(TINY, encoder.params, {"s2_l2a": terrafm.patchify(jax.numpy.asarray(pixels), 16)})
    np.testing.assert_allclose(found, expected.cls, atol=2e-5)
    np.testing.assert_allclose(maps[0], expected.patches, atol=2e-5)
    offset = encoder(ImageBatch({"s2_l2a": x + 1000}, offset={"s2_l2a": np.full(2, 1000.0)}))[0]
    np.testing.assert_allclose(offset, found, atol=2e-4)


def test_missing_bands_equal_a_sliced_stem(encoder):
    x = images(2, size=32)
    keep = np.array([i not in (0, 9) for i in range(12)])
    found, _ = encoder(ImageBatch({"s2_l2a": np.where(keep, x, 0)}, {"s2_l2a": keep}))
    mean, std = Statistics.published().arrays("s2_l2a")
    pixels = np.where(keep, (x - (mean - 2 * std)) / (4 * std), 0).astype(np.float32)
    expected = terrafm.encode(TINY, encoder.params, {"s2_l2a": terrafm.patchify(jax.numpy.asarray(pixels), 16)})
    np.testing.assert_allclose(found, expected.cls, atol=2e-5)
    dark, _ = encoder(ImageBatch({"s2_l2a": np.where(keep, x, 0)}))
    assert np.abs(found - dark).max() > 1e-3  # zero DN is not "absent"


def test_unmeasured_pixels_do_not_leak(encoder):
    x = np.full((1, 20, 20, 2), -12.0, np.float32)
    holes = x.copy()
    holes[0, 5:9, 5:9] = np.nan
    a, b = (encoder(ImageBatch({"s1": v}), patches=True)[1][0] for v in (x, holes))
    assert np.isfinite(b).all()
    np.testing.assert_allclose(features.prepare_image(
        jax.numpy.asarray(holes), *Statistics.published().arrays("s1"), np.zeros(1), np.ones(2, bool), (20, 20)
    )[0, 6, 6], 0.5)  # fmt: skip
    assert np.abs(a - b).max() < 1.0


def test_a_sensor_without_a_measurement_takes_no_part(encoder):
    """As in training and in ``terrafm_jax.load``: an image whose radar is nodata shows what its optical one shows."""
    optical, radar = images(3, size=32), images(3, size=32, key="s1")
    radar[1], optical[2] = np.nan, np.nan
    keep = np.array([i != 4 for i in range(12)])
    optical[..., ~keep] = 0  # a band that the data set lacks is no measurement
    found, _ = encoder(ImageBatch({"s1": radar, "s2_l2a": optical}, {"s2_l2a": keep}))
    whole, alone = (
        encoder(ImageBatch(given, {"s2_l2a": keep}))[0]
        for given in ({"s1": radar[:1], "s2_l2a": optical[:1]}, {"s2_l2a": optical[1:2]})
    )
    np.testing.assert_allclose(found[:2], np.concatenate([whole, alone]), atol=2e-5)
    np.testing.assert_allclose(found[2:], encoder(ImageBatch({"s1": radar[2:]}))[0], atol=2e-5)
    empty, _ = encoder(ImageBatch({"s1": radar[1:2], "s2_l2a": optical[2:]}, {"s2_l2a": keep}))
    assert np.isfinite(empty).all()


def test_encoder_refuses_what_the_weights_cannot_take():
    released = random_encoder(
        dataclasses.replace(TINY, fusion=False, sensors=("s2_l2a",)), 0, 32, Statistics.published()
    )
    with pytest.raises(FeatureError, match=r"weights take \['s2_l2a'\], the data gives \['s1'\]"):
        released.check(["s1"])
    released = random_encoder(dataclasses.replace(TINY, fusion=False), 0, 32, Statistics.published())
    with pytest.raises(FeatureError, match="no fusion block"):
        released.check(["s1", "s2_l2a"])
    with pytest.raises(FeatureError, match="image_size 30: expected a multiple"):
        random_encoder(TINY, 0, 30, Statistics.published())
    with pytest.raises(FeatureError, match="random:SIZE"):
        open_encoder("random:xl")
    with pytest.raises(FeatureError, match="raw has no network"):
        open_encoder("random@raw")
    assert open_encoder("baseline=raw").check(["s2_l2a", "s1"]) == ("s1", "s2_l2a")


def two_sensor_set(count=24, size=20, task="classification"):
    info = DatasetInfo("pair", task, ("a", "b", "c"), {
        "s1": Input("s1", ("VV", "VH")), "s2_l2a": Input("s2_l2a", ("B04", "B03", "B02", "B08")),
    })  # fmt: skip
    y = np.arange(count) % 3

    def read(i):
        rng = np.random.default_rng(i)
        target = int(y[i]) if task == "classification" else np.full((size, size), y[i])
        return Sample(str(i), {
            "s1": rng.normal(-18 + 4 * y[i], 1, (size, size, 2)).astype("f4"),
            "s2_l2a": rng.normal(1500 + 800 * y[i], 300, (size, size, 4)).clip(1).astype(np.uint16),
        }, target)  # fmt: skip

    whole = Split([str(i) for i in range(count)], read, y if task == "classification" else None)
    half = count // 2
    return Dataset(info, {"train": whole.subset(range(half)), "test": whole.subset(range(half, count))})


def test_store_resumes_chunk_by_chunk(tmp_path, encoder, monkeypatch):
    monkeypatch.setattr(store, "CHUNK", 5)
    dataset, calls = two_sensor_set(), []
    request = store.Request(("s2_l2a",), batch_size=4)

    class Counting:
        def __getattr__(self, name):
            return getattr(encoder, name)

        def __call__(self, batch, **kwargs):
            calls.append(len(batch))
            if sum(calls) > 8 and len(calls) < 4:
                raise KeyboardInterrupt
            return encoder(batch, **kwargs)

    with pytest.raises(KeyboardInterrupt):
        store.extract(Counting(), dataset, "train", request, tmp_path)
    done = list(tmp_path.rglob("*.done"))
    assert len(done) == 1
    calls[:] = [0] * 10
    found = store.extract(Counting(), dataset, "train", request, tmp_path)
    assert sum(calls) == 12 - 5  # the finished chunk is not computed again
    np.testing.assert_array_equal(found.cls, store.extract(encoder, dataset, "train", request).cls)
    calls[:] = [0] * 10
    again = store.extract(Counting(), dataset, "train", request, tmp_path)
    assert sum(calls) == 0
    np.testing.assert_array_equal(again.targets, np.arange(12) % 3)
    other = random_encoder(TINY, 1, 32, Statistics.published())
    assert not np.array_equal(store.extract(other, dataset, "train", request, tmp_path).cls, again.cls)


def test_corrected_labels_reach_what_is_cached(tmp_path, encoder):
    """The images keep their names; nobody would look for the old labels in a folder of features."""
    dataset, request = two_sensor_set(), store.Request(("s2_l2a",), batch_size=4)
    store.extract(encoder, dataset, "train", request, tmp_path)
    train, corrected = dataset.split("train"), (np.arange(12) + 1) % 3
    relabelled = Split(train.ids, lambda i: dataclasses.replace(train[i], target=int(corrected[i])), labels=corrected)
    again = store.extract(encoder, Dataset(dataset.info, {"train": relabelled}), "train", request, tmp_path)
    np.testing.assert_array_equal(again.targets, corrected)
    info = dataclasses.replace(dataset.info, classes=("b", "a", "c"))
    renamed = Dataset(info, dataset.splits)
    assert renamed.fingerprint("train", ["s2_l2a"]) != dataset.fingerprint("train", ["s2_l2a"])


def test_windows_of_another_size_are_not_those_cached(tmp_path, encoder):
    """An image smaller than either window is one of the same name in both."""
    dataset, request = two_sensor_set(12, task="segmentation"), store.Request(("s1",), dense=True, batch_size=4)
    for size in (32, 48):
        cut = store.tiled(dataset, size)
        found = store.extract(encoder, cut, "train", request, tmp_path)
        assert found.targets.shape == (6, size, size)


def test_dense_store_and_rows(tmp_path, encoder):
    dataset = two_sensor_set(12, task="segmentation")
    request = store.Request(("s1",), dense=True, layers=(0, 1), batch_size=4)
    found = store.extract(encoder, dataset, "train", request, tmp_path)
    assert [m.shape for m in found.maps] == [(6, 2, 2, 24)] * 2
    assert found.targets.shape == (6, 20, 20)
    assert found.targets.dtype == np.int16  # of a whole split in memory
    np.testing.assert_array_equal(found.targets, np.stack([s.target for s in dataset.split("train")]))
    assert store._small(np.full((2, 2), 65535)).max() == 65535
    parts = store.Rows([np.arange(6).reshape(3, 2), np.arange(6, 10).reshape(2, 2)])
    np.testing.assert_array_equal(parts[[4, 0, 3]], [[8, 9], [0, 1], [6, 7]])
    np.testing.assert_array_equal(parts[1:4], [[2, 3], [4, 5], [6, 7]])


@pytest.mark.parametrize("others", [4, store.CHUNK])
def test_images_of_several_sizes_are_told_to_be_cut(others):
    """Whether they meet in one chunk or not, and whether or not the network sees one size."""
    info = DatasetInfo("mixed", "segmentation", ("a", "b"), {"s1": Input("s1", ("VV", "VH"))})

    def read(i):
        side = 32 if i < others else 48
        return Sample(str(i), {"s1": np.full((side, side, 2), -10.0)}, np.zeros((side, side), int))

    split = Split([str(i) for i in range(others + 2)], read)
    for image_size in (0, 32):
        with pytest.raises(DatasetError, match="mixed: images differ in size; cut them with --tile"):
            store.extract(
                RawStatistics(image_size), Dataset(info, {"test": split}), "test", store.Request(("s1",), True)
            )


def test_cutting_pads_with_nodata_and_ignore():
    info = DatasetInfo("x", "segmentation", ("a", "b"), {"s1": Input("s1", ("VV", "VH"))})
    sample = Sample("p", {"s1": np.full((10, 7, 2), -10, np.float32)}, np.ones((10, 7), int))
    cut = store.tiled(Dataset(info, {"test": Split(["p"], lambda i: sample)}), 8)
    test = cut.split("test")
    assert test.ids == ["p/r0_c0", "p/r8_c0"]
    assert test[1].target.shape == (8, 8)
    assert (test[1].target >= 0).sum() == 14
    assert np.isnan(collate(cut.info, [test[1]], ["s1"]).images["s1"][0, 3]).all()


def test_files_that_change_under_their_names_are_noticed(tmp_path):
    """Features and targets are cached: a mended mask would be judged by the old one."""
    for folder in ("images", "masks"):
        fake.tiff(tmp_path / folder / "a.tif", np.ones((16, 16, 2 if folder == "images" else 1), np.float32))
    text = "task: segmentation\nclasses: [x, y]\ninputs: {s1: {folder: images, bands: [VV, VH]}}\nmasks: masks\n"
    (tmp_path / "dataset.yaml").write_text(text + "splits: {train: 1.0}\n")
    first, again = (
        store.tiled(datasets.open_suite("folder", tmp_path)[0], 16).fingerprint("train", ["s1"]) for _ in range(2)
    )
    assert first == again
    for folder in ("images", "masks"):
        before = store.tiled(datasets.open_suite("folder", tmp_path)[0], 16).fingerprint("train", ["s1"])
        os.utime(tmp_path / folder / "a.tif", ns=(1, 1))
        assert store.tiled(datasets.open_suite("folder", tmp_path)[0], 16).fingerprint("train", ["s1"]) != before


def test_windows_show_the_same_ground_in_images_of_other_sampling_than_the_mask():
    bands = {"s1": Input("s1", ("VV",)), "s2_l2a": Input("s2_l2a", ("B02",))}
    info = DatasetInfo("x", "segmentation", ("a", "b"), bands)
    fine = np.arange(60.0 * 64).reshape(60, 64)
    sample = Sample("p", {"s1": fine[..., None], "s2_l2a": fine[::2, ::2, None]}, fine.astype(int), path="p.tif")
    split = Split(["p"], lambda i: sample)
    for window in store.tiled(Dataset(info, {"test": split}), 32).split("test"):
        corners = [window.target[0, 0], *(window.images[k][0, 0, 0] for k in bands)]
        assert corners == [corners[0]] * 3
        assert [window.images[k].shape for k in bands] == [(32, 32, 1), (16, 16, 1)]
    with pytest.raises(DatasetError, match=r"^p.tif: image of \(30, 32\) px, mask of \(60, 64\): a window of 21 px"):
        list(store.tiled(Dataset(info, {"test": split}), 21).split("test"))


def test_combinations_of_inputs(encoder):
    dataset = two_sensor_set()
    assert combinations(encoder, dataset, ()) == [("s1",), ("s2_l2a",), ("s1", "s2_l2a")]
    assert combinations(encoder, dataset, ("s2_l2a+s1",)) == [("s1", "s2_l2a")]
    plain = random_encoder(dataclasses.replace(TINY, fusion=False), 0, 32, Statistics.published())
    assert combinations(plain, dataset, ()) == [("s1",), ("s2_l2a",)]
    with pytest.raises(DatasetError, match=r"asked for \['s2_l1c'\]"):
        combinations(encoder, dataset, ("s2_l1c",))
    lacking = random_encoder(dataclasses.replace(TINY, sensors=("s2_l1c",)), 0, 32, Statistics.published())
    with pytest.raises(FeatureError, match="takes none of the sensors"):
        combinations(lacking, dataset, ())


@pytest.mark.parametrize("protocol", [*sorted(protocols.knn.PROTOCOLS), "logreg"])
@pytest.mark.parametrize("inputs", [("s2_l2a",), ("s1", "s2_l2a")])
def test_every_protocol_takes_fused_inputs(encoder, protocol, inputs):
    dataset = two_sensor_set(36)
    request = store.Request(inputs)
    splits = {k: store.extract(encoder, dataset, k, request) for k in dataset.splits}
    result = protocols.run(protocol, splits, dataset.info, protocols.Options(resamples=0))
    assert result.top1 >= (0.9 if len(inputs) > 1 else 0.5)  # chance 0.33; the radar tells the classes best
    raw = RawStatistics()
    splits = {k: store.extract(raw, dataset, k, request) for k in dataset.splits}
    few = protocols.run(protocol, splits, dataset.info, protocols.Options(shots=4, resamples=0), scale=True)
    assert few.settings["train"] == 12
    assert few.top1 > 0.6
    short = protocols.run(protocol, splits, dataset.info, protocols.Options(epochs=2, resamples=0))
    assert "epochs" not in short.protocol  # it has none to shorten


def test_protocols_that_do_not_fit_say_which_do():
    with pytest.raises(protocols.ProtocolError, match=r"galileo-knn20 does not do segmentation; these do: .*upernet"):
        protocols.check("galileo-knn20", "segmentation")
    with pytest.raises(protocols.ProtocolError, match="expected one of"):
        protocols.check("knn")
    dataset = two_sensor_set()
    with pytest.raises(protocols.ProtocolError, match=r"needs splits \['test'\]"):
        protocols.run("logreg", {"train": store.extract(RawStatistics(), dataset, "train", store.Request(("s1",)))},
                      dataset.info, protocols.Options())  # fmt: skip


def test_published_rows_are_those_of_the_paper():
    found = published("galileo-knn20/1", 1.0, ["m-eurosat", "m-so2sat"])
    assert found["TerraFM-B"]["m-eurosat"].value == 94.2
    assert published("galileo-knn20/1", 0.01, ["m-eurosat"])["TerraFM-L"]["m-eurosat"].value == 62.1
    assert published("logreg/1", 1.0, ["m-eurosat"]) == {}
    assert {p.protocol for p in PUBLISHED} - {"galileo-finetune", "upernet-finetune"} <= set(protocols.TASKS_OF)
    copernicus = {p.dataset: p.value for p in PUBLISHED if p.model == "TerraFM-B" and "copernicus" in p.protocol}
    assert copernicus["BigEarthNet-S1"] == 76.9
    assert copernicus["DFC2020-S2"] == 63.8


# --- sessions ---


def test_thumbnails_of_every_sensor():
    dataset = two_sensor_set()
    sample = dataset.split("train")[0]
    assert charts.thumbnail(dataset.info, sample).shape == (20, 20, 3)
    radar = dataclasses.replace(sample, images={"s1": sample.images["s1"]})
    assert charts.thumbnail(dataset.info, radar).dtype == np.uint8


@pytest.mark.slow
def test_command_line(tmp_path):
    fake.eurosat_like(tmp_path / "tiny", per_class=8)
    command = [sys.executable, "-m", "terrafm_jax.evaluate", "--checkpoint", "raw", "--suite", "folder", "--data",
               str(tmp_path / "tiny"), "--out", str(tmp_path / "out"), "--protocol"]  # fmt: skip
    done = subprocess.run([*command, "logreg", "--image_size", "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "logreg/1" in done.stdout
    row = json.loads((tmp_path / "out/results.jsonl").read_text())
    assert row["settings"]["C"] in [10.0**e for e in range(-6, 5)]
    bad = subprocess.run([*command, "knn"], capture_output=True, text=True)
    assert bad.returncode == 1
    assert bad.stderr.strip().splitlines()[-1].startswith("error: protocol 'knn', expected one of")
    (tmp_path / "tiny/class_1/class_1_3.tif").write_bytes(b"broken")
    again = [*command, "galileo-knn20", "--image_size", "16", "--nofigures"]
    assert subprocess.run(again, capture_output=True).returncode == 1
    fake.eurosat_like(tmp_path / "tiny", per_class=8)
    assert subprocess.run(again, capture_output=True).returncode == 0  # all rows are there now


def test_sensors_of_the_fake_exist():
    assert set(SENSORS) >= {"s1", "s2_l2a"}
    assert isinstance(random_encoder(TINY, 0, 32, Statistics.published()), Encoder)
