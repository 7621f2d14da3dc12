"""The table of sensors: bands, order, ground sampling, units, nodata, statistics and aliases.

Nothing else in the project repeats what stands here. Preparation, training, evaluation, export and
inference ask this module for band order and normalize through :func:`normalize`.

Order and published statistics are those of the released TerraFM weights (arXiv 2506.06281 and its
public inference code); the processing-baseline offset is not part of them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import numpy as np


class SensorError(ValueError):
    """A sensor or band name is unknown, missing or ambiguous."""


@dataclasses.dataclass(frozen=True)
class Band:
    """One spectral band or polarization, stored at ``gsd`` metres by the data provider."""

    name: str
    gsd: int
    aliases: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sensor:
    """One input modality of the model.

    Attributes:
      key: name in code, records and weights (``s1``, ``s2_l1c``, ``s2_l2a``).
      title: name for people.
      bands: canonical order of the channels the model sees.
      delivered: all bands of a product in the provider's order, also those that the model does not see.
      unit: unit of the values that :func:`normalize` takes (``DN`` = reflectance x 10000, ``dB``).
      dtype: how records store the pixels; stored value times ``scale`` is the value in ``unit``.
      nodata: stored value that means "no measurement".
      mean, std: published statistics per band, in ``unit``.
      aliases: other names of the sensor.
    """

    key: str
    title: str
    bands: tuple[Band, ...]
    delivered: tuple[Band, ...]
    unit: str
    dtype: str
    scale: float
    nodata: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    aliases: tuple[str, ...] = ()

    @cached_property
    def band_names(self) -> tuple[str, ...]:
        return tuple(b.name for b in self.bands)

    @cached_property
    def delivered_names(self) -> tuple[str, ...]:
        return tuple(b.name for b in self.delivered)

    @cached_property
    def dropped(self) -> tuple[Band, ...]:
        """Delivered bands that the model does not see: B10 of Level-1C (cirrus, no surface signal)."""
        return tuple(b for b in self.delivered if b not in self.bands)

    @cached_property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Resolution groups, finest first: ``{"10m": ("B02", ...), "20m": (...), "60m": (...)}``."""
        gsds = sorted({b.gsd for b in self.bands})
        return {f"{g}m": tuple(b.name for b in self.bands if b.gsd == g) for g in gsds}

    @cached_property
    def group_order(self) -> tuple[int, ...]:
        """Position of every canonical band in the concatenation of the groups."""
        flat = [name for names in self.groups.values() for name in names]
        return tuple(flat.index(name) for name in self.band_names)

    def indices(self, names: Iterable[str]) -> tuple[int, ...]:
        """Canonical positions of ``names`` (aliases allowed). Raises SensorError on unknown names."""
        return tuple(self.band_names.index(n) for n in self.canonical(names))

    def canonical(self, names: Iterable[str]) -> tuple[str, ...]:
        """Translates band names or aliases to ESA names; names all unknown ones at once."""
        found = [(name, band_name(name, self)) for name in names]
        unknown = [name for name, band in found if band not in self.band_names]
        if unknown:
            raise SensorError(f"{self.key}: unknown bands {unknown}; expected some of {list(self.band_names)}")
        return tuple(band for _, band in found)


_S2_DELIVERED = (
    Band("B01", 60, ("coastal", "coastal_aerosol", "coastal aerosol", "01 - coastal aerosol")),
    Band("B02", 10, ("blue", "02 - blue")),
    Band("B03", 10, ("green", "03 - green")),
    Band("B04", 10, ("red", "04 - red")),
    Band("B05", 20, ("red_edge_1", "rededge1", "rededge071", "05 - vegetation red edge")),
    Band("B06", 20, ("red_edge_2", "rededge2", "rededge075", "06 - vegetation red edge")),
    Band("B07", 20, ("red_edge_3", "rededge3", "rededge078", "07 - vegetation red edge")),
    Band("B08", 10, ("nir", "nir_broad", "08 - nir")),
    Band("B8A", 20, ("nir08", "nir_narrow", "rededge4", "red_edge_4", "08a - vegetation red edge")),
    Band("B09", 60, ("nir09", "water_vapor", "water_vapour", "watervapor", "09 - water vapour")),
    Band("B10", 60, ("cirrus", "swir_cirrus", "10 - swir - cirrus")),
    Band("B11", 20, ("swir16", "swir_1", "swir1", "11 - swir")),
    Band("B12", 20, ("swir22", "swir_2", "swir2", "12 - swir")),
)
_S2_BANDS = tuple(b for b in _S2_DELIVERED if b.name != "B10")
_S1_BANDS = (Band("VV", 10, ("vv",)), Band("VH", 10, ("vh",)))

