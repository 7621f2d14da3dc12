"""Shards of a data set in a bucket: copied once per host to a local folder, then read like local ones.

The array_record wheels can only open local files. Copies suit data sets that fit on every host's disk; for
larger ones mount the bucket (docs/input.md).
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from etils import epath

log = logging.getLogger(__name__)
FOLDER_VARIABLE = "TERRAFM_SHARD_CACHE"
TRIES, FIRST_WAIT = 6, 0.5  # the wait, in seconds, doubles after every failure: gives up after about half a minute
_CHUNK = 16 << 20


class FetchError(RuntimeError):
    """A shard is unavailable: the store does not answer, or the local folder is full. Never means a damaged record."""


def cache_folder() -> Path:
    """The folder of the copies: ``$TERRAFM_SHARD_CACHE``, else one in the system's temporary folder."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(tempfile.gettempdir()) / "terrafm_jax_shards")


def local_copy(url: str, *, tries: int = TRIES, first_wait: float = FIRST_WAIT) -> Path:
    """The local copy of a remote file, made now unless there is one of the same length.

    Only one process of a host copies while the others wait; a copy appears atomically.

    Raises:
      FetchError: no answer after ``tries``, no such file, or no space.
    """
    source = epath.Path(url)
    parent, name = str(source.parent), source.name
    digest = hashlib.sha256(parent.encode()).hexdigest()[:12]
    target = cache_folder() / f"{Path(parent).name}-{digest}" / name
    length = _with_retries(lambda: source.stat().length, url, tries, first_wait)
    if _complete(target, length):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _complete(target, length):
                _with_retries(lambda: _copy(source, target, length), url, tries, first_wait)
    except OSError as error:
        raise FetchError(
            f"{url}: cannot be copied to {target.parent}: {error}. Free some space, or set {FOLDER_VARIABLE} to a "
            "folder that holds the whole data set, or mount the bucket and give the mounted folder"
        ) from error
    return target


def _complete(path: Path, length: int) -> bool:
    return path.exists() and path.stat().st_size == length


def _copy(source: Any, target: Path, length: int) -> None:
    partial = target.with_name(target.name + ".partial")
    with source.open("rb") as remote:
        try:
            with partial.open("wb") as local:
                shutil.copyfileobj(remote, local, _CHUNK)
        except OSError as error:
            if error.errno is None:  # from the store, so worth a retry
                raise ConnectionError(str(error)) from error
            partial.unlink(missing_ok=True)
            raise
    if partial.stat().st_size != length:
        raise ConnectionError(f"{partial.stat().st_size} of {length} bytes arrived")
    os.replace(partial, target)


def _with_retries(action: Callable[[], Any], url: str, tries: int, wait: float) -> Any:
    """Retries an access to the store with exponential, jittered backoff; errors of the local disk pass at once."""
    for attempt in range(1, tries + 1):
        try:
            return action()
        except FileNotFoundError as error:
            raise FetchError(f"{url}: not there") from error
        except Exception as error:  # stores raise whatever their client library raises
            if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
                raise
            if attempt == tries:
                raise FetchError(f"{url}: gave up after {tries} tries: {type(error).__name__}: {error}") from error
            pause = wait * 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
            log.warning("%s: %s: %s; trying again in %.1f s", url, type(error).__name__, error, pause)
            time.sleep(pause)
