"""When a profiler trace starts and ends: as asked, after a resume in the middle, at the end of a run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from terrafm_jax.training import trace as trace_lib


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(trace_lib.jax.profiler, "start_trace", lambda folder: said.append(f"start {Path(folder).name}"))
    monkeypatch.setattr(trace_lib.jax.profiler, "stop_trace", lambda: said.append("stop"))
    return said


def run(calls: list[str], start: int, stop: int, steps: range) -> dict[int, list[str]]:
    """What was called before each step; key -1: at the end."""
    trace, found = trace_lib.Trace(SimpleNamespace(start=start, stop=stop), "run"), {}
    for step in [*steps, -1]:
        calls.clear()
        trace.close() if step < 0 else trace.before(step, ())
        if calls:
            found[step] = list(calls)
    return found


def test_steps_asked_for_are_traced(calls: list[str]) -> None:
    assert run(calls, 3, 5, range(8)) == {3: ["start profile"], 5: ["stop"]}
    assert run(calls, 0, 0, range(8)) == {}


def test_a_resumed_run_traces_the_rest(calls: list[str]) -> None:
    assert run(calls, 3, 6, range(4, 8)) == {4: ["start profile"], 6: ["stop"]}
    assert run(calls, 3, 6, range(6, 8)) == {}


def test_a_run_that_ends_keeps_its_trace(calls: list[str]) -> None:
    assert run(calls, 3, 100, range(5)) == {3: ["start profile"], -1: ["stop"]}


def test_the_device_catches_up_before_a_trace_starts_or_ends(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are dispatched ahead: without waiting the trace would hold the step before, and lack the last one."""
    monkeypatch.setattr(trace_lib.jax, "block_until_ready", lambda state: calls.append(f"wait for {state}"))
    trace, found = trace_lib.Trace(SimpleNamespace(start=1, stop=2), "run"), []
    for step in range(4):
        calls.clear()
        trace.before(step, f"state {step}")
        found.append(list(calls))
    assert found == [[], ["wait for state 1", "start profile"], ["wait for state 2", "stop"], []]


def test_a_trace_is_written(tmp_path: Path) -> None:
    trace = trace_lib.Trace(SimpleNamespace(start=0, stop=1), str(tmp_path))
    trace.before(0, ())
    jnp.ones(3).sum().block_until_ready()
    trace.close()
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
