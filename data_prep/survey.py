"""The baseline offset is decided once per product and level, never per tile.

A product that covers many cells is looked at in one of them (the next, where the pixels cannot tell),
before any record is written; products that appear once are decided while they are prepared.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from data_prep.chunks import Job, SourceUnavailable, Unit
from data_prep.harmonize import Offset, decide_offset
from data_prep.optical import optical
from data_prep.write import write_text
from terrafm_jax.data.source import read_json

TRIES = 3  # cells of one product to look at before its id decides alone
UNDECIDED = (None, True)
Key = tuple[str, str]  # sensor, product id
Verdicts = dict[Key, tuple[float | None, bool]]  # what the pixels suggest, and whether the product id has a say


def look(job: Job, unit: Unit) -> Verdicts:
    """What the pixels of one cell say about each of its Sentinel-2 products; {} if the cell cannot be read."""
    try:
        cell = job.source.read(unit)
        return {
            unit.product_of(key): (optical(key, given, job.options.snap).verdict, given.unit != "reflectance")
            for key, given in cell.sensors.items()
            if key != "s1" and given.offset is None
        }
    except SourceUnavailable:
        raise
    except (ValueError, OSError, RuntimeError):
        return {}  # it will be rejected, with the reason, when it is prepared


def survey(units: Sequence[Unit], run: Callable[[list[Unit]], Iterable[Verdicts]], record: Path) -> dict[Key, Offset]:
    """Offsets of all products that several units share.

    Args:
      units: all units of the job.
      run: applies :func:`look` to units, in order, in parallel or not.
      record: JSON file that keeps the result for a continued run.
    """
    if record.exists():
        return read_json(record, lambda rows: {tuple(k): Offset(**v) for k, v in rows})
    candidates = _shared(units)
    verdicts: Verdicts = {}
    tries: Counter[Key] = Counter()
    while True:
        chosen: dict[str, Unit] = {}
        for key, found in candidates.items():
            if verdicts.get(key, UNDECIDED)[0] is None and tries[key] < min(TRIES, len(found)):
                # Cells far apart in the list are rarely overcast together.
                unit = found[tries[key] * (len(found) - 1) // max(1, min(TRIES, len(found)) - 1)]
                chosen[unit.key] = unit
                tries[key] += 1
        if not chosen:
            break
        for seen in run([chosen[name] for name in sorted(chosen)]):
            for key, verdict in seen.items():
                if key in candidates and verdicts.get(key, UNDECIDED)[0] is None:
                    verdicts[key] = verdict
    offsets = {}
    for key in sorted(candidates):
        verdict, has_say = verdicts.get(key, UNDECIDED)
        # The file's name is what speaks for a scene without a product id (``Unit.products``).
        offsets[key] = decide_offset(key[1].rpartition("/")[2] if has_say else "", verdict)
    write_text(record, json.dumps([[key, dataclasses.asdict(offset)] for key, offset in offsets.items()]))
    return offsets


def _shared(units: Sequence[Unit]) -> dict[Key, list[Unit]]:
    """Sentinel-2 products of more than one unit, with their units in order of the cell."""
    found: dict[Key, list[Unit]] = defaultdict(list)
    for unit in sorted(units, key=lambda u: (u.cell, u.number)):
        for key, product in unit.products:
            if key != "s1":
                found[(key, product)].append(unit)
    return {key: those for key, those in found.items() if len(those) > 1}
