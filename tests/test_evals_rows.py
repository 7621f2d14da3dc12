"""Rows of an evaluation: resumed, cut short, failed, of earlier calls; and the report that is made of them."""

from __future__ import annotations

import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax.evals import charts, report
from terrafm_jax.evals.datasets.base import Dataset, DatasetInfo, Input, Sample, Split
from terrafm_jax.evals.session import Session, Settings

pytest.importorskip("sklearn")
pytest.importorskip("rasterio")


def settings(tmp_path, **overrides) -> Settings:
    values = {"checkpoints": ("raw", "second=raw"), "suite": "folder", "data": str(tmp_path / "tiny"), "image_size": 32,
              "out": str(tmp_path / "out"), "protocols": ("torchgeo-bench-knn5",), "resamples": 50}  # fmt: skip
    return Settings(**{**values, **overrides})


def test_session_writes_resumes_and_compares(tmp_path):
    fake.eurosat_like(tmp_path / "tiny", per_class=8)
    said: list[str] = []
    rows = Session(settings(tmp_path, fractions=(0.5, 1.0), seeds=2), say=said.append).run()
    assert len(rows) == 3
    out = tmp_path / "out"
    text = (out / "results.md").read_text()
    assert "## torchgeo-bench-knn5/1, 100 % of the train labels" in text
    assert "(n=2)" in text
    assert "- tiny: 12 train, 4 val, 8 test samples" in text
    assert any("50 % of the train labels, draw 1: top1" in line for line in said)
    assert (out / "figures/scores.png").stat().st_size > 5000
    assert len(list((out / "figures").glob("confusion-*.png"))) == 1
    assert next(r for r in rows if r["fraction"] == 1)["metrics"]["top1"]["value"] > 0.6
    said.clear()
    again = Session(settings(tmp_path, fractions=(0.5, 1.0), seeds=2), say=said.append).run()
    assert len(again) == 3
    assert all("already there" in s for s in said)
    assert len((out / "results.jsonl").read_text().splitlines()) == 3


def test_a_row_cut_short_costs_no_other(tmp_path):
    fake.eurosat_like(tmp_path / "tiny", per_class=8)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").write_text('{"key": "a", "mo')
    (row,) = Session(settings(tmp_path, checkpoints=("raw",), figures=False), say=lambda text: None).run()
    assert row["protocol"] == "torchgeo-bench-knn5/1"


def test_mistakes_of_an_earlier_call_are_named_by_its_classes(tmp_path, monkeypatch):
    """A class that the data set has lost since is no reason to fail."""
    shown = []
    monkeypatch.setattr(charts, "error_sheet", lambda info, samples, path, title: shown.extend(t for _, t in samples))
    ids, labels = list("012345"), np.array([0, 1] * 3)
    split = Split(ids, lambda i: Sample(ids[i], {}, labels[i]), labels)
    info = DatasetInfo("pair", "classification", ("a", "b"), {"s1": Input("s1", ("VV", "VH"))})
    fewer = Dataset(info, {"test": split})
    row = {
        "dataset": "pair", "model": "m", "protocol": "p/1", "task": "classification", "classes": ["a", "b", "c"],
        "settings": {},
    }  # fmt: skip
    Session(settings(tmp_path))._errors(row, fewer, np.full(len(ids), 2), labels, ids, "name")
    assert set(shown) == {"a\n→ c", "b\n→ c"}


def test_rows_of_windows_and_of_whole_images_lie_in_one_folder(tmp_path):
    """The pictures of the first run's windows cannot be drawn from whole images any more; the tables have both."""
    rng = np.random.default_rng(0)
    for i in range(6):
        fake.tiff(tmp_path / f"tiny/images/{i}.tif", rng.normal(-12, 3, (64, 64, 2)).astype(np.float32))
        fake.tiff(tmp_path / f"tiny/masks/{i}.tif", rng.integers(0, 2, (64, 64), np.uint8))
    (tmp_path / "tiny/dataset.yaml").write_text(
        "task: segmentation\nclasses: [dry, water]\nmasks: masks\n"
        "inputs: {s1: {bands: [VV, VH], folder: images}}\nsplits: {train: 0.5, test: 0.5}\n"
    )
    how = {"checkpoints": ("raw",), "protocols": ("segmentation-linear",), "runs": 1, "epochs": 1}
    for tile, count in ((32, 1), (0, 2)):
        rows = Session(settings(tmp_path, tile=tile, **how), say=lambda text: None).run()
        assert [r.get("error") for r in rows] == [None] * count


def test_notes_name_their_data_set_once(tmp_path):
    fake.eurosat_like(tmp_path / "tiny", classes=3, per_class=4, yaml="splits: split.csv\n")
    rows = [f"class_{c}_{i}.tif,{'test' if c == 2 else ('train', 'val')[i % 2]}" for c in range(3) for i in range(4)]
    (tmp_path / "tiny" / "split.csv").write_text("file,split\n" + "\n".join(rows) + "\n")
    said: list[str] = []
    Session(settings(tmp_path, figures=False), say=said.append).run()
    assert any(line.startswith("WARNING tiny: train has no sample of class_2") for line in said)
    assert "\n- tiny: train has no sample of class_2" in (tmp_path / "out" / "results.md").read_text()


