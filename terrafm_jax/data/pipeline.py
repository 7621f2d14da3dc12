"""Batches for training and evaluation: Grain reads, decodes and prefetches; the device does the rest.

The host ships what the records hold: no resampling, no conversion to float. Batch n is a function of
(data set, sampling settings, seed, n), so resuming is starting at step n, with any number of
processes or workers.

With ``workers`` > 0 Grain starts Python processes: the calling script needs the usual
``if __name__ == "__main__"`` guard, and ``/dev/shm`` must hold a few batches per worker.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags, logging

from terrafm_jax.data import canvas as canvas_lib
from terrafm_jax.data.reader import Reader, SplitBatches, TooManySkipped, TrainBatches
from terrafm_jax.data.sampling import Order, SamplingSpec
from terrafm_jax.data.source import DataError, Split, find_root, open_split
from terrafm_jax.sensors import SENSOR_KEYS, Statistics

_ENDLESS = 1 << 40  # steps
_MIN_ATTEMPTS = 10_000  # or the whole split: one bad record among the first few must not end a run


class Loader:
    """Iterator over batches that keeps count of damaged records.

    Attributes:
      order: the order of records (None when iterating once over a split).
      canvases: one per bucket.
      step: number of the batch that ``next`` returns.
      size: rows of a batch that this process reads.
      attempted: records that this process has tried to read, damaged ones included.
      skipped: damaged records among them, by file; those of the run are the sum over its processes.
    """

    def __init__(
        self,
        batches: Any,
        start: int,
        stop: int,
        *,
        workers: int = 0,
        prefetch: int = 2,
        echo: int = 1,
        max_skipped: float = 0.01,
        skipped: Mapping[str, int] | None = None,
    ):
        self.order, self.canvases = getattr(batches, "order", None), batches.reader.canvases
        self.step, self.size = start, batches.size
        self.attempted, self._max_skipped = start // echo * batches.size, max_skipped
        self._echo, self._held = echo, None
        self.skipped = dict(skipped or {})
        self._floor = min(_MIN_ATTEMPTS, len(batches.reader.records))
        self._sensors = batches.reader.sensors
        data = grain.MapDataset.range(start // echo, -(-stop // echo)).map(batches)
        self._stop = stop
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
        if self.step >= self._stop:
            raise StopIteration
        if self._held is None or self.step % self._echo == 0:
            self._held = None  # frees its memory for the next one
            self._held = self._fetch()
        batch = self._held
        self.step += 1
        if self._echo == 1:
            self._held = None
        return batch

    def _fetch(self) -> dict[str, Any]:
        if self._iterator is None:
            self._iterator = iter(self._data)
        batch = next(self._iterator)
        self.attempted += self.size
        self._account(json.loads(batch.pop("report")))
        return batch

    def _account(self, report: list[list[Any]]) -> None:
        for number, file, position, reason in report:
            logging.warning("skipped record %d (%s, position %d): %s", number, file, position, reason)
            self.skipped[file] = self.skipped.get(file, 0) + 1
        total = sum(self.skipped.values())
        if report and total > self._max_skipped * max(self.attempted, self._floor):
            number, file, position, reason = report[-1]
            raise TooManySkipped(
                f"{total} of {self.attempted} records could not be read, more than "
                f"data.max_skipped = {self._max_skipped:g} allows; the last one is record {number} ({file}, position "
                f"{position}): {reason}. Copy the files again, prepare the data set again, or raise data.max_skipped"
            )

    def coming(self, steps: int) -> list[dict[str, Any]]:
        """A global batch per canvas of the next ``steps`` steps, in order of first use, to compile the step for.

        The arrays have the right shapes and dtypes but take no memory.
        """
        end = min(self.step + steps, self._stop)
        buckets = dict.fromkeys(self.order.bucket(step // self._echo) for step in range(self.step, end))
        specs = [canvas_lib.batch_spec(self.canvases[b], self._sensors, self.order.batch_size) for b in buckets]
        return [
            canvas_lib.nested({p: np.broadcast_to(np.zeros((), dtype), shape) for p, (shape, dtype) in spec.items()})
            for spec in specs
        ]

    def close(self) -> None:
        """Stops workers and threads."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def _canvases_of(
    split: Split, sensors: Sequence[str], limit: int
) -> tuple[np.ndarray, list[canvas_lib.Canvas], np.ndarray]:
    """The index of a split, its canvases (at most ``limit``) and the canvas of every layout, int64 [layouts].

    Raises DataError: sensors unknown, an index that does not fit ``layouts.json``.
    """
    unknown = [key for key in sensors if key not in SENSOR_KEYS]
    if unknown or not sensors:
        raise DataError(f"data.sensors = {list(sensors)}: unknown {unknown}, expected some of {list(SENSOR_KEYS)}")
    index, layouts = split.index(), split.layouts()
    counts = np.bincount(index["layout"], minlength=len(layouts))
    if len(counts) > len(layouts):
        raise DataError(f"{split.directory}: the index uses {len(counts)} layouts, layouts.json lists {len(layouts)}")
    canvases, canvas_of_layout = canvas_lib.plan_canvases(layouts, counts, sensors, max(1, limit))
    return index, canvases, canvas_of_layout


def load_index(data_dir: Any, split: str) -> np.ndarray:
    """The index of a split (``tiles.INDEX_DTYPE``). Raises DataError."""
    return open_split(data_dir, split).index()


def load_statistics(data_dir: Any) -> Statistics:
    """``statistics.json`` of a prepared data set. Raises DataError if it is missing, SensorError if it is wrong."""
    path = find_root(data_dir) / "statistics.json"
    if not path.exists():
        raise DataError(f"{path} is missing; prepare the data set again or set data.statistics = published")
    return Statistics.from_json(path.read_text(), str(path))


