"""Labelled folders with several faults: each is named by its file, all at once, before anything is learnt from them."""

from __future__ import annotations

import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax.evals import datasets
from terrafm_jax.evals.datasets import faults
from terrafm_jax.evals.datasets.base import Dataset, DatasetError, Sample
from terrafm_jax.evals.datasets.doubts import unseen

rasterio = pytest.importorskip("rasterio")
transform = pytest.importorskip("rasterio.warp").transform
RNG = np.random.default_rng(0)


def open_one(path) -> Dataset:
    (dataset,) = datasets.open_suite("folder", path)
    return dataset


def masked(folder, masks, extra="", classes="classes: [land, water]\n"):
    """A folder of images of 8 px with these masks, all of them in train."""
    for i, mask in enumerate(masks):
        fake.tiff(folder / "img" / f"{i}.tif", fake.planes(RNG, 8, 2))
        if mask is not None:
            fake.tiff(folder / "masks" / f"{i}.tif", mask)
    (folder / "dataset.yaml").write_text(
        f"task: segmentation\nmasks: masks\n{classes}{extra}splits: {{train: 1.0}}\n"
        "inputs: {s2_l2a: {folder: img, bands: [B04, B08]}}\n"
    )
    return open_one(folder).split("train")


def label(value: int, size=(8, 8)) -> np.ndarray:
    return np.full(size, value, np.uint8)


def test_masks_that_are_none_are_named_together(tmp_path):
    train = masked(tmp_path, [label(0), label(7), label(1, (8, 6)), np.zeros((8, 8, 3), np.uint8), None, label(255)])
    assert train[0].target.dtype == np.int64
    with pytest.raises(DatasetError) as caught:
        train[5]
    text = str(caught.value)
    assert text.startswith("5 samples cannot be used: ")
    for part in (
        r"1.tif: labels 7 are no class (0 land, 1 water) and not ignore (-1)", "2.tif: the mask has (8, 6) px",
        "3.tif: 3 bands; a mask has one", "4.tif: not found", "5.tif: labels 255",
    ):  # fmt: skip
        assert part in text
    with pytest.raises(DatasetError, match="5 samples cannot be used"):
        train[1]
    train[0]


def test_rasters_of_a_sample_that_share_no_ground_are_refused(tmp_path):
    """Names may agree where places do not; one beside another, or in another projection, is the same place."""
    train = masked(tmp_path, [label(0)] * 4)
    degrees = [v[0] for v in transform("EPSG:32632", "EPSG:4326", [4e5], [5e6])]
    utm = "EPSG:32632"
    for name, corner, crs in (("1", (4e5 + 80, 5e6), utm), ("2", (4e5 + 70, 5e6), utm), ("3", degrees, "EPSG:4326")):
        step = 10 if crs == utm else 1e-4
        with rasterio.open(fake.tiff(tmp_path / f"masks/{name}.tif", label(0), crs=crs), "r+") as file:
            file.transform = rasterio.Affine(step, 0, corner[0], 0, -step, corner[1])
    assert [train[i].target.shape for i in (0, 2, 3)] == [(8, 8)] * 3
    with pytest.raises(DatasetError, match=r"masks/1.tif: shares no ground with .*img/1.tif \(EPSG:32632 \(400080.0, "):
        train[1]


def test_bands_that_another_file_than_the_first_names_otherwise_are_refused(tmp_path):
    fake.eurosat_like(tmp_path, classes=2, per_class=3, yaml="splits: {train: 1.0}\n")
    (dataset,) = datasets.open_suite("folder", tmp_path)
    names = list(dataset.info.inputs["s2_l2a"].bands)
    fake.tiff(tmp_path / "class_1/class_1_2.tif", fake.planes(RNG, 32, 12), names=names[::-1])
    fake.tiff(tmp_path / "class_1/class_1_1.tif", fake.planes(RNG, 32, 12), names=["x"] * 12)  # junk counts as none
    train = open_one(tmp_path).split("train")
    with pytest.raises(DatasetError, match=r"class_1_2.tif: names its bands \['B12', 'B11', .*declares \['B01'"):
        [train[i] for i in range(len(train))]


