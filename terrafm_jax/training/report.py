"""The summary page of a run: ``WORKDIR/report.html``, one file without scripts or outside references.

Curves, collapse monitors, throughput, restarts with goodput, and the pictures of the workdir. Made from
``metrics.jsonl`` alone, so ``python -m terrafm_jax.training.report WORKDIR`` renews it at any time.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import html
import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from terrafm_jax.training.metrics import clock

log = logging.getLogger(__name__)

CHARTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss (nats)", ("loss",)),
    ("Teacher entropy and KL (nats)", ("teacher_entropy", "kl", "marginal_entropy")),
    ("Centers: norms and distance", ("center_norm", "center_frequent_norm", "center_distance")),
    ("Spread of class tokens (1 = random directions)", ("feature_std",)),
    ("Gradient norms", ("grad_norm", "grad_norm_backbone", "grad_norm_head", "grad_norm_max")),
    ("kNN on held-out tiles (share right)", ("knn_top1", "knn_macro")),
    ("Learning rate", ("lr",)),
    ("Weight decay and teacher temperature", ("weight_decay", "teacher_temp")),
    ("Images per second", ("images_per_second",)),
    ("MFU", ("mfu",)),
    ("Share of time not spent in steps", ("data_share", "checkpoint_share", "evaluation_share")),
)
COLORS = ("#0b6e4f", "#c8553d", "#2f6690", "#8a6d1f")
PICTURES = (".png", ".jpg")
LARGEST_PICTURE = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Goodput:
    """Where the wall time of a run went, over all its starts, in seconds.

    Attributes:
      steps: useful, in steps that no later start repeated. Everything else is lost:
      repeated: in steps that a restart did again.
      data, checkpoint, evaluation: waiting for them inside the loop; exports of the teacher count as checkpoints.
      startup: from a start to its first logged step, compiling included.
      between: while no process was running, unless the run was complete before (``after`` of the start event).
      starts: number of starts, not seconds.
    """

    steps: float = 0.0
    repeated: float = 0.0
    data: float = 0.0
    checkpoint: float = 0.0
    evaluation: float = 0.0
    startup: float = 0.0
    between: float = 0.0
    starts: int = 0

    @property
    def wall(self) -> float:
        parts = (self.steps, self.repeated, self.data, self.checkpoint, self.evaluation, self.startup, self.between)
        return sum(parts)

    @property
    def share(self) -> float:
        """Goodput: useful step time over wall time, 0 for an empty run."""
        return self.steps / self.wall if self.wall > 0 else 0.0


def read_rows(workdir: Any) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` in order, without lines cut short by a crash; empty if the file is missing."""
    path = epath.Path(workdir) / "metrics.jsonl"
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and isinstance(row.get("time"), int | float):
            rows.append(row)
    return rows


