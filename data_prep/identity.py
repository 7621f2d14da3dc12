"""What makes two preparations the same job, and in words what differs where they are not."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.chunks import Job, Unit

_FLAGS = {
    "tile_size": "--tile-size", "stride": "--stride", "require": "--require", "max_nodata": "--max-nodata",
    "sea_keep": "--sea-keep", "shares": "--split-shares", "degrees": "--block-degrees", "seed": "--seed",
    "keep_map": "land-cover map kept", "snap": "--snap-origin", "chunk_size": "--cells-per-shard",
    "shards": "--compression", "worldcover": "--worldcover", "worldcover_missing": "--worldcover-missing",
}  # fmt: skip
_UNSAID = {"worldcover": "a folder of maps", "worldcover_missing": "error"}  # stand in no parts
Parts = dict[str, str]


def parts_of(job: Job, units: Sequence[Unit], chunk_size: int) -> Parts:
    """What must be equal for a folder to be continued, and its ``digest``."""
    options = json.dumps(dataclasses.asdict(job.options), sort_keys=True)
    names = hashlib.blake2b(digest_size=16)
    for unit in sorted(units, key=lambda u: (u.cell, u.number)):
        names.update(f"{unit.key}|{unit.products}|{unit.split}|{unit.outlook}\n".encode())
    parts = {"options": options, "cells": names.hexdigest(), "chunk_size": str(chunk_size), "shards": job.compression}
    if job.cover.folder is None:  # another folder of the same maps is the same job
        parts["worldcover"] = "none"
    elif job.cover.missing_is_sea:
        parts["worldcover_missing"] = "sea"
    stated = getattr(job.source, "stated", {})  # what the user says of the files decides about the content, too
    if stated:
        parts["source"] = json.dumps(stated, sort_keys=True)
    return {**parts, "digest": hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()}


def differences(found: Mapping[str, Any], wanted: Mapping[str, str]) -> list[str]:
    """``--sea-keep 1.0 there, 0.5 now``: one text for each thing that two jobs do not share."""
    there, now = _flat(found), _flat(wanted)
    texts = []
    for name in dict.fromkeys((*there, *now)):
        if there.get(name) == now.get(name):
            continue
        if name == "cells":
            texts.append("other cells (names, products or splits)")
        elif name == "manifest":
            texts.append("other statements in the manifest (bands, units, dates, offsets, nodata)")
        else:
            values = [_shown(flags.get(name, _UNSAID.get(name))) for flags in (there, now)]
            texts.append(f"{_FLAGS.get(name, name)} {values[0]} there, {values[1]} now")
    return texts


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in parts.items():
        if name in ("options", "source"):
            value = json.loads(value)
            blocks = value.pop("blocks", {})
            result |= value | blocks
        elif name != "digest":
            result[name] = value
    return result


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "not given"
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
