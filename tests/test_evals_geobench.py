"""GEO-Bench on small files in exactly the published formats, written here; and the pickles in them."""

from __future__ import annotations

import pickle

import labelled_fake as fake
import numpy as np
import pytest
from labelled_fake import band_levels

from terrafm_jax.evals import datasets
from terrafm_jax.evals.datasets import geobench as gb
from terrafm_jax.evals.datasets import stub_pickle
from terrafm_jax.evals.datasets.base import (
    DatasetError,
    collate,
)
from terrafm_jax.sensors import S2_L2A

pytest.importorskip("rasterio")
h5py = pytest.importorskip("h5py")
RNG = np.random.default_rng(0)


# --- foreign pickles ---


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_stub_unpickler_reads_plain_data(protocol):
    data = {"label": np.array([0, 1, 1]), "f": np.float64(3.5), "b": b"x", "t": (1, [2.0, "y"])}
    found = stub_pickle.loads(pickle.dumps(data, protocol))
    np.testing.assert_array_equal(found["label"], data["label"])
    assert found["f"] == 3.5
    assert found["b"] == b"x"
    assert found["t"] == (1, [2.0, "y"])


def test_malicious_attribute_does_not_execute(tmp_path):
    target = tmp_path / "pwned"
    evil = pickle.dumps(fake.Evil(target))
    pickle.loads(evil)
    assert target.exists()  # the bait works ...
    target.unlink()
    found = stub_pickle.loads_attribute(str(pickle.dumps({"label": 1, "x": fake.Evil(target)})))
    assert found["label"] == 1
    assert not target.exists()  # ... and is not taken
    folder = fake.geobench(tmp_path, "m-eurosat", "classification_v1.0", gb._S2_13, [0, 1, 2])
    fake.hdf5(folder / "sample_0.hdf5", {n: np.ones((16, 16)) for n in gb._S2_13}, fake.Evil(target))
    (dataset,) = datasets.open_suite("geobench", tmp_path)
    with pytest.raises(DatasetError, match=r"sample_0.hdf5: label <stub pathlib\S*touch>, expected 0..9"):
        dataset.split("train")[0]
    assert not target.exists()


@pytest.mark.parametrize("text", ["not a literal", "b'not a pickle'", "'text'", "b'\\x80\\x04.'"])
def test_damaged_attributes_are_value_errors(text):
    with pytest.raises(ValueError, match=r"attribute|pickle"):
        stub_pickle.loads_attribute(text)


def test_object_arrays_are_not_rebuilt():
    with pytest.raises(ValueError, match=r"only numbers and text|no plain data"):
        stub_pickle.loads(pickle.dumps(np.array([1, "a", None], object)))


@pytest.mark.real
def test_real_geobench_attributes(real_data):
    files = sorted((real_data / "data_prep/geobench_hdf5_brick_kiln").glob("*.hdf5"))
    for file in files:
        with h5py.File(file) as f:
            assert stub_pickle.loads_attribute(f.attrs["pickle"])["label"] in (0, 1)


# --- GEO-Bench 1 ---


def test_geobench_eurosat_band_orders(tmp_path):
    fake.geobench(tmp_path, "m-eurosat", "classification_v1.0", gb._S2_13, [0, 1, 2, 3, 4, 5])
    (corrected,) = datasets.open_suite("geobench", tmp_path)
    assert band_levels(corrected, key="s2_l1c") == dict(
        zip(S2_L2A.band_names, [1, 2, 3, 4, 5, 6, 7, 8, 13, 9, 11, 12], strict=True)
    )
    (labelled,) = datasets.open_suite("geobench", tmp_path, ["m-eurosat"], bands="as_labelled")
    assert band_levels(labelled, key="s2_l1c") == dict(
        zip(S2_L2A.band_names, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 13], strict=True)
    )
    assert "bands=as_labelled" in labelled.info.note
    assert "bands=corrected" in corrected.info.note
    assert [corrected.split("train")[i].target for i in range(2)] == [0, 1]
    (small,) = datasets.open_suite("geobench", tmp_path, partition="0.01x_train")
    assert len(small.split("train")) == 1
    with pytest.raises(DatasetError, match=r"0.5x_partition.json: not found.*found \['0.01x_train', 'default'\]"):
        datasets.open_suite("geobench", tmp_path, partition="0.5x")
    with pytest.raises(DatasetError, match="expected 'corrected' or 'as_labelled'"):
        datasets.open_suite("geobench", tmp_path, bands="best")


