"""Features of a split, computed once: cached by weights hash, written chunk by chunk, resumed where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from terrafm_jax.evals.datasets.base import Dataset, DatasetError, Sample, batches, collate, spread
from terrafm_jax.evals.features import ImageBatch
from terrafm_jax.paths import save_array, write_atomically

VERSION = 5  # raise when features change for the same weights and inputs: old caches are then not used
CHUNK = 256


class Rows:
    """Arrays of chunks as one array along the first axis, without loading them (memory maps stay on disk).

    Raises ValueError for parts of several shapes.
    """

    def __init__(self, parts: Sequence[np.ndarray]):
        self.parts = list(parts)
        shapes = {p.shape[1:] for p in self.parts}
        if len(shapes) > 1:
            raise ValueError(f"rows of shapes {sorted(shapes)}")
        self._ends = np.cumsum([len(p) for p in self.parts])
        self.shape, self.dtype = (int(self._ends[-1]), *self.parts[0].shape[1:]), self.parts[0].dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        rows = np.arange(len(self))[rows] if isinstance(rows, slice) else np.asarray(rows, int)
        out = np.empty((len(rows), *self.shape[1:]), self.dtype)
        part = np.searchsorted(self._ends, rows, side="right")
        for p in np.unique(part):
            here = part == p
            out[here] = self.parts[p][rows[here] - (self._ends[p] - len(self.parts[p]))]
        return out


@dataclasses.dataclass(frozen=True)
class Extracted:
    """Features of one split.

    Attributes:
      cls: float32 [N, d]. targets: [N], [N, C] or [N, H, W].
      maps: per layer [N, h, w, d] float16 rows, empty unless asked for. after: the same of the second date.
    """

    cls: np.ndarray
    targets: np.ndarray
    ids: list[str]
    maps: tuple[Rows, ...] = ()
    after: tuple[Rows, ...] = ()


@dataclasses.dataclass(frozen=True)
class Request:
    """What to compute: inputs (sensor keys), dense maps and of which layers, batch size, samples at most (0: all)."""

    inputs: tuple[str, ...]
    dense: bool = False
    layers: tuple[int, ...] = ()
    batch_size: int = 32
    limit: int = 0


Progress = Callable[[int, int], None]


class ImageEncoder(Protocol):
    """What features come from; a cache also asks it for ``weights_hash`` and ``image_size``."""

    def check(self, sensors: Iterable[str]) -> tuple[str, ...]: ...

    def __call__(
        self, batch: ImageBatch, *, layers: Sequence[int] = (), patches: bool = False
    ) -> tuple[np.ndarray, Sequence[np.ndarray] | None]: ...


def extract(
    encoder: ImageEncoder,
    dataset: Dataset,
    split: str,
    request: Request,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> Extracted:
    """Features of a split, from the cache as far as it has them.

    Args:
      encoder: see ``encoders.py``; its ``cache_key`` and ``image_size`` are part of the cache's key.
      cache: folder, or None to keep everything in memory.
      progress: called with (samples done, samples in all).

    Raises:
      DatasetError: unreadable sample, inputs that the data set lacks, maps of unequal size.
    """
    encoder.check(request.inputs)
    dataset.info.select(request.inputs)
    samples = dataset.split(split)
    if request.limit:
        samples = samples.subset(spread(len(samples), request.limit))
    if not len(samples):
        raise DatasetError(f"{dataset.info.name}: split {split!r} is empty")
    folder = None if cache is None else cache / _key(encoder, dataset, split, request)
    chunks = []
    for start in range(0, len(samples), CHUNK):
        rows = range(start, min(start + CHUNK, len(samples)))
        chunks.append(_chunk(encoder, dataset, samples.subset(rows), request, folder, start // CHUNK))
        if progress:
            progress(rows[-1] + 1, len(samples))
    return _assemble(dataset, samples.ids, chunks)


def _key(encoder: Any, dataset: Dataset, split: str, request: Request) -> Path:
    options = [VERSION, encoder.image_size, request.dense, request.layers, request.limit]
    text = json.dumps([dataset.fingerprint(split, request.inputs), options])
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    name = f"{dataset.info.name}-{split}-{'+'.join(request.inputs)}-{digest}".replace("/", "_")
    return Path(encoder.cache_key[:16]) / name


def _chunk(
    encoder: ImageEncoder,
    dataset: Dataset,
    samples: Sequence[Sample],
    request: Request,
    folder: Path | None,
    number: int,
) -> dict[str, np.ndarray]:
    if folder is None:
        return _compute(encoder, dataset, samples, request)
    names = ["cls", "targets"] + [f"{kind}{i}" for kind, i in _map_names(dataset, request)]
    paths = {n: folder / f"chunk_{number:05d}.{n}.npy" for n in names}
    done = folder / f"chunk_{number:05d}.done"
    if not done.exists():
        found = _compute(encoder, dataset, samples, request)
        folder.mkdir(parents=True, exist_ok=True)
        for name, path in paths.items():
            save_array(path, found[name])
        done.write_bytes(b"")  # written last: a chunk that was cut short is computed again
    return {n: np.load(p, mmap_mode="r" if n[:4] in ("maps", "afte") else None) for n, p in paths.items()}


def _map_names(dataset: Dataset, request: Request) -> list[tuple[str, int]]:
    if not request.dense:
        return []
    kinds = ("maps", "after") if dataset.info.task == "change" else ("maps",)
    return [(kind, i) for kind in kinds for i in range(max(1, len(request.layers)))]


def _compute(
    encoder: ImageEncoder, dataset: Dataset, samples: Sequence[Sample], request: Request
) -> dict[str, np.ndarray]:
    found: dict[str, list[np.ndarray]] = {"cls": [], "targets": []}
    for group in batches(samples, request.batch_size):
        for kind in ("maps", "after") if dataset.info.task == "change" else ("maps",):
            images = collate(dataset.info, group, request.inputs, after=kind == "after")
            cls, maps = encoder(images, layers=request.layers, patches=request.dense)
            if kind == "maps":
                found["cls"].append(cls)
            for i, m in enumerate(maps or ()):
                found.setdefault(f"{kind}{i}", []).append(m.astype(np.float16))
        found["targets"] += [_small(np.asarray(s.target))[None] for s in group]
    with _one_size(dataset):
        return {k: np.concatenate(v) for k, v in found.items()}


def _small(target: np.ndarray) -> np.ndarray:
    """Masks [H, W] in two bytes a pixel where they suffice: those of a split are in memory all at once."""
    if target.ndim != 2 or not -(2**15) <= target.min(initial=0) <= target.max(initial=0) < 2**15:
        return target
    return target.astype(np.int16)


def _assemble(dataset: Dataset, ids: list[str], chunks: list[dict[str, np.ndarray]]) -> Extracted:
    def rows(kind: str) -> tuple[Rows, ...]:
        names = sorted(k for k in chunks[0] if k.startswith(kind))
        return tuple(Rows([c[n] for c in chunks]) for n in names)

    with _one_size(dataset):
        cls, targets = (np.concatenate([c[name] for c in chunks]) for name in ("cls", "targets"))
        return Extracted(cls, targets, ids, rows("maps"), rows("after"))


@contextlib.contextmanager
def _one_size(dataset: Dataset) -> Iterator[None]:
    """What cannot be joined is a DatasetError that says why."""
    try:
        yield
    except ValueError as e:
        raise DatasetError(f"{dataset.info.name}: images differ in size; cut them with --tile ({e})") from e


def joined(parts: Sequence[Extracted]) -> Extracted:
    """Several splits of whole-image features as one."""
    ids = [i for p in parts for i in p.ids]
    return Extracted(np.concatenate([p.cls for p in parts]), np.concatenate([p.targets for p in parts]), ids)


# --- cutting large images -------------------------------------------------------------------------------------


def tiled(dataset: Dataset, size: int) -> Dataset:
    """The same data set with images and masks cut into ``size`` px windows; the last ones are padded and ignored there.

    Reads every image once to learn its size. Padding is nodata in the images and ``ignore`` in the masks. Pixels are
    those of the masks: an image of other sampling gives the same ground in pixels of its own.

    Raises:
      DatasetError: on reading a window that is not a whole number of an image's pixels.
    """
    from terrafm_jax.evals.datasets.base import Split

    if dataset.info.task not in ("segmentation", "change"):
        return dataset

    def cut(split: Split) -> Split:
        cells = [(i, r, c) for i in range(len(split)) for r, c in _windows(split[i], size)]
        names = [f"{split.ids[i]}/r{r}_c{c}" for i, r, c in cells]

        def read(k: int) -> Sample:
            i, r, c = cells[k]
            return _window(split[i], names[k], r, c, size, dataset.info.ignore)

        return Split(names, read, state=lambda k: split.state(cells[k][0]))

    return dataclasses.replace(dataset, splits={k: cut(s) for k, s in dataset.splits.items()}, tile=size)


def _windows(sample: Sample, size: int) -> Iterator[tuple[int, int]]:
    rows, cols = np.shape(sample.target)
    return ((r, c) for r in range(0, rows, size) for c in range(0, cols, size))


def _window(sample: Sample, name: str, r: int, c: int, size: int, ignore: int) -> Sample:
    whole = np.shape(sample.target)

    def take(image: np.ndarray, fill: float) -> np.ndarray:
        rows, cols = image.shape[:2]
        side, left_over = divmod(size * rows, whole[0])
        if left_over or rows * whole[1] != cols * whole[0]:
            raise DatasetError(
                f"{sample.path or sample.id}: image of {(rows, cols)} px, mask of {whole}: a window of {size} px "
                "of the mask is no whole number of pixels of the image; choose another, or warp the image to the mask"
            )
        top, left = r // size * side, c // size * side
        part = image[top : top + side, left : left + side]
        pad = [(0, side - part.shape[0]), (0, side - part.shape[1])] + [(0, 0)] * (part.ndim - 2)
        return np.pad(part, pad, constant_values=fill)

    def all_of(images: Any) -> Any:
        # 0 in every band is nodata of Sentinel-2; radar in dB needs NaN, of which integers have none.
        return {k: take(v.astype(np.float32), np.nan if k == "s1" else 0) for k, v in images.items()}

    after = None if sample.after is None else all_of(sample.after)
    target = take(np.asarray(sample.target), ignore)
    window = (r, c, whole)
    return dataclasses.replace(sample, id=name, images=all_of(sample.images), after=after, target=target, window=window)


def write_json(path: Path, value: Any) -> None:
    """JSON that appears whole or not at all."""
    write_atomically(path, json.dumps(value, indent=2, default=plain).encode())


def plain(value: Any) -> Any:
    """For ``json.dumps(default=)``: NumPy's arrays and numbers as Python's, anything else as text."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    return str(value)
