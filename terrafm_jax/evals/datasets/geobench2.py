"""GEO-Bench 2: the Sentinel data sets among its tortilla archives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax.evals.datasets import files, labels
from terrafm_jax.evals.datasets.base import Dataset, DatasetError, DatasetInfo, Input, Sample, Split
from terrafm_jax.evals.datasets.tortilla import Archive

_TREE_S2 = ("B02", "B03", "B04", "B08", "B05", "B06", "B07", "B8A", "B11", "B12", "B01", "B09")


@dataclasses.dataclass(frozen=True)
class Spec:
    """One data set: which item of a sample is which image, where the label is.

    Attributes:
      items: sensor -> (item, declaration). mask: item with the label map. column: footer column with label names.
      remap: delivered mask value -> class (-1 ignored).
    """

    task: str
    classes: tuple[str, ...]
    items: dict[str, tuple[int, Input]]
    mask: int = -1
    column: str = ""
    remap: tuple[int, ...] = ()
    note: str = ""


def _specs() -> dict[str, Spec]:
    s1 = Input("s1", ("VV", "VH"), "dB", level="GRD sigma0")
    l2a = Input("s2_l2a", labels.S2_12, "DN", level="L2A")
    return {
        "benv2": Spec("multilabel", labels.BIGEARTHNET_19, {"s1": (0, s1), "s2_l2a": (1, l2a)}, column="labels"),
        "cloudsen12": Spec(
            "segmentation",
            labels.CLOUDS,
            {"s2_l2a": (0, Input("s2_l2a", (*labels.S2_12, "", ""), "DN", level="L2A"))},
            mask=1,
            note="14 planes delivered: 12 bands, then cirrus and cloud probability, which are not used",
        ),
        "treesatai": Spec(
            "multilabel",
            labels.TREESATAI,
            {
                "s1": (1, Input("s1", ("VV", "VH", ""), "dB", level="GRD sigma0")),
                "s2_l2a": (2, Input("s2_l2a", _TREE_S2, "DN", level="L2A")),
            },
            column="species_labels",
            note="aerial image not used",
        ),
        "kuro_siwo": Spec(
            "segmentation",
            ("No water", "Permanent water", "Flood"),
            {"s1": (2, Input("s1", ("VV", "VH"), "power", level="GRD sigma0"))},
            mask=4,
            remap=(0, 1, 2, -1),
            note="post-event image only",
        ),
    }


DATASETS = ("benv2", "cloudsen12", "treesatai", "kuro_siwo")
REFUSED = {
    "forestnet": "Landsat 8", "burn_scars": "HLS mixes Landsat and Sentinel-2", "caffe": "other radars",
    "flair2": "aerial", "spacenet2": "WorldView", "spacenet7": "PlanetScope", "dynamic_earthnet": "PlanetScope",
    "everwatch": "aerial", "nzcattle": "aerial", "fotw": "RGBN composites without level",
}  # fmt: skip


def open_geobench2(root: str | Path, names: Sequence[str] = ()) -> list[Dataset]:
    """Opens ``ROOT/<name>/geobench_<name>*.tortilla`` or ``ROOT/geobench_<name>*.tortilla``.

    Raises DatasetError: nothing there, unknown name, a sensor the model has no stem for.
    """
    root = Path(root)
    refused = [f"{n} ({REFUSED[n]})" for n in names if n in REFUSED]
    unknown = [n for n in names if n not in DATASETS and n not in REFUSED]
    if refused or unknown:
        raise DatasetError(f"geobench2: refused {refused}, unknown {unknown}; readable are {list(DATASETS)}")
    found = {n: _parts(root, n) for n in (names or DATASETS)}
    empty = [n for n, parts in found.items() if not parts]
    if (names and empty) or len(empty) == len(found):
        raise DatasetError(f"{root}: no geobench_<name>*.tortilla for {empty}")
    return [_open(n, parts) for n, parts in found.items() if parts]


def _parts(root: Path, name: str) -> list[Path]:
    return sorted([*root.glob(f"geobench_{name}*.tortilla"), *root.glob(f"{name}/geobench_{name}*.tortilla")])


def _open(name: str, parts: list[Path]) -> Dataset:
    spec, archive = _specs()[name], Archive(parts)
    inputs = {key: declared for key, (_, declared) in spec.items.items()}
    info = DatasetInfo(f"geobench2-{name}", spec.task, spec.classes, inputs, note=spec.note)
    splits = {}
    for split in ("train", "val", "test"):
        rows = archive.split(split)
        targets = np.stack([_names(spec, r) for r in rows]) if spec.column and rows else None
        ids = [str(r["tortilla:id"]) for r in rows]
        splits[split] = Split(ids, _reader(spec, rows), targets)
    return Dataset(info, splits)


def _names(spec: Spec, row: dict[str, Any]) -> np.ndarray:
    """bool [C] of the class names a row lists; names outside the benchmark's classes do not count."""
    listed = set(row[spec.column])
    return np.array([c in listed for c in spec.classes])


def _reader(spec: Spec, rows: list[dict[str, Any]]) -> Callable[[int], Sample]:
    def read(i: int) -> Sample:
        items = Archive.items(rows[i])
        images = {k: files.read_image(items[n][0], source, items[n][1:]) for k, (n, source) in spec.items.items()}
        if spec.column:
            target = _names(spec, rows[i])
        else:
            target = files.read_tiff(items[spec.mask][0], at=items[spec.mask][1:])[..., 0].astype(np.int64)
            if spec.remap:
                target = np.array(spec.remap)[np.clip(target, 0, len(spec.remap) - 1)]
        return Sample(str(rows[i]["tortilla:id"]), images, target, path=str(rows[i]["_path"]))

    return read
