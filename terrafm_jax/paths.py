"""Files on disk and in buckets: which one a path means, and writing that never leaves half a file."""

from __future__ import annotations

import contextlib
import io
import os
from typing import Any

import numpy as np


def is_remote(path: Any) -> bool:
    """Whether a path or URL names an object in a store (``gs://...``) instead of a file."""
    return "://" in str(path)


def write_atomically(path: Any, content: bytes) -> None:
    """Writes an ``epath.Path`` or a ``pathlib.Path``; interrupted, it holds all of the old content or all of the new.

    Raises OSError, which names the path: a full disk on its own does not say which one it is.
    """
    if is_remote(path):  # object stores write whole objects or none
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.partial")  # hidden: a new workdir may hold nothing that is foreign
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def save_array(path: Any, array: np.ndarray) -> None:
    """``numpy.save``, atomically."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    write_atomically(path, buffer.getvalue())


def append_line(path: Any, line: str) -> None:
    """Adds a line to a file on disk, which need not be there yet.

    What a kill or a full disk has cut short before stays a line of its own, and costs no other. Raises OSError, which
    names the path.
    """
    try:
        with open(path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + line.encode() + b"\n")
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