def test_geobench_brick_kiln_true_order(tmp_path):
    fake.geobench(tmp_path, "m-brick-kiln", "classification_v1.0", gb._S2_13, [0, 1, 1])
    (dataset,) = datasets.open_suite("geobench", tmp_path)
    found = band_levels(dataset)
    assert found == {"B01": 1, "B02": 2, "B03": 3, "B04": 4, "B05": 5, "B06": 0, "B07": 6, "B08": 8, "B8A": 7,
                     "B09": 0, "B11": 9, "B12": 10}  # fmt: skip
    assert dataset.info.inputs["s2_l2a"].missing == ("B06", "B09")
    (labelled,) = datasets.open_suite("geobench", tmp_path, bands="as_labelled")
    assert band_levels(labelled)["B11"] == 12


def test_geobench_so2sat_is_reflectance_and_radar_power(tmp_path):
    spec = gb.DATASETS["m-so2sat"]
    names = (*spec.names, "05 - VH.LEE Filtered", "06 - VV.LEE Filtered", "01 - VH.Real")
    folder = fake.geobench(tmp_path, "m-so2sat", "classification_v1.0", names, [3, 4, 16])
    for file in folder.glob("*.hdf5"):
        with h5py.File(file, "a") as f:
            for name in spec.names:
                f[name][...] = 0.25
            f["05 - VH.LEE Filtered"][...], f["06 - VV.LEE Filtered"][...] = 0.01, 0.1
    (dataset,) = datasets.open_suite("geobench", tmp_path)
    batch = collate(dataset.info, [dataset.split("train")[0]], ["s1", "s2_l1c"])
    np.testing.assert_allclose(batch.images["s1"][0, 0, 0], [-10, -20], atol=1e-4)
    assert batch.images["s2_l1c"][0, 0, 0, 1] == 2500
    np.testing.assert_array_equal(np.nonzero(~batch.bands["s2_l1c"])[0], [0, 9])


def test_geobench_multilabel_and_segmentation_tiles(tmp_path):
    truth = RNG.random((3, 43)) < 0.2
    fake.geobench(tmp_path, "m-bigearthnet", "classification_v1.0", gb._S2_12, list(truth.astype(np.int64)))
    masks = [np.arange(128 * 128).reshape(128, 128) % 7 for _ in range(3)]
    dated = [n + "_2019-06-01" for n in gb._S2_12]
    fake.geobench(tmp_path, "m-cashew-plant", "segmentation_v1.0", dated, [0] * 3, size=128, masks=masks)
    multi, cashew = datasets.open_suite("geobench", tmp_path)
    np.testing.assert_array_equal(multi.split("train")[0].target, truth[0])
    train = cashew.split("train")
    assert len(train) == 4
    sample = train[3]
    assert sample.id == "sample_0/r1c1"
    assert sample.images["s2_l2a"].shape == (64, 64, 12)
    np.testing.assert_array_equal(sample.target, masks[0][64:, 64:])


def test_geobench_damage_is_named(tmp_path):
    folder = fake.geobench(tmp_path, "m-eurosat", "classification_v1.0", gb._S2_13, [0, 1, 2])
    with h5py.File(folder / "sample_0.hdf5", "a") as f:
        del f["04 - Red"]
    (folder / "sample_1.hdf5").write_bytes(b"x" * 100)
    (dataset,) = datasets.open_suite("geobench", tmp_path)
    with pytest.raises(DatasetError, match=r"sample_0.hdf5: lacks bands \['04 - Red'\]"):
        dataset.split("train")[0]
    with pytest.raises(DatasetError, match=r"sample_1.hdf5: cannot be read as HDF5"):
        dataset.split("val")[0]
    (folder / "default_partition.json").write_text('{"train": ["sample_0"]}')
    with pytest.raises(DatasetError, match=r"default_partition.json: unexpected content \(KeyError: 'valid'\)"):
        datasets.open_suite("geobench", tmp_path)


