"""What files for other people say of where things came from: names and digests, never a path of this machine."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any
from urllib.parse import urlsplit

_URL = re.compile(r"(?:[a-z0-9+.-]+=|/vsi[a-z0-9]+/)*([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_LOCAL = re.compile(r"(?P<mark>[^/\\=@]*[=@])?(?P<path>(?:/|~|[A-Za-z]:[\\/]).*)", re.DOTALL)
_CONTAINERS = (".safe", ".zip", ".tar", ".tgz", ".zarr")  # what lies inside is named from here on
_GENERIC = re.compile(r"teacher|checkpoints|best|\d+")  # of a workdir: say nothing without the folder above


def place(path: object) -> str:
    """The name of a file or folder: what remains true on another machine.

    A URL keeps host and path, without user, query and fragment (which may hold a signature); a local path becomes its
    last part, with the folders above it from a product's or archive's own name on, or as far as it is a step of a run.
    """
    text = str(path)
    if (url := _URL.match(text)) and url[1].lower() != "file":
        parts = urlsplit(text[url.start(1) :])
        return f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}"
    names = [n for n in re.split(r"[/\\]+", os.path.abspath(os.path.expanduser(text))) if n]
    first = len(names) - 1
    while first > 0 and _GENERIC.fullmatch(names[first]):
        first -= 1
    inside = [i for i, n in enumerate(names) if PurePath(n).suffix.lower() in _CONTAINERS]
    return "/".join(names[min([first, *inside]) :]) if names else ""


def portable(value: Any) -> Any:
    """The value of a config, its absolute paths replaced by :func:`place`, what stands before ``=`` or ``@`` kept."""
    if isinstance(value, Mapping):
        return {k: portable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(portable(v) for v in value)
    if not isinstance(value, str):
        return value
    if found := _LOCAL.fullmatch(value):
        return (found["mark"] or "") + place(found["path"])
    return place(value) if _URL.match(value) else value


def digest(config: Mapping[str, Any]) -> str:
    """SHA-256 of a flat config, equal on every machine that has data and weights under the same names."""
    return hashlib.sha256(json.dumps(portable(config), sort_keys=True, default=str).encode()).hexdigest()
