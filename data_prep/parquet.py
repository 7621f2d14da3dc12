"""Rows of parquet files, local or behind any URL that fsspec knows, one row group at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.chunks import SourceUnavailable
from data_prep.raster import BadInput, PerThread, first_line

T = TypeVar("T")
_PAUSES = (1.0, 4.0, 15.0)  # seconds between tries of a remote read


def is_remote(url: str) -> bool:
    """Whether a path names a protocol other than local files."""
    return "://" in url and not url.startswith("file://")


def read_table(url: str, columns: Sequence[str]) -> pa.Table | None:
    """Those of ``columns`` that the file has; None if there is no such file. Raises ValueError."""

    def read() -> pa.Table:
        with fsspec.open(url, "rb").open() as file:
            source = pq.ParquetFile(file)
            names = [name for name in columns if name in source.schema_arrow.names]
            return source.read(columns=names)

    try:
        return _retried(read, url)
    except FileNotFoundError:
        return None
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{url} cannot be read as parquet ({first_line(error)})") from error


def read_row(url: str, row: int, columns: Sequence[str]) -> dict[str, Any]:
    """The values of one row; only its row group and these columns are read. Raises BadInput, SourceUnavailable.

    Bytes come as memoryviews of what Arrow has read, without another copy.
    """

    def read() -> dict[str, Any]:
        file, starts = _open(url)
        group = next((i for i, end in enumerate(starts[1:]) if row < end), None)
        if row < 0 or group is None:
            raise BadInput(f"{url}: row {row} of {starts[-1]} rows")
        names = [name for name in columns if name in file.schema_arrow.names]
        table = file.read_row_group(group, columns=names, use_threads=False)
        at = row - starts[group]
        if at >= table.num_rows:
            raise BadInput(f"{url}: row group {group} has {table.num_rows} rows, truncated?")
        return {name: _value(table.column(name)[at]) for name in names}

    try:
        return _retried(read, url)
    except FileNotFoundError as error:
        raise BadInput(f"{url}: no such file") from error
    except (pa.ArrowException, OSError) as error:
        raise BadInput(f"{url}: row {row} cannot be read, truncated? ({first_line(error)})") from error


def _value(scalar: pa.Scalar) -> Any:
    if scalar.is_valid and (pa.types.is_binary(scalar.type) or pa.types.is_large_binary(scalar.type)):
        return memoryview(scalar.as_buffer())
    return scalar.as_py()


def _open_file(url: str) -> tuple[pq.ParquetFile, list[int]]:
    """An open file (only its footer is read) and the first row of each row group, and of the end."""
    pa.set_memory_pool(pa.system_memory_pool())  # reuses pages (data.memory); Arrow's own asks for new ones every row
    if is_remote(url):
        filesystem, path = fsspec.core.url_to_fs(url)
        file = pq.ParquetFile(filesystem.open(path, "rb", cache_type="none"), pre_buffer=True)
    else:
        file = pq.ParquetFile(url, memory_map=True)
    starts = [0]
    for group in range(file.metadata.num_row_groups):
        starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
    return file, starts


_open = PerThread(_open_file, keep=8)


def _retried(read: Callable[[], T], url: str) -> T:
    """Calls ``read``; for a remote source several times, with pauses, then SourceUnavailable."""
    if not is_remote(url):
        return read()
    for pause in (*_PAUSES, None):
        try:
            return read()
        except (FileNotFoundError, BadInput, pa.ArrowInvalid):
            raise  # the answer came, and it is bad
        except Exception as error:  # every protocol has its own network errors
            _open.cache_clear()
            if pause is None:
                raise SourceUnavailable(
                    f"{url} does not answer ({type(error).__name__}: {first_line(error)})"
                ) from error
            time.sleep(pause)
    raise AssertionError("unreachable")