# --- GEO-Bench 2 ---


def archive(tmp_path, name, arrays, extra, count=3):
    payload = fake.tortilla_sample(tmp_path, arrays)
    splits = ["train", "validation", "test"]
    rows = [
        (
            {"tortilla:id": f"s{i}", "tortilla:file_format": "TORTILLA", "tortilla:data_split": splits[i], **extra},
            payload,
        )
        for i in range(count)
    ]
    (tmp_path / f"geobench_{name}.tortilla").write_bytes(fake.tortilla(rows))


def test_geobench2_archives(tmp_path):
    s1, s2 = RNG.normal(-12, 1, (16, 16, 2)).astype(np.float32), fake.planes(RNG, 16, 12)
    archive(tmp_path, "benv2", [s1, s2], {"labels": ["Pastures", "Marine waters"]})
    clouds = RNG.integers(0, 4, (16, 16)).astype(np.uint8)
    archive(tmp_path, "cloudsen12", [fake.planes(RNG, 16, 14), clouds], {"x": 1})
    water = np.array([[0, 1], [2, 3]], np.uint8).repeat(8, 0).repeat(8, 1)
    power = RNG.random((16, 16, 2)).astype(np.float32)
    archive(tmp_path, "kuro_siwo", [power, power, power, power[..., :1], water], {"x": 1})
    archive(tmp_path, "treesatai", [s2[..., :4], RNG.random((16, 16, 3)), s2], {"species_labels": ["Acer", "other"]})
    found = {d.info.name: d for d in datasets.open_suite("geobench2", tmp_path)}
    ben = found["geobench2-benv2"]
    np.testing.assert_array_equal(np.nonzero(ben.split("train").labels[0])[0], [4, 18])
    np.testing.assert_array_equal(ben.split("val")[0].images["s1"], s1)
    assert band_levels(ben)["B12"] == 12
    np.testing.assert_array_equal(found["geobench2-cloudsen12"].split("test")[0].target, clouds)
    assert band_levels(found["geobench2-cloudsen12"])["B8A"] == 9
    np.testing.assert_array_equal(np.unique(found["geobench2-kuro_siwo"].split("train")[0].target), [-1, 0, 1, 2])
    trees = found["geobench2-treesatai"]
    assert trees.split("train").labels[0].sum() == 1
    assert band_levels(trees)["B01"] == 11


def test_geobench2_honors_declared_nodata(tmp_path):
    item = fake.tiff(tmp_path / "image.tif", fake.planes(RNG, 16, 14))
    fake.hole([item], 2)
    fake.hole([item], at=(0, 1))  # a cloud probability, which the model does not see
    clouds = fake.tiff(tmp_path / "clouds.tif", RNG.integers(0, 4, (16, 16)).astype(np.uint8))
    items = [({"tortilla:id": p.stem, "tortilla:file_format": "GTiff"}, p.read_bytes()) for p in (item, clouds)]
    row = {"tortilla:id": "s", "tortilla:file_format": "TORTILLA", "tortilla:data_split": "train"}
    (tmp_path / "geobench_cloudsen12.tortilla").write_bytes(fake.tortilla([(row, fake.tortilla(items))]))
    (dataset,) = datasets.open_suite("geobench2", tmp_path)
    assert np.argwhere(~fake.measured(dataset, "train", "s2_l2a")).tolist() == [[0, 0]]


def test_truncated_tortilla_is_named(tmp_path):
    archive(tmp_path, "benv2", [np.ones((4, 4, 2), np.float32)] * 2, {"labels": ["Pastures"]})
    file = tmp_path / "geobench_benv2.tortilla"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DatasetError, match=r"geobench_benv2.tortilla: truncated"):
        datasets.open_suite("geobench2", tmp_path)
    file.write_bytes(b"PK" + b"0" * 40)
    with pytest.raises(DatasetError, match="no tortilla archive at byte 0"):
        datasets.open_suite("geobench2", tmp_path)
