"""Readers on small files in exactly the published formats, written here."""

from __future__ import annotations

import json
import pickle

import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax.evals import datasets
from terrafm_jax.evals.datasets import geobench as gb
from terrafm_jax.evals.datasets import labels, stub_pickle
from terrafm_jax.evals.datasets.base import (
    Dataset,
    DatasetError,
    DatasetInfo,
    Input,
    Sample,
    Split,
    batches,
    canonical,
    collate,
    few_shot,
    label_fraction,
)  # fmt: skip
from terrafm_jax.sensors import S1, S2_L2A

pytest.importorskip("rasterio")
h5py = pytest.importorskip("h5py")
RNG = np.random.default_rng(0)


def band_levels(dataset: Dataset, split: str = "train", key: str = "s2_l2a") -> dict[str, int]:
    """Which delivered plane (counted from 1) stands at each canonical band of the first sample; 0: absent."""
    batch = collate(dataset.info, [dataset.split(split)[0]], [key])
    means = np.nan_to_num(batch.images[key][0].mean((0, 1)))
    return dict(zip(S2_L2A.band_names, (means // 1000).astype(int).tolist(), strict=True))


# --- the declaration ---


def test_landsat_and_unknown_bands_are_refused():
    with pytest.raises(DatasetError, match="sensor 'landsat8' cannot be evaluated"):
        Input("landsat8", ("B1",))
    with pytest.raises(DatasetError, match=r"unknown bands \['B99'\], repeated bands \['B02'\]"):
        Input("s2_l2a", ("B02", "blue", "B99"))
    with pytest.raises(DatasetError, match=r"unit 'kelvin', expected one of \['DN', 'reflectance'\]"):
        Input("s2_l2a", ("B02",), "kelvin")
    with pytest.raises(DatasetError, match=r"geobench: refused \['m-forestnet \(Landsat 8\)'\]"):
        datasets.open_suite("geobench", ".", ["m-forestnet"])
    with pytest.raises(DatasetError, match="HLS mixes Landsat"):
        datasets.open_suite("geobench2", ".", ["burn_scars"])


def test_canonical_order_units_and_nodata():
    source = Input("s2_l1c", labels.EUROSAT_BANDS)
    image = np.broadcast_to(np.arange(1, 14, dtype=np.uint16) * 1000, (4, 4, 13)).copy()
    image[0, 0] = 0
    image[1, 1, 3] = 0  # dark in one band: valid
    out = canonical(source, image)
    assert np.isnan(out[0, 0]).all()
    assert out[1, 1, 3] == 0
    np.testing.assert_array_equal(out[2, 2], np.array([1, 2, 3, 4, 5, 6, 7, 8, 13, 9, 11, 12]) * 1000)
    assert source.missing == ()
    half = Input("s2_l2a", ("nir", "red"), "reflectance")
    out = canonical(half, np.full((2, 2, 2), 0.25))
    assert half.mask.sum() == 2
    assert out[0, 0, 7] == out[0, 0, 3] == 2500
    assert out[0, 0, 0] == 0
    radar = canonical(Input("s1", ("VH", "VV"), "linear"), np.array([[[0.01, 0.1], [0.0, 1.0]]]))
    np.testing.assert_allclose(radar[0, 0], [-10, -20], atol=1e-5)
    assert np.isnan(radar[0, 1, 1])
    with pytest.raises(DatasetError, match=r"expected \[H, W, 13\]"):
        canonical(source, np.zeros((4, 4, 12)))


def test_stratified_fractions_and_shots():
    y = np.repeat([0, 1, 2], [100, 40, 2])
    rows = label_fraction(y, 0.05, seed=1)
    np.testing.assert_array_equal(np.bincount(y[rows]), [5, 2, 1])
    assert not np.array_equal(rows, label_fraction(y, 0.05, seed=2))
    np.testing.assert_array_equal(rows, label_fraction(y, 0.05, seed=1))
    np.testing.assert_array_equal(np.bincount(y[few_shot(y, 5, 0)]), [5, 5, 2])
    assert len(label_fraction(np.zeros((50, 3), bool), 0.2, 0)) == 10
    with pytest.raises(DatasetError, match="label fraction 2"):
        label_fraction(y, 2, 0)


def test_batches_split_where_sizes_change():
    info = DatasetInfo("x", "classification", ("a", "b"), {"s1": Input("s1", ("VV", "VH"))})
    sizes = [8, 8, 8, 16, 16, 8]
    split = Split([str(i) for i in range(6)], lambda i: Sample(str(i), {"s1": np.ones((sizes[i], 8, 2))}, 0))
    assert [len(b) for b in batches(split, 2)] == [2, 1, 2, 1]
    with pytest.raises(DatasetError, match="differ in size"):
        collate(info, [split[0], split[3]], ["s1"])
    dataset = Dataset(info, {"train": split})
    assert dataset.fingerprint("train", ["s1"]) != Dataset(info, {"train": split.subset([1, 0])}).fingerprint(
        "train", ["s1"]
    )


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


def test_truncated_tortilla_is_named(tmp_path):
    archive(tmp_path, "benv2", [np.ones((4, 4, 2), np.float32)] * 2, {"labels": ["Pastures"]})
    file = tmp_path / "geobench_benv2.tortilla"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(DatasetError, match=r"geobench_benv2.tortilla: truncated"):
        datasets.open_suite("geobench2", tmp_path)
    file.write_bytes(b"PK" + b"0" * 40)
    with pytest.raises(DatasetError, match="no tortilla archive at byte 0"):
        datasets.open_suite("geobench2", tmp_path)


# --- Copernicus-Bench ---


def test_copernicus_eurosat_and_bigearthnet(tmp_path):
    for kind, count in (("eurosat_s1", 2), ("eurosat_s2", 13)):
        for split in ("train", "val", "test"):
            names = []
            for c in ("Forest", "River"):
                names.append(f"{c}_{split}.jpg")
                image = fake.planes(RNG, 16, count) if count == 13 else RNG.normal(-12, 1, (16, 16, 2)).astype("f4")
                fake.tiff(tmp_path / kind / "all_imgs" / c / f"{c}_{split}.tif", image)
            (tmp_path / kind / f"eurosat-{split}.txt").write_text("\n".join(names) + "\n")
    ben = tmp_path / "bigearthnetv2"
    for split in ("train", "val", "test"):
        fake.tiff(ben / "BigEarthNet-S1-5%" / f"a_{split}.tif", RNG.normal(-12, 1, (12, 12, 2)).astype("f4"))
        fake.tiff(ben / "BigEarthNet-S2-5%" / f"b_{split}.tif", fake.planes(RNG, 12, 12))
        (ben / f"multilabel-{split}.csv").write_text(
            f"s1_path,s2_path,Pastures,Water\na_{split}.tif,b_{split}.tif,0,1\n"
        )
    found = {d.info.name: d for d in datasets.open_suite("copernicus", tmp_path)}
    assert set(found) == {"EuroSAT-S1", "EuroSAT-S2", "BigEarthNet-S1", "BigEarthNet-S2"}
    assert band_levels(found["EuroSAT-S2"], key="s2_l1c")["B8A"] == 13
    np.testing.assert_array_equal(found["EuroSAT-S1"].split("test").labels, [1, 8])
    assert found["EuroSAT-S1"].split("test")[1].images["s1"].shape == (16, 16, 2)
    (fused,) = datasets.open_suite("copernicus", tmp_path, ["BigEarthNet-S12"])
    sample = fused.split("val")[0]
    assert set(sample.images) == {"s1", "s2_l2a"}
    np.testing.assert_array_equal(sample.target, [False, True])
    with pytest.raises(DatasetError, match=r"not found \['LCZ-S2"):
        datasets.open_suite("copernicus", tmp_path, ["LCZ-S2"])


def test_copernicus_segmentation_and_lcz(tmp_path):
    for split in ("train", "val", "test"):
        name = f"ROI_1__2020{split}"
        fake.tiff(tmp_path / "cloud_s2/s2_toa" / f"{name}.tif", fake.planes(RNG, 16, 13))
        fake.tiff(tmp_path / "cloud_s2/cloud" / f"{name}.tif", RNG.integers(0, 4, (16, 16)).astype(np.uint8))
        (tmp_path / "cloud_s2" / f"{split}.csv").write_text(name + "\n")
        label = f"ROIs0000_dfc_{split}_p1.tif"
        delivered = np.arange(16, dtype=np.uint8).reshape(4, 4) % 11
        fake.tiff(tmp_path / "dfc2020/dfc" / label, delivered)
        fake.tiff(tmp_path / "dfc2020/s1" / label.replace("dfc", "s1"), RNG.normal(-12, 1, (4, 4, 2)).astype("f4"))
        fake.tiff(tmp_path / "dfc2020/s2" / label.replace("dfc", "s2"), fake.planes(RNG, 4, 13))
        (tmp_path / "dfc2020" / f"dfc-{split}-new.csv").write_text(label + "\n")
        (tmp_path / "lcz_s2").mkdir(exist_ok=True)
        with h5py.File(tmp_path / "lcz_s2" / f"lcz_{split}.h5", "w") as f:
            f["sen2"] = RNG.random((4, 32, 32, 10)).astype("f4")
            f["label"] = np.eye(17)[[0, 3, 16, 2]]
    found = {d.info.name: d for d in datasets.open_suite("copernicus", tmp_path)}
    assert set(found) == {"Cloud-S2", "DFC2020-S1", "DFC2020-S2", "LCZ-S2"}
    assert found["Cloud-S2"].split("val")[0].target.shape == (16, 16)
    mask = found["DFC2020-S2"].split("train")[0].target
    np.testing.assert_array_equal(mask.reshape(-1)[:11], [255, 0, 1, 255, 2, 3, 4, 5, 255, 6, 7])
    assert found["DFC2020-S2"].info.ignore == 255
    (fused,) = datasets.open_suite("copernicus", tmp_path, ["DFC2020-S12"])
    assert set(fused.split("test")[0].images) == {"s1", "s2_l1c"}
    np.testing.assert_array_equal(found["LCZ-S2"].split("train").labels, [0, 3, 16, 2])
    batch = collate(found["LCZ-S2"].info, [found["LCZ-S2"].split("train")[0]], ["s2_l1c"])
    assert 1000 < batch.images["s2_l1c"][..., 1].max() <= 10000


# --- others in their authors' layouts ---


def test_landslide4sense_restores_dn(tmp_path):
    from terrafm_jax.evals.datasets.published import L4S_DIVISORS

    for folder in ("TrainData", "ValidData", "TestData"):
        for kind in ("img", "mask"):
            (tmp_path / folder / kind).mkdir(parents=True)
        dn = np.broadcast_to(np.arange(1, 15) * 1000.0, (128, 128, 14))
        with h5py.File(tmp_path / folder / "img/image_1.h5", "w") as f:
            f["img"] = dn / np.array(L4S_DIVISORS)
        with h5py.File(tmp_path / folder / "mask/mask_1.h5", "w") as f:
            f["mask"] = np.eye(128, dtype=np.uint8)
    (dataset,) = datasets.open_suite("landslide4sense", tmp_path)
    batch = collate(dataset.info, [dataset.split("train")[0]], ["s2_l1c"])
    np.testing.assert_allclose(batch.images["s2_l1c"][0, 0, 0, 1], 2000, rtol=1e-5)
    assert dataset.info.inputs["s2_l1c"].missing == ("B8A",)
    assert dataset.split("test")[0].target.sum() == 128


def test_sen1floods11(tmp_path):
    data, lists = tmp_path / "v1.1/data/flood_events/HandLabeled", tmp_path / "v1.1/splits/flood_handlabeled"
    lists.mkdir(parents=True)
    for split in ("train", "valid", "test"):
        radar = RNG.normal(-12, 2, (16, 16, 2)).astype("f4")
        radar[0, 0] = np.nan
        fake.tiff(data / "S1Hand" / f"Ghana_{split}_S1Hand.tif", radar)
        fake.tiff(data / "S2Hand" / f"Ghana_{split}_S2Hand.tif", fake.planes(RNG, 16, 13))
        fake.tiff(data / "LabelHand" / f"Ghana_{split}_LabelHand.tif", RNG.integers(-1, 2, (16, 16)).astype(np.int16))
        (lists / f"flood_{split}_data.csv").write_text(f"Ghana_{split}_S1Hand.tif,Ghana_{split}_LabelHand.tif\n")
    (dataset,) = datasets.open_suite("sen1floods11", tmp_path)
    batch = collate(dataset.info, [dataset.split("val")[0]], ["s1", "s2_l1c"])
    assert np.isnan(batch.images["s1"][0, 0, 0]).all()
    assert set(np.unique(dataset.split("train")[0].target)) <= {-1, 0, 1}


def test_bigearthnet_v2(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = []
    for split in ("train", "validation", "test"):
        patch, radar = (
            f"S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_{len(rows)}_43",
            f"S1A_IW_GRDH_1SDV_{split}_33UUP_1_2",
        )
        rows.append({"patch_id": patch, "labels": ["Arable land"], "split": split, "s1_name": radar, "country": "x"})
        for i, band in enumerate(S2_L2A.bands):
            side = {10: 12, 20: 6, 60: 2}[band.gsd]
            plane = np.full((side, side), 1000 * (i + 1), np.uint16)
            fake.tiff(tmp_path / "BigEarthNet-S2" / patch.rsplit("_", 2)[0] / patch / f"{patch}_{band.name}.tif", plane)
        for band in S1.bands:
            plane = np.full((12, 12), -12, np.float32)
            fake.tiff(tmp_path / "BigEarthNet-S1" / radar.rsplit("_", 3)[0] / radar / f"{radar}_{band.name}.tif", plane)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    (dataset,) = datasets.open_suite("bigearthnet", tmp_path)
    sample = dataset.split("val")[0]
    assert sample.images["s2_l2a"].shape == (12, 12, 12)
    assert list(band_levels(dataset).values()) == list(range(1, 13))
    np.testing.assert_array_equal(np.nonzero(sample.target)[0], [2])
    next((tmp_path / "BigEarthNet-S2").rglob("*_B04.tif")).unlink()
    with pytest.raises(DatasetError, match=r"missing \['S2A.*_B04.tif'\]"):
        [dataset.split(s)[0] for s in ("train", "val", "test")]


def test_pastis(tmp_path):
    for folder in ("DATA_S2", "DATA_S1A", "ANNOTATIONS"):
        (tmp_path / folder).mkdir()
    features = []
    for patch, fold in ((10000, 1), (10001, 4), (10002, 5)):
        series = np.stack([fake.planes(RNG, 128, 10, t).transpose(2, 0, 1) for t in (0, 100, 800)]).astype(np.int16)
        np.save(tmp_path / f"DATA_S2/S2_{patch}.npy", series)
        np.save(tmp_path / f"DATA_S1A/S1A_{patch}.npy", RNG.normal(-12, 1, (5, 3, 128, 128)).astype(np.float16))
        np.save(tmp_path / f"ANNOTATIONS/TARGET_{patch}.npy", RNG.integers(0, 20, (3, 128, 128)).astype(np.uint8))
        features.append({"type": "Feature", "properties": {"ID_PATCH": patch, "Fold": fold}, "geometry": None})
    (tmp_path / "metadata.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (dataset,) = datasets.open_suite("pastis", tmp_path)
    sample = dataset.split("test")[0]
    assert sample.id == "10002"
    assert sample.images["s2_l2a"].shape == (128, 128, 10)
    assert 2100 <= sample.images["s2_l2a"][..., 1].mean() < 2150  # the median date
    assert set(np.unique(sample.target)) == {-1, *range(19)}
    assert dataset.info.inputs["s2_l2a"].missing == ("B01", "B09")


def test_oscd(tmp_path):
    from PIL import Image

    images = tmp_path / "Onera Satellite Change Detection dataset - Images"
    for word, city in (("Train", "paris"), ("Test", "dubai")):
        for n in (1, 2):
            for i, band in enumerate(labels.S2_13):
                plane = np.full((20, 24), 1000 * (i + 1) + n, np.uint16)
                fake.tiff(images / city / f"imgs_{n}_rect" / f"{band}.tif", plane)
        out = tmp_path / f"Onera Satellite Change Detection dataset - {word} Labels" / city / "cm"
        out.mkdir(parents=True)
        Image.fromarray(np.eye(20, 24, dtype=np.uint8) * 255).save(out / "cm.png")
    (dataset,) = datasets.open_suite("oscd", tmp_path)
    sample = dataset.split("test")[0]
    assert sample.id == "dubai"
    assert sample.after["s2_l1c"][0, 0, 0] - sample.images["s2_l1c"][0, 0, 0] == 1
    assert sample.target.sum() == 20
    assert collate(dataset.info, [sample], ["s2_l1c"], after=True).images["s2_l1c"][0, 0, 0, 8] == 9002


def test_cloudsen12(tmp_path):
    for split, count in (("train", 2), ("test", 1)):
        (tmp_path / split).mkdir()
        for i, band in enumerate(labels.S2_13):
            np.full((count, 512, 512), 1000 * (i + 1), np.int16).tofile(tmp_path / split / f"L1C_{band}.dat")
        np.ones((count, 512, 512), np.int8).tofile(tmp_path / split / "LABEL_manual_hq.dat")
    (dataset,) = datasets.open_suite("cloudsen12", tmp_path)
    assert len(dataset.split("train")) == 2
    assert band_levels(dataset, key="s2_l1c")["B12"] == 13
    assert dataset.split("test")[0].target.mean() == 1
    (tmp_path / "train/L1C_B04.dat").write_bytes(b"00")
    with pytest.raises(DatasetError, match=r"another length than the labels: \['L1C_B04.dat'\]"):
        datasets.open_suite("cloudsen12", tmp_path)


def test_unknown_suites_and_options():
    with pytest.raises(DatasetError, match="suite 'imagenet', expected one of"):
        datasets.open_suite("imagenet", ".")
    with pytest.raises(DatasetError, match=r"options \['bands'\]"):
        datasets.open_suite("copernicus", ".", bands="corrected")
