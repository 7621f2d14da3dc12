"""One spelling of times: ISO 8601, UTC; the days between them; and acquisitions of one time as pairs."""

from __future__ import annotations

import datetime as dt
import re
from bisect import bisect_left
from collections import defaultdict, deque
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


def day_of(time: str) -> int | None:
    """The day of a time as :func:`iso_time` spells it, as a number that counts days; None if it is unknown."""
    try:
        return dt.date.fromisoformat(time[:10]).toordinal()
    except ValueError:
        return None


def days_apart(time: str, other: str) -> float:
    """Days between two times as :func:`iso_time` spells them; infinite if one is unknown."""
    one, two = day_of(time), day_of(other)
    return float("inf") if one is None or two is None else abs(one - two)


def paired(
    level_2a: Sequence[T], level_1c: Sequence[T], moment: Callable[[T], str], same: Callable[[T, T], bool]
) -> tuple[list[T | None], list[T]]:
    """The Level 1C of every Level 2A, None where there is none; and the Level 1C without a Level 2A.

    Those of the ``same`` time belong together; what is left over is paired in order. Only those of one ``moment`` are
    compared (all that are the same must share it), so that a place of many dates takes no time.
    """
    waiting: dict[str, list[int]] = defaultdict(list)
    for i, other in enumerate(level_1c):
        waiting[moment(other)].append(i)
    found: list[T | None] = []
    taken = set()
    for one in level_2a:
        those = waiting.get(moment(one), [])
        match = next((i for i in those if same(one, level_1c[i])), None)
        if match is not None:
            those.remove(match)
            taken.add(match)
        found.append(None if match is None else level_1c[match])
    left = deque(other for i, other in enumerate(level_1c) if i not in taken)
    for i, match in enumerate(found):
        if match is None and left:
            found[i] = left.popleft()
    return found, list(left)


def nearest_in_time(times: Sequence[str]) -> Callable[[str, int], int]:
    """A function (time, position) -> position in ``times`` of the one nearest in days.

    Of those as near, as where no times are known, the one nearest in position, then the first.
    """
    by_day: dict[int | None, list[int]] = defaultdict(list)
    for i, time in enumerate(times):
        by_day[day_of(time)].append(i)
    days = sorted(day for day in by_day if day is not None)

    def nearest(time: str, position: int) -> int:
        own, groups = day_of(time), [range(len(times))]
        if own is not None and days:
            at = bisect_left(days, own)
            around = days[max(at - 1, 0) : at + 1]
            least = min(abs(day - own) for day in around)
            groups = [by_day[day] for day in around if abs(day - own) == least]
        found = []
        for group in groups:
            at = bisect_left(group, position)
            found += group[max(at - 1, 0) : at + 1]
        return min(found, key=lambda i: (abs(i - position), i))

    return nearest
