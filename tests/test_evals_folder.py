"""The folder reader (class folders, masks, tables, tags, several sensors, splits) and TFDS data sets."""

from __future__ import annotations

import json

import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax.evals import datasets
from terrafm_jax.evals.datasets import labels
from terrafm_jax.evals.datasets.base import SPLITS, DatasetError, collate
from terrafm_jax.evals.datasets.shares import random_splits

pytest.importorskip("rasterio")
RNG = np.random.default_rng(0)


def open_one(path):
    (dataset,) = datasets.open_suite("folder", path)
    return dataset


def test_class_folders_are_split_by_share(tmp_path):
    folder = fake.eurosat_like(tmp_path / "tiny", per_class=6)
    (folder / "class_0/._class_0_0.tif").write_bytes(b"\0\5\x16\7 left by macOS")
    dataset = open_one(folder)
    assert dataset.info.classes == ("class_0", "class_1", "class_2")
    assert {k: len(v) for k, v in dataset.splits.items()} == {"train": 9, "val": 3, "test": 6}
    np.testing.assert_array_equal(np.bincount(dataset.split("test").labels), [2, 2, 2])
    assert len(set().union(*(dataset.split(s).ids for s in dataset.splits))) == 18
    assert dataset.split("train")[0].images["s2_l2a"].shape == (32, 32, 12)


def test_a_share_of_nothing_is_no_split(tmp_path):
    """It was an empty one, at which evaluation, and pretraining that evaluates, failed."""
    dataset = open_one(fake.eurosat_like(tmp_path, yaml="splits: {train: 0.8, val: 0.0, test: 0.2}\n"))
    assert list(dataset.splits) == ["train", "test"]


@pytest.mark.parametrize(
    ("classes", "per_class", "shares", "counts"),
    [
        (10, 12, (0.6, 0.2, 0.2), (72, 24, 24)),
        (3, 6, (0.5, 0.17, 0.33), (9, 3, 6)),
        (7, 3, (0.6, 0.2, 0.2), (13, 4, 4)),
        (4, 1, (0.6, 0.2, 0.2), (4, 0, 0)),  # a class that was not trained on cannot be tested
        (2, 5, (0.0, 0.5, 0.5), (0, 5, 5)),
    ],
)
def test_random_splits_have_the_shares_asked_for(classes, per_class, shares, counts):
    labels = np.repeat(np.arange(classes), per_class)
    found = random_splits(len(labels), labels, dict(zip(SPLITS, shares, strict=True)), 0)
    assert tuple(len(found[name]) for name in SPLITS) == counts
    assert sorted(i for rows in found.values() for i in rows) == list(range(len(labels)))
    for name, share in zip(SPLITS, shares, strict=True):  # and each class, to the next whole image
        each = np.bincount(labels[found[name]], minlength=classes)
        assert np.all(np.abs(each - share * per_class) < 1)


@pytest.mark.parametrize(
    ("key", "dtype", "nodata", "gone"),
    [("s1", "float32", -9999, 3), ("s1", "float32", 0, 3), ("s2_l2a", "int16", -9999, 3),
     ("s2_l2a", "uint16", 65535, 3), ("s2_l2a", "uint16", 0, 1)],  # zero in one band is dark
)  # fmt: skip
def test_nodata_that_a_raster_declares_is_not_measured(tmp_path, key, dtype, nodata, gone):
    rasterio = pytest.importorskip("rasterio")
    bands = {"s1": ("VV", "VH"), "s2_l2a": ("B02", "B03")}[key]
    image = RNG.integers(5, 20, (16, 16, 2)).astype(dtype) if dtype != "float32" else RNG.normal(-12, 3, (16, 16, 2))
    image = image.astype(dtype)
    image[0, 0], image[0, 1, 0], image[0, 2, 1] = nodata, nodata, nodata
    for i, name in enumerate("aabb"):
        with rasterio.open(fake.tiff(tmp_path / name / f"{i}.tif", image), "r+") as file:
            file.nodata = nodata
    (tmp_path / "dataset.yaml").write_text(f"inputs: {{{key}: {{bands: [{', '.join(bands)}]}}}}\n")
    dataset = open_one(tmp_path)
    found = collate(dataset.info, [dataset.split("train")[0]], [key]).images[key][0][..., dataset.info.inputs[key].mask]
    missing = np.isnan(found).all(-1)
    assert missing.sum() == gone
    assert missing[0, :gone].all()
    np.testing.assert_array_equal(found[1:], image[1:].astype(np.float32))


