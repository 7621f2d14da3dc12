"""What a checkpoint says besides the state, and what the next start makes of it."""

from __future__ import annotations

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from terrafm_jax.config import ConfigError, base
from terrafm_jax.sensors import Statistics
from terrafm_jax.training import tools
from terrafm_jax.training.plan import Plan

COUNTS = {"0": {"a": 1}, "1": {"a": 2, "b": 5}}


@pytest.mark.parametrize(
    ("processes", "index", "expected"),
    [(2, 0, {"a": 1}), (2, 1, {"a": 2, "b": 5}), (1, 0, {"a": 3, "b": 5}), (4, 0, {"a": 3, "b": 5}), (4, 2, {})],
)
def test_each_process_takes_up_its_own_count_of_damage(
    processes: int, index: int, expected: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With another number of processes the first takes all: the run's total stays."""
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    assert tools.skipped_before({"skipped": COUNTS}) == expected


def a_plan(**changes: bool) -> Plan:
    config = base()
    config.data.dir = "DATA"
    for key, value in changes.items():
        config[key] = value
    spec, order = SimpleNamespace(stats=Statistics.published()), SimpleNamespace(num_records=40)
    return Plan(config, "RUN", spec, {}, order, None, True)


def test_a_run_goes_on_with_its_own_data_only() -> None:
    meta = {"records": 40, "statistics": json.loads(Statistics.published().to_json())}
    a_plan().check_data(meta)
    a_plan().check_data({})
    with pytest.raises(ConfigError, match=r"config.data.dir: DATA has other records than the data set that RUN"):
        a_plan().check_data({**meta, "records": 41})
    other = json.loads(json.dumps(meta["statistics"]).replace("0", "1"))
    with pytest.raises(ConfigError, match="other records and other statistics"):
        a_plan().check_data({"records": 41, "statistics": other})
    a_plan(allow_config_change=True).check_data({"records": 41})


def test_finite_means_every_leaf() -> None:
    tree = {"a": np.ones(3, np.float32), "b": {"c": np.ones((2, 2), np.float32)}, "step": np.int32(7)}
    assert tools.all_finite(tree)
    tree["b"]["c"][1, 1] = np.inf
    assert not tools.all_finite(tree)
