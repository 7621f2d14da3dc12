"""CSV files that people give: lists of files, labels, points. Written by spreadsheets as often as by programs."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from pathlib import Path


class TableError(ValueError):
    """A CSV file cannot be read or lacks columns; says which file and line, and what was expected."""


def read_csv(path: str | Path, columns: Sequence[str] = (), *, lower: bool = False) -> list[dict[str, str]]:
    """Rows of a CSV file by column. Names and cells lose the blanks around them; cells that a row lacks are empty.

    The header says what separates: commas, else semicolons or tabs, which spreadsheets write in many countries. A
    byte-order mark is not part of the first name.

    Args:
      columns: names that must be there.
      lower: names become lower case.

    Raises:
      TableError: not UTF-8, no rows, columns missing or named twice, rows with more cells than there are columns (all
        are named).
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise TableError(f"{path}: is not UTF-8 text ({where}); save it as UTF-8") from None
    separator = next((s for s in ",;\t" if s in text.partition("\n")[0]), ",")
    reader = csv.reader(io.StringIO(text), delimiter=separator)
    try:
        lines = [(reader.line_num, line) for line in reader if any(map(str.strip, line))]
    except csv.Error as error:
        raise TableError(f"{path}: is no CSV ({error})") from None
    header = lines[0][1] if lines else []
    names = [name.strip().lower() if lower else name.strip() for name in header]
    missing = [name for name in columns if name not in names]
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if missing or twice:
        double = f", twice {twice}" if twice else ""
        raise TableError(f"{path}: columns {missing} are missing{double}; found {names}")
    long = [number for number, line in lines if any(map(str.strip, line[len(names) :]))]
    if long:
        raise TableError(f"{path}: lines {long[:5]} have more cells than the {len(names)} columns; quote such cells")
    rows = (zip(names, itertools.chain(line, itertools.repeat("")), strict=False) for _, line in lines[1:])
    return [{name: cell.strip() for name, cell in row if name} for row in rows]
