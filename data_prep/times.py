"""One spelling of times: ISO 8601, UTC; and the days between them."""

from __future__ import annotations

import datetime as dt
import re
from typing import Any


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
