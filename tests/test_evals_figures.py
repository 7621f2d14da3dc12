"""Figures and sheets of an evaluation show the numbers of the rows, and exactly the samples that were wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import labelled_fake as fake
import numpy as np
import pytest

from terrafm_jax import palette
from terrafm_jax.evals import charts, progress, report
from terrafm_jax.evals.datasets import open_suite
from terrafm_jax.evals.datasets.base import DatasetInfo, Input, Sample
from terrafm_jax.evals.session import Session, Settings

pytest.importorskip("rasterio")
pytest.importorskip("matplotlib")
S2 = Input("s2_l1c", ("B02", "B03", "B04"))


@pytest.fixture
def drawn(monkeypatch) -> dict[str, object]:
    """Figures by file name, kept open for inspection; the files are written as well."""
    kept: dict[str, object] = {}

    def save(figure, path: Path, **options) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=40, **options)
        kept[path.name] = figure

    monkeypatch.setattr(charts, "save", save)
    yield kept
    for figure in kept.values():
        charts.pyplot().close(figure)


def row(model: str, dataset: str, value: float, **fields) -> report.Row:
    metrics = {"top1": {"value": value, "low": value - 0.1, "high": value + 0.05}}
    return {"model": model, "dataset": dataset, "task": "classification", "inputs": ["s1"], "fraction": 1.0, "shots": 0,
            "protocol": "logreg/1", "metrics": metrics, **fields}  # fmt: skip


def test_radar_has_one_axis_per_data_set_and_one_closed_line_per_model(drawn, tmp_path):
    values = {"ours": (0.9, 0.5, 0.7), "raw": (0.4, 0.6, 0.8)}
    rows = [row(m, d, v) for m, vs in values.items() for d, v in zip("xyz", vs, strict=True)]
    assert not charts.radar(rows[:2], tmp_path / "radar.png")  # two axes are a line, not a figure
    assert charts.radar(rows, tmp_path / "radar.png")
    (axis,) = drawn["radar.png"].axes
    assert [t.get_text().split("\n")[0] for t in axis.get_xticklabels()] == ["x", "y", "z"]
    assert [t.get_text() for t in axis.get_legend().get_texts()] == ["ours (s1)", "raw (s1)"]
    for line, expected in zip(axis.get_lines(), values.values(), strict=True):
        np.testing.assert_allclose(line.get_ydata(), 100 * np.array([*expected, expected[0]]))
    assert axis.get_ylim() == (0, 100)


def test_radar_leaves_a_gap_where_a_model_was_not_measured(drawn, tmp_path):
    rows = [row("ours", d, 0.5) for d in "xyz"] + [row("raw", d, 0.25) for d in "xz"]
    assert charts.radar(rows, tmp_path / "radar.png")
    full, part = drawn["radar.png"].axes[0].get_lines()
    np.testing.assert_array_equal(full.get_ydata(), [50, 50, 50, 50])
    np.testing.assert_array_equal(part.get_ydata(), [25, np.nan, 25, 25])


def test_bars_carry_values_and_intervals(drawn, tmp_path):
    assert not charts.bars([row("ours", "x", 3.0, task="regression")], tmp_path / "none.png")
    assert charts.bars([row("ours", "x", 0.5), row("raw", "x", 0.3)], tmp_path / "scores.png")
    (axis,) = drawn["scores.png"].axes
    assert [p.get_height() for p in axis.patches] == pytest.approx([50, 30])
    spans = [c.get_segments()[0][:, 1] for c in axis.collections]
    np.testing.assert_allclose(spans, [[40, 55], [20, 35]])


def test_several_draws_carry_their_interval_in_table_and_bars(drawn, tmp_path):
    same = {"image_size": 64, "weights": "w", "fraction": 0.2}
    rows = [row("ours", "x", v, key=str(s), seed=s, **same) for s, v in enumerate((0.48, 0.50, 0.52))]
    reach = 4.302653 * 0.02 / 3**0.5
    low, high = 50 - 100 * np.hypot(reach, 0.1), 50 + 100 * np.hypot(reach, 0.05)
    text = report.markdown(rows)
    assert f"| ours | s1 | 64 | 50.0 ± 2.0 [{low:.1f}, {high:.1f}] (n=3) |" in text
    assert "Student's t over the draws and the bootstrap over the test samples" in text
    assert "draws" not in report.markdown(rows[:1])
    assert charts.bars(rows, tmp_path / "scores.png")
    (axis,) = drawn["scores.png"].axes
    np.testing.assert_allclose(axis.collections[0].get_segments()[0][:, 1], [low, high], rtol=1e-6)
    certain = [row("ours", "x", v, key=str(s), seed=s, **same) for s, v in enumerate((0.95, 1.0))]
    assert "100.0] (n=2)" in report.markdown(certain)  # no share above one
    for r in rows:
        r["metrics"]["top1"] |= {"low": None, "high": None}
    assert "| 50.0 ± 2.0 (n=3) |" in report.markdown(rows)  # no resampling: no interval


def test_an_evaluation_done_again_is_no_second_draw(drawn, tmp_path):
    """With more resamples, say: both rows stay in results.jsonl, the later one is shown."""
    same = {"image_size": 64, "weights": "w", "seed": 0}
    rows = [row("ours", "x", v, key=str(v), **same) for v in (0.4, 0.5)]
    assert "| ours | s1 | 64 | 50.0 [40.0, 55.0] |" in report.markdown(rows)
    assert charts.bars(rows, tmp_path / "scores.png")
    assert [p.get_height() for p in drawn["scores.png"].axes[0].patches] == pytest.approx([50])


@pytest.mark.parametrize("fields", [{"weights": "another"}, {"image_size": 0}, {"note": "bands=as_labelled; wrong"}])
def test_bars_of_one_name_are_drawn_apart(drawn, tmp_path, fields):
    same = {"image_size": 64, "weights": "w", "note": "bands=corrected", "seed": 0}
    rows = [row("ours", "x", 0.5, key="a", **same), row("ours", "x", 0.25, key="b", **{**same, **fields})]
    assert charts.bars(rows, tmp_path / "scores.png")
    (axis,) = drawn["scores.png"].axes
    assert [p.get_height() for p in axis.patches] == pytest.approx([50, 25])
    names = [t.get_text() for t in axis.get_legend().get_texts()]
    assert len(set(names)) == 2
    assert any(part in names[1] for part in ("anothe", "own px", "bands=as_labelled"))


def test_thumbnails_lose_the_haze_and_keep_calm_scenes_calm():
    info = DatasetInfo("x", "classification", ("a",), {"s2_l1c": S2})
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 2000, (20, 20, 1)).repeat(3, axis=2)
    grey = charts.thumbnail(info, Sample("a", {"s2_l1c": (ground + np.array([1500, 900, 400])).astype(np.uint16)}, 0))
    np.testing.assert_array_equal(grey[..., 0], grey[..., 2])  # blue is not left standing above red
    assert grey.max() == 255
    water = 1000 + rng.normal(0, 10, (20, 20, 3))
    assert charts.thumbnail(info, Sample("b", {"s2_l1c": water.astype(np.uint16)}, 0)).max() < 40
    empty = Sample("c", {"s2_l1c": np.zeros((20, 20, 3), np.uint16)}, 0)
    assert charts.thumbnail(info, empty).max() == 0  # nothing measured


def test_error_sheet_shows_exactly_the_wrong_samples(drawn, tmp_path):
    """Two classes that overlap: some are wrong, and the sheet agrees with the stored predictions."""
    rng = np.random.default_rng(0)
    for i in range(40):
        image = 1000 + 60 * (i % 2) + rng.normal(0, 400, (1, 1, 3)) + rng.normal(0, 50, (16, 16, 3))
        fake.tiff(tmp_path / "data" / "ab"[i % 2] / f"{i}.tif", image.clip(1).astype(np.uint16))
    (tmp_path / "data/dataset.yaml").write_text("name: hard\ninputs:\n  s2_l1c: {bands: [B02, B03, B04], unit: DN}\n")
    settings = Settings(
        checkpoints=("raw",), suite="folder", data=str(tmp_path / "data"), out=str(tmp_path / "out"), resamples=0,
        protocols=("torchgeo-bench-knn5",), image_size=16,
    )  # fmt: skip
    (found,) = Session(settings, say=lambda text: None).run()
    with np.load(tmp_path / "out/predictions" / f"{found['key']}.npz") as f:
        wrong, targets, predictions = np.nonzero(f["predictions"] != f["targets"])[0], f["targets"], f["predictions"]
        ids = f["ids"].tolist()
    assert 0 < len(wrong) < len(ids)
    (name,) = [n for n in drawn if n.startswith("errors-")]
    assert name.startswith("errors-hard-torchgeo-bench-knn5-raw_band_statistics-s2_l1c-")
    sheet = drawn[name]
    assert sheet.get_suptitle().endswith(f"{len(wrong)} of {len(ids)} wrong")
    pictures = [a for a in sheet.axes if a.images]
    assert [a.get_title() for a in pictures] == [f"{'ab'[targets[i]]}\n→ {'ab'[predictions[i]]}" for i in wrong[:24]]
    (dataset,) = open_suite("folder", str(tmp_path / "data"))
    test = dataset.split("test")
    shown = charts.thumbnail(dataset.info, test[test.ids.index(ids[wrong[0]])])
    np.testing.assert_array_equal(pictures[0].images[0].get_array(), shown)
    matrix = next(f for n, f in drawn.items() if n.startswith("confusion-")).axes[0].images[0].get_array()
    counts = np.asarray(found["confusion"], float)
    np.testing.assert_allclose(matrix, counts / counts.sum(1, keepdims=True))


def test_mask_sheet_puts_image_labels_and_prediction_side_by_side(drawn, tmp_path):
    info = DatasetInfo("x", "segmentation", ("dry", "wet"), {"s2_l1c": S2}, ignore=255)
    target = np.array([[0, 1], [255, 1]])
    sample = Sample("a", {"s2_l1c": np.full((2, 2, 3), 900, np.uint16)}, target)
    prediction = np.array([[1, 1], [0, 1]])
    charts.mask_sheet(info, [(sample, prediction)], tmp_path / "masks.png", "title")
    image, labels, predicted = (a.images[0].get_array() for a in drawn["masks.png"].axes)
    assert image.shape == (2, 2, 3)
    assert labels.mask.tolist() == [[False, False], [True, False]]
    np.testing.assert_array_equal(labels.filled(0), np.where(target == 255, 0, target))
    np.testing.assert_array_equal(predicted, prediction)
    assert [a.get_title() for a in drawn["masks.png"].axes] == ["image", "labels", "prediction"]


def test_mask_sheet_has_a_legend_in_the_colors_of_maps(drawn, tmp_path):
    info = DatasetInfo("x", "segmentation", ("Tree cover", "Built-up"), {"s2_l1c": S2}, ignore=255)
    sample = Sample("a", {"s2_l1c": np.full((2, 2, 3), 900, np.uint16)}, np.array([[0, 1], [255, 1]]))
    charts.mask_sheet(info, [(sample, np.zeros((2, 2), int))] * 2, tmp_path / "masks.png", "title")
    (shown,) = drawn["masks.png"].legends
    assert [text.get_text() for text in shown.get_texts()] == ["Tree cover", "Built-up"]
    wanted = [tuple(v / 255 for v in color) for color in palette.colors(info.classes)]
    assert [patch.get_facecolor()[:3] for patch in shown.get_patches()] == wanted
    predicted = drawn["masks.png"].axes[2].images[0]
    assert tuple(predicted.to_rgba(predicted.get_array())[0, 0, :3]) == pytest.approx(wanted[0])
    assert [a.get_title() for a in drawn["masks.png"].axes] == ["image", "labels", "prediction", "", "", ""]


def test_pairs_put_the_checkpoint_named_first_before_the_others_and_join_draws(tmp_path):
    rng = np.random.default_rng(0)
    targets, rows = np.arange(60) % 2, []
    (tmp_path / "predictions").mkdir()
    right = {("ours", 0): 0.9, ("ours", 1): 0.9, ("raw", 0): 0.6, ("raw", 1): 0.6}
    for (model, seed), share in right.items():
        key = f"{model}{seed}"
        predictions = np.where(rng.random(60) < share, targets, 1 - targets)
        np.savez(tmp_path / "predictions" / f"{key}.npz", predictions=predictions, targets=targets, ids=np.arange(60))
        rows.append(row(model, "x", share, key=key, seed=seed, weights=model, fraction=0.5, classes=["a", "b"]))
    text = report.paired_table(rows, tmp_path)
    (line,) = [x for x in text.splitlines() if "−" in x]
    assert line.startswith("| ours − raw | x, logreg/1, 50 % of the train labels, s1 | top1 +")
    assert line.endswith("(mean of 2 draws) |")
    accuracy = {}
    for r in rows:
        with np.load(tmp_path / "predictions" / f"{r['key']}.npz") as f:
            accuracy.setdefault(r["model"], []).append((f["predictions"] == f["targets"]).mean())
    gain = 100 * (np.mean(accuracy["ours"]) - np.mean(accuracy["raw"]))
    assert f"top1 {gain:+.1f} [" in line
    sizes = [{**r, "image_size": 64 if r["model"] == "ours" else 224} for r in rows]
    assert "| ours at 64 px − raw at 224 px |" in report.paired_table(sizes, tmp_path)
    lonely = report.paired_table(rows[:3], tmp_path)  # only one draw in common
    assert "draws" not in lonely
    assert "ours − raw" in lonely


def test_pairs_of_probes_compare_the_means_over_their_runs(tmp_path):
    """As the table does: the first of five runs alone may be 20 points off."""
    targets = np.arange(20) % 2
    (tmp_path / "predictions").mkdir()
    rows = []
    for model, wrong in (("ours", (0, 10)), ("raw", (10, 10))):
        runs = np.stack([np.where(np.arange(20) < k, 1 - targets, targets) for k in wrong])
        file = tmp_path / "predictions" / f"{model}.npz"
        np.savez(file, predictions=runs[0], runs=runs, targets=targets, ids=np.arange(20))
        rows.append(row(model, "x", 0.5, key=model, seed=0, weights=model, classes=["a", "b"]))
    assert "| top1 +25.0 [" in report.paired_table(rows, tmp_path)


def test_batch_jobs_see_a_line_now_and_then(capsys, monkeypatch):
    clock = iter([0.0, 1.0, 31.0, 32.0, 62.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    update = progress.bar("features")
    for done in (1, 2, 3, 4):
        update(done, 4)
    assert capsys.readouterr().err == "features: 2 of 4\nfeatures: 4 of 4\n"
