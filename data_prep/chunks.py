"""A chunk of cells -> the shards and the tally of that chunk, all or nothing.

Chunks are fixed by the plan, and what a chunk writes depends on its cells alone; so any number of
workers, any interruption and any runner give the same bytes. ``DIR/.work/chunk-000012.npz`` appears
last and says that chunk 12 is done.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import rasterio
from array_record.python import array_record_module

from data_prep.cell import Options, Prepared, prepare
from data_prep.delivered import Cell
from data_prep.encode import encode_record
from data_prep.ground import Rival
from data_prep.harmonize import WITHOUT_ID, Offset
from data_prep.raster import BadInput, first_line
from data_prep.stats import Tally
from data_prep.worldcover import WorldCover
from terrafm_jax.data.memory import keep_memory
from terrafm_jax.data.tiles import INDEX_DTYPE, SPLITS

WORK = ".work"
# Without compression by measurement: zstd:1 saves a quarter of the space and costs three times the CPU a read.
COMPRESSIONS = ("uncompressed", "zstd:1", "zstd:3", "snappy")
Report = Callable[[str], None]
MOST_LAYOUTS = 1 << 8 * INDEX_DTYPE["layout"].itemsize
TOO_MANY_LAYOUTS = f"more than {MOST_LAYOUTS} different shapes of tiles; cut them to a common --tile-size"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFull(RuntimeError):
    """No space is left where the shards go."""


class SourceUnavailable(RuntimeError):
    """The source does not answer (network, permissions); nothing is wrong with the cell."""


@dataclasses.dataclass(frozen=True, slots=True)
class Unit:
    """One cell to prepare, as the plan knows it.

    Attributes:
      cell, number: see ``cell.Cell``.
      where: what the source needs to read it (plain, picklable values).
      products: (sensor, product id) pairs; ``cell/p0/file`` for a scene in several units whose files have no id.
      split: the fixed split, or None.
      outlook: split that its position lets expect, ``mixed`` or ``unknown``; chunks do not mix them.
      rivals: cells of listed splits nearby that keep the ground they share with this one.
    """

    cell: str
    number: int
    where: Any
    products: tuple[tuple[str, str], ...] = ()
    split: str | None = None
    outlook: str = "unknown"
    rivals: tuple[Rival, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.cell}/p{self.number}"

    def product_of(self, sensor: str) -> tuple[str, str]:
        """The first of ``products`` of a sensor, by which its offset is known; its id is "" if there is none."""
        return next((pair for pair in self.products if pair[0] == sensor), (sensor, ""))


class Source(Protocol):
    """Where cells come from. Picklable."""

    def read(self, unit: Unit) -> Cell:
        """Reads and decodes one cell. Raises BadInput, or SourceUnavailable."""


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that a worker needs besides the units; ``offsets`` are those decided once per product."""

    source: Source
    cover: WorldCover
    options: Options
    directory: str
    compression: str = COMPRESSIONS[0]
    offsets: Mapping[tuple[str, str], Offset] = dataclasses.field(default_factory=dict)  # by (sensor, product)

    @property
    def work(self) -> Path:
        return Path(self.directory) / WORK


def job_of_chunk(job: Job, units: Sequence[Unit]) -> Job:
    """The job with the offsets of these units alone: it travels with every chunk, and a planet has 100,000 of them."""
    pairs = {pair for unit in units for pair in unit.products}
    return dataclasses.replace(job, offsets={pair: job.offsets[pair] for pair in sorted(pairs & job.offsets.keys())})


def chunk_path(job: Job, chunk: int) -> Path:
    """The file whose presence says that the chunk is done."""
    return job.work / f"chunk-{chunk:06d}.npz"


def shard_path(job: Job, chunk: int, split: str) -> Path:
    """The shard of one chunk before the data set is complete."""
    return job.work / f"chunk-{chunk:06d}.{split}.array_record"


