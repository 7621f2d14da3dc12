"""Folders of band files, Sentinel-2 SAFE products and STAC items as acquisitions."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlparse

from terrafm_jax import checks
from terrafm_jax.scenes.errors import SceneError, first_line
from terrafm_jax.scenes.layers import (
    RASTERS,
    Acquisition,
    Layer,
    band_in_name,
    bands_of,
    last_part,
    open_raster,
    ordered,
    unique,
)
from terrafm_jax.sensors import Sensor, band_name, baseline_offset

_SCL = re.compile(r"(^|_)SCL(_20m)?$")
_DATE = re.compile(r"(?<!\d)(19|20)\d{2}(0[1-9]|1[0-2])([0-2]\d|3[01])(T\d{6})?(?!\d)")
_PRODUCT = re.compile(r"S2[A-D]_MSI(L1C|L2A)_(\d{8}T\d{6})_N(\d{4})_\w+")


def offset_of(product: str) -> float:
    """DN that the processing baseline named in a product id adds; 0 where it says nothing."""
    return baseline_offset(product) or 0.0


def is_product(name: str) -> bool:
    """Whether a name is the id of a Sentinel-2 product."""
    return bool(_PRODUCT.search(name))


def from_folder(folder: Path, sensor: Sensor) -> Acquisition:
    """A SAFE product, or a folder whose file names end in bands or whose rasters name their bands.

    Raises:
      SceneError: several products or dates, another level, radar geometry, or no band.
    """
    folder = _product_folder(folder)
    # Quality masks (QI_DATA/MSK_DETFOO_B02.jp2) end in band names too, and what macOS leaves beside files (._B02.tif).
    no_bands = ("MSK_", ".")
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in RASTERS and not p.name.startswith(no_bands))
    safe = folder.suffix.upper() == ".SAFE" or any(folder.glob("MTD_MSI*.xml"))
    _refuse_radar_geometry(folder)
    classes = [path for path in files if _SCL.search(path.stem)]
    product = _product_of(folder, files)
    level = _PRODUCT.search(product)
    _refuse_other_level(folder, sensor, level.group(1) if level else "")
    for finding in checks.level(sensor.key, [last_part(str(path)) for path in files]):
        raise SceneError(f"{folder}: {finding.text}")
    layers = _of_names([p for p in files if p not in classes], sensor, folder)
    if not layers and not safe:
        layers = _of_descriptions(files, sensor, folder)
    return Acquisition(
        sensor.key,
        ordered(layers, sensor, str(folder)),
        "",
        offset=_safe_offset(folder, product) if safe else 0.0,
        product=product,
        time=_iso(level.group(2)) if level else "",
        classes=str(classes[-1]) if classes else "",
        cirrus=layers.get("B10"),
    )


def _product_folder(folder: Path) -> Path:
    """The folder itself, or the one SAFE product in it. Raises SceneError if there are several."""
    if folder.suffix.upper() == ".SAFE" or any(folder.glob("MTD_MSI*.xml")):
        return folder
    inside = sorted({p for p in folder.rglob("*") if p.is_dir() and p.suffix.upper() == ".SAFE"})
    if len(inside) > 1:
        shown = ", ".join(p.name for p in inside[:4]) + (" ..." if len(inside) > 4 else "")
        raise SceneError(
            f"{folder}: holds {len(inside)} products ({shown}); give one product or date at a time, "
            "each with its own --sensor"
        )
    return inside[0] if inside else folder


def _refuse_radar_geometry(folder: Path) -> None:
    """Raises SceneError for Sentinel-1 as ESA delivers it, which only the folder's name gives away."""
    if re.match(r"S1[A-D]_\w+_(GRD|SLC)", folder.name) and (folder / "measurement").is_dir():
        kind = re.match(r"S1[A-D]_\w+?_(GRD|SLC)", folder.name).group(1)
        raise SceneError(
            f"{folder}: is Sentinel-1 {kind} in radar geometry; terrain-correct it first (SNAP, pyroSAR or an RTC "
            "service), then give the GeoTIFFs"
        )


def _refuse_other_level(folder: Path, sensor: Sensor, level: str) -> None:
    if level and sensor.key != f"s2_{level.lower()}":
        raise SceneError(
            f"{folder}: is a Level-{level[1:]} product, but --sensor says {sensor.key}; "
            f"pass --sensor s2_{level.lower()}={folder}"
        )


def _of_names(files: list[Path], sensor: Sensor, folder: Path) -> dict[str, Layer]:
    """Layers by the ends of file names; of copies at several samplings the native one. Raises SceneError: unclear."""
    candidates: dict[str, list[Path]] = {}
    for path in files:
        if band := band_in_name(path.stem, sensor):
            candidates.setdefault(band, []).append(path)
    found: list[Path] = []
    layers: list[Layer] = []
    for band, paths in candidates.items():
        native = [p for p in paths if _is_native(p, band, sensor)]
        best = native or _finest_copy(paths)
        found += best
        layers += [Layer(band, str(p)) for p in best]
    result = unique(layers, str(folder))
    dates = sorted({stamp.group() for p in found if (stamp := _DATE.search(p.stem))})
    if len(dates) > 1:
        raise SceneError(
            f"{folder}: its bands are of several dates ({', '.join(dates[:4])}); give one date at a time, "
            "each with its own --sensor"
        )
    return result


def _finest_copy(paths: list[Path]) -> list[Path]:
    """Of copies that differ in their sampling alone, the finest; else all of them."""
    if len(paths) > 1 and len({re.sub(r"_(10|20|60)m$", "", p.stem) for p in paths}) == 1:
        sizes = {p: int(m.group(1)) for p in paths if (m := re.search(r"_(10|20|60)m$", p.stem))}
        if len(set(sizes.values())) == len(paths):
            return [min(sizes, key=sizes.__getitem__)]
    return paths


def _of_descriptions(files: list[Path], sensor: Sensor, folder: Path) -> dict[str, Layer]:
    layers: list[Layer] = []
    for path in files:
        with open_raster(path) as source:
            names = enumerate(bands_of(source, sensor), 1)
            layers += [Layer(band, str(path), i) for i, band in names if band]
    return unique(layers, str(folder))


def _is_native(path: Path, band: str, sensor: Sensor) -> bool:
    """Level 2A holds bands at several samplings: the one they were measured at wins."""
    gsd = next(b.gsd for b in (*sensor.bands, *sensor.dropped) if b.name == band)
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
    collection = f"{item.get('collection', '')} {item.get('id', '')}".upper()
    if sensor.key == "s2_l2a" and re.search(r"(?<![A-Z])L1C(?![A-Z])|MSIL1C", collection):
        raise SceneError(f"{path}: is a Level-1C item; pass --sensor s2_l1c={path}")
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
        cirrus=layers.get("B10"),
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
