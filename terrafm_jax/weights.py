"""Parameter trees as flat files: ``params.npz`` and ``meta.json`` in a folder, on disk or in a bucket."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from terrafm_jax.paths import write_atomically

PARAMS_FILE, META_FILE = "params.npz", "meta.json"
TEACHER_FOLDER = "teacher"  # WORKDIR/teacher/<step>/


class WeightsError(ValueError):
    """A file of weights is missing, damaged, or does not fit; says which file and what was expected."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"backbone/blocks/0/attn/qkv/kernel": leaf}, in sorted order."""
    flat: dict[str, Any] = {}
    for name in sorted(tree):
        value, path = tree[name], f"{prefix}{name}"
        flat.update(flatten(value, f"{path}/") if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`flatten`."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree


def content_hash(tree: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of names, shapes, types and values: tells weights apart however they are stored."""
    digest = hashlib.sha256()
    for path, value in flatten(tree).items():
        array = np.ascontiguousarray(value)
        digest.update(f"{path} {array.shape} {array.dtype.str}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save_npz(folder: Any, params: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Writes ``params`` (arrays become float32) and ``meta`` (JSON) to ``folder``, whole or not at all.

    ``meta`` is written last: a folder without it is unfinished and readers skip it.
    """
    from etils import epath

    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez(buffer, **{path: np.asarray(value, np.float32) for path, value in flatten(params).items()})
    write_atomically(folder / PARAMS_FILE, buffer.getvalue())
    write_atomically(folder / META_FILE, json.dumps(dict(meta), indent=2).encode())


def load_npz(folder: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what :func:`save_npz` wrote: (nested params of NumPy arrays, meta). Raises WeightsError."""
    from etils import epath

    folder = epath.Path(folder)
    missing = [name for name in (PARAMS_FILE, META_FILE) if not (folder / name).exists()]
    if missing:
        raise WeightsError(f"{folder}: {', '.join(missing)} not found; expected a folder that a training run exported")
    try:
        with np.load(io.BytesIO((folder / PARAMS_FILE).read_bytes()), allow_pickle=False) as archive:
            flat = {path: archive[path] for path in archive.files}
        meta = json.loads((folder / META_FILE).read_text())
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise WeightsError(f"{folder}: cannot be read ({error}); copy it again from where it was written") from error
    return unflatten(flat), meta


def newest_teacher(workdir: Any) -> Any | None:
    """The finished ``teacher/<step>`` folder of the largest step in a workdir, or None."""
    from etils import epath

    root = epath.Path(workdir) / TEACHER_FOLDER
    if not root.is_dir():
        return None
    steps = [f for f in root.iterdir() if f.name.isdigit() and (f / META_FILE).exists()]
    return max(steps, key=lambda f: int(f.name), default=None)
