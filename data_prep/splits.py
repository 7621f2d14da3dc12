"""Train, validation and holdout by footprint over coarse blocks, so that no two splits share ground."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from terrafm_jax.data.tiles import SPLITS
from terrafm_jax.tables import read_csv


@dataclasses.dataclass(frozen=True)
class BlockSplit:
    """Blocks of about ``degrees`` x ``degrees`` of ground (fewer columns towards the poles), drawn by hash.

    Attributes:
      shares: wanted share of the blocks per split, in the order of ``tiles.SPLITS``; sums to 1.
      degrees: height of a block in latitude, and width in longitude at the equator.
      seed: another seed is another assignment.
    """

    shares: tuple[float, ...] = (0.9, 0.05, 0.05)
    degrees: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.shares) != len(SPLITS) or not (min(self.shares) >= 0 and abs(sum(self.shares) - 1.0) <= 1e-6):
            raise ValueError(f"--split-shares {self.shares}: expected {len(SPLITS)} shares that sum to 1, for {SPLITS}")
        if not 0 < self.degrees <= 30:
            raise ValueError(f"--block-degrees {self.degrees}: expected above 0 and up to 30")

    def blocks(self, lon: np.ndarray, lat: np.ndarray) -> set[tuple[int, int]]:
        """(row, column) of every block that the bounding box of an outline touches.

        Longitudes run without a jump (they may exceed +-180), as ``worldcover.lonlat_outline`` gives them.
        """
        touched = set()
        for row in range(self._row(lat.min()), self._row(lat.max()) + 1):
            middle = min(90.0, abs((row + 0.5) * self.degrees - 90.0))
            count = max(1, round(360.0 / self.degrees * math.cos(math.radians(middle))))
            width = 360.0 / count
            first, last = math.floor((lon.min() + 180.0) / width), math.floor((lon.max() + 180.0) / width)
            touched |= {(row, col % count) for col in range(first, min(last, first + count - 1) + 1)}
        return touched

    def _row(self, lat: float) -> int:
        return math.floor((min(float(lat), 90.0 - 1e-9) + 90.0) / self.degrees)

    def split_of_block(self, block: tuple[int, int]) -> str:
        """Split of one block: a hash of its position and the seed against the shares."""
        drawn = unit_hash(f"block {self.seed} {block[0]} {block[1]}")
        for name, edge in zip(SPLITS, np.cumsum(self.shares), strict=True):
            if drawn < edge:
                return name
        return SPLITS[0]

    def splits(self, lon: np.ndarray, lat: np.ndarray) -> set[str]:
        """The splits of all blocks that a footprint touches."""
        return {self.split_of_block(block) for block in self.blocks(lon, lat)}

    def split(self, lon: np.ndarray, lat: np.ndarray) -> str | None:
        """The split of a footprint, None where it straddles blocks of different splits."""
        found = self.splits(lon, lat)
        return found.pop() if len(found) == 1 else None


def unit_hash(text: str) -> float:
    """A number in [0, 1) that only depends on the text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2.0**64


def read_splits(path: str | Path) -> Mapping[str, str]:
    """Reads ``grid_cell,split`` rows. Raises ValueError naming every fault."""
    rows = [(row["grid_cell"], row["split"]) for row in read_csv(path, ("grid_cell", "split"))]
    found = dict(rows)
    faults = [f"{cell}: split {split!r}, expected one of {list(SPLITS)}" for cell, split in rows if split not in SPLITS]
    faults += [f"{cell}: in {found[cell]} and in {split}" for cell, split in rows if found[cell] != split]
    if faults:
        raise ValueError(f"{path}: " + "; ".join(faults))
    return found