def test_the_mask_inside_a_file_hides_its_pixels(tmp_path):
    rasterio = pytest.importorskip("rasterio")
    mask = np.full((16, 16), 255, np.uint8)
    mask[:4] = 0
    for i, name in enumerate("aabb"):
        file = fake.tiff(tmp_path / name / f"{i}.tif", RNG.integers(200, 3000, (16, 16, 2)).astype(np.uint16))
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(file, "r+") as opened:
            opened.write_mask(mask)
    (tmp_path / "dataset.yaml").write_text("inputs: {s2_l2a: {bands: [B02, B03]}}\n")
    image = open_one(tmp_path).split("train")[0].images["s2_l2a"]
    np.testing.assert_array_equal(np.isnan(image).all(-1), mask == 0)
    np.testing.assert_array_equal(np.isnan(image).any(-1), mask == 0)


def test_complex_radar_is_not_taken_for_its_real_part(tmp_path):
    image = (RNG.normal(-12, 3, (16, 16, 2)) + 0j).astype(np.complex64)
    for i, name in enumerate("aabb"):
        fake.tiff(tmp_path / name / f"{i}.tif", image)
    (tmp_path / "dataset.yaml").write_text("inputs: {s1: {bands: [VV, VH]}}\n")
    with pytest.raises(DatasetError, match=r"complex values \(SLC\)"):
        open_one(tmp_path).split("train")[0]


def test_a_table_of_splits_that_is_not_named_is_said_to_be_ignored(tmp_path, caplog):
    fake.eurosat_like(tmp_path, classes=2, per_class=4, yaml="task: classification\n")
    open_one(tmp_path)
    assert not caplog.records
    (tmp_path / "split.csv").write_text("file,split\n")
    open_one(tmp_path)
    assert "split.csv is ignored and splits are drawn at random; to use it say splits: split.csv" in caplog.text


def test_thirteen_bands_are_level_1c(tmp_path):
    fake.tiff(tmp_path / "a" / "x.tif", fake.planes(RNG, 8, 13))
    (tmp_path / "dataset.yaml").write_text(f"inputs:\n  s2_l2a: {{bands: [{', '.join(labels.S2_12)}]}}\n")
    with pytest.raises(DatasetError, match=r"13 bands, .*dataset.yaml declares 12; thirteen bands.*sensor s2_l1c"):
        open_one(tmp_path)


def test_two_sensors_masks_and_suffixes(tmp_path):
    for i in range(4):
        fake.tiff(tmp_path / "S1" / f"chip{i}_S1Hand.tif", RNG.normal(-12, 1, (8, 8, 2)).astype("f4"))
        fake.tiff(tmp_path / "S2" / f"chip{i}_S2Hand.tif", fake.planes(RNG, 8, 13))
        fake.tiff(tmp_path / "Label" / f"chip{i}_LabelHand.tif", np.full((8, 8), i % 2, np.int16))
    (tmp_path / "dataset.yaml").write_text(
        "name: floods\ntask: segmentation\nclasses: [dry, water]\nmasks: Label\nmask_suffix: _LabelHand.tif\n"
        "inputs:\n  s1: {folder: S1, suffix: _S1Hand.tif, bands: [VV, VH], unit: dB}\n"
        f"  s2_l1c: {{folder: S2, suffix: _S2Hand.tif, bands: [{', '.join(labels.S2_13)}]}}\n"
        "splits: {train: 0.5, test: 0.5}\n"
    )
    dataset = open_one(tmp_path)
    sample = dataset.split("train")[0]
    assert set(sample.images) == {"s1", "s2_l1c"}
    assert sample.target.shape == (8, 8)
    assert sample.id in {f"chip{i}" for i in range(4)}
    assert collate(dataset.info, [sample], ["s1", "s2_l1c"]).images["s2_l1c"].shape == (1, 8, 8, 12)