def runs(rows: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Splits rows at the ``start`` events."""
    found: list[list[Mapping[str, Any]]] = []
    for row in rows:
        if row.get("event") == "start" or not found:
            found.append([])
        found[-1].append(row)
    return found


def goodput(rows: Sequence[Mapping[str, Any]]) -> Goodput:
    """Adds up where the time went; see :class:`Goodput`.

    A step is credited to the last start that did it: when a start resumes at step s, the steps of earlier
    starts beyond s count as repeated.
    """
    parts = runs(rows)
    total = dict.fromkeys(("steps", "repeated", "data", "checkpoint", "evaluation", "startup", "between"), 0.0)
    kept = math.inf
    for i in reversed(range(len(parts))):
        for name, seconds in _one_run(parts[i], kept).items():
            total[name] += seconds
        kept = min(kept, parts[i][0]["step"])
        if i and parts[i][0].get("after") != "complete":
            total["between"] += max(0.0, parts[i][0]["time"] - parts[i - 1][-1]["time"])
    return Goodput(starts=len(parts), **total)


def goodput_line(workdir: Any) -> str:
    """Goodput over all starts of a workdir as one line for the log; "" where nothing (readable) was logged."""
    try:
        spent = goodput(read_rows(workdir))
    except OSError:
        return ""
    if not spent.wall:
        return ""
    lost = sorted(((s, n) for n, s in dataclasses.asdict(spent).items() if n not in ("steps", "starts")), reverse=True)
    most = ", ".join(f"{name} {seconds / spent.wall:.0%}" for seconds, name in lost[:2] if seconds)
    starts = f"{spent.starts} start{'s' * (spent.starts != 1)}"
    return f"goodput {spent.share:.0%} of {clock(spent.wall)} over {starts}" + (f" (lost: {most})" if most else "")


def _one_run(rows: Sequence[Mapping[str, Any]], kept: float) -> dict[str, float]:
    """Seconds of one start by kind; steps above ``kept`` were repeated later."""
    found = dict.fromkeys(("steps", "repeated", "data", "checkpoint", "evaluation", "startup"), 0.0)
    last_time, last_step = rows[0]["time"], rows[0]["step"]
    for row in rows[1:]:
        if _number(row, "loss") is None:
            continue
        elapsed, count = max(0.0, row["time"] - last_time), row["step"] - last_step
        pace = _number(row, "seconds_per_step")
        inside = min(elapsed, pace * count) if pace is not None else 0.0
        found["startup"] += elapsed - inside
        waiting = 0.0
        for name in ("data", "checkpoint", "evaluation"):
            spent = inside * min(1.0, _number(row, f"{name}_share") or 0.0)
            found[name] += spent
            waiting += spent
        stepping = max(0.0, inside - waiting)
        useful = min(1.0, max(0.0, kept - last_step) / count) if count > 0 else 0.0
        found["steps"] += stepping * useful
        found["repeated"] += stepping * (1.0 - useful)
        last_time, last_step = row["time"], row["step"]
    found["startup"] += max(0.0, rows[-1]["time"] - last_time)
    return found


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def series(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) in order of the step; of a repeated step the last value."""
    found = {row["step"]: value for row in rows if (value := _number(row, name)) is not None}
    return sorted(found.items())


# --- drawing ----------------------------------------------------------------------------------


def chart(lines: Mapping[str, Sequence[tuple[float, float]]], width: int = 460, height: int = 190) -> str:
    """Line chart as an SVG element. ``lines``: name -> points; names with no points are left out."""
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    xs, ys = zip(*(p for points in lines.values() for p in points), strict=True)
    x0, x1, (y0, y1) = min(xs), max(xs), _padded(min(ys), max(ys))
    left, right, top, bottom = 58, 10, 10, 24
    across = (width - left - right) / ((x1 - x0) or 1)
    up = (height - top - bottom) / (y1 - y0)
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img">']
    for y in _ticks(y0, y1):
        at = height - bottom - (y - y0) * up
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(y)}</text>')
    for x, anchor in ((x0, "start"), (x1, "end")):
        at = left + (x - x0) * across
        parts.append(f'<text x="{at:.1f}" y="{height - 8}" text-anchor="{anchor}">step {x:,}</text>')
    for color, points in zip(COLORS, lines.values(), strict=False):
        path = " ".join(
            f"{left + (x - x0) * across:.1f},{height - bottom - (y - y0) * up:.1f}" for x, y in _thinned(points)
        )
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
        if len(points) == 1:
            cx, cy = path.split(",")
            parts.append(f'<circle cx="{cx}" cy="{cy}" r="3" fill="{color}"/>')
    return "".join([*parts, "</svg>"])


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - margin if low < 0 else max(0.0, low - margin), high + margin  # no share or norm is below zero


