"""A CSV manifest that says of every file what it is, instead of the naming rule of ``data_prep/scenes.py``.

Columns: ``file``, ``location`` (or ``cell``), ``sensor``; optional ``bands`` (by comma, in the file's
order), ``units`` (dB or power = linear; DN or reflectance), ``date`` (or ``time``; 2022-06-01 or
2022-06-01T10:30:21), ``product``, ``orbit``, ``offset`` (DN), ``nodata``, ``split``. Other columns serve
``--select``. Sensor ``worldcover`` (or units that speak of WorldCover codes) is a land-cover map.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from data_prep.scenes import (
    CLOUD_MASK,
    LANDCOVER,
    PRODUCT,
    SUFFIXES,
    UNKNOWN_SENSOR,
    Scene,
    SceneFile,
    band_list,
    join,
    kind_of,
)
from data_prep.times import iso_time
from data_prep.units import stated_nodata, stated_unit
from terrafm_jax.data.tiles import SPLITS
from terrafm_jax.sensors import BASELINE_OFFSET, SensorError, sensor
from terrafm_jax.tables import read_csv


def from_manifest(path: Path, root: Path, select: Mapping[str, set[str]]) -> tuple[list[Scene], Counter[str]]:
    """Scenes of a CSV manifest and the rows left out, by reason.

    Args:
      path: the manifest.
      root: folder that ``file`` is relative to.
      select: column -> values; rows with another value are left out.

    Raises:
      ValueError: columns are missing, or rows are wrong (all are named).
    """
    rows = read_csv(path, ("file", "sensor", *map(str.lower, select)), lower=True)
    if not rows:
        raise ValueError(f"{path}: no rows; expected one for each file")
    place = next((name for name in ("location", "cell", "grid_cell") if name in rows[0]), None)
    if place is None:
        raise ValueError(f"{path}: columns ['location'] are missing; found {list(rows[0])}")
    found: dict[str, list[SceneFile]] = defaultdict(list)
    splits: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    faults = []
    for line, row in enumerate(rows, 2):
        if any(row[column.lower()] not in values for column, values in select.items()):
            skipped["not selected"] += 1
            continue
        key = _manifest_sensor(row)
        if not key:
            skipped[f"{UNKNOWN_SENSOR}{row['sensor']}"] += 1
            continue
        if Path(row["file"]).suffix.lower() not in SUFFIXES:
            skipped[f"none of {', '.join(SUFFIXES)}"] += 1
            continue
        cell = row[place].replace("/", "_")
        try:
            found[cell].append(_manifest_file(key, row, root))
        except ValueError as error:
            faults.append(f"line {line}: {error}")
        if split := row.get("split"):
            if split not in SPLITS:
                faults.append(f"line {line}: split {split!r}, expected one of {list(SPLITS)}")
            elif splits.setdefault(cell, split) != split:
                faults.append(f"line {line}: split {split!r}, but {row[place]!r} is in {splits[cell]!r} before")
    if faults:
        raise ValueError(f"{path}: " + "; ".join(faults))
    return join(found, splits, skipped), skipped


def _manifest_sensor(row: Mapping[str, str]) -> str:
    """Sensor key, ``landcover`` or ""; understands ``Sentinel-2 L1C``, ``S1GRD``, ``Sentinel-1 GRD (dB)`` ..."""
    text = row["sensor"]
    if "worldcover" in text.lower() or "worldcover" in row.get("units", "").lower():
        return LANDCOVER
    with contextlib.suppress(SensorError):  # no name that the table knows: the pattern below knows more
        return sensor(text).key
    found = re.match(r"(?i)(?:sentinel-?\s?|s)([12])[\s_-]*(rtc|grd|l1c|l2a)", text)
    if not found:
        return ""
    number, rest = found.group(1), found.group(2).lower()
    if (number == "1") != (rest in ("rtc", "grd")):
        return ""
    return "s1" if number == "1" else f"s2_{rest}"


def _manifest_file(key: str, row: Mapping[str, str], root: Path) -> SceneFile:
    """One row. Raises ValueError naming all of bands, units, dates, offsets and nodata that make no sense."""
    units = row.get("units", "")
    measured = key != LANDCOVER and row.get("bands") != CLOUD_MASK
    cells: dict[str, Callable[[], Any]] = {
        "bands": lambda: band_list(key, row["bands"], row["file"]) if key != LANDCOVER and row.get("bands") else (),
        "unit": lambda: stated_unit(key, units) if measured else "",
        "time": lambda: _stated_time(row.get("time") or row.get("date") or "") if key != LANDCOVER else "",
        "offset": lambda: _stated_offset(row["offset"]) if row.get("offset") else None,
        "nodata": lambda: _number("nodata", row.get("nodata") or stated_nodata(units)),
    }
    read, faults = {}, []
    for name, value in cells.items():
        try:
            read[name] = value()
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(", ".join(faults))
    product = row.get("product") or next(
        (m.group(1) for t in (row["file"], row.get("origin_path", "")) if (m := PRODUCT.search(t))), ""
    )
    return SceneFile(
        path=str(root / row["file"]),
        sensor=key,
        kind=kind_of(key, f"{row['sensor']} {units}") if key != LANDCOVER else "",
        product=product,
        orbit=row.get("orbit", ""),
        **read,
    )


def _number(column: str, text: str) -> float | None:
    """A number, None for an empty cell. Raises ValueError naming the column."""
    try:
        return float(text) if text else None
    except ValueError:
        raise ValueError(f"{column} {text!r}: expected a number") from None


def _stated_time(text: str) -> str:
    """ISO 8601, "" for an empty cell or bare years. Raises ValueError: a date that vanishes is not missed later."""
    if re.fullmatch(r"20\d\d(\s*-\s*20\d\d)?(\s*\(.*\))?", text):  # said to be no better known
        return ""
    found = iso_time(text)
    if text and found[:4] < "2014":  # also "": the first Sentinel flew in 2014
        raise ValueError(f"date {text!r}: expected YYYY-MM-DD or YYYY-MM-DDTHH:MM:SS, from 2014 on")
    return found


def _stated_offset(text: str) -> float:
    """DN still inside the stored values. Raises ValueError, also on -1000: the sign that ESA gives its ADD_OFFSET."""
    offset = _number("offset", text)
    if offset is None or not 0 <= offset <= BASELINE_OFFSET:
        raise ValueError(f"offset {text}: expected the DN to subtract, 0..{BASELINE_OFFSET:.0f}")
    return offset
