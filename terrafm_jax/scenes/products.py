"""Folders of band files, Sentinel-2 SAFE products and STAC items as acquisitions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlparse

from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.scenes.layers import RASTERS, Acquisition, Layer, band_in_name, bands_of, open_raster, ordered
from terrafm_jax.sensors import Sensor, band_name, baseline_offset

_PRODUCT = re.compile(r"S2[A-D]_MSI(L1C|L2A)_(\d{8}T\d{6})_N(\d{4})_\w+")


def offset_of(product: str) -> float:
    """DN that the processing baseline named in a product id adds; 0 where it says nothing."""
    return baseline_offset(product) or 0.0


def from_folder(folder: Path, sensor: Sensor) -> Acquisition:
    """A SAFE product, or a folder whose file names end in bands or whose rasters name their bands."""
    # Quality masks (QI_DATA/MSK_DETFOO_B02.jp2) end in band names too.
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in RASTERS and not p.name.startswith("MSK_"))
    safe = folder.suffix.upper() == ".SAFE" or any(folder.glob("MTD_MSI*.xml"))
    layers: dict[str, Layer] = {}
    classes = ""
    for path in files:
        if re.search(r"(^|_)SCL(_20m)?$", path.stem):
            classes = str(path)
            continue
        band = band_in_name(path.stem, sensor)
        if band and (band not in layers or _is_native(path, band, sensor)):
            layers[band] = Layer(band, str(path))
    if not layers and not safe:
        for path in files:
            with open_raster(path) as source:
                for i, band in enumerate(bands_of(source, sensor), 1):
                    if band:
                        layers.setdefault(band, Layer(band, str(path), i))
    product = _product_of(folder, files)
    level = _PRODUCT.search(product)
    if level and sensor.key != f"s2_{level.group(1).lower()}":
        raise SceneError(
            f"{folder}: is a Level-{level.group(1)[1:]} product, but --sensor says {sensor.key}; "
            f"pass --sensor s2_{level.group(1).lower()}={folder}"
        )
    return Acquisition(
        sensor.key,
        ordered(layers, sensor, str(folder)),
        "",
        offset=_safe_offset(folder, product) if safe else 0.0,
        product=product,
        time=_iso(level.group(2)) if level else "",
        classes=classes,
    )


def _is_native(path: Path, band: str, sensor: Sensor) -> bool:
    """Level 2A holds bands at several samplings: the one they were measured at wins."""
    gsd = next(b.gsd for b in sensor.bands if b.name == band)
    return bool(re.search(rf"_{gsd}m$", path.stem)) or path.parent.name == f"R{gsd}m"


def _product_of(folder: Path, files: list[Path]) -> str:
    for text in (folder.name, *(str(p) for p in files[:1])):
        found = _PRODUCT.search(text)
        if found:
            return found.group(0)
    return folder.name


def _safe_offset(folder: Path, product: str) -> float:
    """The additive offset that the product's metadata state (negated), else what the baseline says."""
    for path in sorted(folder.glob("MTD_MSI*.xml")):
        found = re.findall(r"<(?:BOA|RADIO)_ADD_OFFSET[^>]*>\s*(-?\d+)", path.read_text(errors="replace"))
        if found:
            return -float(found[0])
    return offset_of(product)


def _iso(stamp: str) -> str:
    return f"{stamp[:4]}-{stamp[4:6]}-{stamp[6:8]}T{stamp[9:11]}:{stamp[11:13]}:{stamp[13:15]}Z"


# --- STAC ----------------------------------------------------------------------------------------


def from_stac(path: Path, sensor: Sensor) -> Acquisition:
    """A STAC item: bands by ``eo:bands`` / ``bands`` or by asset key, local or remote hrefs."""
    try:
        item = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SceneError(f"{path}: not a STAC item ({first_line(error)}); expected one GeoJSON Feature") from None
    if item.get("type") != "Feature" or not isinstance(item.get("assets"), dict):
        raise SceneError(f"{path}: not a STAC item (type {item.get('type')!r}); expected a Feature with assets")
    layers: dict[str, Layer] = {}
    offsets: set[float] = set()
    classes = ""
    for key, asset in item["assets"].items():
        href = _href(path, asset.get("href", ""))
        if key.lower() == "scl":
            classes = href
        for i, band in enumerate(_asset_bands(key, asset, sensor), 1):
            if band and band not in layers and _is_data(asset):
                layers[band] = Layer(band, href, i)
                offsets |= _asset_offset(asset, i)
    properties = item.get("properties", {})
    return Acquisition(
        sensor.key,
        ordered(layers, sensor, str(path)),
        "",
        offset=_item_offset(properties, offsets, str(item.get("id", ""))) if sensor.key != "s1" else 0.0,
        product=str(properties.get("s2:product_uri") or item.get("id", "")),
        time=str(properties.get("datetime") or ""),
        classes=classes,
    )


def _href(path: Path, href: str) -> str:
    if urlparse(href).scheme in ("http", "https", "s3", "gs"):
        return href
    if href.startswith("file://"):
        return href.removeprefix("file://")
    return urljoin(str(path.resolve()), href) if not Path(href).is_absolute() else href


def _is_data(asset: dict[str, Any]) -> bool:
    """Previews and metadata name bands too."""
    roles = asset.get("roles") or ["data"]
    return "data" in roles or not ({"thumbnail", "overview", "metadata", "visual"} & set(roles))


def _asset_bands(key: str, asset: dict[str, Any], sensor: Sensor) -> list[str | None]:
    listed = asset.get("eo:bands") or asset.get("bands") or []
    found = []
    for entry in listed:
        names = (entry.get("name"), entry.get("eo:common_name"), entry.get("common_name"))
        found.append(next((b for n in names if n and (b := band_name(str(n), sensor))), None))
    if len(found) <= 1:  # the key is the surer name: common names are shared by several bands
        return [band_name(key, sensor) or next(iter(found), None)]
    return found


def _asset_offset(asset: dict[str, Any], band: int) -> set[float]:
    """DN offset stated by the raster extension: offset / scale, negated."""
    listed = asset.get("raster:bands") or asset.get("bands") or [{}]
    entry = listed[min(band, len(listed)) - 1]
    scale, offset = (entry.get(k, entry.get(f"raster:{k}")) for k in ("scale", "offset"))
    return {round(-offset / scale, 3)} if scale and offset is not None else set()


def _item_offset(properties: dict[str, Any], stated: set[float], name: str) -> float:
    """Offset of the item: the raster extension, else the flag of earth-search, else the baseline.

    The flag is known to be wrong for some items; ``--offset`` overrides, and dark values that contradict
    are warned about.
    """
    if len(stated) == 1:
        return stated.pop()
    if properties.get("earthsearch:boa_offset_applied") is True:
        return 0.0
    baseline = str(properties.get("s2:processing_baseline") or properties.get("processing:version") or "")
    number = re.match(r"(\d{2})\.(\d{2})", baseline)
    if number:
        return offset_of(f"N{number.group(1)}{number.group(2)}")
    return offset_of(str(properties.get("s2:product_uri") or name))