def test_labels_that_differ_in_spelling_alone_are_told(tmp_path, caplog):
    table(tmp_path, ["p0.tif,Forest", "p1.tif,forest", "p2.tif,1", "p3.tif,1.0", "p4.tif,2"])
    assert open_one(tmp_path).info.classes == ("1", "1.0", "2", "Forest", "forest")
    assert "are 1 and 1.0, Forest and forest one class?" in caplog.text
    caplog.clear()
    table(tmp_path, ["p0.tif,a", "p1.tif,b"])
    open_one(tmp_path)
    assert "one class" not in caplog.text


def test_labels_that_are_missing_are_no_class(tmp_path):
    rows = ["p0.tif,a", "p1.tif,nan", "p2.tif,b", "p3.tif,NaN"]
    table(tmp_path, rows)
    with pytest.raises(
        DatasetError, match=r"2 images have the label 'nan', .*\['p1.tif', 'p3.tif'\]; leave their rows"
    ):
        open_one(tmp_path)
    table(tmp_path, rows[:3], extra="classes: [a, b, nan]\n")
    assert open_one(tmp_path).info.classes == ("a", "b", "nan")


def test_ignored_and_coarser_masks_are_right(tmp_path):
    train = masked(tmp_path, [label(255), label(1, (4, 4)), label(0, (8, 8)).astype(np.float32)], "ignore: 255\n")
    assert [train[i].target.shape for i in range(3)] == [(8, 8), (4, 4), (8, 8)]
    halves = np.full((8, 8), 0.5, np.float32)
    with pytest.raises(DatasetError, match=r"labels 0\.5 are no class"):
        masked(tmp_path / "halves", [halves])[0]
    with pytest.raises(DatasetError, match="segmentation needs 'classes'"):
        masked(tmp_path / "nameless", [label(0)], classes="")


def test_damaged_images_and_other_bands_are_named_together(tmp_path):
    fake.eurosat_like(tmp_path, classes=2, per_class=9, yaml="splits: {train: 1.0}\n")
    (tmp_path / "class_1/class_1_1.tif").write_bytes(b"II*\0broken")
    fake.tiff(tmp_path / "class_0/class_0_3.tif", fake.planes(RNG, 32, 4))
    train = open_one(tmp_path).split("train")
    with pytest.raises(
        DatasetError, match=r"2 samples cannot be used: .*_0_3.tif: 4 bands, .*declares 12; .*_1_1.tif: c"
    ):
        [train[i] for i in range(18)]


def test_the_search_for_more_ends_early(monkeypatch):
    def read(i: int) -> Sample:
        raise DatasetError(f"{i}.tif: broken")

    with pytest.raises(DatasetError) as caught:
        faults.naming_all(read, 5000)(7)
    assert str(caught.value).startswith(
        "11 samples cannot be used (of 11 looked at, 5000 in all): 7.tif, 0.tif, 1.tif, 2.tif"
    )
    monkeypatch.setattr(faults, "_SECONDS", -1.0)
    with pytest.raises(DatasetError, match=r"^3.tif: broken$"):
        faults.naming_all(read, 5000)(3)


def table(folder, rows, task="multilabel", splits="{train: 1.0}", column="labels", extra=""):
    for i in range(6):
        fake.tiff(folder / f"p{i}.tif", fake.planes(RNG, 8, 2))
    (folder / "labels.csv").write_text(f"file,{column}\n" + "\n".join(rows) + "\n")
    (folder / "dataset.yaml").write_text(
        f"task: {task}\nlabels: labels.csv\nsplits: {splits}\ninputs: {{s2_l2a: {{bands: [B04, B08]}}}}\n{extra}"
    )


