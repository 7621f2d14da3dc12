"""``python -m etils_copy FROM TO``: a folder from or to a bucket, in a process that knows where the store is."""

import sys

from etils import epath


def copy(source: epath.Path, target: epath.Path) -> None:
    if source.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        for child in source.iterdir():
            copy(child, target / child.name)
    else:
        target.write_bytes(source.read_bytes())


if __name__ == "__main__":
    copy(*map(epath.Path, sys.argv[1:]))
