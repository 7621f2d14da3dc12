"""Files on disks and in buckets: which of them a path means, and how to write one so that it is never half there."""

from __future__ import annotations

import os
from typing import Any


def is_remote(path: Any) -> bool:
    """Whether a path or URL names an object in a store (``gs://...``) instead of a file."""
    return "://" in str(path)


def write_atomically(path: Any, content: bytes) -> None:
    """Writes an ``epath.Path``; whatever interrupts it, the path holds all of the old content or all of the new."""
    if is_remote(path):  # object stores write whole objects or none
        path.write_bytes(content)
        return
    partial = path.with_name(f".{path.name}.partial")  # hidden: a new workdir may hold nothing that is foreign
    partial.write_bytes(content)
    partial.replace(path)


def append_line(path: Any, line: str) -> None:
    """Adds a line to a file on disk, which need not be there yet.

    What a kill or a full disk has cut short before stays a line of its own, and costs no other. Raises OSError that
    names the file.
    """
    try:
        with open(path, "a+b") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            torn = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * torn + line.encode() + b"\n")
    except OSError as error:  # of a full disk it says no more than that
        raise OSError(error.errno, error.strerror, str(path)) from error
