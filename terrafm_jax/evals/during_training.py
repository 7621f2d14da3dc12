"""What is evaluated while pretraining runs, once for random init too: kNN of the teacher on held-out tiles and on
labelled data sets of the user's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from terrafm_jax.evals import landcover_knn, protocols, store
from terrafm_jax.evals.datasets import open_suite
from terrafm_jax.evals.features import FeatureError, ImageBatch, encode_images, target_size, tile_encoder
from terrafm_jax.evals.landcover_knn import TileSets
from terrafm_jax.landcover import NAMES

if TYPE_CHECKING:
    from terrafm_jax.training.run import Evaluator, Run


def during_training(run: Run) -> list[Evaluator]:
    """The evaluators of a run: none when ``config.knn.every`` is 0. Raises DatasetError for bad labelled data."""
    if not run.steps["knn.every"]:
        return []
    return [LandCoverKnn(run), *([LabelledSets(run)] if run.config.knn.labelled else [])]


class LandCoverKnn:
    """kNN on the WorldCover majority class: gallery and queries from ``config.knn.gallery`` and ``config.knn.split``.

    Yields ``knn_top1``, ``knn_macro`` and ``knn_class/NAME``; the protocol's name stands in ``knn_protocol``.
    """

    def __init__(self, run: Run):
        knn, spec = run.config.knn, run.spec
        self.protocol = knn.protocol
        self.sets = TileSets(
            run.config.data.dir, (knn.gallery, knn.train_examples), (knn.split, knn.test_examples),
            spec.model.sensors, max(1, knn.batch_size // jax.process_count()), run.config.data.canvases,
        )  # fmt: skip
        stats = {name: spec.stats.arrays(name) for name in spec.model.sensors}
        self._encode = tile_encoder(spec.model, stats, size=spec.views.global_size)

    def __call__(self, step: int, state: Any, poll: Callable[[], None]) -> Iterator[tuple[str, Any]]:
        backbone = _on_this_host(state.teacher["backbone"])

        def encode(batch: Any) -> Any:
            poll()  # a notice of preemption leaves less time than a gallery takes
            return self._encode(backbone, _arrays(batch))

        gallery, queries = self.sets.encode(encode)
        found = landcover_knn.score(gallery, queries, self.protocol)
        yield "knn_protocol", found.protocol
        yield "knn_top1", found.top1
        yield "knn_macro", found.macro
        for name, value in zip(NAMES, found.per_class, strict=False):
            if value == value:  # a class without a query has no accuracy
                yield f"knn_class/{name}", float(value)


class LabelledSets:
    """The data sets of ``config.knn.labelled`` with ``config.knn.protocol``: yields ``labelled/NAME/METRIC``.

    Images are resized to the global crops' size. All sensors that data set and model share are fused. Every process
    of a job does the same work on its own device.
    """

    def __init__(self, run: Run):
        knn = run.config.knn
        protocols.check(knn.protocol)
        self.protocol, self.spec, self.image_size = knn.protocol, run.spec.model, run.spec.views.global_size
        self.sets = [d for d in open_suite(knn.suite, knn.labelled) if d.info.task in protocols.TASKS_OF[knn.protocol]]
        if not self.sets:
            raise protocols.ProtocolError(f"config.knn.labelled: nothing in {knn.labelled} that {knn.protocol} can do")
        self.stats = {k: run.spec.stats.arrays(k) for k in self.spec.sensors}
        self._jit = jax.jit(partial(encode_images, self.spec), static_argnames="size")

    def check(self, sensors: Iterable[str]) -> tuple[str, ...]:
        """Those of the sensors that the model takes; without fusion the last one. Raises FeatureError for none."""
        found = tuple(k for k in self.spec.sensors if k in set(sensors))
        if not found:
            raise FeatureError(
                f"config.knn.labelled: the model takes {self.spec.sensors}, the data has {list(sensors)}"
            )
        return found if self.spec.fusion else found[-1:]

    def __call__(self, step: int, state: Any, poll: Callable[[], None]) -> Iterator[tuple[str, Any]]:
        encoder = _Teacher(self, _on_this_host(state.teacher["backbone"]), poll)
        for dataset in self.sets:
            request = store.Request(self.check(dataset.info.inputs))
            splits = {name: store.extract(encoder, dataset, name, request) for name in dataset.splits}
            found = protocols.run(self.protocol, splits, dataset.info, protocols.Options(resamples=0))
            metric = protocols.headline(self.protocol, dataset.info.task)
            yield f"labelled/{dataset.info.name}/{metric}", found.metrics[metric].value


class _Teacher:
    """The teacher of one step as ``store.extract`` wants an encoder."""

    def __init__(self, sets: LabelledSets, backbone: Any, poll: Callable[[], None]):
        self.sets, self.backbone, self.poll, self.check = sets, backbone, poll, sets.check

    def __call__(self, batch: ImageBatch, *, layers: Any = (), patches: bool = False) -> tuple[np.ndarray, None]:
        self.poll()
        height, width = next(iter(batch.images.values())).shape[1:3]
        size = target_size(height, width, self.sets.image_size, self.sets.spec.patch)
        jitted, stats = self.sets._jit, self.sets.stats
        found = jitted(self.backbone, stats, batch.images, batch.bands, batch.offset, size=size)
        return np.asarray(found.cls, np.float32), None


def _arrays(batch: Any) -> Any:
    """The batch without what only the host reads (the mask of padding)."""
    return {key: value for key, value in batch.items() if key != "mask"}


def _on_this_host(params: Any) -> Any:
    """The parameters whole on one local device; every process of a job evaluates its share of the tiles."""
    if jax.process_count() == 1:
        return params
    from jax.experimental import multihost_utils

    gathered = jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), params)
    return jax.device_put(gathered, jax.local_devices()[0])
