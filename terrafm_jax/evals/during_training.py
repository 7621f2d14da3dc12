"""What is evaluated while pretraining runs: kNN of the teacher on held-out tiles, once for random init too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from terrafm_jax.evals import landcover_knn
from terrafm_jax.evals.features import tile_encoder
from terrafm_jax.evals.landcover_knn import TileSets
from terrafm_jax.landcover import NAMES

if TYPE_CHECKING:
    from terrafm_jax.training.loop import Evaluator, Run


def during_training(run: Run) -> list[Evaluator]:
    """The evaluators of a run: none when ``config.knn.every`` is 0."""
    return [LandCoverKnn(run)] if run.steps["knn.every"] else []


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