def _ticks(low: float, high: float) -> list[float]:
    """Two to seven round values (1, 2 or 5 times a power of ten apart) between the two, which are not equal."""
    rough = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    return [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _thinned(points: Sequence[tuple[float, float]], most: int = 600) -> Sequence[tuple[float, float]]:
    step = -(-len(points) // most)
    return [*points[::step], points[-1]] if step > 1 else points


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- the page ---------------------------------------------------------------------------------

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1020px;padding:0 1rem;color:#222}
h1{font-size:1.5rem;margin-bottom:0} h2{font-size:1.1rem;margin:2rem 0 .5rem} p.sub{color:#666;margin-top:0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1rem}
figure{margin:0;border:1px solid #ddd;border-radius:6px;padding:.6rem} figcaption{font-size:.85rem}
svg text{font:11px system-ui,sans-serif;fill:#666} svg .grid{stroke:#eee}
table{border-collapse:collapse;font-size:.9rem} td,th{border-bottom:1px solid #eee;padding:.25rem .8rem;text-align:left}
td.n{text-align:right;font-variant-numeric:tabular-nums} img{max-width:100%} .warn{color:#a33}
"""


def page(workdir: Any) -> str:
    """The whole page. Works for a run that has logged nothing yet, too."""
    rows = read_rows(workdir)
    name = html.escape(epath.Path(workdir).name)
    last = max((row["step"] for row in rows), default=0)
    spent = goodput(rows)
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{name}</title><style>{_STYLE}</style>",
        f"<h1>{name}</h1><p class=sub>step {last:,}; {spent.starts} start{'s' * (spent.starts != 1)}; "
        f"{clock(spent.wall)} of wall time, goodput {spent.share:.1%}</p>",
        *(f"<p class=warn>{html.escape(w)}</p>" for w in warnings(rows)),
        "<h2>Latest values</h2>",
        _latest(rows),
        "<h2>Curves</h2><div class=charts>",
        *_charts(rows),
        "</div><h2>Where the time went</h2>",
        _time_table(spent),
        *_pictures(workdir),
        *_plan(workdir),
        "</html>",
    ]
    return "\n".join(parts)


def warnings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a person should look at, from the last logged values."""
    found = []
    shares = [v for _, v in series(rows, "data_share")[-3:]]
    if shares and min(shares) > 0.05:
        found.append(
            f"Waiting for data takes {shares[-1]:.0%} of the time: raise config.data.workers (docs/performance.md)"
        )
    spread = [v for _, v in series(rows, "feature_std")[-3:]]
    if spread and max(spread) < 0.05:
        found.append(f"Class tokens hardly differ (feature_std {spread[-1]:.3f}): the teacher has collapsed")
    for row in [row for row in rows if "loss" in row][-1:]:
        found += map(str, row.get("warnings", ()))
    broken = sum(isinstance(row.get("loss"), str) for row in rows)
    if broken:
        found.append(f"{broken} logged losses were not finite")
    return found


def _latest(rows: Sequence[Mapping[str, Any]]) -> str:
    names = ("loss", "teacher_entropy", "feature_std", "grad_norm", "knn_top1", "images_per_second", "mfu", "skipped")
    cells = []
    for name in names:
        points = series(rows, name)
        if points:
            step, value = points[-1]
            cells.append(f"<tr><td>{name}</td><td class=n>{value:.4g}</td><td class=n>step {step:,}</td></tr>")
    return f"<table>{''.join(cells)}</table>" if cells else "<p>Nothing has been logged yet.</p>"


def _charts(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for title, names in CHARTS:
        lines = {name: series(rows, name) for name in names}
        drawn = chart(lines)
        if drawn:
            present = [name for name in names if lines[name]]
            legend = " ".join(f'<span style="color:{c}">{n}</span>' for c, n in zip(COLORS, present, strict=False))
            found.append(f"<figure>{drawn}<figcaption><b>{title}</b> {legend}</figcaption></figure>")
    return found


def _time_table(spent: Goodput) -> str:
    rows = []
    for field in dataclasses.fields(spent):
        seconds = getattr(spent, field.name)
        if field.name != "starts":
            share = seconds / spent.wall if spent.wall else 0.0
            rows.append(f"<tr><td>{field.name}</td><td class=n>{clock(seconds)}</td><td class=n>{share:.1%}</td></tr>")
    return f"<table>{''.join(rows)}</table>"


def _pictures(workdir: Any) -> list[str]:
    folder = epath.Path(workdir)
    found = []
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.suffix.lower() not in PICTURES or path.stat().length > LARGEST_PICTURE:
            continue
        kind = "jpeg" if path.suffix.lower() == ".jpg" else "png"
        data = base64.b64encode(path.read_bytes()).decode()
        name = html.escape(path.name)
        image = f'<img alt="{name}" src="data:image/{kind};base64,{data}">'
        found.append(f"<figure>{image}<figcaption>{name}</figcaption></figure>")
    return ["<h2>Pictures</h2>", *found] if found else []


def _plan(workdir: Any) -> list[str]:
    path = epath.Path(workdir) / "config_resolved.json"
    if not path.exists():
        return []
    text = html.escape(path.read_text())
    return [f"<h2>Configuration</h2><details><summary>config_resolved.json</summary><pre>{text}</pre></details>"]


def write(workdir: Any) -> str | None:
    """Writes ``WORKDIR/report.html`` and returns its path; a failure is logged, never raised."""
    try:
        path = epath.Path(workdir) / "report.html"
        path.write_text(page(workdir))
    except Exception as e:  # a page must not end a training run
        log.warning("no report.html in %s: %s: %s", workdir, type(e).__name__, e)
        return None
    return str(path)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m terrafm_jax.training.report", description=__doc__)
    parser.add_argument("workdir", nargs="+", help="folder of a run, local or gs://")
    workdirs = parser.parse_args(arguments).workdir
    for workdir in workdirs:
        if not (epath.Path(workdir) / "metrics.jsonl").exists():
            print(f"error: {workdir}: no metrics.jsonl; expected the workdir of a run", file=sys.stderr)
            return 1
    written = [path for path in map(write, workdirs) if path]
    for path in written:
        print(path)
    return 0 if len(written) == len(workdirs) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
