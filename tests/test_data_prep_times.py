"""Acquisitions of one place: which Level 1C goes with which Level 2A, which radar is nearest, of many dates, too."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pytest

from data_prep.times import days_apart, nearest_in_time, paired


def dates(count: int, seed: int, unknown: float = 0.0) -> list[str]:
    rng = np.random.default_rng(seed)
    days = [(dt.date(2020, 1, 1) + dt.timedelta(days=int(d))).isoformat() for d in rng.integers(0, 30, count)]
    return ["" if rng.random() < unknown else f"{day}T10:30:21Z" if rng.random() < 0.5 else day for day in days]


@pytest.mark.parametrize("unknown", [0.0, 0.3, 1.0])
def test_the_nearest_radar_is_that_of_looking_at_all(unknown: float) -> None:
    for seed in range(40):
        radar, optical = dates(1 + seed % 12, seed, unknown), dates(15, 100 + seed, unknown / 2)
        nearest = nearest_in_time(radar)
        for number, time in enumerate(optical):
            apart = [(days_apart(r, time), abs(i - number)) for i, r in enumerate(radar)]
            assert nearest(time, number) == apart.index(min(apart))


def test_pairs_share_their_time_and_the_rest_goes_in_order() -> None:
    def same(a: str, b: str) -> bool:
        return bool(a) and a == b

    level_1c = ["2020-01-03", "2020-01-01", "", "2020-01-01", "2020-01-09"]
    found, alone = paired(["2020-01-01", "2020-01-02", "2020-01-01", ""], level_1c, str, same)
    assert found == ["2020-01-01", "2020-01-03", "2020-01-01", ""]
    assert alone == ["2020-01-09"]


def test_many_dates_are_not_compared_with_each_other() -> None:
    compared = 0

    def same(a: str, b: str) -> bool:
        nonlocal compared
        compared += 1
        return a == b

    days = [(dt.date(2000, 1, 1) + dt.timedelta(days=i)).isoformat() for i in range(2000)]
    paired(days[::2], days[1::2], str, same)  # no two are of one day
    paired(days, days[::-1], str, same)
    assert compared <= len(days)
