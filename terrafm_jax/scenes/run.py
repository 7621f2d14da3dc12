"""The work: read ahead, encode, blend, write; interrupted jobs go on where they stopped."""

from __future__ import annotations

import collections
import dataclasses
import json
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.scenes.grid import Chunk, Grid, Plan
from terrafm_jax.scenes.read import Pixels, SceneReader
from terrafm_jax.scenes.store import Blender, Unfinished

# Windows of one sensor: values float32 [B, H, W, bands] and valid bool [B, H, W].
Windows = Mapping[str, Pixels]
# Starts to encode windows: class tokens [B, d] and patch tokens [B, h, w, d], float32.
Encode = Callable[[Windows], Future[tuple[np.ndarray, np.ndarray]]]


class Stopped(Exception):
    """The job was interrupted after a snapshot; starting it again goes on."""


@dataclasses.dataclass
class Summary:
    """What a job did: windows in all, encoded, skipped as empty, done before this start; seconds by kind.

    ``square_kilometers`` is the area of the windows of this start.
    """

    windows: int = 0
    encoded: int = 0
    empty: int = 0
    resumed: int = 0
    seconds: float = 0.0
    reading: float = 0.0
    square_kilometers: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """A chunk with its pixels: the windows worth encoding, and which of their tokens count.

    Attributes:
      chunk: the windows.
      kept: positions in ``chunk.columns`` of the windows with any token that counts.
      windows: pixels of those, padded to a constant batch by repeating the last one; empty if there are none.
      valid: bool [kept, h, w] tokens that are wanted and whose ground within the scene was measured well enough.
    """

    chunk: Chunk
    kept: tuple[int, ...]
    windows: dict[str, Pixels]
    valid: np.ndarray


