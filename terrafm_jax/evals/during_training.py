"""What is evaluated while pretraining runs, once for random init too: kNN of the teacher on held-out tiles and on
labelled data sets of the user's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from terrafm_jax.data.source import DataError
from terrafm_jax.devices import LocalDevices
from terrafm_jax.evals import landcover_knn, protocols, store
from terrafm_jax.evals.datasets import open_suite
from terrafm_jax.evals.features import Encoder, FeatureError, ImageBatch, tile_encoder
from terrafm_jax.evals.knn import PROTOCOLS
from terrafm_jax.evals.landcover_knn import TileSets
from terrafm_jax.landcover import NAMES
from terrafm_jax.processes import to_host

if TYPE_CHECKING:
    from terrafm_jax.training.plan import Plan
    from terrafm_jax.training.tools import Evaluator

log = logging.getLogger(__name__)


def during_training(plan: Plan) -> list[Evaluator]:
    """The evaluators of a run: none when ``config.knn.every`` is 0, none of land cover where no tile's is known.

    Raises DatasetError for bad labelled data, ProtocolError for a protocol that is not there, DataError where
    ``config.knn`` names splits that are not there, or one split twice.
    """
    if not plan.steps["knn.every"]:
        return []
    land_cover = LandCoverKnn(plan)
    unknown = land_cover.unknown()
    if unknown and jax.process_index() == 0:  # prepared without maps
        log.warning(
            "config.knn: no tile of %s has a known land cover and a sensor of the model; its kNN is left out", unknown
        )
    if not unknown:
        land_cover.check()
    labelled = [LabelledSets(plan)] if plan.config.knn.labelled else []
    return [*([] if unknown else [land_cover]), *labelled]


class LandCoverKnn:
    """kNN on the WorldCover majority class: gallery and queries from ``config.knn.gallery`` and ``config.knn.split``.

    Yields ``knn_top1``, ``knn_macro`` and ``knn_class/NAME``; the protocol's name stands in ``knn_protocol``.
    """

    def __init__(self, plan: Plan):
        knn, spec = plan.config.knn, plan.spec
        self.protocol = knn.protocol
        self.sets = TileSets(
            plan.config.data.dir, (knn.gallery, knn.train_examples), (knn.split, knn.test_examples),
            spec.model.sensors, max(1, knn.batch_size // jax.process_count()), plan.config.data.canvases,
        )  # fmt: skip
        self._encode = tile_encoder(spec.model, spec.stats, size=spec.views.global_size)
        self._devices = LocalDevices()

    def unknown(self) -> str:
        """Splits without a tile of known land cover, by name; "" for none. Raises DataError for splits not there."""
        empty, faults = [], []
        for field, which in (("gallery", self.sets.gallery), ("split", self.sets.queries)):
            try:
                empty += [] if len(self.sets.records(which)) else [which[0]]
            except DataError as error:
                faults.append(f"config.knn.{field}: {error}")
        if faults:
            raise DataError(f"{'; '.join(faults)}; name another split, or train without kNN: --config.knn.every=0")
        return ", ".join(dict.fromkeys(empty))

    def check(self) -> None:
        """Raises ProtocolError for a protocol that is not kNN, after hours of training otherwise; DataError where
        gallery and queries are one split: random weights know 97 % of such tiles.
        """
        if self.protocol not in PROTOCOLS:
            raise protocols.ProtocolError(
                f"config.knn.protocol: found {self.protocol!r}, expected one of {sorted(PROTOCOLS)}"
            )
        if self.sets.gallery[0] == self.sets.queries[0]:
            raise DataError(
                f"config.knn.gallery and config.knn.split are both {self.sets.queries[0]!r}, so each tile would be its "
                "own nearest neighbor; name another split (preparation has --split-shares), or train without kNN: "
                "--config.knn.every=0"
            )

    def __call__(self, step: int, state: Any, poll: Callable[[], None]) -> Iterator[tuple[str, Any]]:
        backbone = self._devices.everywhere(_whole(state.teacher["backbone"]))

        def encode(batch: Any) -> Any:
            poll()  # a notice of preemption leaves less time than a gallery takes
            found, rows = self._encode(backbone, self._devices.rows(batch)), len(batch["index"])
            return found if len(found) == rows else found[:rows]

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
    of a job does the same work on its own devices.
    """

    def __init__(self, plan: Plan):
        knn = plan.config.knn
        protocols.check(knn.protocol)
        self.protocol, self.spec = knn.protocol, plan.spec.model
        self.sets = [d for d in open_suite(knn.suite, knn.labelled) if d.info.task in protocols.TASKS_OF[knn.protocol]]
        if not self.sets:
            raise protocols.ProtocolError(f"config.knn.labelled: nothing in {knn.labelled} that {knn.protocol} can do")
        self.plan, self._encoder = plan, None

    def check(self, sensors: Iterable[str]) -> tuple[str, ...]:
        """Those of the sensors that the model takes; without fusion the last one. Raises FeatureError for none."""
        found = tuple(k for k in self.spec.sensors if k in set(sensors))
        if not found:
            raise FeatureError(
                f"config.knn.labelled: the model takes {self.spec.sensors}, the data has {list(sensors)}"
            )
        return found if self.spec.fusion else found[-1:]

    def __call__(self, step: int, state: Any, poll: Callable[[], None]) -> Iterator[tuple[str, Any]]:
        encoder = self._teacher(state, poll)
        for dataset in self.sets:
            request = store.Request(self.check(dataset.info.inputs))
            splits = {name: store.extract(encoder, dataset, name, request) for name in dataset.splits}
            found = protocols.run(self.protocol, splits, dataset.info, protocols.Options(resamples=0))
            metric = protocols.headline(self.protocol, dataset.info.task)
            yield f"labelled/{dataset.info.name}/{metric}", found.metrics[metric].value

    def _teacher(self, state: Any, poll: Callable[[], None]) -> _Teacher:
        """The encoder of all steps, which compiles once, with the weights of this one."""
        backbone = _whole(state.teacher["backbone"])
        if self._encoder is None:
            views, stats = self.plan.spec.views, self.plan.spec.stats
            self._encoder = _Teacher(
                self.spec, backbone, stats, name="teacher", weights_hash="", image_size=views.global_size
            )
        self._encoder.renew(backbone, poll)
        return self._encoder


class _Teacher(Encoder):
    """The teacher as ``store.extract`` wants an encoder; it listens for a notice of preemption at every batch."""

    def renew(self, backbone: Any, poll: Callable[[], None]) -> None:
        self.params, self._poll = self._devices.everywhere(backbone), poll

    def __call__(
        self, batch: ImageBatch, *, layers: Sequence[int] = (), patches: bool = False
    ) -> tuple[np.ndarray, list[np.ndarray] | None]:
        self._poll()
        return super().__call__(batch, layers=layers, patches=patches)


def _whole(params: Any) -> Any:
    """The parameters whole in this process, wherever in the job they lie (a collective on several processes)."""
    return params if jax.process_count() == 1 else to_host(params)
