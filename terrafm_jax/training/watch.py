"""Warnings about speed while training runs: slow input, stragglers among the processes, sudden slowdowns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

SLOW_INPUT = 0.05  # share of the wall time
STRAGGLER = 0.05  # share of the wall time by which a process may exceed the median process's time on its own
SLOWER = 1.5  # times the usual seconds a step
REMEMBERED = 20  # intervals whose median is "usual"
REPEAT = 10  # intervals after which a warning that stays true is repeated


def slow_input(data_share: float) -> str:
    """Warning where waiting for batches takes too much of the time, else ""."""
    if data_share <= SLOW_INPUT:
        return ""
    return (
        f"slow input: {data_share:.0%} of the time went into waiting for batches; raise config.data.workers, "
        "or use config.data.cache or config.data.echo (docs/input.md)"
    )


def stragglers(own: Sequence[float], elapsed: float) -> str:
    """Warning naming the processes that others wait for, else "".

    Args:
      own: per process the seconds it spent on its own: waiting for its input and in Python, not for the devices.
      elapsed: seconds of the interval.
    """
    median = float(np.median(own))
    late = [(p, s - median) for p, s in enumerate(own) if s - median > STRAGGLER * elapsed]
    if not late or elapsed <= 0:
        return ""
    worst = ", ".join(f"process {p} (+{s / elapsed:.0%})" for p, s in sorted(late, key=lambda x: -x[1])[:4])
    return f"stragglers: the others wait for {worst}: look at the input and the load of these hosts"


def sudden(seconds: float, earlier: Sequence[float]) -> str:
    """Warning where a step takes much longer than it usually did, else ""; needs five earlier intervals."""
    if len(earlier) < 5 or seconds <= SLOWER * (usual := float(np.median(earlier))):
        return ""
    return f"slow: {seconds:.2f} s a step, {seconds / usual:.1f} times the usual {usual:.2f} s"


class Watch:
    """Judges each logged interval. All processes' figures are compared one interval late, so that nothing waits."""

    def __init__(self, mesh: Mesh):
        line = Mesh(mesh.devices.reshape(-1), ("all",), axis_types=(jax.sharding.AxisType.Auto,))
        self._devices, self._mine = line.devices, len(line.local_devices)
        self._split = NamedSharding(line, P("all"))
        self._spread = jax.jit(lambda x: x, out_shardings=NamedSharding(line, P()))  # compiled once
        self._sent: tuple[jax.Array, float] | None = None
        self._earlier: list[float] = []
        self._said: dict[str, int] = {}
        self._interval = 0

    def interval(self, elapsed: float, steps: int, spent: Mapping[str, float]) -> list[str]:
        """Warnings about ``steps`` steps that took ``elapsed`` seconds; every process calls it at the same steps.

        ``spent``: seconds of this process by part, as ``Meter`` counts them.
        """
        self._interval += 1
        busy = sum(spent.get(name, 0.0) for name in ("checkpoint", "evaluation"))
        stepping = max(elapsed - busy, 1e-9)
        pace = stepping / steps
        found = {
            "input": slow_input(spent.get("data", 0.0) / elapsed),
            "straggler": self._compare(max(0.0, stepping - spent.get("device", 0.0)), stepping),
            "sudden": sudden(pace, self._earlier),
        }
        self._earlier = [*self._earlier, pace][-REMEMBERED:]
        return [text for kind, text in found.items() if text and self._is_news(kind)]

    def _is_news(self, kind: str) -> bool:
        last = self._said.get(kind)
        if last is not None and self._interval - last < REPEAT:
            return False
        self._said[kind] = self._interval
        return True

    def _compare(self, own: float, elapsed: float) -> str:
        """Starts to gather this interval's figures from all processes; judges those of the interval before."""
        if jax.process_count() == 1:
            return ""
        before, self._sent = self._sent, (self._gather(own), elapsed)
        if before is None:
            return ""
        seconds = np.asarray(before[0].addressable_data(0))
        by_process = {d.process_index: s for d, s in zip(self._devices, seconds, strict=True)}
        return stragglers([float(by_process[p]) for p in sorted(by_process)], before[1])

    def _gather(self, own: float) -> jax.Array:
        """float32 [devices], replicated: for each device the ``own`` of its process."""
        mine = np.full(self._mine, own, np.float32)
        return self._spread(jax.make_array_from_process_local_data(self._split, mine))
