"""Results as tables: markdown with the published rows beside ours, and paired differences (figures: ``charts``)."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals import crossval, metrics
from terrafm_jax.evals.protocols import headline
from terrafm_jax.evals.published import published

Row = dict[str, Any]
RAW_UNITS = ("rmse", "mae", "r2")  # metrics that are not shares: printed as they are
_IN_UNIT = ("rmse", "mae")  # of the target
_LIMITS = {"rmse": (0.0, np.inf), "mae": (0.0, np.inf), "r2": (-np.inf, 1.0)}  # shares: 0 to 1


def read_rows(path: Path) -> list[Row]:
    """Rows of results.jsonl; the last of equal keys counts, a half-written last line is left out."""
    found: dict[str, Row] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            found[row["key"]] = row
    return list(found.values())


def failures(rows: Sequence[Row]) -> list[Row]:
    """The last error of each evaluation that has no result so far."""

    def tried(row: Row) -> tuple:
        names = row["model"], row["dataset"]
        if not row.get("protocol"):  # failed before any protocol: every result of the data set tells that it works now
            return names
        how = row["protocol"].split("/")[0], row.get("fraction"), row.get("shots"), row.get("seed")
        return *names, tuple(row.get("inputs", ())), *how

    results = {tried(row) for row in rows if "error" not in row}
    results |= {names[:2] for names in results}
    last = {tried(row): row for row in rows if "error" in row}
    return [row for names, row in last.items() if names not in results]


_IDENTITY = ("model", "weights", "dataset", "note", "inputs", "image_size", "protocol", "fraction", "shots", "seed")


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last row of each evaluation: one repeated, say with more resamples, is not a second draw of labels."""
    return list({json.dumps([r.get(k) for k in _IDENTITY]): r for r in rows if "error" not in r}.values())


def _cell(rows: Sequence[Row], metric: str) -> str:
    """One run: value with its interval; several draws of labels: mean, deviation over them and interval."""
    values = [r["metrics"][metric]["value"] for r in rows if metric in r["metrics"]]
    if not values:
        return "–"
    factor, digits = (1, 3) if metric in RAW_UNITS else (100, 1)
    i = interval(rows, metric)
    between = "" if np.isnan(i.low) else f" [{factor * i.low:.{digits}f}, {factor * i.high:.{digits}f}]"
    if len(values) == 1:
        return f"{factor * i.value:.{digits}f}{between}"
    sd = metrics.summarize_seeds(values)[1]
    return f"{factor * i.value:.{digits}f} ± {factor * sd:.{digits}f}{between} (n={len(values)})"


def interval(rows: Sequence[Row], metric: str) -> metrics.Interval:
    """Over test samples; where labels were drawn several times, over the draws as well. NaN ends: not computed."""

    def read(entry: Mapping[str, float | None]) -> metrics.Interval:
        low, high = (np.nan if entry.get(k) is None else entry[k] for k in ("low", "high"))
        return metrics.Interval(entry["value"], low, high)

    found = [read(r["metrics"][metric]) for r in rows if metric in r["metrics"]]
    if len(found) == 1:
        return found[0]
    i = metrics.over_draws([f.value for f in found], metrics.mean_interval(found))
    least, most = _LIMITS.get(metric, (0.0, 1.0))
    return metrics.Interval(i.value, np.clip(i.low, least, most), np.clip(i.high, least, most))


def _setting(row: Row) -> tuple[str, float, int]:
    return row["protocol"], row["fraction"], row["shots"]


def amount(fraction: float, shots: int) -> str:
    return f"{shots} label{'s' * (shots > 1)} per class" if shots else f"{100 * fraction:g} % of the train labels"


