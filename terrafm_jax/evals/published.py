"""Published numbers to print beside ours; never filled in where we did not measure. Values in percent.

Sources: TerraFM (arXiv 2506.06281), tables as collected in docs/evaluation.md. The protocol says how they were
measured; only rows of the same protocol may be compared.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Published:
    model: str
    protocol: str
    dataset: str
    metric: str
    value: float
    fraction: float = 1.0


def _rows(protocol: str, metrics: dict[str, str], table: dict[str, dict[float, tuple[float, ...]]]) -> list[Published]:
    rows = []
    for model, by_fraction in table.items():
        for fraction, values in by_fraction.items():
            for (dataset, metric), value in zip(metrics.items(), values, strict=True):
                rows.append(Published(model, protocol, dataset, metric, value, fraction))
    return rows


_KNN = {"m-eurosat": "top1", "m-bigearthnet": "f1_micro", "m-so2sat": "top1", "m-brick-kiln": "top1"}
_DENSE = {"m-cashew-plant": "miou", "m-SA-crop-type": "miou"}
_COPERNICUS_LINEAR = {"EuroSAT-S1": "top1", "EuroSAT-S2": "top1", "BigEarthNet-S1": "map_macro",
                      "BigEarthNet-S2": "map_macro", "LCZ-S2": "top1"}  # fmt: skip
_COPERNICUS_DENSE = {"Cloud-S2": "miou", "DFC2020-S1": "miou", "DFC2020-S2": "miou"}

PUBLISHED: tuple[Published, ...] = tuple(
    _rows(
        "galileo-knn20",
        _KNN,
        {
            "TerraFM-B": {1.0: (94.2, 68.7, 55.1, 94.5), 0.01: (59.3, 49.4, 41.6, 85.6)},
            "TerraFM-L": {1.0: (95.1, 69.4, 55.9, 93.0), 0.01: (62.1, 50.6, 41.1, 82.2)},
            "Galileo-B": {1.0: (93.0, 59.0, 54.8, 90.7), 0.01: (56.6, 36.5, 43.2, 78.0)},
            "CROMA-B": {1.0: (85.6, 58.8, 48.8, 92.6), 0.01: (51.3, 44.7, 33.8, 85.1)},
            "Copernicus-FM-B": {1.0: (76.0, 53.8, 38.4, 93.0), 0.01: (47.4, 33.3, 23.3, 83.2)},
        },
    )
    + _rows(
        "galileo-finetune",
        _KNN,
        {
            "TerraFM-B": {1.0: (98.1, 72.6, 64.9, 98.7)},
            "TerraFM-L": {1.0: (98.6, 73.1, 66.6, 99.0)},
            "Galileo-B": {1.0: (97.7, 70.7, 63.3, 98.7)},
        },
    )
    + _rows(
        "segmentation-linear",
        _DENSE,
        {"TerraFM-B": {1.0: (34.1, 33.0)}, "TerraFM-L": {1.0: (37.2, 34.5)}, "Galileo-B": {1.0: (33.0, 30.1)}},
    )
    + _rows(
        "copernicus-linear",
        _COPERNICUS_LINEAR,
        {"TerraFM-B": {1.0: (87.8, 99.1, 76.9, 84.4, 87.0)}, "Copernicus-FM-B": {1.0: (87.2, 97.9, 77.9, 79.0, 84.4)}},
    )
    + _rows(
        "copernicus-upernet",
        _COPERNICUS_DENSE,
        {"TerraFM-B": {1.0: (67.9, 55.4, 63.8)}, "Copernicus-FM-B": {1.0: (66.7, 52.4, 64.5)}},
    )
    + _rows(
        "upernet-finetune",  # the paper does not say how Landslide4Sense was trained: inferred
        {"Landslide4Sense": "miou"},
        {"TerraFM-B": {1.0: (70.8,)}, "Prithvi-EO-2.0 300M": {1.0: (65.0,)}},
    )
)


def published(protocol: str, fraction: float, datasets: list[str]) -> dict[str, dict[str, Published]]:
    """model -> data set -> number, of one protocol (its name without version) and label fraction."""
    found: dict[str, dict[str, Published]] = {}
    for row in PUBLISHED:
        if row.protocol == protocol.split("/")[0] and row.fraction == fraction and row.dataset in datasets:
            found.setdefault(row.model, {})[row.dataset] = row
    return found
