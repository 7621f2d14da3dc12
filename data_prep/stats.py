"""Statistics per sensor and band in one streaming pass: exact histograms that add up in any order."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from terrafm_jax import landcover
from terrafm_jax.sensors import BASELINE_OFFSET, SENSORS, Sensor

if TYPE_CHECKING:
    from data_prep.records import Layer

PERCENTILES = (0.1, 1, 2, 5, 25, 50, 75, 95, 98, 99, 99.9)
_LOWEST = {"uint16": -round(BASELINE_OFFSET), "int16": -32768}  # harmonized DN go below zero
_BINS = {"uint16": 65536 - _LOWEST["uint16"], "int16": 65536}


class Tally:
    """Counts of stored values, harmonized (offset subtracted), over the valid pixels of records.

    Attributes:
      values: sensor -> int64 [bands, bins]; bin i counts the stored value ``lowest + i``.
      pixels: sensor -> int64 [bands], all pixels, measured or not.
      records: sensor -> number of records that hold it.
      fractions: float64 [NUM_CATEGORIES], sum of the land-cover shares.
    """

    def __init__(self) -> None:
        self.values = {k: np.zeros((len(s.bands), _BINS[s.dtype]), np.int64) for k, s in SENSORS.items()}
        self.pixels = {k: np.zeros(len(s.bands), np.int64) for k, s in SENSORS.items()}
        self.records = dict.fromkeys(SENSORS, 0)
        self.fractions = np.zeros(landcover.NUM_CATEGORIES)

    def add(self, parts: Mapping[str, Layer], fractions: np.ndarray) -> None:
        """Counts one tile: its layers by sensor, and its land-cover shares [NUM_CATEGORIES]."""
        self.fractions += fractions
        for key, layer in parts.items():
            self.records[key] += 1
            sensor = SENSORS[key]
            for group, names in sensor.groups.items():
                found = layer.groups[group]
                whole = bool(found.valid.all())
                for name, pixels in zip(names, found.bands, strict=True):
                    band = sensor.band_names.index(name)
                    stored = pixels if whole else pixels[found.valid]
                    if sensor.dtype == "int16":
                        start, stored = 0, stored.view(np.uint16) ^ np.uint16(0x8000)  # + 32768
                    else:
                        start = round(-_LOWEST[sensor.dtype] - layer.offset.value)
                    counts = np.bincount(stored.astype(np.intp).ravel())
                    self.values[key][band, start : start + len(counts)] += counts
                    self.pixels[key][band] += found.valid.size

    def arrays(self) -> dict[str, np.ndarray]:
        """Sparse form for ``numpy.savez``."""
        result: dict[str, np.ndarray] = {"fractions": self.fractions}
        for key in SENSORS:
            flat = self.values[key].ravel()
            where = np.flatnonzero(flat)
            result[f"{key}_where"], result[f"{key}_count"] = where.astype(np.int32), flat[where]
            result[f"{key}_pixels"] = np.append(self.pixels[key], self.records[key])
        return result

    def add_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Adds what another tally's :meth:`arrays` holds; only bins that occur are touched."""
        self.fractions += arrays["fractions"]
        for key in SENSORS:
            self.values[key].ravel()[arrays[f"{key}_where"]] += arrays[f"{key}_count"]
            self.pixels[key] += arrays[f"{key}_pixels"][:-1]
            self.records[key] += int(arrays[f"{key}_pixels"][-1])

    def to_json(self, classes: Mapping[str, Mapping[str, int]], source: str) -> str:
        """The text of ``statistics.json``; ``sensors.Statistics.from_json`` reads mean and std of it.

        Args:
          classes: split -> category -> number of records.
          source: where the numbers come from, shown beside every use of them.
        """
        total = self.fractions.sum()
        shares = self.fractions / total if total else self.fractions
        return json.dumps(
            {
                "source": source,
                "unit": {key: sensor.unit for key, sensor in SENSORS.items()},
                "sensors": {key: self._sensor(key, s) for key, s in SENSORS.items() if self.values[key].any()},
                "classes": {split: dict(counts) for split, counts in classes.items()},
                "landcover_share": dict(zip(landcover.NAMES, shares.round(6).tolist(), strict=True)),
            },
            indent=1,
        )

    def _sensor(self, key: str, sensor: Sensor) -> dict[str, Any]:
        bands = [summary(row, _LOWEST[sensor.dtype], sensor.scale) for row in self.values[key]]
        counts = self.values[key].sum(axis=1)
        return {
            "bands": list(sensor.band_names),
            **{name: [band[name] for band in bands] for name in ("mean", "std", "min", "max", "percentiles")},
            "percentile_ranks": list(PERCENTILES),
            "nodata": (1.0 - counts / np.maximum(self.pixels[key], 1)).round(6).tolist(),
            "pixels": counts.tolist(),
            "records": self.records[key],
        }


def summary(counts: np.ndarray, lowest: int, scale: float) -> dict[str, Any]:
    """Mean, std, min, max and percentiles (nearest rank) of a histogram, times ``scale``.

    Args:
      counts: int64 [bins]; bin i counts the value ``lowest + i``.
      lowest: value of the first bin.
      scale: unit of the values.
    """
    where = np.flatnonzero(counts)
    if len(where) == 0:
        return {"mean": 0.0, "std": 1.0, "min": 0.0, "max": 0.0, "percentiles": [0.0] * len(PERCENTILES)}
    n = counts[where].astype(np.float64)
    values = (where + lowest).astype(np.float64)
    mean = float((n * values).sum() / n.sum())
    std = float(np.sqrt((n * (values - mean) ** 2).sum() / n.sum()))
    ranks = np.searchsorted(np.cumsum(counts[where]), np.asarray(PERCENTILES) / 100 * counts.sum())
    chosen = values[np.minimum(ranks, len(values) - 1)] * scale
    return {
        "mean": round(mean * scale, 6),
        "std": max(round(std * scale, 6), 1e-6),
        "min": round(float(values[0]) * scale, 6),
        "max": round(float(values[-1]) * scale, 6),
        "percentiles": chosen.round(6).tolist(),
    }