def prepare(
    reader: SceneReader, plan: Plan, chunk: Chunk, min_ground: float = 0.5, inside: np.ndarray | None = None
) -> Work:
    """Reads the pixels under a chunk once and cuts its windows out of them; ``min_ground``, ``inside``: see Job."""
    p, left = plan.patch, chunk.columns[0]
    tokens = (len(chunk.columns), chunk.height // p, chunk.width // p)
    wanted = np.ones(tokens, bool)
    if inside is not None:
        wanted = np.stack([inside[plan.tokens_of(chunk, column)] for column in chunk.columns])
    if not wanted.any():
        return Work(chunk, (), {}, wanted[:0])
    strip = reader.read(chunk.row, left, chunk.height, chunk.columns[-1] + chunk.width - left)
    measured = np.any([pixels.valid for pixels in strip.values()], axis=0)
    ground = np.zeros_like(measured)  # mirrored pixels beyond the edge are none
    ground[: max(0, plan.grid.height - chunk.row), : max(0, plan.grid.width - left)] = True
    cuts = [slice(c - left, c - left + chunk.width) for c in chunk.columns]

    def per_token(pixels: np.ndarray) -> np.ndarray:
        return np.stack([pixels[:, cut].reshape(tokens[1], p, tokens[2], p).sum((1, 3)) for cut in cuts])

    valid = wanted & (per_token(measured & ground) >= min_ground * np.maximum(per_token(ground), 1))
    kept = tuple(np.flatnonzero(valid.any((1, 2))).tolist())
    padded = [*kept, *[kept[-1]] * (plan.fill - len(kept))] if kept else []
    windows = {
        key: Pixels(
            np.stack([pixels.values[:, cuts[i]] for i in padded]), np.stack([pixels.valid[:, cuts[i]] for i in padded])
        )
        for key, pixels in strip.items()
        if padded
    }
    return Work(chunk, kept, windows, valid[list(kept)])


def read_ahead(chunks: Sequence[Chunk], threads: int, prepared: Callable[[Chunk], Work]) -> Iterator[Work]:
    """Work in order, prepared by threads a few chunks ahead."""
    pool = ThreadPoolExecutor(threads, "terrafm-scene")
    waiting: collections.deque[Future[Work]] = collections.deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(prepared, chunk))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class Job:
    """Embeds a scene into an unfinished result, from wherever that stands.

    Args:
      encode: see :data:`Encode`; called with ``plan.fill`` windows at a time.
      reader: pixels of the scene.
      plan: windows and output grid.
      width: features per token.
      unfinished: where finished rows and snapshots go.
      inside: bool [rows, columns] of the output: tokens that are wanted; windows without any are not even read.
        None = all.
      min_ground: share of a token's ground within the scene that has to be measured, above 0.
      progress: called with the number of windows done since the last call.
    """

    def __init__(
        self,
        encode: Encode,
        reader: SceneReader,
        plan: Plan,
        width: int,
        unfinished: Unfinished,
        *,
        inside: np.ndarray | None = None,
        min_ground: float = 0.5,
        progress: Callable[[int], None] = lambda windows: None,
    ):
        self._encode, self._plan, self._unfinished, self._progress = encode, plan, unfinished, progress
        self._prepare = lambda chunk: prepare(reader, plan, chunk, min_ground, inside)
        self._chunks = plan.chunks()
        self._before = [0, *np.cumsum([len(c.columns) for c in self._chunks]).tolist()]
        self._blender = Blender(plan, width)
        self._done = 0
        self.summary = Summary(windows=self._before[-1])

    def run(self, *, threads: int = 2, save_seconds: float = 30.0, stop_after: int | None = None) -> Summary:
        """Does what is left.

        Args:
          threads: reading threads.
          save_seconds: time between snapshots.
          stop_after: stop, as if interrupted, after so many chunks.

        Raises:
          Stopped: on SIGINT or SIGTERM or ``stop_after``; a snapshot is on disk.
          SceneError: a file cannot be read or written; the last snapshot is kept.
        """
        self._done = first = self._unfinished.open(self._blender)
        self.summary.resumed = self._before[first]
        self._progress(self.summary.resumed)
        began = saved = time.perf_counter()
        with signals() as stop, closing(read_ahead(self._chunks[first:], threads, self._prepare)) as ahead:
            pending: tuple[Work, Future[tuple[np.ndarray, np.ndarray]] | None] | None = None
            while True:
                waited = time.perf_counter()
                work = next(ahead, None)
                self.summary.reading += time.perf_counter() - waited
                # The device works on this chunk while the one before it is blended and written.
                running = None if work is None else (work, self._encode(work.windows) if work.kept else None)
                if pending is not None:
                    self._finish(*pending)
                    enough = stop or self._done - first == stop_after
                    if enough or time.perf_counter() - saved > save_seconds:
                        self._unfinished.save(self._blender, self._done)
                        saved = time.perf_counter()
                    if enough and self._done < len(self._chunks):
                        raise Stopped(self._stopped())
                if running is None:
                    break
                pending = running
        self._unfinished.save(self._blender, self._done)
        left = 1 - self.summary.resumed / max(self.summary.windows, 1)
        self.summary.seconds = time.perf_counter() - began
        self.summary.square_kilometers = area(self._plan.grid) * left
        return self.summary

    def _stopped(self) -> str:
        done, windows = self._before[self._done], self._before[-1]
        return f"stopped after {done} of {windows} windows, everything is kept; the same command goes on from there"

    def _finish(self, work: Work, features: Future[tuple[np.ndarray, np.ndarray]] | None) -> None:
        """Blends the windows of one chunk; rows that no later chunk reaches go to disk."""
        columns, plan, blender = work.chunk.columns, self._plan, self._blender
        every = np.full((len(columns), blender.sums.shape[-1]), np.nan, np.float32)
        if features is not None:
            cls, patches = features.result()
            for i, position in enumerate(work.kept):
                blender.add(work.chunk, columns[position], patches[i], work.valid[i])
                every[position] = cls[i]
        self._unfinished.write_cls(self._before[self._done], every)
        self.summary.encoded += len(work.kept)
        self.summary.empty += len(columns) - len(work.kept)
        self._done += 1
        reached = self._chunks[self._done].row // plan.stride if self._done < len(self._chunks) else plan.shape[0]
        first = blender.first  # which finish() moves on
        self._unfinished.write_rows(first, blender.finish(reached))
        self._progress(len(columns))


@contextmanager
def signals() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM fills; the second one acts as usual. Only in the main thread."""
    got: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield got
        return
    old = {}

    def note(number: int, frame: Any) -> None:
        got.append(number)
        signal.signal(number, old[number])

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield got
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def signature(plan: Plan, reader: SceneReader, inside: np.ndarray | None, **more: Any) -> str:
    """What must be equal for a job to continue an interrupted one: files, grid, windows, area, and ``more``.

    By the names of fields, not of classes: those may change without changing the job.
    """
    files = {p: (Path(p).stat().st_size, Path(p).stat().st_mtime_ns) for p in reader.paths if Path(p).exists()}
    wanted = None if inside is None else zlib.crc32(inside.tobytes())
    return json.dumps(
        {"plan": dataclasses.asdict(plan), "files": files, "area": wanted, **more}, sort_keys=True, default=str
    )


def area(grid: Grid) -> float:
    """Square kilometers of a grid."""
    return grid.height * grid.width * grid.gsd**2 / 1e6
