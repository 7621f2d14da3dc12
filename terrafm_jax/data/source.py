"""Random access to the records of a prepared data set, and the small files beside the shards."""

from __future__ import annotations

import collections
import dataclasses
import json
import threading
import time
import tokenize
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
from etils import epath

from terrafm_jax import landcover
from terrafm_jax.data import shards, tiles
from terrafm_jax.paths import is_remote

TRY_AGAIN = 60.0  # seconds after which a shard that could not be opened is: mounted buckets and network disks recover


class DataError(ValueError):
    """A prepared data set is missing, incomplete or inconsistent."""


Parsed = TypeVar("Parsed")


def read_json(path: Any, parse: Callable[[Any], Parsed]) -> Parsed:
    """``parse`` applied to a JSON file. Raises DataError, which names the file, if it is missing or damaged."""
    path = epath.Path(path)
    if not path.exists():
        raise DataError(f"{path} is missing; prepare the data set again")
    try:
        return parse(json.loads(path.read_text()))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is damaged ({type(error).__name__}: {error}); copy it again, or prepare the data set again"
        ) from error


class RecordError(RuntimeError):
    """One record cannot be read; ``file``, ``position`` in it, ``number`` in the split and ``reason``."""

    def __init__(self, number: int, file: str, position: int, reason: str):
        super().__init__(f"record {number} ({file}, position {position}): {reason}")
        self.number, self.file, self.position, self.reason = number, file, position, reason

    def __reduce__(self) -> tuple[type[RecordError], tuple[int, str, int, str]]:  # crosses process borders
        return type(self), (self.number, self.file, self.position, self.reason)


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a prepared data set.

    Attributes:
      directory: the data set's folder, a path or a URL that etils understands.
      name: ``train``, ``validation`` or ``holdout``.
      files: shard names in order.
      lengths: records in each shard.
    """

    directory: str
    name: str
    files: tuple[str, ...]
    lengths: tuple[int, ...]

    def __len__(self) -> int:
        return sum(self.lengths)

    def index(self) -> np.ndarray:
        """Rows of ``tiles.INDEX_DTYPE``, mapped from disk where that is possible; raises DataError."""
        path = epath.Path(self.directory) / f"index_{self.name}.npy"
        if not path.exists():
            raise DataError(f"{path} is missing; prepare the data set again")
        try:
            if is_remote(path):
                with path.open("rb") as file:
                    index = np.load(file, allow_pickle=False)
            else:
                index = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, TypeError, EOFError, SyntaxError, tokenize.TokenError) as error:  # of its header
            raise DataError(f"{path} is damaged ({error}); copy it again, or prepare the data set again") from error
        missing = set(tiles.INDEX_DTYPE.names or ()) - set(index.dtype.names or ())
        if missing or index.shape != (len(self),):
            raise DataError(
                f"{path}: {index.shape[0] if index.ndim else 0} rows, columns missing: {sorted(missing)}; "
                f"dataset_info.json promises {len(self)} records"
            )
        largest = index["landcover"].max(initial=0)
        if largest >= landcover.NUM_CATEGORIES:
            raise DataError(f"{path}: land cover {largest}, expected 0 to {landcover.NUM_CATEGORIES - 1}")
        return index

    def layouts(self) -> list[dict[str, tuple[int, int]]]:
        """Rows and columns of every ``sensor/group`` that a layout holds; raises DataError."""
        return read_json(
            epath.Path(self.directory) / "layouts.json",
            lambda layouts: [{k: (int(v[0]), int(v[1])) for k, v in layout.items()} for layout in layouts],
        )

    def sea_left_out(self) -> int:
        """Number of tiles of open sea that preparation left out of the training split; 0 for other splits."""
        path = epath.Path(self.directory) / "summary.json"
        if self.name != "train" or not path.exists():
            return 0
        return read_json(path, lambda summary: int(summary.get("left_out", {}).get("open ocean", 0)))


def open_split(data_dir: Any, name: str) -> Split:
    """Reads ``dataset_info.json`` and checks that every shard exists.

    ``data_dir`` may be the folder that holds ``dataset_info.json`` or a parent of the only one below
    it (TFDS nests ``name/version``), on disk or in a bucket that etils can reach (extra ``[gcs]``).

    Raises:
      DataError: no such data set or split, another file format, or shards are missing (all are named).
    """
    root = find_root(data_dir)
    file_format, splits = read_json(root / "dataset_info.json", _splits)
    if file_format != "array_record":
        raise DataError(f"{root}/dataset_info.json: fileFormat {file_format!r}, expected 'array_record'")
    if name not in splits:
        raise DataError(f"{root}: no split {name!r}, found {sorted(splits)}")
    files, lengths = splits[name]
    present = {p.name for p in root.iterdir()}
    missing = [f for f in files if f not in present]
    if missing or not files:
        raise DataError(f"{root}: split {name!r} lacks {len(missing)} of {len(files)} shards: {missing[:5]}")
    return Split(str(root), name, files, lengths)


def _splits(info: dict[str, Any]) -> tuple[str, dict[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """File format, and names and lengths of the shards of every split, from ``dataset_info.json``."""
    splits = {}
    for split in info.get("splits", []):
        lengths = tuple(int(n) for n in split.get("shardLengths", []))
        template = split.get("filepathTemplate") or "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
        names = [_shard_name(template, info["name"], split["name"], i, len(lengths)) for i in range(len(lengths))]
        splits[split["name"]] = tuple(names), lengths
    return info.get("fileFormat", ""), splits


def find_root(data_dir: Any) -> epath.Path:
    """The folder that holds ``dataset_info.json``: ``data_dir``, or the only one up to two levels below it."""
    path = epath.Path(data_dir)
    for depth in ("", "*", "*/*"):
        found = [path] if not depth else [p.parent for p in path.glob(f"{depth}/dataset_info.json")]
        found = [p for p in found if (p / "dataset_info.json").exists()]
        if len(found) == 1:
            return found[0]
        if found:
            raise DataError(f"{path} holds several data sets: {sorted(map(str, found))}; name one of them")
    raise DataError(f"{path}: no dataset_info.json here or two folders below; expected a prepared data set")


def _shard_name(template: str, dataset: str, split: str, shard: int, count: int) -> str:
    values = {
        "DATASET": dataset,
        "SPLIT": split,
        "FILEFORMAT": "array_record",
        "SHARD_X_OF_Y": f"{shard:05d}-of-{count:05d}",
        "SHARD_INDEX": f"{shard:05d}",
        "NUM_SHARDS": f"{count:05d}",
    }
    for key, value in values.items():
        template = template.replace("{" + key + "}", value)
    return template


class _Broken(NamedTuple):
    """What is wrong with a shard, and until when it is not opened again."""

    error: Exception
    until: float


class Records:
    """Reads records by number. Opens shards on demand and keeps the last ``keep_open`` of them open.

    One that cannot be opened counts as damaged for ``TRY_AGAIN`` seconds; one that fails later is opened anew.

    Safe to share between threads and to pickle (open readers do not travel).
    """

    def __init__(self, split: Split, keep_open: int = 64):
        self.split, self._keep_open = split, keep_open
        self._ends = np.cumsum(split.lengths)
        self._reset()

    def _reset(self) -> None:
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __len__(self) -> int:
        return len(self.split)

    def place(self, number: int) -> tuple[int, int]:
        """Shard and position in the shard of record ``number``."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return shard, int(number) - (int(self._ends[shard - 1]) if shard else 0)

    def error(self, number: int, reason: str) -> RecordError:
        """A RecordError that says where record ``number`` is stored."""
        shard, position = self.place(number)
        return RecordError(int(number), self.split.files[shard], position, reason)

    def read(self, number: int) -> bytes:
        """The bytes of one record.

        Raises RecordError if the shard or the record is damaged, FetchError if a bucket does not give the shard.
        """
        shard, position = self.place(number)
        reader = None
        try:
            reader = self._reader(shard)
            return reader.read([position])[0]
        except shards.FetchError:
            raise
        except Exception as error:  # array_record raises bare RuntimeError, IndexError, ...: all mean damage
            if reader is not None:  # its file may be one that a network disk no longer serves
                self._forget(shard, reader)
            raise self.error(number, _one_line(error)) from error

    def _forget(self, shard: int, reader: Any) -> None:
        with self._lock:
            if self._readers.get(shard) is reader:
                del self._readers[shard]

    def _reader(self, shard: int) -> Any:
        with self._lock:
            reader = self._readers.pop(shard, None)
            if reader is None or (isinstance(reader, _Broken) and time.monotonic() >= reader.until):
                reader = self._open(shard)
                while len(self._readers) >= self._keep_open:
                    self._readers.popitem(last=False)  # a thread that still reads it keeps it alive
            self._readers[shard] = reader
        if isinstance(reader, _Broken):
            raise reader.error
        return reader

    def _open(self, shard: int) -> Any:
        from array_record.python import array_record_module

        path = f"{self.split.directory.rstrip('/')}/{self.split.files[shard]}"
        if is_remote(path):
            path = str(shards.local_copy(path))
        try:
            reader = array_record_module.ArrayRecordReader(
                path, "readahead_buffer_size:0,max_parallelism:0", file_reader_buffer_size=32768
            )
            found, expected = reader.num_records(), self.split.lengths[shard]
            if found != expected:
                raise RuntimeError(f"shard holds {found} records, dataset_info.json promises {expected}")
            return reader
        except Exception as error:
            # Kept in place of the reader, so that a broken shard is not opened again for every record.
            return _Broken(error, time.monotonic() + TRY_AGAIN)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
