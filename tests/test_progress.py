"""Progress of long work: a bar on a terminal, plain lines elsewhere, and how long it will take."""

from __future__ import annotations

import io
import logging
import re

import pytest

from terrafm_jax.training import metrics
from terrafm_jax.training.metrics import Progress, clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar_with_its_note_and_lines_above_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Terminal()
    monkeypatch.setattr(metrics.sys, "stderr", screen)
    progress = Progress(2, 10)
    progress.update(6, "loss 1.250")
    progress.line("step 6: saved")
    progress.close()
    shown = screen.getvalue()
    assert re.search(r"60%.*6/10", shown), "six of ten: four done now, two by an earlier start"
    assert "loss 1.250" in shown
    assert "step 6: saved" in capsys.readouterr().out


def test_the_bar_appears_with_the_first_update_and_counts_earlier_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(metrics.sys, "stderr", screen)
    progress = Progress(0, 10)
    progress.line("2 x cpu")
    assert not screen.getvalue()
    progress.resume(4)
    progress.update(6)
    progress.close()
    assert re.search(r"60%.*6/10", screen.getvalue())


def test_a_log_gets_lines_only(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(metrics.sys, "stderr", screen)
    with caplog.at_level(logging.INFO):
        for enabled in (True, False):  # the second is another process than the first
            progress = Progress(0, 10, enabled=enabled)
            progress.update(5, "loss 1.250")
            progress.line("step 5: saved")
            progress.close()
    assert [r.getMessage() for r in caplog.records] == ["step 5: saved"]
    assert "10" not in screen.getvalue()


def test_time_left_counts_from_the_first_step_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    progress = Progress(20, 100)
    assert progress.eta() == "?"
    progress.update(21)  # compiled until here
    assert progress.eta() == "?"
    now[0] += 60
    progress.update(41)
    assert progress.eta() == clock(60 / 20 * 59) == "0:02:57"
