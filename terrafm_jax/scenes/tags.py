"""Tags of embeddings: how one was made, and whether two can be compared."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from terrafm_jax.provenance import place, portable
from terrafm_jax.scenes.products import is_product, offset_of

if TYPE_CHECKING:
    from terrafm_jax.inference import Model
    from terrafm_jax.scenes.grid import Plan
    from terrafm_jax.scenes.read import SceneReader

WEIGHTS = "TERRAFM_WEIGHTS"  # hash of the weights; a file without it is not one of our embeddings
CHECKPOINT, CODE, STATISTICS = "TERRAFM_CHECKPOINT", "TERRAFM_CODE", "TERRAFM_STATISTICS"
BANDS, SOURCES, GSD = "TERRAFM_BANDS", "TERRAFM_SOURCES", "TERRAFM_GSD"
WINDOW, COMPOSITE = "TERRAFM_WINDOW", "TERRAFM_COMPOSITE"
JOB = "TERRAFM_JOB"  # digest of inputs and settings of the finished job
WARNINGS = "TERRAFM_WARNINGS"
CHANGE = "TERRAFM_CHANGE"  # of a map of change, which has the weights' tag but holds no features
_STEM = "(upstream L2A stem)"


def of_scene(model: Model, reader: SceneReader, plan: Plan, args: argparse.Namespace) -> dict[str, str]:
    """Everything needed to make the output of a command again; files by name, since other people get the output."""
    statistics = {k: [np.asarray(v).tolist() for v in model.stats[k]] for k in reader.bands}
    sources = {
        key: [
            {"files": [place(p) for p in a.paths], **{k: getattr(a, k) for k in ("product", "time", "unit", "offset")}}
            for a in dates
        ]
        for key, dates in reader.dates.items()
    }
    area = portable(args.aoi) or "none"
    return {
        WEIGHTS: str(model.weights_hash),
        CHECKPOINT: place(args.checkpoint) + (f" {_STEM}" if args.upstream_l2a_stem else ""),
        CODE: f"terrafm_jax {importlib.metadata.version('terrafm_jax')}",
        STATISTICS: json.dumps(statistics),
        BANDS: json.dumps({k: list(v) for k, v in reader.bands.items()}),
        SOURCES: json.dumps(sources),
        GSD: f"{plan.grid.gsd:g}",
        WINDOW: f"{plan.window} px, overlap {plan.overlap} px, stride {plan.stride} px",
        COMPOSITE: f"{args.composite}; masks {portable(args.mask)}; scl {args.use_scl}; aoi {area}",
    }


def against(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What makes two embeddings of the same weights incomparable, and what only casts doubt on a comparison.

    A tag that only one of them has (the other is older) says nothing.
    """
    wrong, doubts = [], []
    ours, theirs = _json(a, BANDS), _json(b, BANDS)
    if ours and theirs and set(ours) != set(theirs):
        wrong.append(f"their sensors differ ({_list(ours)} and {_list(theirs)}); embed both from the same sensors")
    for key in [k for k in ours if k in theirs and ours[k] != theirs[k]]:
        lacking = sorted(set(ours[key]) ^ set(theirs[key]))
        wrong.append(f"their bands of {key} differ ({', '.join(lacking)} in one only); embed both with the same bands")
    if _differ(a, b, STATISTICS):
        ours, theirs = _json(a, STATISTICS), _json(b, STATISTICS)
        if any(ours[k] != theirs[k] for k in set(ours) & set(theirs)) and not wrong:
            wrong.append("their normalization statistics differ; embed both with the same --checkpoint")
    if CHECKPOINT in a and CHECKPOINT in b:
        stems = [_STEM in x[CHECKPOINT] for x in (a, b)]
        if stems[0] != stems[1]:
            wrong.append("one was made with --upstream-l2a-stem; embed both alike")
    if _differ(a, b, GSD):
        wrong.append(f"their samplings differ ({a[GSD]} and {b[GSD]} m); embed both at one --gsd")
    if _differ(a, b, WINDOW) and a[WINDOW].split(",")[0] != b[WINDOW].split(",")[0]:
        doubts.append(f"their windows differ ({a[WINDOW]}; {b[WINDOW]})")
    doubts += _offsets(_json(a, SOURCES), _json(b, SOURCES))
    doubts += [f"one was made with a warning: {x[WARNINGS]}" for x in (a, b) if x.get(WARNINGS)]
    return wrong, doubts


def _offsets(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Offsets or units that differ, unless the products' own baselines explain it."""
    found = []
    for key in [k for k in ours if k in theirs]:
        dates = [*ours[key], *theirs[key]]
        for what in ("offset", "unit"):
            values = [sorted({str(d.get(what)) for d in side[key]}) for side in (ours, theirs)]
            explained = what == "offset" and all(
                is_product(str(d.get("product"))) and offset_of(str(d["product"])) == d.get("offset") for d in dates
            )
            if values[0] != values[1] and not explained:
                shown = " and ".join(", ".join(v) for v in values)
                found.append(f"their {what}s of {key} differ ({shown}): right only if each is what its files hold")
    return found


def _differ(a: Mapping[str, str], b: Mapping[str, str], tag: str) -> bool:
    return tag in a and tag in b and a[tag] != b[tag]


def _json(found: Mapping[str, str], tag: str) -> dict[str, Any]:
    try:
        return dict(json.loads(found.get(tag, "{}")))
    except (ValueError, TypeError):
        return {}


def _list(names: Mapping[str, Any]) -> str:
    return " + ".join(names)
