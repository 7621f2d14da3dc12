"""What a source hands over for one cell, before anything is done to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cached_property

import numpy as np

from data_prep import quality
from data_prep.ground import Rival
from data_prep.harmonize import Offset
from data_prep.raster import Raster


@dataclasses.dataclass
class SensorInput:
    """The delivered bands of one sensor.

    Attributes:
      bands: ESA band name -> raster.
      product, kind, time, orbit: as the record stores them.
      unit: ``DN`` or ``reflectance``, ``power`` or ``dB``.
      cloud_mask, cloud_percent: see ``quality.cloud_share``.
      offset: decided beforehand (a manifest, the survey of a product), or None: decide here.
      doubts: what looks wrong with the files.
    """

    bands: dict[str, Raster]
    product: str = ""
    kind: str = ""
    time: str = ""
    orbit: str = ""
    unit: str = "DN"
    cloud_mask: np.ndarray | None = None
    cloud_percent: float | None = None
    offset: Offset | None = None
    doubts: tuple[str, ...] = ()

    @cached_property
    def cloud(self) -> tuple[float, str]:
        """Cloud share of the cell and its source, the same for all its tiles."""
        return quality.cloud_share(self.cloud_mask, self.cloud_percent)


@dataclasses.dataclass
class Cell:
    """What a source delivers for one cell.

    Attributes:
      name: grid cell, ``199U_1099R``.
      sensors: sensor key -> input; at least one.
      number: 0 for the first product of the cell, 1 for the next; part of the tile ids.
      split: fixed split, or None: by footprint.
      center: (lat, lon) that the metadata claim, or None.
      landcover: WorldCover codes of the cell itself, in place of the 3 degree maps.
      rivals: cells nearby of another listed split, with a Grid each, that keep the ground they share.
      beside: sensors whose files do not reach this part of the scene.
    """

    name: str
    sensors: dict[str, SensorInput]
    number: int = 0
    split: str | None = None
    center: tuple[float, float] | None = None
    landcover: Raster | None = None
    rivals: Sequence[Rival] = ()
    beside: Sequence[str] = ()
