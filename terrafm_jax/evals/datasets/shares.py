"""Splits drawn by shares: seeded, stratified, and as large as asked for."""

from __future__ import annotations

import numpy as np


def random_splits(count: int, labels: np.ndarray | None, shares: dict[str, float], seed: int) -> dict[str, list[int]]:
    """Sorted rows of each split, drawn at random, stratified where labels [count] are classes."""
    groups = [np.arange(count)]
    if labels is not None and labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
        groups = [np.nonzero(labels == c)[0] for c in np.unique(labels)]
    rng, out = np.random.default_rng(seed), {k: [] for k in shares}
    wanted = np.array(list(shares.values()))
    seen, drawn = 0, np.zeros(len(wanted), int)
    for members in groups:
        seen += len(members)
        sizes = _sizes(len(members), wanted, seen * wanted - drawn)
        drawn += sizes
        for name, part in zip(shares, np.split(rng.permutation(members), np.cumsum(sizes)[:-1]), strict=True):
            out[name] += part.tolist()
    return {k: sorted(v) for k, v in out.items()}


def _sizes(count: int, shares: np.ndarray, lacking: np.ndarray) -> np.ndarray:
    """How many of ``count`` each split gets: its share rounded down, the rest to where most is ``lacking``.

    Rounding each class for itself would add up: twelve images a class gave 70, 30 and 20 of 120 instead of 72, 24, 24.
    The first split with a share, train as a rule, gets one of every class before the others do.
    """
    sizes = np.floor(count * shares + 1e-9).astype(int)
    lacking = np.where(shares > 0, lacking - sizes, -np.inf)
    for _ in range(count - sizes.sum()):
        first = int(np.argmax(shares > 0))
        chosen = first if not sizes[first] else int(np.argmax(lacking))
        sizes[chosen] += 1
        lacking[chosen] -= 1
    return sizes
