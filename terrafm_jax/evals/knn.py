"""k-nearest-neighbor classification on the device: exact, memory-bounded, under four named protocols.

Numbers of different protocols must never stand in one column, so a protocol is data with a name and a
version, and the name travels with every result. Sources of the definitions: docs/evaluation.md.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from terrafm_jax.evals import metrics
from terrafm_jax.evals.metrics import Interval, Result
from terrafm_jax.evals.versioned import Versioned

SPARE = 16  # candidates beyond k that fp32 keeps, so that the fp64 ranking on the host decides near ties


@dataclasses.dataclass(frozen=True)
class KnnProtocol(Versioned):
    """One way to count neighbors.

    Attributes:
      similarity: ``cosine`` or ``euclidean``.
      temperature: a neighbor's vote is exp(similarity / temperature); 0 means one neighbor, one vote.
      headline_multilabel: the metric that the protocol's tables print for several labels (all are computed).
      top5: also top-5 accuracy; with several labels the five highest classes count as present. Else a class is
        present when more than half of the vote says so (a binary vote per class).
    """

    name: str
    k: int
    similarity: str
    temperature: float
    headline_multilabel: str = "f1_micro"
    top5: bool = False
    version: int = 1


PROTOCOLS: dict[str, KnnProtocol] = {
    p.name: p
    for p in (
        KnnProtocol("galileo-knn20", 20, "cosine", 0.07),
        KnnProtocol("torchgeo-bench-knn5", 5, "euclidean", 0.0, headline_multilabel="map_micro"),
        KnnProtocol("olmoearth-knn20", 20, "cosine", 0.07, headline_multilabel="f1_macro"),
        KnnProtocol("pangaea-knn200", 200, "cosine", 0.1, headline_multilabel="f1_micro", top5=True),
    )
}


def knn_protocol(name: str | KnnProtocol) -> KnnProtocol:
    """Looks a protocol up by name. Raises ValueError that lists the known ones."""
    if isinstance(name, KnnProtocol):
        return name
    if name not in PROTOCOLS:
        raise ValueError(f"unknown kNN protocol {name!r}; expected one of {sorted(PROTOCOLS)}")
    return PROTOCOLS[name]


@partial(jax.jit, static_argnames="euclidean")
def _merge(
    test: Array, block: Array, count: int, start: int, best: Array, where: Array, *, euclidean: bool
) -> tuple[Array, Array]:
    """Updates the running best [n, m] similarities and their indices with one block [b, d] of train features."""
    similarity = jnp.matmul(test, block.T, precision=jax.lax.Precision.HIGHEST)
    if euclidean:  # -|a - b|^2 up to the constant |a|^2 of each row
        similarity = 2.0 * similarity - jnp.sum(block * block, axis=1)[None, :]
    column = jnp.arange(block.shape[0])
    similarity = jnp.where(column[None, :] < count, similarity, -jnp.inf)
    index = jnp.broadcast_to((start + column)[None, :], similarity.shape)
    best, order = jax.lax.top_k(jnp.concatenate([best, similarity], axis=1), best.shape[1])
    return best, jnp.take_along_axis(jnp.concatenate([where, index], axis=1), order, axis=1)


def _prepare(train: np.ndarray, test: np.ndarray, similarity: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows on the unit sphere, or moved to the train mean (distances stay, cancellation in fp32 shrinks)."""
    if similarity == "euclidean":
        center = train.mean(0, dtype=np.float64)
        return train - center.astype(np.float32), test - center.astype(np.float32)
    if similarity != "cosine":
        raise ValueError(f"similarity: expected 'cosine' or 'euclidean', found {similarity!r}")

    def unit(rows: np.ndarray) -> np.ndarray:
        return rows / np.maximum(np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True), 1e-12)

    return unit(train).astype(np.float32), unit(test).astype(np.float32)