def _unfinished(path: Path) -> Path:
    """A name for a file until it is whole, another one each time: Beam may run a chunk twice at once.

    Process ids would not do: threads share one, and containers have equal ones.
    """
    return path.with_suffix(f".tmp-{uuid.uuid4().hex}")


class Flusher:
    """Sends a growing file to disk while it is written, and lets go of the pages that have arrived there.

    Left alone, the page cache takes fresh pages for every shard until memory is full. On a virtual machine
    whose free pages belong to the host, getting them took five times as long as copying the records into
    them; and shards push the sources out of memory that are still to be read.
    """

    STEP = 16 << 20  # bytes between two calls; ArrayRecord hands over as much at a time

    def __init__(self, path: Path):
        self._file = os.open(path, os.O_RDONLY) if hasattr(os, "posix_fadvise") else -1
        self._since = 0

    def wrote(self, size: int) -> None:
        """Counts ``size`` more bytes."""
        self._since += size
        if self._since >= self.STEP:
            self._since = 0
            self._advise()

    def close(self) -> None:
        """Lets go of the rest; a second call does nothing."""
        if self._file >= 0:
            self._advise()
            os.close(self._file)
            self._file = -1

    def _advise(self) -> None:
        if self._file >= 0:
            with suppress(OSError):  # advice: a file system may not take it
                os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)


class _Shards:
    """Writers of one chunk, opened when the first record of a split arrives."""

    def __init__(self, job: Job, chunk: int):
        self._job, self._chunk = job, chunk
        self._writers: dict[str, tuple[Any, Path, Flusher]] = {}
        self.count: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def write(self, split: str, data: bytes) -> None:
        if split not in self._writers:
            path = _unfinished(shard_path(self._job, self._chunk, split))
            options = f"group_size:1,{self._job.compression}"
            self._writers[split] = (array_record_module.ArrayRecordWriter(str(path), options), path, Flusher(path))
        writer, _, flusher = self._writers[split]
        writer.write(data)
        flusher.wrote(len(data))
        self.count[split] += 1
        self.bytes[split] += len(data)

    def close(self) -> None:
        """Closes, checks and publishes. A shard without its last bytes never gets its name."""
        for split, (writer, path, flusher) in self._writers.items():
            writer.close()
            reader = array_record_module.ArrayRecordReader(str(path))
            found = reader.num_records()
            reader.close()
            if found != self.count[split]:
                raise OSError(errno.EIO, f"{found} of {self.count[split]} records are in the shard", str(path))
            sync(path)
            flusher.close()
            path.replace(shard_path(self._job, self._chunk, split))
        self._writers.clear()

    def discard(self) -> None:
        """Removes what is not published."""
        for writer, path, flusher in self._writers.values():
            flusher.close()
            with suppress(Exception):  # the writer failed before, this only frees it
                writer.close()
            path.unlink(missing_ok=True)
        self._writers.clear()


