"""A record back to GeoTIFFs that lie exactly where the source lies (after snapping)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from terrafm_jax import landcover
from terrafm_jax.data.tiles import extent_affine, unpack_valid
from terrafm_jax.sensors import SENSORS


def export(record: dict[str, Any], out: Path) -> list[Path]:
    """Writes one file per sensor and resolution group, and the land-cover map in WorldCover codes and colors.

    Sentinel-2 is written as delivered (DN with the offset still in, which the tags name), Sentinel-1 in
    dB; pixels without a measurement are masked by the file's internal mask.

    Args:
      record: a decoded record.
      out: folder, created if needed.

    Returns:
      The files.
    """
    out.mkdir(parents=True, exist_ok=True)
    name = record["tile_id"].replace("/", "_")
    made = []
    for key, sensor in SENSORS.items():
        entry = record[key]
        if not entry["present"]:
            continue
        fields = ("product", "kind", "time", "orbit", "offset", "offset_source", "cloud", "cloud_source", "nodata")
        tags = {field.upper(): str(entry[field]) for field in fields}
        for group, bands in sensor.groups.items():
            pixels = np.moveaxis(np.asarray(entry[group]["dn"]), -1, 0)
            valid = unpack_valid(entry[group]["valid"], pixels.shape[2])
            if key == "s1":
                pixels = (pixels * np.float32(sensor.scale)).astype(np.float32)
            path = out / f"{name}_{key}_{group}.tif"
            transform = rasterio.Affine(*entry[group]["transform"])
            _write(path, pixels, record["crs"], transform, bands, {**tags, "UNIT": sensor.unit}, valid)
            made.append(path)
    if record["landcover_map"].size > 4:
        made.append(_landcover(record, out / f"{name}_landcover.tif"))
    return made


def _write(
    path: Path,
    pixels: np.ndarray,
    crs: str,
    transform: rasterio.Affine,
    names: tuple[str, ...],
    tags: dict[str, str],
    valid: np.ndarray | None,
) -> None:
    with (
        rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True),
        rasterio.open(
            path, "w", driver="GTiff", count=len(pixels), height=pixels.shape[1], width=pixels.shape[2],
            dtype=pixels.dtype.newbyteorder("="), crs=crs, transform=transform, compress="deflate",
        ) as target,
    ):  # fmt: skip
        target.write(pixels)
        target.descriptions = names
        target.update_tags(**tags)
        if valid is not None and not valid.all():
            target.write_mask(valid)


def _landcover(record: dict[str, Any], path: Path) -> Path:
    """The map with WorldCover's codes; 0 = open sea, 255 = unknown."""
    codes = np.array([255 if c.name == "unknown" else c.code or 0 for c in landcover.CATEGORIES], np.uint8)
    affine, _ = extent_affine(record)
    _write(
        path, codes[record["landcover_map"]][None], record["crs"], rasterio.Affine(*affine), ("landcover",), {}, None
    )
    with rasterio.open(path, "r+") as target:
        colors = {int(codes[i]): c.color.lstrip("#") for i, c in enumerate(landcover.CATEGORIES)}
        target.write_colormap(1, {v: (*bytes.fromhex(c), 255) for v, c in colors.items()})
    return path
