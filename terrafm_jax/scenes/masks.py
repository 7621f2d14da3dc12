"""Masks: rasters that are zero where pixels do not count, and scene classifications of Level-2A."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.scenes.grid import Grid, bounds_in
from terrafm_jax.scenes.layers import Acquisition, open_raster

# Scene classification of Level-2A: no data, saturated, cloud shadow, medium and high cloud, cirrus. Snow stays.
SCL_INVALID = (0, 1, 3, 8, 9, 10)
_COARSE = 12  # pixels that the edge of a mask may lack: two of 60 m on a grid of 10 m


@dataclasses.dataclass(frozen=True)
class MaskFile:
    """A raster that says where the scene counts: ``keep`` where non-zero, or classes (SCL) to leave out."""

    path: str
    classes: tuple[int, ...] = ()


def read_mask(text: str) -> MaskFile:
    """``FILE`` (non-zero = keep) or ``scl=FILE`` or ``scl=FILE:3,8,9`` (classes to leave out). Raises SceneError."""
    kind, _, rest = text.partition("=")
    if kind.lower() != "scl" or not rest:
        open_raster(text).close()
        return MaskFile(text)
    path, _, listed = rest.rpartition(":") if rest.rpartition(":")[2].replace(",", "").isdigit() else (rest, "", "")
    open_raster(path).close()
    return MaskFile(path, tuple(int(v) for v in listed.split(",")) if listed else SCL_INVALID)


def check_masks(
    grid: Grid, masks: Sequence[MaskFile], dates: Mapping[str, Sequence[Acquisition]], use_classes: bool
) -> Iterator[str]:
    """Sentences on masks that cover a part of the scene, and on dates without the classification that is to be used.

    Raises:
      SceneError: a mask lies elsewhere, or no date has a classification.
    """
    optical = [date for key, found in dates.items() for date in found if key != "s1"]
    classes = [date.classes for date in optical if use_classes and date.classes]
    if use_classes and not classes:
        raise SceneError(
            "--use-scl: no --sensor brings a scene classification (SAFE and STAC of Level-2A do); "
            "leave the flag out or pass --mask scl=FILE"
        )
    for date in optical:
        if use_classes and not date.classes:
            yield f"{date.paths[0]}: has no scene classification, --use-scl leaves nothing out of it"
    for path in [mask.path for mask in masks] + classes:
        with open_raster(path) as source:  # the grid in the mask's system: one of the whole Earth has no place in UTM
            (left, bottom, right, top), (x0, y0, x1, y1) = source.bounds, bounds_in(source, grid)
        if not (left < x1 and x0 < right and bottom < y1 and y0 < top):
            raise SceneError(f"{path}: lies elsewhere than the scene; give the mask or classification of this place")
        across, down = _COARSE * (x1 - x0) / grid.width, _COARSE * (y1 - y0) / grid.height
        if left > x0 + across or bottom > y0 + down or right < x1 - across or top < y1 - down:
            yield f"{path}: covers a part of the scene only, the rest counts as its value 0"