class _Content:
    """What a chunk has gathered besides the shards."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.rows: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
        self.layouts: list[dict[str, list[int]]] = []
        self.rejected: list[tuple[str, str, str]] = []
        self.dropped: Counter[str] = Counter()
        self.notes: list[tuple[str, str]] = []
        self.shared: set[str] = set()
        self.doubts: Counter[str] = Counter()
        self.empty = 0  # cells that were read and left no tile

    def reject(self, unit: Unit, reason: str) -> None:
        self.rejected.append((unit.key, " ".join(product for _, product in unit.products), reason))

    def add(self, unit: Unit, prepared: Prepared, shards: _Shards) -> None:
        self.dropped.update(prepared.dropped)
        self.notes += [(unit.key, note) for note in prepared.notes]
        self.shared |= prepared.shared
        self.doubts.update(prepared.doubts if prepared.tiles else ())
        self.empty += not prepared.tiles
        for tile in prepared.tiles:
            if tile.layout not in self.layouts:
                if len(self.layouts) == MOST_LAYOUTS:
                    raise ValueError(TOO_MANY_LAYOUTS)
                self.layouts.append(tile.layout)
            tile.row["layout"] = self.layouts.index(tile.layout)
            if tile.split == SPLITS[0]:  # first, so that encoding finds the pixels in the processor's cache
                self.tally.add(tile.parts, tile.fields["fractions"])
            shards.write(tile.split, encode_record(tile.record()))
            self.rows[tile.split].append(tile.row)

    def arrays(self, shards: _Shards) -> dict[str, np.ndarray]:
        meta = {"count": dict(shards.count), "bytes": dict(shards.bytes), "layouts": self.layouts}
        meta |= {"rejected": self.rejected, "dropped": dict(self.dropped), "notes": self.notes}
        meta |= {"shared": sorted(self.shared), "empty": self.empty, "doubts": dict(self.doubts)}
        index = {f"index_{split}": np.array(found, INDEX_DTYPE) for split, found in self.rows.items()}
        return {"meta": np.array(json.dumps(meta)), **index, **self.tally.arrays()}


def write_chunk(job: Job, chunk: int, units: Sequence[Unit], deadly: Sequence[str], report: Report) -> int:
    """Prepares the units of a chunk and writes its shards; returns the chunk number.

    Args:
      job: source, land cover, options and output.
      chunk: number of the chunk.
      units: its cells.
      deadly: keys of units that killed a worker before; they are rejected unread.
      report: called with the key of each unit when it starts, and with "" when it is done.

    Raises:
      DiskFull: nothing of this chunk is left behind.
      SourceUnavailable: the source does not answer.
    """
    keep_memory()
    shards, content = _Shards(job, chunk), _Content()
    try:
        with telling_full_disk(job), rasterio.Env():  # one, or every open and read of a band sets up its own
            for unit in units:
                report(unit.key)
                if unit.key in deadly:
                    content.reject(unit, "reading it ends the worker process (a crash in a decoder, or out of memory)")
                else:
                    _one(job, unit, shards, content)
                report("")
            shards.close()
            save(chunk_path(job, chunk), **content.arrays(shards))
    finally:
        shards.discard()
    return chunk


def read(job: Job, unit: Unit) -> Cell:
    """The cell of a unit, with the offsets that were decided once per product."""
    cell = job.source.read(unit)
    for key, given in cell.sensors.items():
        decided = job.offsets.get(unit.product_of(key))
        # Whoever computed reflectance has subtracted the offset that the product id states.
        if decided is not None and (given.unit != "reflectance" or decided.source in WITHOUT_ID):
            given.offset = given.offset or decided
    return cell


def _one(job: Job, unit: Unit, shards: _Shards, content: _Content) -> None:
    """Prepares one cell; whatever bad input makes a decoder throw must not end a long job."""
    try:
        prepared = prepare(read(job, unit), job.cover, job.options)
    except BadInput as error:
        content.reject(unit, first_line(error))
        return
    except (SourceUnavailable, MemoryError):
        raise
    except Exception as error:
        _check_space(error, job)
        content.reject(unit, f"{type(error).__name__}: {first_line(error)}")
        return
    content.add(unit, prepared, shards)


@contextmanager
def telling_full_disk(job: Job) -> Iterator[None]:
    """Errors that mean a full disk leave as DiskFull."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if not isinstance(error, DiskFull):
            _check_space(error, job)
        raise


def _check_space(error: BaseException, job: Job) -> None:
    """Raises DiskFull if that is what the error means; ArrayRecord only tells it in words."""
    text = str(error).lower()
    if getattr(error, "errno", None) in _FULL or "no space left" in text or "file too large" in text:
        raise DiskFull(f"no space left under {job.directory}: {first_line(error)}") from error


def save(path: Path, **arrays: np.ndarray) -> None:
    """``numpy.savez`` that appears whole or not at all."""
    temporary = _unfinished(path)
    try:
        with open(temporary, "wb") as file:
            np.savez(file, **arrays)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Forces a file to disk, so that a full disk shows now and not after the rename."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