def markdown(rows: Sequence[Row]) -> str:
    """Tables by protocol and label amount: our models, then the published rows of the same protocol."""
    rows = newest(rows)
    legend = "brackets: 95 % bootstrap interval over the test samples"
    if any(r.get("seed") for r in rows):
        legend += (
            "; of n draws of labels, ±: standard deviation over the draws, brackets: 95 % interval of their mean, "
            "Student's t over the draws and the bootstrap over the test samples added in squares"
        )
    parts = ["# Results\n", f"Shares in percent, {legend}.\n"]
    for setting in sorted({_setting(r) for r in rows}):
        chosen = [r for r in rows if _setting(r) == setting]
        parts.append(_table(setting, chosen))
    counts = {f"- {r['dataset']}: {_counts(r['samples'])} samples" for r in rows if r.get("samples")}
    licenses = {f"- {r['dataset']}: license of the data: {r['license']}" for r in rows if r.get("license")}
    notes = sorted(counts | licenses | {f"- {r['dataset']}: {r['note']}" for r in rows if r.get("note")})
    if notes:
        parts += ["## Notes\n", *notes, ""]
    return "\n".join(parts)


def _counts(samples: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {split}" for split, count in samples.items())


def _table(setting: tuple[str, float, int], rows: Sequence[Row]) -> str:
    protocol, fraction, shots = setting
    datasets = sorted({r["dataset"] for r in rows})
    metric = {d: headline(protocol.split("/")[0], next(r["task"] for r in rows if r["dataset"] == d)) for d in datasets}
    known = {} if shots else published(protocol, fraction, datasets)
    for by_dataset in known.values():
        for d, number in by_dataset.items():
            if any(number.metric in r["metrics"] for r in rows if r["dataset"] == d):
                metric[d] = number.metric
    unit = {r["dataset"]: f" in {r['unit']}" for r in rows if r.get("unit")}
    named = {d: metric[d] + unit.get(d, "") * (metric[d] in _IN_UNIT) for d in datasets}
    header = ["model", "inputs", "px"] + [f"{d} ({named[d]})" for d in datasets]
    lines = [f"## {protocol}, {amount(fraction, shots)}\n"]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for r in rows:
        groups[(r["model"] + variant(r, rows), "+".join(r["inputs"]), r["image_size"])].append(r)
    for (model, inputs, size), found in sorted(groups.items()):
        cells = [_cell([r for r in found if r["dataset"] == d], metric[d]) for d in datasets]
        lines.append("| " + " | ".join([model, inputs, str(size or "own"), *cells]) + " |")
    for model, numbers in known.items():
        fits = {d: n.value for d, n in numbers.items() if n.metric == metric[d]}
        cells = [f"{fits[d]:.1f}" if d in fits else "–" for d in datasets]
        lines.append("| " + " | ".join([f"*{model} (published)*", "", "", *cells]) + " |")
    return "\n".join(lines) + "\n"


def variant(row: Row, rows: Sequence[Row]) -> str:
    """What sets a row apart from others of its name: different weights, or another reading of the data set."""
    parts = []
    if len({r.get("weights") for r in rows if r["model"] == row["model"]}) > 1:
        parts.append(row["weights"][:6])
    if len({r.get("note") for r in rows if (r["dataset"], r["inputs"]) == (row["dataset"], row["inputs"])}) > 1:
        parts.append((row.get("note") or "").split(";")[0])
    return f" ({', '.join(parts)})" if parts else ""


def paired_table(rows: Sequence[Row], folder: Path) -> str:
    """Differences between models on the same test samples, with paired 95 % intervals (classification, multilabel).

    The checkpoint that was named first is the minuend. Where labels were drawn several times, the mean over the draws,
    its interval over samples and draws (:func:`metrics.over_draws`).
    """
    groups: dict[tuple, dict[tuple, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for r in rows:
        if "error" not in r and r["task"] in ("classification", "multilabel"):
            where = (r["dataset"], *_setting(r), tuple(r["inputs"]))
            groups[where][(r["model"], r["weights"], r.get("note") or "", r.get("image_size"))][r["seed"]] = r
    lines = []
    for (dataset, protocol, fraction, shots, inputs), models in sorted(groups.items()):
        where = f"{dataset}, {protocol}, {amount(fraction, shots)}, {'+'.join(inputs)}"
        for a, b in itertools.combinations(models.values(), 2):
            seeds = sorted(a.keys() & b.keys())
            first, second = [a[s] for s in seeds], [b[s] for s in seeds]
            if (found := _paired_folds(first, second, folder) or _paired_metrics(first, second, folder)) is None:
                continue
            drawn = f" (mean of {len(seeds)} draws)" if len(seeds) > 1 else ""
            name, d = found
            text = f"{name} {100 * d.value:+.1f} [{100 * d.low:+.1f}, {100 * d.high:+.1f}]{drawn}"
            sizes = [r[0].get("image_size") for r in (first, second)]
            px = [f" at {size or 'own'} px" if len(set(sizes)) > 1 else "" for size in sizes]
            lines.append(f"| {first[0]['model']}{px[0]} − {second[0]['model']}{px[1]} | {where} | {text} |")
    if not lines:
        return ""
    return "\n".join(["## Paired differences\n", "| models | where | points |", "|---|---|---|", *lines, ""])


def _paired_folds(a: Sequence[Row], b: Sequence[Row], folder: Path) -> tuple[str, metrics.Interval] | None:
    """a - b of cross-validated rows: each sample's share of right answers, paired."""
    shares = [[f["right"] for r in rows if (f := _stored(r, folder)) and "right" in f] for rows in (a, b)]
    if not shares[0] or len(shares[0]) != len(shares[1]) or len({s.shape for part in shares for s in part}) > 1:
        return None
    found = crossval.paired(*(np.mean(s, axis=0) for s in reversed(shares)))
    return "top1", _over_draws([float(np.mean(x) - np.mean(y)) for x, y in zip(*shares, strict=True)], found)


def _over_draws(values: Sequence[float], images: metrics.Interval) -> metrics.Interval:
    return metrics.over_draws(values, images) if len(values) > 1 else images


def _paired_metrics(a: Sequence[Row], b: Sequence[Row], folder: Path) -> tuple[str, metrics.Interval] | None:
    """a - b of rows with predictions of the same test samples."""
    first, second = ([_metric(r, folder) for r in rows] for rows in (a, b))
    if not first or None in first + second or len({count for _, count in first + second}) > 1:
        return None
    name = "top1" if a[0]["task"] == "classification" else "f1_micro"
    means = (metrics.mean_metric([p for p, _ in parts]) for parts in (second, first))
    found, ones = metrics.paired_difference(*means, first[0][1], resamples=500)[name], np.ones(first[0][1])
    return name, _over_draws(
        [p(ones)[name] - q(ones)[name] for (p, _), (q, _) in zip(first, second, strict=True)], found
    )


def _stored(row: Row, folder: Path) -> dict[str, np.ndarray] | None:
    path = folder / "predictions" / f"{row['key']}.npz"
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as f:
        return {name: f[name] for name in f.files}


def _metric(row: Row, folder: Path) -> tuple[metrics.Metric, int] | None:
    """(metric, test samples) of the stored predictions; of several runs the mean, as the row's own value is."""
    found = _stored(row, folder)
    if found is None or found["predictions"].shape != found["targets"].shape:
        return None
    targets, runs = found["targets"], found.get("runs", found["predictions"][None])
    if row["task"] == "multilabel":
        parts = [metrics.multilabel_metric(targets, p, None) for p in runs]
    else:
        parts = [metrics.classification_metric(targets, p, len(row["classes"])) for p in runs]
    return metrics.mean_metric(parts), len(targets)


def as_entry(found: Mapping[str, metrics.Interval]) -> dict[str, dict[str, float | None]]:
    """Intervals as JSON: value, low, high (None where not computed)."""

    def number(v: float) -> float | None:
        return None if np.isnan(v) else float(v)

    return {k: {"value": float(i.value), "low": number(i.low), "high": number(i.high)} for k, i in found.items()}
