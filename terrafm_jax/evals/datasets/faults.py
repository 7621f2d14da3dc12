"""Faults of labelled files, named at once: what one image, mask or row of a table lacks, others often lack, too."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals.datasets.base import DatasetError, Sample

log = logging.getLogger(__name__)

NAMED = 10
_SECONDS = 30.0  # after which a large data set is not searched any further


def naming_all(read: Callable[[int], Sample], count: int) -> Callable[[int], Sample]:
    """``read``, but its first DatasetError looks at the other samples as well and names those that fail, too.

    Reading every file beforehand would cost every job what only a broken data set needs.
    """
    known: list[str] = []
    lock = threading.Lock()

    def surveyed(i: int) -> Sample:
        try:
            return read(i)
        except DatasetError as error:
            with lock:  # threads that read fail together
                if not known:
                    known.append(_survey(read, count, str(error)))
            raise DatasetError(known[0]) from error

    return surveyed


def _survey(read: Callable[[int], Sample], count: int, first: str) -> str:
    found, until, looked = {first: None}, time.monotonic() + _SECONDS, 0
    for i in range(count):
        if len(found) > NAMED or time.monotonic() > until:
            break
        looked += 1
        try:
            read(i)
        except DatasetError as error:
            found[str(error)] = None
    if len(found) == 1:
        return first
    alike: dict[str, list[str]] = {}
    for text in list(found)[:NAMED]:
        path, _, why = text.partition(": ")
        alike.setdefault(why, []).append(path if why not in alike else Path(path).name)
    texts = [f"{', '.join(paths)}: {why}" for why, paths in alike.items()]
    rest = "" if looked == count else f" (of {looked} looked at, {count} in all)"
    return f"{len(found)} samples cannot be used{rest}: " + "; ".join(texts)


def check_mask(path: Path, mask: np.ndarray, image: np.ndarray, classes: Sequence[str], ignore: int) -> np.ndarray:
    """The mask [H, W, 1] of an image [H, W, bands] as int64 [H, W]. Raises DatasetError where it cannot be one.

    A number beyond the classes makes the loss NaN, and the learning rate would be blamed for it.
    """
    if mask.shape[-1] != 1:
        raise DatasetError(f"{path}: {mask.shape[-1]} bands; a mask has one, which holds the numbers of classes")
    labels, size = mask[..., 0], image.shape[:2]
    if labels.shape[0] * size[1] != labels.shape[1] * size[0]:
        raise DatasetError(f"{path}: the mask has {labels.shape} px, its image {size}; give masks of the same extent")
    right = ((labels >= 0) & (labels < len(classes)) & (labels == np.floor(labels))) | (labels == ignore)
    if not right.all():
        wrong = np.unique(labels[~right])
        shown = ", ".join(f"{value:g}" for value in wrong[:NAMED]) + (" ..." if len(wrong) > NAMED else "")
        named = ", ".join(f"{i} {name}" for i, name in enumerate(classes[:NAMED]))
        more = " ..." if len(classes) > NAMED else ""
        raise DatasetError(
            f"{path}: labels {shown} are no class ({named}{more}) and not ignore ({ignore}); mend the mask, or say "
            "classes or ignore in dataset.yaml"
        )
    return labels.astype(np.int64)


def tell_alike(what: Path, names: Sequence[str]) -> None:
    """Warns of labels that became classes of their own though only their spelling differs: Forest, forest; 1, 1.0."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        try:
            key: Any = float(name)
        except ValueError:
            key = name.casefold()
        groups.setdefault(key, []).append(name)
    alike = [" and ".join(those) for those in groups.values() if len(those) > 1]
    if alike:
        log.warning("%s: are %s one class? Spelled differently they are several", what, few(alike))


def by_image(
    what: Path, rows: Iterable[tuple[str, Any]], match: Callable[[str], Path | None], images: Sequence[Path]
) -> dict[Path, Any]:
    """What a table (name, value) says of each image. Raises DatasetError where it has two values for one.

    Rows that name no image and images without a row are told: a typing error halves a data set without a word.
    """
    found: dict[Path, Any] = {}
    stray, twice = [], []
    for name, value in rows:
        path = match(name)
        if path is None:
            stray.append(name)
        elif found.setdefault(path, value) != value:
            twice.append(f"{name} ({found[path]!r}, {value!r})")
    if twice:
        raise DatasetError(f"{what}: two values for {', '.join(twice[:NAMED])}")
    lacking = [path.name for path in images if path not in found]
    for names, text in ((stray, "rows name no image"), (lacking, "images have no row and are left out")):
        if names:
            log.warning("%s: %d %s: %s", what, len(names), text, few(names))
    return found


def few(names: Sequence[str]) -> str:
    """The first five names, and whether there are more."""
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")