def _rows(name: str, rows: np.ndarray, columns: int | None = None) -> np.ndarray:
    rows = np.asarray(rows, np.float32)
    if rows.ndim != 2 or not len(rows) or (columns is not None and rows.shape[1] != columns):
        raise ValueError(f"{name}: expected [N > 0, {columns or 'd'}] features, found shape {rows.shape}")
    bad = np.nonzero(~np.isfinite(rows).all(1))[0]
    if bad.size:
        raise ValueError(f"{name}: {bad.size} rows are not finite, first {bad[:8].tolist()}")
    return rows


def neighbors(
    train: np.ndarray, test: np.ndarray, k: int, *, similarity: str = "cosine", memory_bytes: int = 128 << 20
) -> tuple[np.ndarray, np.ndarray]:
    """Exact nearest neighbors of every row of ``test [n, d]`` in ``train [N, d]``.

    The device ranks in fp32 block by block (never more than ``memory_bytes`` of similarities at once, whatever
    n and N are), the host ranks the best k + 16 again in fp64; ties go to the lower index.

    Returns:
      index int64 [n, k'] and similarity float64 [n, k'] (cosine, or minus the distance), best first, with
      k' = min(k, N).
    """
    train = _rows("train features", train)
    test = _rows("test features", test, train.shape[1])
    k = min(k, len(train))
    kept = min(k + SPARE, len(train))
    a, b = _prepare(train, test, similarity)
    width = int(np.clip(memory_bytes // (4 * 1024), 1024, 65536))
    width = min(width, max(kept, len(a)))
    height = int(np.clip(memory_bytes // (12 * width), 1, len(b)))
    index = np.empty((len(b), k), np.int64)
    value = np.empty((len(b), k), np.float64)
    for lo in range(0, len(b), height):
        rows = slice(lo, min(lo + height, len(b)))
        found = _candidates(a, b[rows], kept, width, similarity == "euclidean")
        index[rows], value[rows] = _rank(train, test[rows], found, k, similarity)
    return index, value


def _candidates(train: np.ndarray, test: np.ndarray, kept: int, width: int, euclidean: bool) -> np.ndarray:
    rows = jnp.asarray(test)
    best = jnp.full((len(test), kept), -jnp.inf, jnp.float32)
    where = jnp.zeros((len(test), kept), jnp.int32)
    for start in range(0, len(train), width):
        block = train[start : start + width]
        count = len(block)
        if count < width:  # one shape, one compilation
            block = np.pad(block, ((0, width - count), (0, 0)))
        best, where = _merge(rows, jnp.asarray(block), count, start, best, where, euclidean=euclidean)
    return np.asarray(where)


def _rank(
    train: np.ndarray, test: np.ndarray, found: np.ndarray, k: int, similarity: str
) -> tuple[np.ndarray, np.ndarray]:
    """Orders the candidates ``found [n, m]`` by their fp64 similarity; chunks keep the gather small."""
    index = np.empty((len(test), k), np.int64)
    value = np.empty((len(test), k), np.float64)
    step = max(1, (64 << 20) // (8 * found.shape[1] * train.shape[1]))
    for lo in range(0, len(test), step):
        rows = slice(lo, lo + step)
        a, b = train[found[rows]].astype(np.float64), test[rows].astype(np.float64)
        if similarity == "euclidean":
            s = -np.sqrt(((a - b[:, None]) ** 2).sum(-1))
        else:
            norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)[:, None]
            s = np.einsum("nmd,nd->nm", a, b) / np.maximum(norms, 1e-12)
        order = np.lexsort((found[rows], -s), axis=1)[:, :k]
        index[rows] = np.take_along_axis(found[rows], order, 1)
        value[rows] = np.take_along_axis(s, order, 1)
    return index, value


def vote(index: np.ndarray, similarity: np.ndarray, labels: np.ndarray, classes: int, temperature: float) -> np.ndarray:
    """Share of the votes for each class, float64 [n, C].

    ``labels`` is int [N] (one class each; rows sum to 1) or bool [N, C] (share of the vote that says "present").
    """
    weight = np.ones_like(similarity) if not temperature else np.exp(similarity / temperature)
    weight /= weight.sum(1, keepdims=True)
    if labels.ndim == 2:
        return np.einsum("nk,nkc->nc", weight, labels[index].astype(np.float64))
    row = np.arange(len(index))[:, None] * classes
    return np.bincount((row + labels[index]).reshape(-1), weight.reshape(-1), len(index) * classes).reshape(-1, classes)


def knn_scores(
    train: np.ndarray, labels: np.ndarray, test: np.ndarray, protocol: str | KnnProtocol, classes: int = 0
) -> np.ndarray:
    """Vote shares [n, C] of ``test [n, d]`` under a protocol; the classes are 0..max(label) unless given."""
    protocol, labels = knn_protocol(protocol), np.asarray(labels)
    if len(labels) != len(train):
        raise ValueError(f"{protocol.label}: {len(train)} train features but {len(labels)} labels")
    classes = labels.shape[1] if labels.ndim == 2 else classes or int(labels.max()) + 1
    index, similarity = neighbors(train, test, protocol.k, similarity=protocol.similarity)
    return vote(index, similarity, labels, classes, protocol.temperature)


def knn_classify(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    protocol: str | KnnProtocol = "galileo-knn20",
    *,
    classes: int = 0,
    resamples: int = 1000,
) -> Result:
    """Classifies ``test_features [n, d]`` by their neighbors among ``train_features [N, d]``.

    Labels are int [N] for one class per sample, or bool [N, C] for several. Intervals are 95 % bootstrap
    intervals over the test samples (``resamples`` 0: none). ``settings["k"]`` is smaller than the protocol's k
    when there are fewer train samples. Raises ValueError on shapes that do not fit or features that are not finite.
    """
    protocol = knn_protocol(protocol)
    train_labels, test_labels = np.asarray(train_labels), np.asarray(test_labels)
    if train_labels.ndim == 1:
        classes = classes or int(max(train_labels.max(), test_labels.max())) + 1
    scores = knn_scores(train_features, train_labels, test_features, protocol, classes)
    settings = {"k": min(protocol.k, len(train_labels)), "train": len(train_labels), "test": len(test_labels)}
    return score_classification(protocol.label, scores, test_labels, settings, protocol.top5, resamples)


def score_classification(
    label: str, scores: np.ndarray, labels: np.ndarray, settings: dict, top5: bool = False, resamples: int = 1000
) -> Result:
    """The result of class scores [n, C] (multilabel: shares in 0..1, present above 0.5) against labels."""
    labels, n = np.asarray(labels), len(labels)
    if labels.ndim == 2:
        predictions = scores > 0.5
        if top5:
            predictions = np.argsort(np.argsort(-scores, axis=1, kind="stable"), axis=1) < 5
        found = metrics.bootstrap(metrics.multilabel_metric(labels, predictions, scores), n, resamples=resamples // 5)
        tp, fp, fn = metrics.multilabel_counts(labels, predictions, np.ones(n))
        with np.errstate(invalid="ignore", divide="ignore"):
            by_class = 2 * tp / (2 * tp + fp + fn)
        return Result(label, "multilabel", found, by_class, predictions, None, scores, settings)
    predictions = scores.argmax(1)
    found = metrics.bootstrap(
        metrics.classification_metric(labels, predictions, scores.shape[1]), n, resamples=resamples
    )
    if top5 and scores.shape[1] > 5:
        found |= metrics.bootstrap(metrics.top5_metric(labels, scores), n, resamples=resamples)
    matrix = metrics.confusion_matrix(labels, predictions, scores.shape[1])
    return Result(label, "classification", found, metrics.recalls(matrix), predictions, matrix, scores, settings)


def majority_class(train_labels: np.ndarray, test_labels: np.ndarray) -> Interval:
    """Top-1 of always answering the commonest train class: the floor under every number."""
    labels = np.asarray(test_labels)
    answer = np.full(len(labels), np.bincount(train_labels).argmax())
    classes = int(max(labels.max(), answer[0])) + 1
    return metrics.bootstrap(metrics.classification_metric(labels, answer, classes), len(labels))["top1"]
