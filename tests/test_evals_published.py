"""Copernicus-Bench and authors' layouts on small files in exactly the published formats, written here."""

from __future__ import annotations

import json

import labelled_fake as fake
import numpy as np
import pytest
from labelled_fake import band_levels

from terrafm_jax.evals import datasets
from terrafm_jax.evals.datasets import labels
from terrafm_jax.evals.datasets.base import (
    DatasetError,
    collate,
)
from terrafm_jax.sensors import S1, S2_L2A

pytest.importorskip("rasterio")
h5py = pytest.importorskip("h5py")
RNG = np.random.default_rng(0)


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
    fake.hole(tmp_path.rglob("*.tif"))
    for dataset in (*found.values(), fused):
        for key in dataset.info.inputs:
            assert np.argwhere(~fake.measured(dataset, "train", key)).tolist() == [[0, 0]], (dataset.info.name, key)
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
    fake.hole(p for folder in ("s2_toa", "s1", "s2") for p in tmp_path.rglob(f"{folder}/*.tif"))
    for name, key in (("Cloud-S2", "s2_l1c"), ("DFC2020-S1", "s1"), ("DFC2020-S2", "s2_l1c")):
        assert np.argwhere(~fake.measured(found[name], "train", key)).tolist() == [[0, 0]], name


# --- others in their authors' layouts ---


def test_landslide4sense_restores_dn(tmp_path):
    from terrafm_jax.evals.datasets.layouts import L4S_DIVISORS

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
    fake.hole((data / "S2Hand").glob("*.tif"))
    fake.hole((data / "S2Hand").glob("*.tif"), 11, (0, 1))  # B10, which the model does not see
    assert np.argwhere(~fake.measured(dataset, "val", "s2_l1c")).tolist() == [[0, 0]]


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
    fake.hole([*tmp_path.rglob("*_B08.tif"), *tmp_path.rglob("*_VH.tif")])
    fake.hole(tmp_path.rglob("*_B05.tif"))  # of 20 m: four pixels of 10 m
    assert np.argwhere(~fake.measured(dataset, "train", "s1")).tolist() == [[0, 0]]
    assert np.argwhere(~fake.measured(dataset, "train", "s2_l2a")).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
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
    fake.hole(tmp_path.rglob("imgs_2_rect/B12.tif"))
    fake.hole(tmp_path.rglob("imgs_1_rect/B10.tif"))  # which the model does not see
    assert fake.measured(dataset, "test", "s2_l1c").all()
    assert np.argwhere(~fake.measured(dataset, "test", "s2_l1c", after=True)).tolist() == [[0, 0]]


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