def test_rows_without_an_image_and_images_without_a_row_are_told(tmp_path, caplog):
    table(tmp_path, ["p0.tif,a;b", "p1.tif,a", "p2.tif,b", "p3,b", "P4.tif,b", "p5.tif,", "p5.tif,"])
    assert len(open_one(tmp_path).split("train")) == 4
    assert "labels.csv: 2 rows name no image: p3, P4.tif" in caplog.text
    assert "labels.csv: 2 images have no row and are left out: p3.tif, p4.tif" in caplog.text


def test_a_table_that_contradicts_itself_is_refused(tmp_path):
    rows = [f"p{i}.tif,a" for i in range(6)]
    table(tmp_path, [*rows, "p2.tif,b"])
    with pytest.raises(DatasetError, match=r"labels.csv: two values for p2.tif \('a', 'b'\)"):
        open_one(tmp_path)
    table(tmp_path, [*rows[:4], "p4.tif,b", "p5.tif,a;b"], "classification", column="label")
    with pytest.raises(
        DatasetError, match=r"1 images have several labels: p5.tif \['a', 'b'\]; is the task multilabel"
    ):
        open_one(tmp_path)
    table(tmp_path, rows, splits="split.csv")
    (tmp_path / "split.csv").write_text("file,split\np0.tif,train\np1.tif,test\np0.tif,test\n")
    with pytest.raises(DatasetError, match=r"split.csv: two values for .*'train', 'test'"):
        open_one(tmp_path)


def test_images_beside_the_class_folders_are_no_class_of_their_own(tmp_path, caplog):
    folder = fake.eurosat_like(tmp_path / "data", classes=3, per_class=4)
    fake.tiff(folder / "stray.tif", fake.planes(RNG, 32, 12))
    with pytest.raises(DatasetError, match=r"data: 1 images lie in no class folder: stray\.tif"):
        open_one(folder)
    text = (folder / "dataset.yaml").read_text()
    (folder / "dataset.yaml").write_text(text + "classes: [class_0, class_2]\n")
    assert sum(map(len, open_one(folder).splits.values())) == 8
    assert "class folders left out, as they are none of classes: class_1, data" in caplog.text
    (folder / "dataset.yaml").write_text(text + "classes: [class_0, class_1, class_0]\n")
    with pytest.raises(DatasetError, match="classes name class_0 twice"):
        open_one(folder)
    (folder / "dataset.yaml").write_text(text.replace("bands:", "suffix: _S2.tif, bands:"))
    with pytest.raises(DatasetError, match=r"no .tif below it whose name ends in '_S2.tif' \(inputs.s2_l2a.suffix\)"):
        open_one(folder)


def test_classes_that_train_lacks_are_told(tmp_path):
    fake.eurosat_like(tmp_path, classes=3, per_class=4, yaml="splits: split.csv\n")
    rows = [f"class_{c}_{i}.tif,{'test' if c == 2 else ('train', 'val')[i % 2]}" for c in range(3) for i in range(4)]
    (tmp_path / "split.csv").write_text("file,split\n" + "\n".join(rows) + "\n")
    dataset = open_one(tmp_path)
    (text,) = unseen(dataset.info.name, dataset.info.classes, dataset.splits)
    assert "train has no sample of class_2 (4 in test)" in text
    assert unseen("x", dataset.info.classes, {k: dataset.splits[k] for k in ("train", "val")}) == []
    alone = dataset.splits["test"]
    assert unseen("x", dataset.info.classes, {"train": alone}) == [
        "x: all samples of train are class_2: scores say nothing"
    ]
    several = dataset.splits["test"].subset([0])
    several.labels = np.array([[True, False, True]])
    assert "class_0 (1 in val), class_2" in unseen("x", ("class_0", "class_1", "class_2"), {
        "train": _labels(several, [[False, True, False]]), "val": several,
    })[0]  # fmt: skip


def _labels(split, rows):
    found = split.subset([0])
    found.labels = np.array(rows)
    return found