def test_masks_below_the_images_are_no_images(tmp_path):
    for i in range(5):
        fake.tiff(tmp_path / "north" / f"s{i}.tif", fake.planes(RNG, 16, 2))
        fake.tiff(tmp_path / "masks" / "north" / f"s{i}_mask.tif", np.full((16, 16), i % 2, np.uint8))
    (tmp_path / "dataset.yaml").write_text(
        "task: segmentation\nclasses: [dry, water]\nmasks: masks\nmask_suffix: _mask.tif\nsplits: {test: 1.0}\n"
        "inputs:\n  s2_l2a: {bands: [B02, B03], unit: DN, suffix: .tif}\n"
    )
    test = open_one(tmp_path).split("test")
    assert len(test) == 5
    assert [int(test[i].target[0, 0]) for i in range(5)] == [0, 1, 0, 1, 0]


def test_tables_tags_and_regression(tmp_path):
    for i in range(4):
        fake.tiff(tmp_path / f"p{i}.tif", fake.planes(RNG, 8, 2), tags={"LABELS": json.dumps(["a", "b"][: 1 + i % 2])})
    base = "inputs:\n  s2_l2a: {bands: [B04, B08]}\nsplits: {train: 0.5, test: 0.5}\n"
    yaml = tmp_path / "dataset.yaml"
    yaml.write_text(base + "task: multilabel\nlabels: {tag: LABELS}\n")
    found = open_one(tmp_path)
    assert found.info.classes == ("a", "b")
    assert sorted(s.target.sum() for k in found.splits for s in [found.split(k)[i] for i in range(2)]) == [1, 1, 2, 2]
    (tmp_path / "t.csv").write_text("file,value\np0.tif,1.5\np1.tif,2.5\np3.tif,-1\nnone.tif,9\n")
    yaml.write_text(base + "task: regression\nlabels: t.csv\nunit: t/ha\n")
    found = open_one(yaml)
    assert sorted(float(v) for k in found.splits for v in found.split(k).labels) == [-1, 1.5, 2.5]
    (tmp_path / "t.csv").write_text("file,labels\np0.tif,a; b\np1.tif,c\n")
    yaml.write_text(base + "task: multilabel\nlabels: t.csv\nclasses: [a, b]\n")
    with pytest.raises(DatasetError, match=r"labels \['c'\] are none of the classes \['a', 'b'\]"):
        open_one(tmp_path)


@pytest.mark.parametrize(
    ("task", "table", "message"),
    [
        ("regression", "file,value\np0.tif,1.5\np1.tif,much\n", "p1.tif: value 'much', expected a number"),
        ("regression", "file,value\np0.tif,1.5\np1.tif,nan\n", "p1.tif: value 'nan', expected a number"),
        ("classification", "file,label\np0.tif,a\np1.tif,\n", r"1 images have no label: \['p1.tif'\]"),
        ("multilabel", "", r"p0.tif: tag 'AREA' = '\[1' is not JSON"),
    ],
)
def test_labels_that_are_none_name_their_image(tmp_path, task, table, message):
    for i in range(2):
        fake.tiff(tmp_path / f"p{i}.tif", fake.planes(RNG, 8, 2), tags={"AREA": "[1"})
    (tmp_path / "t.csv").write_text(table)
    labels = "t.csv" if table else "{tag: AREA}"
    base = "inputs:\n  s2_l2a: {bands: [B04, B08]}\nsplits: {train: 0.5, test: 0.5}\n"
    (tmp_path / "dataset.yaml").write_text(f"{base}task: {task}\nlabels: {labels}\n")
    with pytest.raises(DatasetError, match=message):
        open_one(tmp_path)


@pytest.fixture
def twins(tmp_path):
    """Six images of three names, in folders of two names below two others."""
    for place in ("a/x/0.tif", "b/x/0.tif", "a/x/1.tif", "b/x/1.tif", "a/y/2.tif", "b/y/2.tif"):
        fake.tiff(tmp_path / place, fake.planes(RNG, 8, 2))
    base = "inputs:\n  s2_l2a: {bands: [B04, B08]}\ntask: regression\nlabels: t.csv\nsplits: {test: 1.0}\n"
    (tmp_path / "dataset.yaml").write_text(base)
    return tmp_path


