"""One spelling of times: ISO 8601, UTC; the days between them; and acquisitions of one time as pairs."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def iso_time(value: Any) -> str:
    """``20200223T032739``, ``2020-02-23 03:27:39.024``, a datetime, a date ... -> ``2020-02-23T03:27:39Z``.

    A value without a time of day keeps the date alone; one without a date becomes "".
    """
    if value is None:
        return ""
    text = value.isoformat() if isinstance(value, dt.date) else str(value)
    found = re.search(
        r"(\d{4})-?(\d{2})-?(\d{2})(?:[T ](\d{2}):?(\d{2}):?(\d{2})?(?:\.\d+)?([+-]\d{2}:?\d{2})?)?", text
    )
    if not found:
        return ""
    year, month, day, hour, minute, second, zone = found.groups()
    try:
        if hour is None:
            return dt.date(int(year), int(month), int(day)).isoformat()
        moment = dt.datetime(int(year), int(month), int(day), int(hour), int(minute), int(second or 0))
    except ValueError:
        return ""
    if zone:
        sign = 1 if zone[0] == "+" else -1
        moment -= sign * dt.timedelta(hours=int(zone[1:3]), minutes=int(zone[-2:]))
    return moment.isoformat() + "Z"


def days_apart(time: str, other: str) -> float:
    """Days between two times as :func:`iso_time` spells them; infinite if one is unknown."""
    try:
        return abs((dt.date.fromisoformat(time[:10]) - dt.date.fromisoformat(other[:10])).days)
    except ValueError:
        return float("inf")


def paired(
    level_2a: Sequence[T], level_1c: Sequence[T], same: Callable[[T, T], bool]
) -> tuple[list[T | None], list[T]]:
    """The Level 1C of every Level 2A, None where there is none; and the Level 1C without a Level 2A.

    Those of the ``same`` time belong together; what is left over is paired in order.
    """
    left = list(level_1c)
    found: list[T | None] = []
    for one in level_2a:
        match = next((other for other in left if same(one, other)), None)
        if match is not None:
            left.remove(match)
        found.append(match)
    for i, match in enumerate(found):
        if match is None and left:
            found[i] = left.pop(0)
    return found, left
