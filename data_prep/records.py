"""From arrays to the record of ``terrafm_jax.data.tiles``, and to bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from data_prep import tiling
from data_prep.delivered import SensorInput
from data_prep.harmonize import Offset
from data_prep.raster import Grid
from terrafm_jax import landcover
from terrafm_jax.data import tiles
from terrafm_jax.sensors import SENSORS

_ABSENT = (2, 2)  # shape of placeholders, see tiles.features


@dataclasses.dataclass(frozen=True)
class Group:
    """Bands of one resolution group as stored, each [H, W]; ``valid`` bool [H, W]; their grid."""

    bands: tuple[np.ndarray, ...]
    valid: np.ndarray
    grid: Grid


@dataclasses.dataclass(frozen=True)
class Layer:
    """One sensor of a cell or tile in its stored form; ``verdict``: the offset that its pixels alone suggest."""

    given: SensorInput
    groups: dict[str, Group]
    offset: Offset
    verdict: float | None = None

    @property
    def finest(self) -> Grid:
        return next(iter(self.groups.values())).grid

    @property
    def valid(self) -> dict[str, np.ndarray]:
        return {name: group.valid for name, group in self.groups.items()}

    def cut(self, finest: Grid, window: tiling.Window) -> Layer:
        """The part under a window of the ``finest`` grid of the cell."""
        cut = {}
        for name, group in self.groups.items():
            part = tiling.on_grid(window, finest, group.grid)
            fill = SENSORS["s1"].nodata if group.bands[0].dtype == np.int16 else 0
            cut[name] = Group(
                tuple(tiling.cut(band, part, fill) for band in group.bands),
                tiling.cut(group.valid, part, False),
                group.grid.window(part.row, part.col, part.height, part.width),
            )
        return dataclasses.replace(self, groups=cut)


def record(
    *, parts: Mapping[str, Layer], nodata: Mapping[str, float], landcover_map: np.ndarray | None, **fields: Any
) -> dict[str, Any]:
    """One record as ``tiles.features`` describes it; ``fields`` are those at its top level."""
    shown = np.full(_ABSENT, landcover.UNKNOWN, np.uint8) if landcover_map is None else landcover_map
    result = {**fields, "landcover_map": shown}
    for key in SENSORS:
        result[key] = _present(key, parts[key], nodata[key]) if key in parts else _absent(key)
    return result


def _present(key: str, layer: Layer, nodata: float) -> dict[str, Any]:
    given = layer.given
    cloud, cloud_source = given.cloud if key != "s1" else (np.nan, "")
    entry: dict[str, Any] = {
        "present": True,
        "product": given.product,
        "kind": given.kind,
        "time": given.time,
        "orbit": given.orbit,
        "offset": layer.offset.value,
        "offset_source": layer.offset.source,
        "nodata": nodata,
        "cloud": cloud,
        "cloud_source": cloud_source,
    }
    for name, group in layer.groups.items():
        entry[name] = {
            "dn": np.stack(group.bands, axis=-1),
            "valid": tiles.pack_valid(group.valid),
            "transform": np.asarray(group.grid.transform, np.float64),
        }
    return entry


def _absent(key: str) -> dict[str, Any]:
    sensor = SENSORS[key]
    texts = dict.fromkeys(("product", "kind", "time", "orbit", "offset_source", "cloud_source"), "")
    entry: dict[str, Any] = {"present": False, "offset": 0.0, "nodata": 1.0, "cloud": np.nan, **texts}
    for name, bands in sensor.groups.items():
        entry[name] = {
            "dn": np.zeros((*_ABSENT, len(bands)), sensor.dtype),
            "valid": np.zeros(_ABSENT, np.uint8),
            "transform": np.zeros(6),
        }
    return entry


def layout(parts: Mapping[str, Layer]) -> dict[str, list[int]]:
    """Rows and columns of every ``sensor/group`` present."""
    return {f"{k}/{n}": list(g.valid.shape) for k in SENSORS if k in parts for n, g in parts[k].groups.items()}