S1 = Sensor(
    key="s1",
    title="Sentinel-1 RTC",
    bands=_S1_BANDS,
    delivered=_S1_BANDS,
    unit="dB",
    dtype="int16",
    scale=0.01,
    nodata=-32768,
    mean=(-12.7572, -19.6423),
    std=(5.8491, 5.8516),
    aliases=("s1rtc", "s1grd", "s1-rtc", "s1-grd", "s1_rtc", "s1_grd", "sentinel-1", "sentinel1", "sentinel-1-rtc",
             "sentinel-1-grd"),
)  # fmt: skip
S2_L1C = Sensor(
    key="s2_l1c",
    title="Sentinel-2 L1C",
    bands=_S2_BANDS,
    delivered=_S2_DELIVERED,
    unit="DN",
    dtype="uint16",
    scale=1.0,
    nodata=0,
    mean=(2153.94, 1937.191, 1885.8236, 1906.7263, 2096.8369, 2692.8083,
          3015.8569, 2930.3957, 3243.99, 1389.849, 2915.8289, 2186.0514),
    std=(581.6321, 619.9756, 714.7784, 1018.3657, 1021.4312, 1116.4055,
         1265.8559, 1234.6123, 1374.9582, 608.362, 1547.9093, 1336.0316),
    aliases=("s2l1c", "s2-l1c", "sentinel-2-l1c", "s2_toa"),
)  # fmt: skip
S2_L2A = Sensor(
    key="s2_l2a",
    title="Sentinel-2 L2A",
    bands=_S2_BANDS,
    delivered=_S2_BANDS,
    unit="DN",
    dtype="uint16",
    scale=1.0,
    nodata=0,
    mean=(1033.9414, 1135.3391, 1382.2553, 1526.9789, 1883.3911, 2516.2726,
          2782.7811, 2829.3833, 2977.2936, 3004.2905, 2832.1983, 2186.6507),
    # The first value (B01) is an outlier in the released code: a typo or trained-in, nobody knows.
    std=(2761.4226, 807.365, 919.6919, 1221.4198, 1265.8146, 1323.0764,
         1428.7845, 1459.0343, 1497.9797, 1577.071, 1738.6128, 1620.8854),
    aliases=("s2l2a", "s2-l2a", "sentinel-2-l2a", "sentinel-2-c1-l2a", "s2_boa"),
)  # fmt: skip

SENSORS: dict[str, Sensor] = {s.key: s for s in (S1, S2_L1C, S2_L2A)}
SENSOR_KEYS: tuple[str, ...] = tuple(SENSORS)


def sensor(name: str) -> Sensor:
    """Looks a sensor up by key or alias (case-insensitive). Raises SensorError."""
    wanted = name.strip().lower()
    for s in SENSORS.values():
        if wanted in (s.key, *s.aliases):
            return s
    raise SensorError(f"unknown sensor {name!r}; expected one of {list(SENSORS)} or an alias of them")


def listed(text: str) -> list[str]:
    """``B1..B8, B8A`` -> the names as written, where ``X..Y`` are the numbered bands from X to Y."""
    names: list[str] = []
    for part in (part.strip() for part in text.split(",")):
        span = re.fullmatch(r"(?i)B(\d{1,2})\s*\.\.\s*B(\d{1,2})", part)
        names += [f"B{n:02d}" for n in range(int(span.group(1)), int(span.group(2)) + 1)] if span else [part]
    return names


def band_name(name: str, of: Sensor | None = None) -> str | None:
    """ESA name of a band given in any known spelling (``B1``, ``COASTAL_AEROSOL``, ``swir16``), or None."""
    wanted = name.strip().lower()
    padded = re.fullmatch(r"b(\d)", wanted)
    if padded:
        wanted = f"b0{padded.group(1)}"
    for s in (of,) if of else SENSORS.values():
        for band in (*s.bands, *s.dropped):
            if wanted == band.name.lower() or wanted in band.aliases:
                return band.name
    return None