@pytest.mark.parametrize("prefix", ["", "./", "/elsewhere/data/", "data/"])
def test_images_of_one_name_are_told_apart_by_their_folders(twins, prefix):
    values = {"a/x/0.tif": 1.0, "b/x/0.tif": 2.0, "b/y/2.tif": 3.0, "a/x/1.tif": 4.0}
    rows = "".join(f"{prefix}{name},{value}\n" for name, value in values.items())
    (twins / "t.csv").write_text(f"file,value\n{rows}elsewhere/x/1.tif,5\nc/3.tif,6\n")
    test = open_one(twins).split("test")
    assert {test.ids[i]: test[i].target for i in range(len(test))} == values


def test_a_name_of_several_images_is_refused(twins):
    (twins / "t.csv").write_text("file,value\nx/0.tif,1\n")
    with pytest.raises(DatasetError, match=r"'x/0.tif' names 2 images: .*a/x/0.tif, .*b/x/0.tif; say which"):
        open_one(twins)


def test_a_table_says_one_thing_of_an_image(twins):
    (twins / "t.csv").write_text("file,value\na/x/0.tif,1\na/x/0.tif,1\nb/x/0.tif,2\n")
    assert len(open_one(twins).split("test")) == 2
    (twins / "t.csv").write_text("file,value\na/x/0.tif,1\n/data/a/x/0.tif,2\n")
    with pytest.raises(DatasetError, match=r"t.csv: two values for /data/a/x/0.tif \('1', '2'\)"):
        open_one(twins)


def test_an_image_in_two_splits_is_refused(tmp_path):
    """It would be tested on itself."""
    fake.eurosat_like(tmp_path, classes=2, per_class=3, yaml="splits: split.csv\n")
    rows = ["class_0/class_0_1.tif,train", "class_1/class_1_1.tif,test", "class_0_1.tif,test"]
    (tmp_path / "split.csv").write_text("file,split\n" + "\n".join(rows) + "\n")
    with pytest.raises(DatasetError, match=r"two values for class_0_1.tif \('train', 'test'\)"):
        open_one(tmp_path)


def test_splits_from_a_table_with_foreign_prefixes(tmp_path):
    fake.eurosat_like(tmp_path, classes=2, per_class=3, yaml="splits: split.csv\n")
    rows = [
        f"elsewhere/tiny/class_{c}/class_{c}_{i}.tif,{s}"
        for c in (0, 1)
        for i, s in enumerate(("train", "valid", "test"))
    ]
    (tmp_path / "split.csv").write_text("file,split\n" + "\n".join(rows) + "\n")
    dataset = open_one(tmp_path)
    assert dataset.split("val").ids == ["class_0/class_0_1.tif", "class_1/class_1_1.tif"]


