"""The one exception of scene embedding: a line that names the file, what is wrong and what to do."""

from __future__ import annotations


class SceneError(ValueError):
    """Input of a scene cannot be used; the message is one line that names file and remedy."""


def first_line(error: BaseException) -> str:
    """What a library said, on one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
