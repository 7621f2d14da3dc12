"""Can two embeddings be compared? What their tags say of bands, sampling, units and offsets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from terrafm_jax.scenes.finish import WARNINGS_TAG
from terrafm_jax.scenes.products import is_product, offset_of

_STEM = "(upstream L2A stem)"


def tags(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """What makes two embeddings of the same weights incomparable, and what only speaks against comparing them.

    A tag that one of them lacks (written before there was such a tag) says nothing.
    """
    wrong, doubts = [], []
    ours, theirs = _json(a, "TERRAFM_BANDS"), _json(b, "TERRAFM_BANDS")
    if ours and theirs and set(ours) != set(theirs):
        wrong.append(f"their sensors differ ({_list(ours)} and {_list(theirs)}); embed both from the same sensors")
    for key in [k for k in ours if k in theirs and ours[k] != theirs[k]]:
        lacking = sorted(set(ours[key]) ^ set(theirs[key]))
        wrong.append(f"their bands of {key} differ ({', '.join(lacking)} in one only); embed both with the same bands")
    if _differ(a, b, "TERRAFM_STATISTICS"):
        ours, theirs = _json(a, "TERRAFM_STATISTICS"), _json(b, "TERRAFM_STATISTICS")
        if any(ours[k] != theirs[k] for k in set(ours) & set(theirs)) and not wrong:
            wrong.append("their normalization statistics differ; embed both with the same --checkpoint")
    if "TERRAFM_CHECKPOINT" in a and "TERRAFM_CHECKPOINT" in b:
        stems = [_STEM in x["TERRAFM_CHECKPOINT"] for x in (a, b)]
        if stems[0] != stems[1]:
            wrong.append("one was made with --upstream-l2a-stem; embed both alike")
    if _differ(a, b, "TERRAFM_GSD"):
        wrong.append(f"their samplings differ ({a['TERRAFM_GSD']} and {b['TERRAFM_GSD']} m); embed both at one --gsd")
    if _differ(a, b, "TERRAFM_WINDOW") and a["TERRAFM_WINDOW"].split(",")[0] != b["TERRAFM_WINDOW"].split(",")[0]:
        doubts.append(f"their windows differ ({a['TERRAFM_WINDOW']}; {b['TERRAFM_WINDOW']})")
    doubts += _offsets(_json(a, "TERRAFM_SOURCES"), _json(b, "TERRAFM_SOURCES"))
    doubts += [f"one was made with a warning: {x[WARNINGS_TAG]}" for x in (a, b) if x.get(WARNINGS_TAG)]
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