def test_change_pairs(tmp_path):
    for name in ("before", "after"):
        fake.tiff(tmp_path / name / "x.tif", fake.planes(RNG, 8, 2, 5 if name == "after" else 0))
    fake.tiff(tmp_path / "cm" / "x.tif", np.eye(8, dtype=np.uint8))
    (tmp_path / "dataset.yaml").write_text(
        "task: change\nclasses: ['no', 'yes']\nmasks: cm\nsplits: {test: 1.0}\n"
        "inputs: {s2_l2a: {folder: before, after: after, bands: [B04, B08]}}\n"
    )
    sample = open_one(tmp_path).split("test")[0]
    assert sample.after["s2_l2a"].mean() > sample.images["s2_l2a"].mean()
    assert sample.target.sum() == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inputs: [", "not valid YAML"),
        ("name: x", "dataset.yaml: names no inputs"),
        ("input: {s2_l2a: {bands: [B04]}}", r"dataset.yaml: unknown field 'input', did you mean 'inputs'\?$"),
        ("inputs: {s2_l2a: {bands: [B04, B08], offset: '0'}}", r"inputs.s2_l2a.offset = '0', expected a number$"),
        ("inputs: {s2_l2a: {bands: [B04, B08], units: DN}}", r"'inputs.s2_l2a.units', did you mean 'unit'\?$"),
        ("inputs: {s2_l2a: {bands: [B04, B08], unit: dB}}", r"unit 'dB', expected one of \['DN', 'reflectance'\]"),
        ("inputs: {s2_l2a: {bands: [B04, B10]}}", r"s2_l2a: unknown bands \['B10'\], B10 means .* s2_l1c in \['B04'"),
        ("inputs: {s2_l2a: {bands: [B04, B04]}}", r"s2_l2a: repeated bands \['B04'\] in"),
        (
            "inputs: {s2_l2a: {bands: [B04], colour: 1}}\ntaks: x",
            r"unknown field 'taks', did you mean 'task'\?; unknown field 'inputs.s2_l2a.colour', expected .*'ban",
        ),
        ("inputs: {s2_l2a: {bands: [B04]}}\ntask: detection", "task 'detection'"),
        ("inputs: {s2_l2a: {bands: [B04, B08]}}\ntask: segmentation", "needs 'masks'"),
        ("inputs: {landsat: {bands: [B04]}}", "sensor 'landsat' cannot be evaluated"),
        ("inputs: {s2_l2a: {bands: [B04]}}", "2 bands, .*dataset.yaml declares 1"),
        ("inputs: {s2_l2a: {bands: [B08, B04]}}", r"names its bands \['B04', 'B08'\]"),
        ("inputs: {s2_l2a: {bands: [B04, B08]}}\nsplits: {train: 0.9}", "sum to 1"),
        ("inputs: {s2_l2a: {bands: [B04, B08]}}\nsplits: {train: much, test: 0.1}", "dataset.yaml: splits .*'much'"),
        ("inputs: {s2_l2a: {bands: [B04, B08]}}\nsplits:", "splits = None, expected text or a mapping"),
        ("inputs: {s2_l2a: {bands: [B04, B08]}}\nclasses: [no, yes]", "classes hold yes or no.*: quote them"),
        ("inputs: {s2_l2a: {bands: [B04, B98]}}", r"dataset.yaml: inputs: s2_l2a: unknown bands \['B98'\]"),
        ("inputs: {s2_l2a: {unit: DN}}", "dataset.yaml: inputs.s2_l2a needs 'bands'$"),
        ("inputs: {s2_l2a: {bands: [B04, B08], offset: }}", r"inputs.s2_l2a.offset = None, expected a number$"),
        ("inputs: {s2_l2a: 3}", "inputs.s2_l2a is no mapping"),
        ("inputs: {s2_l2a: {bands: [B04, B08]}}\nroot: nowhere", "nowhere: not found"),
    ],
)
def test_bad_descriptions_are_one_clear_error(tmp_path, text, message):
    for c in ("a", "b"):
        fake.tiff(tmp_path / c / "x.tif", fake.planes(RNG, 8, 2), names=("B04", "B08"))
    (tmp_path / "dataset.yaml").write_text(text)
    with pytest.raises(DatasetError, match=message):
        open_one(tmp_path)


def test_missing_description_shows_an_example(tmp_path):
    with pytest.raises(DatasetError, match=r"dataset.yaml: not found. Say there"):
        open_one(tmp_path)


def test_damaged_image_is_named(tmp_path):
    fake.eurosat_like(tmp_path, classes=2, per_class=2, yaml="splits: {train: 1.0}\n")
    (tmp_path / "class_1/class_1_1.tif").write_bytes(b"II*\0broken")
    dataset = open_one(tmp_path)
    with pytest.raises(DatasetError, match=r"class_1_1.tif: cannot be read as a raster"):
        [dataset.split("train")[i] for i in range(4)]


# --- TFDS ---


def write_tfds(root, name, features, records):
    """A prepared TFDS data set in ArrayRecord format, written without TensorFlow."""
    import tensorflow_datasets as tfds
    from array_record.python import array_record_module

    folder = root / name / "1.0.0"
    folder.mkdir(parents=True)
    template = tfds.core.ShardedFileTemplate(
        dataset_name=name.split("/")[0], data_dir=folder, split="train", filetype_suffix="array_record"
    )
    splits = []
    for split, rows in records.items():
        template = template.replace(split=split)
        path = folder / f"{name.split('/')[0]}-{split}.array_record-00000-of-00001"
        writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
        for row in rows:
            writer.write(features.serialize_example(features.encode_example(row)))
        writer.close()
        splits.append(
            tfds.core.SplitInfo(name=split, shard_lengths=[len(rows)], num_bytes=1, filename_template=template)
        )
    tfds.folder_dataset.write_metadata(data_dir=str(folder), features=features, split_infos=splits, check_data=False)


