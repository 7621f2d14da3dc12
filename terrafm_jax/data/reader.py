"""Step -> batch: reads and decodes records into batches; damaged ones are reported and replaced or masked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from terrafm_jax.data import canvas as canvas_lib
from terrafm_jax.data.decode import DecodeError, decode_record
from terrafm_jax.data.memory import keep_memory
from terrafm_jax.data.sampling import Order
from terrafm_jax.data.source import DataError, RecordError, Records, Split


class TooManySkipped(RuntimeError):
    """More records are damaged than the configuration tolerates."""


class Reader:
    """Reads and decodes records and places them into batches. Reports damaged ones instead of raising.

    Picklable; threads, open files and cached memory do not travel.
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
        keep_memory()  # here rather than at creation, so that it also happens in worker processes
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
        if self._cache is not None and not isinstance(record, RecordError):  # which may be the disk's, not the record's
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
        records = self.fetch_many(numbers)
        for row, number in zip(rows, numbers, strict=True):
            # Not part of the zip, which would hold a record until the next one is read. Freed before that, its memory
            # is reused while it is still in the CPU cache.
            record = next(records)
            if not isinstance(record, RecordError):
                try:
                    canvas_lib.place(batch, row, number, record, self.sensors)
                except ValueError as error:
                    record = self.records.error(int(number), str(error))
            if isinstance(record, RecordError):
                failed[row] = record
            del record
        return failed

    def empty(self, bucket: int, size: int) -> dict[str, Any]:
        """A batch on the canvas of a bucket, its content undefined."""
        return canvas_lib.empty_batch(self.canvases[bucket], self.sensors, size, self._slabs)


class TrainBatches:
    """Step -> the rows of the global batch that one process reads. Damaged records are replaced by others of these."""

    def __init__(self, reader: Reader, order: Order, rows: np.ndarray):
        self.reader, self.order = reader, order
        self.size = len(rows)
        self._rows = np.asarray(rows)

    def __call__(self, step: int) -> dict[str, Any]:
        numbers = self.order.batch(step)[self._rows]
        batch = self.reader.empty(self.order.bucket(step), self.size)
        failed = self.reader.fill(batch, range(self.size), numbers)
        if failed:
            self._replace(batch, failed, step)
        batch["report"] = _report(failed.values())
        return batch

    def _replace(self, batch: dict[str, Any], failed: dict[int, RecordError], step: int) -> None:
        """A failed row copies the next good row of this process; without one, it takes a record of a later batch."""
        good = [row for row in range(self.size) if row not in failed]
        for row in failed:
            if good:
                source = min(good, key=lambda g: (g - row) % self.size)
                _copy_row(batch, source, row)
            else:
                self._replace_from_later(batch, row, step)

    def _replace_from_later(self, batch: dict[str, Any], row: int, step: int) -> None:
        failed: dict[int, RecordError] = {}
        for numbers in self.order.spares(step):
            for number in numbers[self._rows]:
                failed = self.reader.fill(batch, [row], [number])
                if not failed:
                    return
        last = f": {failed[row]}" if failed else ""
        raise TooManySkipped(f"step {step}: no readable record in this batch nor in the 64 that follow it{last}")


class SplitBatches:
    """Number -> batch, for one pass over a split: bucket by bucket, each in the order of the records.

    ``batches``: canvas bucket and record numbers of each; ``size``: rows of a batch, of which the last may stay empty.
    """

    def __init__(self, reader: Reader, batches: list[tuple[int, np.ndarray]], size: int):
        self.reader, self.batches, self.size = reader, batches, size

    def __call__(self, number: int) -> dict[str, Any]:
        bucket, numbers = self.batches[number]
        batch = self.reader.empty(bucket, self.size)
        failed = self.reader.fill(batch, range(len(numbers)), numbers)
        mask = np.arange(self.size) < len(numbers)
        mask[list(failed)] = False
        for row in np.flatnonzero(~mask):
            canvas_lib.clear(batch, int(row), self.reader.sensors)
        return {**batch, "mask": mask, "report": _report(failed.values())}


def _arrays(batch: Mapping[str, Any]) -> Iterator[np.ndarray]:
    for value in batch.values():
        if isinstance(value, Mapping):
            yield from _arrays(value)
        elif isinstance(value, np.ndarray):
            yield value


def _copy_row(batch: dict[str, Any], source: int, target: int) -> None:
    for array in _arrays(batch):
        array[target] = array[source]


def _report(errors: Any) -> str:
    return json.dumps([[e.number, e.file, e.position, e.reason] for e in errors])
