"""Loaders over small data sets, and comparison of their batches (a helper of the pipeline's tests)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.data import pipeline
from terrafm_jax.data.pipeline import make_loader, make_order
from terrafm_jax.data.sampling import SamplingSpec

UNIFORM = SamplingSpec("uniform")


def loader(
    folder: Path,
    batch_size: int = 8,
    sampling: SamplingSpec = UNIFORM,
    *,
    process: int = 0,
    processes: int = 1,
    **options: Any,
) -> pipeline.Loader:
    """The loader of one of several processes, each of which holds a contiguous part of the batch."""
    shared = {k: options[k] for k in ("sensors", "canvases") if k in options}
    order = make_order(folder, "train", sampling, batch_size=batch_size, seed=0, **shared)
    rows = np.arange(batch_size).reshape(processes, -1)[process]
    return make_loader(folder, "train", order, **{"rows": rows, **options})


def take(batches: pipeline.Loader, count: int) -> list[dict[str, Any]]:
    """Batches whose arrays are copies."""
    out = [map_tree(np.copy, next(batches)) for _ in range(count)]
    batches.close()
    return out


def map_tree(function: Any, tree: Any) -> Any:
    return {k: map_tree(function, v) for k, v in tree.items()} if isinstance(tree, dict) else function(tree)


def leaves(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    if not isinstance(tree, dict):
        return {path: np.asarray(tree)}
    return {k: v for name, sub in tree.items() for k, v in leaves(sub, f"{path}/{name}").items()}


def assert_same(first: Any, second: Any) -> None:
    one, two = leaves(first), leaves(second)
    assert one.keys() == two.keys()
    for path in one:
        assert one[path].dtype == two[path].dtype, path
        assert np.array_equal(one[path], two[path]), path
