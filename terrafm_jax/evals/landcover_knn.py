"""kNN on prepared tiles: does the class token know the WorldCover majority class of a tile?

The label never was an input or a target of pretraining. Gallery and queries come from different splits,
which share no ground. Used during pretraining, by the demo and in docs/experiments.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from terrafm_jax import landcover
from terrafm_jax.data import pipeline
from terrafm_jax.evals.features import TileFeatures, tile_features
from terrafm_jax.evals.knn import knn_classify
from terrafm_jax.evals.raw import batch_statistics, standardize
from terrafm_jax.processes import rows_of_all
from terrafm_jax.sensors import SENSOR_KEYS


@dataclasses.dataclass(frozen=True)
class TileSets:
    """Which tiles serve as gallery and which as queries; the same for every encoder that is compared.

    Attributes:
      data_dir: prepared data set.
      gallery, queries: (split, largest number of tiles); a fixed random choice where there are more.
      sensors: sensors to read.
      batch_size: tiles a batch of one process.
      canvases: canvas buckets, as in training.
    """

    data_dir: str
    gallery: tuple[str, int]
    queries: tuple[str, int]
    sensors: tuple[str, ...]
    batch_size: int = 256
    canvases: int = 4

    def records(self, which: tuple[str, int]) -> np.ndarray:
        """Record numbers, ascending; tiles whose land cover is unknown or that lack every sensor are left out."""
        split, limit = which
        index = pipeline.load_index(self.data_dir, split)
        shown = index["present"] & np.uint8(sum(1 << SENSOR_KEYS.index(key) for key in self.sensors))
        known = np.flatnonzero((index["landcover"] != landcover.UNKNOWN) & (shown != 0))
        chosen = np.random.default_rng(0).permutation(known)[: limit or None]
        return np.sort(chosen)

    def batches(self, which: tuple[str, int]) -> Iterator[Mapping[str, Any]]:
        """Batches as data/tiles.py lays them out, without the host's ``mask``; rows with ``index`` < 0 are padding."""
        loader = pipeline.iterate_split(
            self.data_dir, which[0], self.batch_size, sensors=self.sensors, canvases=self.canvases,
            records=self.records(which), process_index=jax.process_index(), process_count=jax.process_count(),
        )  # fmt: skip
        try:
            yield from ({k: v for k, v in batch.items() if k != "mask"} for batch in loader)
        finally:
            loader.close()

    def encode(self, encode: Callable[[Mapping[str, Any]], Any]) -> tuple[TileFeatures, TileFeatures]:
        """Features of gallery and queries; every process reads its share and all get the whole."""
        return tuple(_gather(tile_features(encode, self.batches(which))) for which in (self.gallery, self.queries))

    def band_statistics(self) -> tuple[TileFeatures, TileFeatures]:
        """Means and standard deviations per band, standardized over the gallery: the baseline."""
        gallery, queries = self.encode(lambda batch: batch_statistics(batch, self.sensors))
        scaled = standardize(gallery.cls, queries.cls)
        return tuple(dataclasses.replace(f, cls=c) for f, c in zip((gallery, queries), scaled, strict=True))


def _gather(found: TileFeatures) -> TileFeatures:
    """The rows of all processes, in the order of the records."""
    parts = (np.concatenate(rows_of_all(rows)) for rows in (found.cls, found.landcover, found.index))
    whole = TileFeatures(*parts)
    if jax.process_count() == 1:
        return whole
    order = np.argsort(whole.index, kind="stable")
    return TileFeatures(whole.cls[order], whole.landcover[order], whole.index[order])


def score(gallery: TileFeatures, queries: TileFeatures, protocol: str) -> Any:
    """kNN result of the queries under a named protocol (``evals.knn.PROTOCOLS``)."""
    return knn_classify(gallery.cls, gallery.landcover, queries.cls, queries.landcover, protocol)
