"""Blending of overlapping windows in bounded memory, and the unfinished result on disk that a job resumes from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Chunk, Plan


class Blender:
    """Weighted sums of the rows of the output that are not finished yet.

    Windows are added in the order of ``Plan.chunks``; once no later window reaches a row, the row is
    complete and leaves. Memory: about one window height of output rows.
    """

    def __init__(self, plan: Plan, width: int):
        self._plan, (_, columns) = plan, plan.shape
        rows = -(-plan.window // plan.stride) + plan.patch
        self.first = 0  # output row that sums[0] stands for
        self.sums = np.zeros((rows, columns, width), np.float32)
        self.weights = np.zeros((rows, columns), np.float32)

    def add(self, chunk: Chunk, column: int, tokens: np.ndarray, valid: np.ndarray) -> None:
        """Adds the tokens [h, w, d] of one window where ``valid`` [h, w] says that their ground was measured."""
        rows, columns = self._plan.tokens_of(chunk, column)
        rows = slice(rows.start - self.first, rows.stop - self.first, rows.step)
        h, w = tokens.shape[:2]
        weight = self._plan.taper(h)[:, None] * self._plan.taper(w)[None, :] * valid
        self.sums[rows, columns] += weight[..., None] * tokens
        self.weights[rows, columns] += weight

    def finish(self, before: int) -> np.ndarray:
        """Takes out the rows up to ``before``; float32 [rows, columns, d], NaN where no window was added."""
        count = min(before, self._plan.shape[0]) - self.first
        if count <= 0:
            return np.empty((0, *self.sums.shape[1:]), np.float32)
        weights = self.weights[:count, :, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            done = np.where(weights > 0, self.sums[:count] / weights, np.float32(np.nan))
        for array in (self.sums, self.weights):
            array[:-count] = array[count:].copy()
            array[-count:] = 0
        self.first += count
        return done


class _Partial:
    """The folder ``OUT.partial``: files that grow, and a snapshot that says how much of them counts.

    The snapshot is replaced atomically, and the files are written before it, so after an interruption at any
    moment the job goes on from the last snapshot and ends with the same bytes.
    """

    def __init__(self, out: Path, fingerprint: str, files: Sequence[str]):
        self.folder = out.with_name(out.name + ".partial")
        self._fingerprint, self._files = fingerprint, tuple(self.folder / name for name in files)

    def _open(self) -> dict[str, np.ndarray]:
        """The last snapshot, empty for a new job. Raises SceneError if it belongs to another one."""
        snapshot = self.folder / "snapshot.npz"
        if not snapshot.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            for path in self._files:
                path.write_bytes(b"")
            return {}
        with np.load(snapshot, allow_pickle=False) as saved:
            if str(saved["fingerprint"]) != self._fingerprint:
                raise SceneError(
                    f"{self.folder}: belongs to other inputs or settings; delete it or choose another --out"
                )
            return dict(saved)

    def _write(self, path: Path, at: int, data: np.ndarray) -> None:
        try:
            with open(path, "r+b") as file:
                file.seek(at)
                file.write(np.ascontiguousarray(data, np.float32).tobytes())
        except OSError as error:
            raise SceneError(f"{path}: cannot be written ({error.strerror}); free space and start again") from None

    def _save(self, **state: Any) -> None:
        temporary = self.folder / "snapshot.tmp.npz"
        try:
            for path in self._files:
                with open(path, "r+b") as file:
                    os.fsync(file.fileno())
            np.savez(temporary, fingerprint=self._fingerprint, **state)
            os.replace(temporary, self.folder / "snapshot.npz")
        except OSError as error:
            raise SceneError(f"{temporary}: cannot be written ({error.strerror}); free space and start again") from None

    def remove(self) -> None:
        """Deletes the folder once the output is in place."""
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def remove_own(self) -> None:
        """Deletes the folder if it is of this very job: killed when its output was in place already."""
        if (self.folder / "snapshot.npz").exists():
            with contextlib.suppress(SceneError):  # of another job, which may want to go on
                self._open()
                self.remove()


class Unfinished(_Partial):
    """What a scene has so far: finished rows, class tokens of windows, and a snapshot of the blender."""

    def __init__(self, out: Path, plan: Plan, width: int, fingerprint: str):
        super().__init__(out, fingerprint, ("tokens.f32", "class_tokens.f32"))
        self._plan, self._width = plan, width
        self.shape = (*plan.shape, width)
        self.rows_path, self.cls_path = self._files

    def open(self, blender: Blender) -> int:
        """Number of chunks done already (the blender is restored), 0 for a new job. Raises SceneError."""
        saved = self._open()
        if not saved:
            return 0
        blender.first = int(saved["first"])
        blender.sums[:], blender.weights[:] = saved["sums"], saved["weights"]
        return int(saved["chunks"])

    def write_rows(self, first: int, rows: np.ndarray) -> None:
        """Puts finished rows [n, columns, d] where they belong."""
        self._write(self.rows_path, first * self.shape[1] * self._width * 4, rows)

    def write_cls(self, window: int, cls: np.ndarray) -> None:
        """Puts the class tokens [n, d] of windows ``window``, ... where they belong."""
        self._write(self.cls_path, window * self._width * 4, cls)

    def save(self, blender: Blender, chunks: int) -> None:
        """Snapshot after ``chunks`` chunks."""
        self._save(chunks=chunks, first=blender.first, sums=blender.sums, weights=blender.weights)

    def tokens(self) -> np.ndarray:
        """The finished tokens [rows, columns, d], mapped from disk."""
        return np.memmap(self.rows_path, np.float32, "r", shape=self.shape)

    def class_tokens(self, windows: int) -> np.ndarray:
        """Class tokens [windows, d], mapped from disk."""
        return np.memmap(self.cls_path, np.float32, "r", shape=(windows, self._width))


class UnfinishedPlaces(_Partial):
    """What a job of places has so far: two vectors a window, in the order of the windows."""

    def __init__(self, out: Path, width: int, fingerprint: str):
        super().__init__(out, fingerprint, ("places.f32",))
        self._width = width

    def open(self) -> int:
        """Number of windows done already. Raises SceneError."""
        return int(self._open().get("windows", 0))

    def write(self, first: int, vectors: np.ndarray) -> None:
        """Puts the vectors [n, 2, d] of windows ``first``, ... where they belong."""
        self._write(self._files[0], first * 2 * self._width * 4, vectors)

    def save(self, windows: int) -> None:
        """Snapshot after so many windows."""
        self._save(windows=windows)

    def vectors(self, windows: int) -> np.ndarray:
        """float32 [windows, 2, d]."""
        return np.fromfile(self._files[0], np.float32, windows * 2 * self._width).reshape(windows, 2, self._width)