def make_order(
    data_dir: Any,
    split: str,
    sampling: SamplingSpec,
    *,
    batch_size: int,
    seed: int,
    sensors: Sequence[str] = SENSOR_KEYS,
    canvases: int = 4,
) -> Order:
    """The order of a split; ``batch_size`` is the global one. Raises DataError, SamplingError.

    Where preparation has already dropped open sea (according to ``summary.json``), paper-like sampling keeps
    all that is left instead of thinning it a second time.
    """
    opened = open_split(data_dir, split)
    index, _, canvas_of_layout = _canvases_of(opened, sensors, canvases)
    left_out = opened.sea_left_out()
    if sampling.mode == "paper" and sampling.sea_keep < 1 and left_out:
        logging.info("%s: open sea was thinned in preparation, sea_keep = 1 here", opened.directory)
        sampling = dataclasses.replace(sampling, sea_keep=1.0)
    return Order(index, sampling, batch_size, seed, sensors=sensors, buckets=canvas_of_layout, sea_left_out=left_out)


def make_loader(
    data_dir: Any,
    split: str,
    order: Order,
    *,
    start_step: int = 0,
    stop_step: int | None = None,
    rows: np.ndarray | None = None,
    sensors: Sequence[str] = SENSOR_KEYS,
    canvases: int = 4,
    workers: int = 0,
    threads: int = 1,
    prefetch: int = 2,
    cache: str = "none",
    echo: int = 1,
    max_skipped: float = 0.01,
    skipped: Mapping[str, int] | None = None,
) -> Loader:
    """Training batches from step ``start_step`` on, as dicts of NumPy arrays (see ``data/tiles.py``).

    Args:
      data_dir: prepared data set.
      split: ``train``, ...
      order: from :func:`make_order` with the same sensors and canvases; names the global batch size.
      start_step, stop_step: the half-open range of steps; ``stop_step`` None never ends.
      rows: those rows of every global batch that this process reads (``training.sharding.local_rows``); None: all.
      sensors: configured sensors, a subset of SENSOR_KEYS in that order.
      canvases: most canvas buckets; tiles of other sizes are padded to the next.
      workers: processes; 0 reads in a thread of this process.
      threads: records read at once inside a batch; more than 1 pays off on remote storage.
      prefetch: batches held ready, per worker; 0 reads when asked.
      echo: every batch of tiles is handed out for this many steps in a row (the same object, so that it need
        not travel to the device again); each step draws views of its own. Divides the bytes read and shipped
        (data echoing, Choi et al. 2019).
      cache: ``ram`` keeps every decoded record (small data sets only; per worker).
      max_skipped: share of damaged records beyond which TooManySkipped is raised.
      skipped: damaged records per file before ``start_step`` (from the checkpoint).

    Raises:
      DataError: before the first batch, with everything that is wrong.
    """
    rows = np.arange(order.batch_size) if rows is None else np.asarray(rows)
    if not len(rows) or rows.min() < 0 or rows.max() >= order.batch_size:
        raise DataError(f"rows {rows.tolist()} are not rows of a batch of {order.batch_size}")
    opened = open_split(data_dir, split)
    if echo < 1:
        raise DataError(f"data.echo = {echo}, expected at least 1")
    index, shapes, canvas_of_layout = _canvases_of(opened, sensors, canvases)
    if order.sensors != tuple(sensors) or not np.array_equal(order.bucket_of_layout, canvas_of_layout):
        raise DataError(
            f"the order was made for sensors {list(order.sensors)} and other canvases than make_loader "
            f"is asked for ({list(sensors)}, canvases = {canvases}); pass make_order the same"
        )
    if order.num_records != len(index):
        raise DataError(f"the order was made for {order.num_records} records, {opened.directory} holds {len(index)}")
    return Loader(
        TrainBatches(Reader(opened, sensors, shapes, threads, cache), order, rows),
        start_step,
        _ENDLESS if stop_step is None else stop_step,
        workers=workers,
        prefetch=prefetch,
        echo=echo,
        max_skipped=max_skipped,
        skipped=skipped,
    )


def iterate_split(
    data_dir: Any,
    split: str,
    batch_size: int,
    *,
    sensors: Sequence[str] = SENSOR_KEYS,
    canvases: int = 4,
    process_index: int = 0,
    process_count: int = 1,
    records: np.ndarray | None = None,
    max_skipped: float = 0.01,
) -> Loader:
    """Iterates once over a split (or over ``records`` of it); batches carry ``mask`` bool [B].

    Rows with mask False are padding (the last batch of a bucket) or damaged records: ``index`` is -1
    there. ``batch_size`` counts the records of one process; every process yields the same number of
    batches of the same shapes, and together they cover each record exactly once.
    """
    opened = open_split(data_dir, split)
    index, shapes, canvas_of_layout = _canvases_of(opened, sensors, canvases)
    wanted = np.arange(len(index)) if records is None else np.asarray(records, np.int64)
    found = index["present"][wanted] & sum(1 << SENSOR_KEYS.index(key) for key in sensors)
    wanted = wanted[found != 0]
    bucket = canvas_of_layout[index["layout"][wanted]]
    step = batch_size * process_count
    batches = []
    for b in np.unique(bucket):
        members = wanted[bucket == b]
        for at in range(0, len(members), step):
            mine = members[at : at + step][process_index * batch_size : (process_index + 1) * batch_size]
            batches.append((int(b), mine))
    reader = Reader(opened, sensors, shapes)
    return Loader(SplitBatches(reader, batches, batch_size), 0, len(batches), max_skipped=max_skipped)
