"""The summary page: goodput over restarts by hand, broken lines, self-contained HTML."""

from __future__ import annotations

import dataclasses
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from terrafm_jax.training import report


def start(time, step):
    return {"step": step, "time": time, "event": "start"}


def row(time, step, pace=None, **more):
    return {
        "step": step,
        "time": time,
        "loss": 5.0 - step / 100,
        **({"seconds_per_step": pace} if pace else {}),
        **more,
    }


def write(folder, rows):
    (folder / "metrics.jsonl").write_text("\n".join(json.dumps(r) for r in rows) + "\n")


def test_goodput_of_one_run():
    """10 s until the first step is logged, then 9 steps of 2 s, a fifth of it waiting for data."""
    found = report.goodput([start(0, 0), row(10, 1), row(28, 10, 2.0, data_share=0.2, checkpoint_share=0.1)])
    assert found.startup == pytest.approx(10)
    assert found.data == pytest.approx(3.6)
    assert found.checkpoint == pytest.approx(1.8)
    assert found.steps == pytest.approx(12.6)
    assert found.wall == pytest.approx(28)
    assert found.share == pytest.approx(12.6 / 28)


def test_goodput_counts_repeated_steps_and_gaps():
    """The second start resumes at step 6: steps 7 to 10 of the first were in vain; 100 s lie between them."""
    rows = [start(0, 0), row(0, 0), row(20, 10, 2.0), start(120, 6), row(125, 7, None), row(131, 10, 2.0)]
    found = report.goodput(rows)
    assert found.starts == 2
    assert found.between == pytest.approx(100)
    assert found.steps == pytest.approx(12 + 6)
    assert found.repeated == pytest.approx(8)
    assert found.startup == pytest.approx(5)
    assert found.wall == pytest.approx(131)


def test_the_time_after_a_complete_run_is_not_lost():
    """Started again days later, by mistake or with more steps: nobody waited for it in between."""
    first, later = [start(0, 0), row(0, 0), row(20, 10, 2.0)], [start(90_000, 10) | {"after": "complete"}]
    assert report.goodput([*first, *later]) == dataclasses.replace(report.goodput(first), starts=2)
    longer = report.goodput([*first, *later, row(90_005, 11), row(90_010, 13, 2.5)])
    assert (longer.between, longer.wall) == (0, pytest.approx(30))


def test_three_starts_from_the_same_checkpoint():
    """Two starts crashed before the next checkpoint: only the third one's steps count."""
    rows = []
    for k in range(3):
        rows += [start(100 * k, 4), row(100 * k, 4), row(100 * k + 10, 9, 2.0)]
    found = report.goodput(rows)
    assert found.steps == pytest.approx(10)
    assert found.repeated == pytest.approx(20)


def test_empty_and_damaged_files(tmp_path):
    assert report.goodput([]).share == 0.0
    assert "Nothing has been logged" in report.page(tmp_path)
    write(tmp_path, [start(0, 0), row(1, 1)])
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 2, "time": 3, "loss"\n[1]\n{"step": "x", "time": 1}\n')
    assert [r["step"] for r in report.read_rows(tmp_path)] == [0, 1]


def test_page_is_one_file_with_curves_and_pictures(tmp_path):
    rows = [start(0, 0)]
    for step in range(1, 40):
        rows.append(row(step * 2.0, step, 2.0, grad_norm=1.0 / step, images_per_second=10.0, lr=1e-4 * step))
    rows.append({"step": 39, "time": 80.0, "knn_top1": 0.5})
    rows.append(row(82.0, 40, 2.0) | {"loss": "nan"})
    write(tmp_path, rows)
    (tmp_path / "views.png").write_bytes(b"\x89PNG not really")
    (tmp_path / "config_resolved.json").write_text('{"note": "<script>"}')
    text = Path(report.write(tmp_path)).read_text(encoding="utf-8")
    assert "goodput" in text
    assert text.count("<svg") >= 5
    assert 'src="data:image/png;base64,' in text
    assert "&lt;script&gt;" in text
    assert not re.search(r"<script|https?://|src=\"(?!data:)", text)
    assert "1 logged losses were not finite" in text
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)


def test_series_keep_the_last_value_of_a_repeated_step():
    rows = [row(0, 1) | {"loss": 9.0}, row(1, 2) | {"loss": float("nan")}, row(2, 1) | {"loss": 3.0}]
    assert report.series(rows, "loss") == [(1, 3.0)]


def test_chart_of_one_point_and_of_a_constant():
    assert "<circle" in report.chart({"a": [(3, 1.0)]})
    ET.fromstring(report.chart({"a": [(0, 2.0), (5, 2.0)], "empty": []}))
    assert report.chart({"a": []}) == ""


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ((0.0, 1.0), ["0", "0.2", "0.4", "0.6", "0.8", "1"]),
        ((6.2, 7.2), ["6.2", "6.4", "6.6", "6.8", "7", "7.2"]),
        ((-1.0, 1.0), ["-1", "-0.5", "0", "0.5", "1"]),
        ((100.0, 9000.0), ["0", "2,000", "4,000", "6,000", "8,000"]),
    ],
)
def test_a_chart_has_round_numbers_on_its_axis_and_none_that_cannot_be(values, shown):
    found = ET.fromstring(report.chart({"a": list(enumerate(values))}))
    assert [text.text for text in found.iter("text")][:-2] == shown
    heights = [float(line.get("y1")) for line in found.iter("line")]
    assert all(9 <= y <= 167 for y in heights), "within the chart"


def test_the_learning_rate_has_a_chart_of_its_own():
    """Beside a weight decay of 0.04 its curve is a straight line at the bottom."""
    assert [names for _, names in report.CHARTS if "lr" in names] == [("lr",)]


def test_the_command_refuses_a_folder_that_is_no_run(tmp_path, capsys):
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert report.main([str(folder)]) == 1
        assert f"error: {folder}: no metrics.jsonl" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    write(tmp_path, [start(0, 0), row(1, 1)])
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"


def test_warnings_name_the_config_key():
    rows = [row(k, k, 1.0, data_share=0.3, feature_std=0.01) for k in range(1, 5)]
    first, second = report.warnings(rows)
    assert "config.data.workers" in first
    assert "collapsed" in second
    assert report.warnings([row(k, k, 1.0, data_share=0.01, feature_std=0.9) for k in range(5)]) == []


def test_a_page_that_cannot_be_written_does_not_raise(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert report.write(tmp_path / "file") is None
    assert "no report.html" in caplog.text
