"""Prepared TFDS data sets (``eurosat/all``, ``so2sat/all``, ``bigearthnet/all``), read without TensorFlow.

Preparing them needs TensorFlow and their download hosts; reading the ArrayRecord shards does not. Write them with
``tfds build eurosat/all --file_format=array_record``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals.datasets import labels
from terrafm_jax.evals.datasets.base import Dataset, DatasetError, DatasetInfo, Input, Sample, Split

_BEN_BANDS = labels.S2_12


def _eurosat(record: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    return {"s2_l1c": record["sentinel2"]}, int(record["label"])


def _so2sat(record: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    return {"s1": record["sentinel1"], "s2_l1c": record["sentinel2"]}, int(record["label"])


def _bigearthnet(record: dict[str, Any]) -> tuple[dict[str, np.ndarray], Any]:
    planes = [np.asarray(record[b]) for b in _BEN_BANDS]
    side = max(p.shape[0] for p in planes)
    image = np.stack([np.kron(p, np.ones((side // p.shape[0],) * 2, p.dtype)) for p in planes], axis=-1)
    target = np.zeros(43, bool)
    target[np.asarray(record["labels"], int)] = True
    return {"s2_l2a": image}, target


_INPUTS: dict[str, dict[str, Input]] = {
    "eurosat/all": {"s2_l1c": Input("s2_l1c", labels.EUROSAT_BANDS, "DN", level="L1C")},
    # Planes 5 and 6 of So2Sat's radar are Lee-filtered power of VH and VV.
    "so2sat/all": {
        "s1": Input("s1", ("", "", "", "", "VH", "VV", "", ""), "power", level="GRD sigma0, Lee-filtered"),
        "s2_l1c": Input("s2_l1c", labels.S2_10, "reflectance", level="L1C"),
    },
    "bigearthnet/all": {"s2_l2a": Input("s2_l2a", _BEN_BANDS, "DN", level="L2A")},
}
DATASETS: dict[str, tuple[str, Callable]] = {
    "eurosat/all": ("classification", _eurosat),
    "so2sat/all": ("classification", _so2sat),
    "bigearthnet/all": ("multilabel", _bigearthnet),
}


def open_tfds(root: str | Path, names: Sequence[str] = (), *, seed: int = 0) -> list[Dataset]:
    """Opens ``ROOT/<name>/all/<version>``. TFDS gives eurosat and bigearthnet one split; 60/20/20 of it are drawn.

    Raises DatasetError: unknown name, not prepared, shards that are not ArrayRecord.
    """
    root = Path(root)
    unknown = [n for n in names if n not in DATASETS]
    if unknown:
        raise DatasetError(f"tfds: unknown {unknown}; readable are {list(DATASETS)}")
    there = [n for n in (names or DATASETS) if names or (root / n).is_dir()]
    if not there:
        raise DatasetError(f"{root}: holds none of {list(DATASETS)}")
    return [_open(root, n, seed) for n in there]


def _open(root: Path, name: str, seed: int) -> Dataset:
    import tensorflow_datasets as tfds

    versions = sorted(p.parent for p in (root / name).glob("*/dataset_info.json"))
    if not versions:
        raise DatasetError(f"{root / name}: no <version>/dataset_info.json; prepare it with file_format=array_record")
    builder = tfds.builder_from_directory(str(versions[-1]))
    task, convert = DATASETS[name]
    try:
        sources = {k: builder.as_data_source(k) for k in builder.info.splits}
    except NotImplementedError as e:
        raise DatasetError(f"{versions[-1]}: shards are not ArrayRecord; prepare with file_format=array_record") from e
    features = builder.info.features
    label = features["labels"].feature if task == "multilabel" else features["label"]
    note = f"version {versions[-1].name}"
    parts = _parts(sources, seed)
    if len(sources) < 3:
        note += f", splits drawn with seed {seed} from {sorted(sources)}"
    info = DatasetInfo(f"tfds-{name}", task, tuple(label.names), _INPUTS[name], note=note)
    return Dataset(info, {k: _split(sources[source], source, rows, convert) for k, (source, rows) in parts.items()})


def _parts(sources: dict[str, Any], seed: int) -> dict[str, tuple[str, np.ndarray]]:
    """Our split -> (their split, rows)."""
    rng = np.random.default_rng(seed)
    shuffled = {k: rng.permutation(len(s)) for k, s in sources.items()}
    train = shuffled["train"]
    if "test" in sources and "validation" in sources:
        return {"train": ("train", np.sort(train)), "val": ("validation", np.sort(shuffled["validation"])),
                "test": ("test", np.sort(shuffled["test"]))}  # fmt: skip
    held = "test" if "test" in sources else "validation" if "validation" in sources else ""
    if held:
        cut = int(0.8 * len(train))
        return {"train": ("train", np.sort(train[:cut])), "val": ("train", np.sort(train[cut:])),
                "test": (held, np.sort(shuffled[held]))}  # fmt: skip
    a, b = int(0.6 * len(train)), int(0.8 * len(train))
    return {k: ("train", np.sort(p)) for k, p in zip(("train", "val", "test"), np.split(train, [a, b]), strict=True)}


def _split(source: Any, name: str, rows: np.ndarray, convert: Callable) -> Split:
    def read(i: int) -> Sample:
        images, target = convert(source[int(rows[i])])
        return Sample(f"{name}/{rows[i]}", images, target)

    return Split([f"{name}/{r}" for r in rows], read)
