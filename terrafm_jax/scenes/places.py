"""Features at places: one window is centered on every place, so that no place lies at a border."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np

from terrafm_jax.scenes.grid import Chunk, Plan
from terrafm_jax.scenes.read import Pixels, SceneReader
from terrafm_jax.scenes.run import Encode, Stopped, Work, prepare, read_ahead, signals
from terrafm_jax.scenes.store import UnfinishedPlaces

Group = list[tuple[int, Work]]  # places with their windows


class Places:
    """Embeds places into an unfinished result, from wherever that stands.

    Args:
      encode: see :data:`run.Encode`; called with ``batch`` windows at a time.
      reader, plan: as of :class:`run.Job`; overlap and stride do not matter.
      points: float64 [N, 2], x and y in the CRS of the grid.
      width: features per token.
      inside: bool [rows, columns] of the plan's output: places elsewhere are not wanted. None = all.

    Attributes:
      wanted: positions in ``points`` of those that lie in the scene and are wanted.
      chunks: the window of each of these.
      batch: windows at once.
    """

    def __init__(
        self,
        encode: Encode,
        reader: SceneReader,
        plan: Plan,
        points: np.ndarray,
        width: int,
        inside: np.ndarray | None = None,
    ):
        self._encode, self._reader, self._plan, self._width = encode, reader, plan, width
        grid, p = plan.grid, plan.patch
        self._side = min(plan.window, grid.height // p * p, grid.width // p * p)
        self._at = np.stack([grid.y - points[:, 1], points[:, 0] - grid.x], 1) / grid.gsd  # pixels down and across
        limits = np.array([grid.height, grid.width])
        wanted = ((self._at >= 0) & (self._at <= limits)).all(1)
        if inside is not None:
            out = plan.output
            cells = np.floor(np.stack([out.y - points[:, 1], points[:, 0] - out.x], 1) / out.gsd)
            rows, columns = np.clip(cells, 0, np.array(inside.shape) - 1).astype(int).T
            wanted &= inside[rows, columns]
        self.wanted = np.flatnonzero(wanted)
        corners = np.clip(np.round(self._at[self.wanted]).astype(int) - self._side // 2, 0, limits - self._side)
        self.chunks = [Chunk(row, (column,), self._side, self._side) for row, column in corners.tolist()]
        self.batch = min(plan.batch, max(len(self.chunks), 1))

    def run(
        self,
        unfinished: UnfinishedPlaces,
        *,
        progress: Callable[[int], None] = lambda places: None,
        threads: int = 2,
        save_seconds: float = 30.0,
        stop_after: int | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Does what is left.

        Args:
          progress: called with the number of places done since the last call.
          threads, save_seconds, stop_after (in batches): as of :meth:`run.Job.run`.

        Returns:
          float32 [N, d] bilinear mean of the four tokens around the place, and [N, d] class token; NaN where the
          place lies outside or was not measured.

        Raises:
          Stopped, SceneError: as :meth:`run.Job.run`.
        """
        count, done = len(self.chunks), unfinished.open()
        progress(len(self._at) - count + done)
        saved = time.perf_counter()
        with signals() as stop, closing(self.groups(done, threads)) as groups:
            for batches, (places, group) in enumerate(groups, 1):
                unfinished.write(done, self._vectors(places, group))
                done += len(places)
                progress(len(places))
                enough = bool(stop) or batches == stop_after
                if enough or time.perf_counter() - saved > save_seconds:
                    unfinished.save(done)
                    saved = time.perf_counter()
                if enough and done < count:
                    kept = "everything is kept; the same command goes on from there"
                    raise Stopped(f"stopped after {done} of {count} places, {kept}")
        unfinished.save(done)
        found = np.full((2, len(self._at), self._width), np.nan, np.float32)
        found[:, self.wanted] = unfinished.vectors(count).swapaxes(0, 1)
        return found[0], found[1]

    def groups(self, first: int, threads: int) -> Iterator[tuple[np.ndarray, Group]]:
        """Batches of places from window ``first`` on, with the windows of those that have pixels."""
        one = dataclasses.replace(self._plan, batch=1)
        with closing(read_ahead(self.chunks[first:], threads, lambda c: prepare(self._reader, one, c))) as works:
            for start in range(first, len(self.chunks), self.batch):
                places = self.wanted[start : start + self.batch]
                yield places, [(i, work) for i, work in zip(places, works, strict=False) if work.kept]

    def windows(self, group: Group) -> dict[str, Pixels]:
        """The windows of several places, padded to one size by repeating the last."""
        padded = [work.windows for _, work in [*group, *[group[-1]] * (self.batch - len(group))]]
        return {
            key: Pixels(np.concatenate([w[key].values for w in padded]), np.concatenate([w[key].valid for w in padded]))
            for key in padded[0]
        }

    def _vectors(self, places: np.ndarray, group: Group) -> np.ndarray:
        """float32 [places, 2, d]: tokens around each and class token, NaN without pixels."""
        found = np.full((len(places), 2, self._width), np.nan, np.float32)
        if not group:
            return found
        row_of = {place: row for row, place in enumerate(places.tolist())}
        for (place, work), cls, patches in zip(group, *self._encode(self.windows(group)).result(), strict=False):
            down, across = (self._at[place] - (work.chunk.row, work.chunk.columns[0])) / self._plan.patch
            tokens = self._side // self._plan.patch
            weight = _bilinear(down, tokens)[:, None] * _bilinear(across, tokens) * work.valid[0]
            found[row_of[place], 1] = cls
            if weight.sum() > 0:
                found[row_of[place], 0] = np.tensordot(weight, patches, 2) / weight.sum()
        return found


def _bilinear(at: float, count: int) -> np.ndarray:
    """float64 [count]: weights of the tokens along one axis for a place ``at`` tokens from the first border."""
    return np.maximum(0.0, 1.0 - np.abs(np.arange(count) + 0.5 - np.clip(at, 0.5, count - 0.5)))
