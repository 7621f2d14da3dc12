"""Files that are never half there, whatever ends their writing."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from terrafm_jax.paths import save_array, write_atomically


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of what is written fits."""
    whole = Path.write_bytes

    def half(self: Path, content: bytes) -> int:
        whole(self, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", half)


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "scores.npy"
    with open(path, "wb") as file:
        file.write(b"old")
    with pytest.raises(OSError, match=r"No space left on device: '.*scores.npy'"):
        save_array(path, np.arange(100))
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["scores.npy"]


def test_a_folder_that_is_not_there_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere/a.json"):
        write_atomically(tmp_path / "nowhere" / "a.json", b"{}")
