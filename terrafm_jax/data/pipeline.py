"""Batches for training and evaluation: Grain reads, decodes and prefetches; the device does the rest.

The host ships what the records hold: no resampling, no conversion to float. Batch n is a function of
(data set, sampling settings, seed, n), so resuming is starting at step n, with any number of
processes or workers.

With ``workers`` > 0 Grain starts Python processes: the calling script needs the usual
``if __name__ == "__main__"`` guard, and ``/dev/shm`` must hold a few batches per worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from terrafm_jax.data import canvas as canvas_lib
from terrafm_jax.data.decode import DecodeError, decode_record
from terrafm_jax.data.sampling import Order, SamplingSpec
from terrafm_jax.data.source import DataError, RecordError, Records, Split, open_split
from terrafm_jax.sensors import SENSOR_KEYS

_ENDLESS = 1 << 40  # steps
_MIN_ATTEMPTS = 10_000  # or one epoch: one bad record among the first few must not end a run


class TooManySkipped(RuntimeError):
    """More records are damaged than the configuration tolerates."""


class Reader:
    """Reads, decodes and lays out records; every damaged one is reported and replaced or masked.

    Picklable; threads, open files and memory stay behind.
    """

    def __init__(
        self,
        split: Split,
        sensors: Sequence[str],
        canvases: Sequence[canvas_lib.Canvas],
        threads: int = 1,
        cache: str = "none",
    ):
        if cache not in ("none", "ram"):
            raise DataError(f"data.cache = {cache!r}, expected 'none' or 'ram'")
        self.records, self.sensors, self.canvases = Records(split), tuple(sensors), list(canvases)
        self._threads, self._cache = threads, {} if cache == "ram" else None
        self._slabs, self._pool = canvas_lib.Slabs(), None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pool": None, "_cache": None if self._cache is None else {}}

    def fetch(self, number: int) -> dict[str, Any] | RecordError:
        """One decoded record, or what is wrong with it."""
        number = int(number)
        if self._cache is not None and number in self._cache:
            return self._cache[number]
        try:
            record: Any = decode_record(self.records.read(number))
            if not any(record[key]["present"] for key in self.sensors):
                record = self.records.error(number, f"none of {list(self.sensors)} is present")
        except DecodeError as error:
            record = self.records.error(number, str(error))
        except RecordError as error:
            record = error
        if self._cache is not None:
            self._cache[number] = record
        return record

    def fetch_many(self, numbers: Sequence[int]) -> Iterator[dict[str, Any] | RecordError]:
        """Records in order; with several threads they are read ahead."""
        if self._threads <= 1:
            return map(self.fetch, numbers)
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self._threads, "terrafm-read")
        return self._pool.map(self.fetch, numbers)

    def fill(self, batch: dict[str, Any], rows: Sequence[int], numbers: Sequence[int]) -> dict[int, RecordError]:
        """Places records into rows of a batch; returns the failures by row."""
        failed: dict[int, RecordError] = {}
        for row, number, record in zip(rows, numbers, self.fetch_many(numbers), strict=True):
            if not isinstance(record, RecordError):
                try:
                    canvas_lib.place(batch, row, number, record, self.sensors)
                    continue
                except ValueError as error:
                    record = self.records.error(int(number), str(error))
            failed[row] = record
        return failed

    def empty(self, bucket: int, size: int) -> dict[str, Any]:
        """Undefined batch of one canvas bucket."""
        return canvas_lib.empty_batch(self.canvases[bucket], self.sensors, size, self._slabs)


class TrainBatches:
    """Step -> the batch of one process. Damaged records give way to others of the same process's slice."""

    def __init__(self, reader: Reader, order: Order, process_index: int, process_count: int):
        self.reader, self.order = reader, order
        self.size = order.batch_size // process_count
        self._slice = slice(process_index * self.size, (process_index + 1) * self.size)

    def __call__(self, step: int) -> dict[str, Any]:
        numbers = self.order.batch(step)[self._slice]
        batch = self.reader.empty(self.order.bucket(step), self.size)
        failed = self.reader.fill(batch, range(self.size), numbers)
        if failed:
            self._replace(batch, failed, step)
        batch["report"] = _report(failed.values())
        return batch

    def _replace(self, batch: dict[str, Any], failed: dict[int, RecordError], step: int) -> None:
        """A failed row takes the next good row of the slice, else the next good record of later slices."""
        good = [row for row in range(self.size) if row not in failed]
        for row in failed:
            if good:
                source = min(good, key=lambda g: (g - row) % self.size)
                _copy_row(batch, source, row)
            else:
                self._replace_from_later(batch, row, step)

    def _replace_from_later(self, batch: dict[str, Any], row: int, step: int) -> None:
        for numbers in self.order.spares(step):
            for number in numbers[self._slice]:
                if not self.reader.fill(batch, [row], [number]):
                    return
        raise TooManySkipped(f"step {step}: no readable record in this batch nor in the 64 that follow it")


