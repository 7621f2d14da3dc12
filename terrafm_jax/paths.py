"""Files on disks and in buckets: which of them a path means, and how to write one so that it is never half there."""

from __future__ import annotations

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