@pytest.mark.parametrize("spelling", ["license", "licence"])
def test_unit_and_license_stand_in_the_results(tmp_path, spelling):
    folder = tmp_path / "tiny"
    for i in range(20):
        fake.tiff(folder / f"p{i}.tif", fake.planes(np.random.default_rng(i), 8, 2))
    (folder / "t.csv").write_text("file,value\n" + "".join(f"p{i}.tif,{i}\n" for i in range(20)))
    inputs = "inputs:\n  s2_l2a: {bands: [B04, B08]}\n"
    (folder / "dataset.yaml").write_text(
        f"{inputs}task: regression\nlabels: t.csv\nunit: t/ha\n{spelling}: CC-BY-4.0\n"
    )
    how = {"checkpoints": ("raw",), "protocols": ("galileo-linear",), "runs": 1, "epochs": 1, "figures": False}
    (row,) = Session(settings(tmp_path, **how), say=lambda text: None).run()
    assert (row["unit"], row["license"]) == ("t/ha", "CC-BY-4.0"), row.get("error")
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| tiny (rmse in t/ha) |" in text
    assert "\n- tiny: license of the data: CC-BY-4.0\n" in text


def test_a_failing_data_set_does_not_stop_the_others(tmp_path):
    fake.eurosat_like(tmp_path / "tiny", per_class=8)
    (tmp_path / "tiny/class_1/class_1_3.tif").write_bytes(b"broken")
    said: list[str] = []
    rows = Session(settings(tmp_path, checkpoints=("raw",)), say=said.append).run()
    assert ["class_1_3.tif: cannot be read as a raster" in r.get("error", "") for r in rows] == [True]
    assert "## Failed" in (tmp_path / "out/results.md").read_text()
    fake.eurosat_like(tmp_path / "tiny", per_class=8)
    rows = Session(settings(tmp_path, checkpoints=("raw",)), say=said.append).run()  # mended: the row is computed now
    assert any("error" not in r for r in rows)
    assert "## Failed" not in (tmp_path / "out/results.md").read_text()


def test_only_what_still_fails_is_told():
    what = {"model": "m", "dataset": "d", "inputs": ["s1"], "fraction": 1.0, "shots": 0, "seed": 0}
    knn, probe = {**what, "protocol": "galileo-knn20"}, {**what, "protocol": "galileo-linear"}
    early = {"model": "m", "dataset": "d", "inputs": [], "protocol": "", "error": "no input"}
    errors = [{**knn, "error": "first"}, {**knn, "error": "second"}, {**probe, "error": "third"}, early]
    assert [r["error"] for r in report.failures(errors)] == ["second", "third", "no input"]
    rows = [*errors, {**knn, "protocol": "galileo-knn20/1"}]
    assert [r["error"] for r in report.failures(rows)] == ["third"]
    assert [r["error"] for r in report.failures([*rows, {**knn, "shots": 5, "error": "x"}])] == ["third", "x"]


def test_one_percent_partitions_stand_beside_published_one_percent(tmp_path):
    from terrafm_jax.evals.datasets import geobench as gb

    labels = [0, 1, 2, 0, 1, 2, 0, 1, 2]
    fake.geobench(tmp_path / "gb", "m-eurosat", "classification_v1.0", gb._S2_13, labels)
    found = settings(tmp_path, checkpoints=("raw",), suite="geobench", data=str(tmp_path / "gb"),
                     protocols=("galileo-knn20",), options={"partition": "0.01x_train"}, figures=False)  # fmt: skip
    (row,) = Session(found, say=lambda text: None).run()
    assert row["fraction"] == 0.01
    assert "partition 0.01x_train" in row["note"]
    text = (tmp_path / "out/results.md").read_text()
    assert "59.3" in text
    assert "94.2" not in text


def test_report_shows_published_rows_beside_ours(tmp_path):
    row = {"key": "k", "model": "ours", "weights": "w", "suite": "geobench", "dataset": "m-eurosat",
           "inputs": ["s2_l1c"], "task": "classification", "image_size": 224, "protocol": "galileo-knn20/1",
           "fraction": 1.0, "shots": 0, "seed": 0, "classes": ["a", "b"], "note": "bands=corrected",
           "metrics": {"top1": {"value": 0.5, "low": 0.4, "high": 0.6}}}  # fmt: skip
    text = report.markdown([row, {**row, "key": "l", "dataset": "m-so2sat"}])
    assert "| ours | s2_l1c | 224 | 50.0 [40.0, 60.0] | 50.0 [40.0, 60.0] |" in text
    assert "| *TerraFM-B (published)* |  |  | 94.2 | 55.1 |" in text
    assert "- m-eurosat: bands=corrected" in text
    other = {**row, "key": "m", "note": "bands=as_labelled; wrong", "weights": "w"}
    both = report.markdown([row, other, {**row, "key": "n", "seed": 1}])
    assert "| ours (bands=as_labelled) | s2_l1c | 224 | 50.0 [" in both  # never averaged with the other reading
    assert "| ours (bands=corrected) | s2_l1c | 224 | 50.0 ± 0.0 [40.0, 60.0] (n=2) |" in both
    renamed = report.markdown([row, {**row, "key": "o", "weights": "another"}])
    assert "| ours (w) |" in renamed
    assert "| ours (anothe) |" in renamed
    unknown = report.markdown([{**row, "dataset": "eurosat-120"}])
    assert "published" not in unknown  # never beside a data set it was not measured on