class SplitBatches:
    """Number -> a batch of a walk through a split, bucket by bucket, each in the order of the records."""

    def __init__(self, reader: Reader, plan: list[tuple[int, np.ndarray]], size: int):
        self.reader, self.plan, self.size = reader, plan, size

    def __call__(self, number: int) -> dict[str, Any]:
        bucket, numbers = self.plan[number]
        batch = self.reader.empty(bucket, self.size)
        failed = self.reader.fill(batch, range(len(numbers)), numbers)
        mask = np.arange(self.size) < len(numbers)
        mask[list(failed)] = False
        for row in np.flatnonzero(~mask):
            canvas_lib.clear(batch, int(row), self.reader.sensors)
        return {**batch, "mask": mask, "report": _report(failed.values())}


def _rows(batch: Mapping[str, Any]) -> Iterator[np.ndarray]:
    for value in batch.values():
        if isinstance(value, Mapping):
            yield from _rows(value)
        elif isinstance(value, np.ndarray):
            yield value


def _copy_row(batch: dict[str, Any], source: int, target: int) -> None:
    for array in _rows(batch):
        array[target] = array[source]


def _report(errors: Any) -> str:
    return json.dumps([[e.number, e.file, e.position, e.reason] for e in errors])


class Loader:
    """Iterator over batches, with an account of what was skipped and waited for.

    Attributes:
      order: the order of records (None for a walk through a split).
      canvases: one per bucket.
      step: number of the batch that ``next`` returns.
      attempted: records asked for so far by this process, damaged ones included.
      skipped: damaged records among them (by this process; sum over processes for the whole run).
      wait_seconds: time spent inside ``next``.
    """

    def __init__(
        self,
        batches: Any,
        start: int,
        stop: int,
        *,
        workers: int = 0,
        prefetch: int = 2,
        max_skipped: float = 0.01,
        skipped: int = 0,
    ):
        self.order, self.canvases = getattr(batches, "order", None), batches.reader.canvases
        self.step, self.size, self.wait_seconds = start, batches.size, 0.0
        self.attempted, self.skipped, self._max_skipped = start * batches.size, skipped, max_skipped
        self._floor = min(_MIN_ATTEMPTS, len(batches.reader.records))
        self._sensors = batches.reader.sensors
        data = grain.MapDataset.range(start, stop).map(batches)
        options = grain.ReadOptions(num_threads=1 if prefetch else 0, prefetch_buffer_size=prefetch)
        data = data.to_iter_dataset(options if not workers else grain.ReadOptions(0, 0))
        if workers:
            if not flags.FLAGS.is_parsed():  # notebooks and libraries have no absl app, and Grain insists
                flags.FLAGS.mark_as_parsed()
            data = data.mp_prefetch(grain.MultiprocessingOptions(workers, per_worker_buffer_size=max(1, prefetch)))
        self._data, self._iterator = data, None

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> dict[str, Any]:
        began = time.perf_counter()
        if self._iterator is None:
            self._iterator = iter(self._data)
        batch = next(self._iterator)
        self.wait_seconds += time.perf_counter() - began
        self.step += 1
        self.attempted += self.size
        self._account(json.loads(batch.pop("report")))
        return batch

    def _account(self, report: list[list[Any]]) -> None:
        for number, file, position, reason in report:
            logging.warning("skipped record %d (%s, position %d): %s", number, file, position, reason)
        self.skipped += len(report)
        limit = self._max_skipped * max(self.attempted, self._floor)
        if report and self.skipped > limit:
            raise TooManySkipped(
                f"{self.skipped} of {self.attempted} records could not be read, more than "
                f"data.max_skipped = {self._max_skipped:g} allows; the last one: {report[-1]}"
            )

    def shapes(self, batch_size: int | None = None) -> list[dict[str, Any]]:
        """For every canvas a batch of the right shapes and dtypes that holds no memory (for compiling)."""
        size = batch_size or self.size
        return [
            canvas_lib.nested(
                {
                    path: np.broadcast_to(np.zeros((), dtype), shape)
                    for path, (shape, dtype) in canvas_lib.batch_spec(canvas, self._sensors, size).items()
                }
            )
            for canvas in self.canvases
        ]

    def close(self) -> None:
        """Stops workers and threads."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _plan(split: Split, sensors: Sequence[str], buckets: int) -> tuple[np.ndarray, list[canvas_lib.Canvas], np.ndarray]:
    unknown = [key for key in sensors if key not in SENSOR_KEYS]
    if unknown or not sensors:
        raise DataError(f"data.sensors = {list(sensors)}: unknown {unknown}, expected some of {list(SENSOR_KEYS)}")
    index, layouts = split.index(), split.layouts()
    counts = np.bincount(index["layout"], minlength=len(layouts))
    if len(counts) > len(layouts):
        raise DataError(f"{split.directory}: the index uses {len(counts)} layouts, layouts.json lists {len(layouts)}")
    canvases, table = canvas_lib.plan_canvases(layouts, counts, sensors, max(1, buckets))
    return index, canvases, table


def make_loader(
    data_dir: Any,
    split: str,
    *,
    batch_size: int,
    sampling: SamplingSpec | None = None,
    seed: int = 0,
    start_step: int = 0,
    stop_step: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    sensors: Sequence[str] = SENSOR_KEYS,
    buckets: int = 4,
    workers: int = 0,
    threads: int = 1,
    prefetch: int = 2,
    cache: str = "none",
    max_skipped: float = 0.01,
    skipped: int = 0,
) -> Loader:
    """Training batches from step ``start_step`` on, as dicts of NumPy arrays (see ``data/tiles.py``).

    Args:
      data_dir: prepared data set.
      split: ``train``, ...
      batch_size: records in a global batch; each process gets ``batch_size / process_count`` of them.
      sampling: how often records are drawn; default paper-like.
      seed: names the order.
      start_step, stop_step: the half-open range of steps; ``stop_step`` None never ends.
      process_index, process_count: which contiguous part of every global batch is this process's.
      sensors: configured sensors, a subset of SENSOR_KEYS in that order.
      buckets: most canvases; tiles of other sizes are padded to the next.
      workers: processes; 0 reads in a thread of this process.
      threads: records read at once inside a batch; more than 1 pays off on remote storage.
      prefetch: batches held ready, per worker.
      cache: ``ram`` keeps every decoded record (small data sets only; per worker).
      max_skipped: share of damaged records beyond which TooManySkipped is raised.
      skipped: records skipped before ``start_step`` (from the checkpoint).

    Raises:
      DataError, SamplingError: before the first batch, with everything that is wrong.
    """
    if batch_size % process_count or not 0 <= process_index < process_count:
        raise DataError(
            f"batch_size = {batch_size} must be a multiple of the {process_count} processes "
            f"and process_index = {process_index} below it"
        )
    opened = open_split(data_dir, split)
    index, canvases, table = _plan(opened, sensors, buckets)
    order = Order(index, sampling or SamplingSpec(), batch_size, seed, sensors=sensors, buckets=table)
    reader = Reader(opened, sensors, canvases, threads, cache)
    return Loader(
        TrainBatches(reader, order, process_index, process_count),
        start_step,
        _ENDLESS if stop_step is None else stop_step,
        workers=workers,
        prefetch=prefetch,
        max_skipped=max_skipped,
        skipped=skipped,
    )


def iterate_split(
    data_dir: Any,
    split: str,
    batch_size: int,
    *,
    sensors: Sequence[str] = SENSOR_KEYS,
    buckets: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    records: np.ndarray | None = None,
    workers: int = 0,
    threads: int = 1,
    prefetch: int = 2,
    max_skipped: float = 0.01,
) -> Loader:
    """Goes once through a split (or through ``records`` of it); batches carry ``mask`` bool [B].

    Rows with mask False are padding (the last batch of a bucket) or damaged records: ``index`` is -1
    there. ``batch_size`` counts the records of one process; every process yields the same number of
    batches of the same shapes, and together they cover each record exactly once.
    """
    opened = open_split(data_dir, split)
    index, canvases, table = _plan(opened, sensors, buckets)
    wanted = np.arange(len(index)) if records is None else np.asarray(records, np.int64)
    found = index["present"][wanted] & sum(1 << SENSOR_KEYS.index(key) for key in sensors)
    wanted = wanted[found != 0]
    bucket = table[index["layout"][wanted]]
    step = batch_size * process_count
    plan = []
    for b in np.unique(bucket):
        members = wanted[bucket == b]
        for at in range(0, len(members), step):
            mine = members[at : at + step][process_index * batch_size : (process_index + 1) * batch_size]
            plan.append((int(b), mine))
    reader = Reader(opened, sensors, canvases, threads)
    return Loader(
        SplitBatches(reader, plan, batch_size),
        0,
        len(plan),
        workers=workers,
        prefetch=prefetch,
        max_skipped=max_skipped,
    )
