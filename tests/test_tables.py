"""CSV files as people write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from terrafm_jax.tables import TableError, read_csv

ROWS = [{"file": "a.tif", "label": "forêt"}, {"file": "b.tif", "label": ""}]


@pytest.mark.parametrize(
    "content",
    [
        "file,label\na.tif,forêt\nb.tif,\n".encode(),
        "\ufefffile;label\r\na.tif;forêt\r\nb.tif\r\n\r\n".encode(),  # a short row and an empty one
        "file\tlabel\t\na.tif\tforêt\t\nb.tif\t\t\n".encode(),
        'file , label\n"a.tif", forêt \nb.tif,""\n'.encode(),
    ],
)
def test_what_spreadsheets_write(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    assert read_csv(path, ("file", "label")) == ROWS


def test_semicolons_inside_cells_and_quoted_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('File,Labels\na.tif,a; b\nb.tif,"c,\nd"\n')
    assert read_csv(path, ("file",), lower=True) == [
        {"file": "a.tif", "labels": "a; b"},
        {"file": "b.tif", "labels": "c,\nd"},
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"columns \['file'\] are missing; found \[\]"),
        (b"path,label\n", r"columns \['file'\] are missing; found \['path', 'label'\]"),
        (b"file,file\n", r"twice \['file'\]"),
        (b"file,label\na,b\nc,d,e\n", r"lines \[3\] have more cells than the 2 columns"),
        ("file\nété\n".encode("latin-1"), r"not UTF-8 text \(invalid continuation byte at byte 5\); save it as UTF-8"),
        (b"file\n" + b"x" * 200_000 + b"\n", r"is no CSV \(field larger than"),
    ],
)
def test_faults_name_the_file(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(TableError, match=f"t.csv: .*{message}"):
        read_csv(path, ("file",))