BASELINE_OFFSET = 1000.0  # DN that Sentinel-2 baselines from 04.00 add (ESA states it as ADD_OFFSET -1000)
# Whether it is inside, told by the darkest percentile in DN; measured on real products.
L1C_CIRRUS_THRESHOLD = 500  # p1(B10): at most 49 without the offset, at least 1005 with it
L2A_THRESHOLD = 750  # min over bands of p1: at most 586 without, 893..1123 with
L2A_ABSTAIN = 1300  # ice or overcast: nothing dark enough to tell


def baseline(product: str) -> int | None:
    """The xxxx of ``_Nxxxx_`` in a Sentinel-2 product id as a number (02.00 to 09.99, or N9999), or None."""
    # Compact names begin with 02.04. Names of places and grid cells hold other numbers: N4512 may be a latitude.
    found = re.search(r"(?:^|_)N(0[2-9]\d\d|9999)(?=_|\.|$)", product)
    return int(found.group(1)) if found else None


def baseline_offset(product: str) -> float | None:
    """DN that a product id says are added: 1000 from N0400 on, else 0; None: no baseline, or N9999 (undocumented)."""
    number = baseline(product)
    if number is None or number == 9999:
        return None
    return BASELINE_OFFSET if number >= 400 else 0.0


NORMALIZED_MEAN = 0.5  # what `normalize` makes of the mean


def normalize(values: Any, mean: Any, std: Any, offset: Any = 0.0) -> Any:
    """The one normalization: ``(values - offset - (mean - 2 std)) / (4 std)``, without clipping.

    Maps mean +- 2 std to [0, 1]. Works on NumPy, JAX and PyTorch arrays alike; ``mean`` and ``std``
    broadcast against the last axis (bands). Source: the first author's port of the released weights.

    Args:
      values: measurements in the sensor's unit (DN as delivered, dB).
      mean, std: statistics per band in the same unit, of harmonized values.
      offset: the processing-baseline offset of the product in DN (1000 or 0; 0 for Sentinel-1).
    """
    return (values - offset - (mean - 2.0 * std)) / (4.0 * std)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation per sensor and band, in the sensor's unit; travels with every checkpoint."""

    mean: Mapping[str, tuple[float, ...]]
    std: Mapping[str, tuple[float, ...]]
    source: str = "published"

    @classmethod
    def published(cls) -> Statistics:
        return cls({k: s.mean for k, s in SENSORS.items()}, {k: s.std for k, s in SENSORS.items()})

    @classmethod
    def from_json(cls, text: str, source: str = "") -> Statistics:
        """Reads ``{"sensors": {key: {"bands": [...], "mean": [...], "std": [...]}}}``.

        Sensors that the file lacks keep the published values. Raises SensorError naming every fault.
        """
        try:
            data = json.loads(text)
            sensors = {key: entry for key, entry in data.get("sensors", {}).items() if key in SENSORS}
            moments = {key: [tuple(map(float, e[m])) for m in ("mean", "std")] for key, e in sensors.items()}
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise SensorError(f"statistics {source or 'text'}: damaged ({type(error).__name__}: {error})") from error
        mean, std, faults = {}, {}, []
        for key, s in SENSORS.items():
            mean[key], std[key] = moments.get(key, (s.mean, s.std))
            if key not in sensors:
                continue
            bands = sensors[key].get("bands")
            if bands != list(s.band_names):
                faults.append(f"{key}: bands {bands}, expected {list(s.band_names)}")
            elif not len(mean[key]) == len(std[key]) == len(bands):
                faults.append(f"{key}: {len(mean[key])} means and {len(std[key])} stds, expected {len(bands)} of each")
            elif not (np.all(np.isfinite(mean[key])) and np.all(np.isfinite(std[key])) and min(std[key]) > 0):
                faults.append(f"{key}: mean and std must be finite and std above zero, found {mean[key]}, {std[key]}")
        if faults:
            raise SensorError(f"statistics {source or 'text'}: " + "; ".join(faults))
        return cls(mean, std, data.get("source", source.rsplit("/", 1)[-1] or "file"))

    def to_json(self) -> str:
        entries = {
            k: {"bands": list(s.band_names), "mean": list(self.mean[k]), "std": list(self.std[k])}
            for k, s in SENSORS.items()
        }
        return json.dumps({"source": self.source, "sensors": entries}, indent=2)

    def arrays(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """float32 mean and std of one sensor, each [bands]."""
        return np.asarray(self.mean[key], np.float32), np.asarray(self.std[key], np.float32)

    def __getitem__(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The same as :meth:`arrays`, so that a Statistics serves where a mapping of arrays is asked for."""
        return self.arrays(key)