def test_tfds_shards_in_another_format_are_refused(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    f = tfds.features
    features = f.FeaturesDict({"label": f.ClassLabel(names=["a", "b"])})
    write_tfds(tmp_path, "eurosat/all", features, {"train": [{"label": 0}]})
    (info,) = (tmp_path / "eurosat" / "all").glob("*/dataset_info.json")
    found = json.loads(info.read_text())
    info.write_text(json.dumps(found | {"fileFormat": "tfrecord"}))
    with pytest.raises(datasets.DatasetError, match="not ArrayRecord"):
        datasets.open_suite("tfds", tmp_path, ("eurosat/all",))


def test_tfds_data_sets(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    f = tfds.features
    features = f.FeaturesDict(
        {"sentinel2": f.Tensor(shape=(64, 64, 13), dtype=np.float32), "label": f.ClassLabel(names=list(labels.EUROSAT))}
    )
    rows = [{"sentinel2": fake.planes(RNG, 64, 13).astype("f4"), "label": i % 10} for i in range(10)]
    write_tfds(tmp_path, "eurosat/all", features, {"train": rows})
    features = f.FeaturesDict(
        {
            "sentinel1": f.Tensor(shape=(32, 32, 8), dtype=np.float32),
            "sentinel2": f.Tensor(shape=(32, 32, 10), dtype=np.float32),
            "label": f.ClassLabel(names=list(labels.LCZ)),
        }
    )
    row = {"sentinel1": np.full((32, 32, 8), 0.01, "f4"), "sentinel2": np.full((32, 32, 10), 0.3, "f4"), "label": 4}
    write_tfds(tmp_path, "so2sat/all", features, {"train": [row] * 5, "validation": [row] * 2})
    bands = {
        b.name: f.Tensor(shape=(120 * 10 // b.gsd,) * 2, dtype=np.float32)
        for b in datasets.base.SENSORS["s2_l2a"].bands
    }
    features = f.FeaturesDict({**bands, "labels": f.Sequence(f.ClassLabel(num_classes=43))})
    row = {k: np.full(v.shape, 7.0, np.float32) for k, v in bands.items()} | {"labels": [2, 42]}
    write_tfds(tmp_path, "bigearthnet/all", features, {"train": [row] * 5})
    found = {d.info.name: d for d in datasets.open_suite("tfds", tmp_path, seed=3)}
    eurosat = found["tfds-eurosat/all"]
    assert {k: len(v) for k, v in eurosat.splits.items()} == {"train": 6, "val": 2, "test": 2}
    assert "seed 3" in eurosat.info.note
    batch = collate(eurosat.info, [eurosat.split("train")[0]], ["s2_l1c"])
    assert int(batch.images["s2_l1c"][0, 0, 0, 8] // 1000) == 13
    so2sat = found["tfds-so2sat/all"]
    assert {k: len(v) for k, v in so2sat.splits.items()} == {"train": 4, "val": 1, "test": 2}
    batch = collate(so2sat.info, [so2sat.split("test")[0]], ["s1", "s2_l1c"])
    np.testing.assert_allclose(batch.images["s1"][0, 0, 0], [-20, -20], atol=1e-4)
    assert batch.images["s2_l1c"][0, 0, 0, 1] == pytest.approx(3000)
    sample = found["tfds-bigearthnet/all"].split("train")[0]
    assert sample.images["s2_l2a"].shape == (120, 120, 12)
    np.testing.assert_array_equal(np.nonzero(sample.target)[0], [2, 42])
    with pytest.raises(DatasetError, match=r"no <version>/dataset_info\.json"):
        datasets.open_suite("tfds", tmp_path / "so2sat", ["eurosat/all"])
