"""Warnings about speed, and stopping in the middle of an evaluation."""

from __future__ import annotations

import signal

import pytest

from terrafm_jax.training import watch
from terrafm_jax.training.preemption import Interrupted, StopRequest
from terrafm_jax.training.sharding import make_mesh


def test_slow_input_is_told_from_five_per_cent_on() -> None:
    assert watch.slow_input(0.04) == ""
    assert "slow input: 23% of the time" in watch.slow_input(0.234)


def test_stragglers_are_named_worst_first() -> None:
    assert watch.stragglers([1.0, 1.1, 0.9, 1.2], elapsed=10.0) == ""
    found = watch.stragglers([1.0, 3.0, 1.0, 2.0, 1.0], elapsed=10.0)
    assert "process 1 (+20%), process 3 (+10%)" in found
    assert "process 0" not in found


def test_sudden_slowness_needs_a_past() -> None:
    assert watch.sudden(9.0, [1.0] * 4) == ""
    assert watch.sudden(1.4, [1.0] * 5) == ""
    assert "2.00 s a step, 2.0 times the usual 1.00 s" in watch.sudden(2.0, [1.0, 0.9, 1.0, 1.1, 5.0])


def test_a_lasting_warning_is_repeated_only_now_and_then() -> None:
    judge = watch.Watch(make_mesh())
    said = [judge.interval(10.0, 5, {"data": 2.0, "device": 8.0}) for _ in range(watch.REPEAT + 1)]
    assert [len(s) for s in said] == [1] + [0] * (watch.REPEAT - 1) + [1]
    assert "slow input: 20%" in said[0][0]
    assert judge.interval(40.0, 5, {"device": 40.0}) == ["slow: 8.00 s a step, 4.0 times the usual 2.00 s"]


def test_evaluation_does_not_count_as_slowness() -> None:
    judge = watch.Watch(make_mesh())
    for _ in range(6):
        assert judge.interval(10.0, 5, {"device": 10.0}) == []
    assert judge.interval(100.0, 5, {"device": 10.0, "evaluation": 80.0, "checkpoint": 10.0}) == []


def test_poll_raises_after_the_signal_and_reached_stays_true() -> None:
    stop = StopRequest()
    try:
        stop.poll()
        assert not stop.reached()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted):
            stop.poll()
        assert stop.reached()
        assert not stop.by_person
    finally:
        stop.close()


def test_ctrl_c_is_told_what_it_does_and_the_second_interrupts(capfd: pytest.CaptureFixture[str]) -> None:
    stop = StopRequest()
    try:
        signal.raise_signal(signal.SIGINT)
        assert stop.reached()
        assert stop.by_person
        (line,) = capfd.readouterr().err.strip().splitlines()
        assert "ends after this step, with a checkpoint; a second Ctrl-C ends at once" in line
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == ""
    finally:
        stop.close()
