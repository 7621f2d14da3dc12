"""Which GeoTIFF (or JPEG 2000) files belong together, by a naming rule.

A folder or file name says the sensor (``S1RTC``, ``S2L1C``, ``s2_l2a`` ... or a product id
``S2A_MSIL2A_...``, ``S1A_IW_...``). A file whose name is or ends in a band (``B02.tif``,
``T31UDQ_20170829T105019_B01.jp2``, ``B02_10m``, ``..._VH.tif``) holds that band, and its cell is the nearest
folder that names neither sensor nor product; any other file is a multi-band image, and its cell is its
own name (or its folder's, where the name is a sensor). Its bands are those of its descriptions, else of
``--bands SENSOR=ORDER``; they are never guessed from their number::

    ROOT/S2L2A/282D_485L_3_3.tif            ROOT/282D_485L_3_3/S2L2A.tif
    ROOT/S2L2A/199U/199U_1099R/S2B_MSIL2A_20200223T032739_N9999_.../B02.tif
    ROOT/S2B_MSIL2A_..._T48QUE_....SAFE/GRANULE/.../IMG_DATA/R10m/T48QUE_20200223T032739_B02_10m.jp2

Manifests, which say everything instead: ``data_prep/manifest.py``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from data_prep.times import iso_time, nearest_in_time, paired
from terrafm_jax.sensors import SENSORS, SensorError, band_name, listed, sensor

LANDCOVER = "landcover"
UNKNOWN_SENSOR = "no sensor of the model: "
CLOUD_MASK = "cloud_mask"  # Major-TOM's, beside the bands of Level 2A
SUFFIXES = (".tif", ".tiff", ".jp2")
PRODUCT = re.compile(r"(S2[A-D]_MSI(L1C|L2A)_\w+|S1[A-D]_(?:IW|EW|SM|WV)_[A-Z]{3}\w*)")
_IGNORED = {"thumbnail", "scl", "aot", "wvp", "tci", "pvi"}


@dataclasses.dataclass(frozen=True)
class SceneFile:
    """One file of a scene.

    Attributes:
      path: where it is.
      sensor: sensor key or ``landcover``.
      bands: ESA names in the file's order; () = to be read from descriptions.
      unit: ``DN``, ``reflectance``, ``dB``, ``power`` or "" (as the flags say; S1: to be read from the values).
      offset, nodata: as a manifest states them.
    """

    path: str
    sensor: str
    bands: tuple[str, ...] = ()
    unit: str = ""
    kind: str = ""
    product: str = ""
    time: str = ""
    orbit: str = ""
    offset: float | None = None
    nodata: float | None = None


@dataclasses.dataclass(frozen=True)
class Scene:
    """Files of one acquisition over one cell, at most one set per sensor."""

    cell: str
    number: int
    files: tuple[SceneFile, ...]
    split: str | None = None


def from_folder(root: Path) -> tuple[list[Scene], Counter[str]]:
    """Scenes by the naming rule, and the files that it does not explain, by reason.

    Raises:
      ValueError: names are not UTF-8, as records and reports are; all are named.
    """
    found: dict[str, list[SceneFile]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    paths = [path for path in sorted(root.rglob("*")) if path.suffix.lower() in SUFFIXES]
    odd = [ascii(str(path.relative_to(root))) for path in paths if re.search("[\ud800-\udfff]", str(path))]
    if odd:
        raise ValueError(f"{root}: names of files are not UTF-8: {', '.join(odd)}; rename them")
    for path in paths:
        if path.name.startswith("."):  # macOS leaves ._B02.tif beside B02.tif
            skipped["hidden file"] += 1
        elif path.is_file():
            guess = by_name(path.relative_to(root))
            if isinstance(guess, str):
                skipped[guess] += 1
            else:
                cell, file = guess
                found[cell].append(dataclasses.replace(file, path=str(path)))
        elif path.is_symlink():
            skipped["link that leads nowhere"] += 1
    return join(found, {}, skipped), skipped


def by_name(path: PurePath) -> tuple[str, SceneFile] | str:
    """(cell, file) by the naming rule, or the reason why there is none."""
    stem = re.sub(r"_(10|20|60)m$", "", path.stem)
    stated = re.search(r"_(10|20|60)m$", path.stem)
    if stem.split("_")[-1].lower() in _IGNORED or path.stem.lower() in _IGNORED:
        return "no band of the model"
    if "QI_DATA" in path.parts:  # of a SAFE: MSK_DETFOO_B02.jp2 is not B02
        return "quality mask"
    parts = [*path.parts[:-1], stem]
    product = next((m.group(1) for part in reversed(parts) if (m := PRODUCT.match(part))), "")
    product = re.sub(r"_(VV|VH|B\w{1,2})$", "", product)  # of a file that holds one band of it
    key, place = _sensor_of(parts, product)
    if not key:
        return "no sensor in the name"
    band = band_name(stem, SENSORS[key]) or band_name(stem.split("_")[-1], SENSORS[key])
    band = CLOUD_MASK if stem == CLOUD_MASK else band
    if band and band != CLOUD_MASK and stated and int(stated.group(1)) != _gsd(key, band):
        return "band resampled by ESA"
    folders = [p for i, p in enumerate(parts[:-1]) if i != place and not PRODUCT.match(p) and p not in _SAFE_FOLDERS]
    if band:
        cell = _safe_cell(product, parts) or (folders[-1] if folders else product or stem)
    else:
        cell = stem if place != len(parts) - 1 else (folders[-1] if folders else stem)
    kind = kind_of(key, " ".join(path.parts))
    file = SceneFile("", key, (band,) if band else (), "", kind, product, iso_time(product))
    return cell, file


_SAFE_FOLDERS = {"GRANULE", "IMG_DATA", "R10m", "R20m", "R60m"}


def _safe_cell(product: str, parts: Sequence[str]) -> str:
    """Tile and sensing time of a SAFE granule, the same for Level 1C and 2A; "" for others."""
    found = re.search(r"_(T\d{2}[A-Z]{3})_", product)
    if not found or not any(part.upper().endswith(".SAFE") for part in parts):
        return ""
    return f"{found.group(1)}_{product.split('_')[2]}"


def _sensor_of(parts: Sequence[str], product: str) -> tuple[str, int | None]:
    """Sensor key and the part that is nothing but its name; product ids come first."""
    if product:
        level = re.match(r"S2._MSI(L1C|L2A)", product)
        return ("s2_" + level.group(1).lower() if level else "s1"), None
    for i in reversed(range(len(parts))):
        try:
            return sensor(parts[i]).key, i
        except SensorError:
            continue
    return "", None


def _gsd(key: str, band: str) -> int:
    return next(b.gsd for b in (*SENSORS[key].bands, *SENSORS[key].dropped) if b.name == band)


def kind_of(key: str, text: str) -> str:
    """Product kind of the record, from whatever text speaks of the product."""
    if key != "s1":
        return key[3:].upper()
    if re.search(r"(?i)rtc|gamma", text):
        return "RTC gamma0"
    return "GRD sigma0" if re.search(r"(?i)grd|sigma", text) else ""


# --- what flags say ---------------------------------------------------------------------------


def band_list(key: str, text: str, what: str) -> tuple[str, ...]:
    """``B1..B8, B8A, cloud_mask`` -> ESA names; ``X..Y`` are the numbered bands from X to Y. Raises ValueError."""
    names = listed(text)
    found = [CLOUD_MASK if name == CLOUD_MASK else band_name(name, SENSORS[key]) for name in names]
    unknown = [name for name, band in zip(names, found, strict=True) if band is None]
    if unknown:
        level = "; B10 means Level-1C" if key == "s2_l2a" and "B10" in map(band_name, unknown) else ""
        raise ValueError(f"{what}: bands {unknown} are not known to {key}{level}")
    return tuple(str(name) for name in found)


def stated_orders(texts: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """``["s2_l1c=B01..B12,B8A"]`` -> sensor key -> names in the files' order. Raises ValueError."""
    found = {}
    for text in texts:
        name, sign, bands = text.partition("=")
        if not sign:
            raise ValueError(f"--bands {text!r}: expected SENSOR=NAME,NAME,...")
        key = sensor(name).key
        found[key] = band_list(key, bands, f"--bands {name}")
    return found


def facts(scenes: Iterable[Scene]) -> str:
    """A digest of what is said of the files, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for scene in scenes:
        for file in scene.files:
            said = dataclasses.asdict(file) | {"path": Path(file.path).name, "cell": scene.cell}
            digest.update(json.dumps(said, sort_keys=True).encode())
    return digest.hexdigest()


# --- joining ----------------------------------------------------------------------------------


def join(found: Mapping[str, Sequence[SceneFile]], splits: Mapping[str, str], skipped: Counter[str]) -> list[Scene]:
    """One scene per acquisition of each cell. Counts repeated files."""
    result = []
    for cell in sorted(found):
        sets: dict[str, list[list[SceneFile]]] = {}
        for key in (*SENSORS, LANDCOVER):
            files = [f for f in found[cell] if f.sensor == key]
            sets[key] = _once(_acquisitions(files))
            repeated = len(files) - sum(map(len, sets[key]))
            skipped.update({"same product of the cell again": repeated} if repeated else {})
        for number, files in enumerate(_joined(sets)):
            result.append(Scene(cell, number, tuple(files), splits.get(cell)))
    return result


def _joined(sets: Mapping[str, Sequence[list[SceneFile]]]) -> list[list[SceneFile]]:
    """The files of each scene of a cell from the acquisitions of each sensor, which are in order of time.

    Level 1C goes with the Level 2A of its time, what is left over in order; Sentinel-1 with each, the nearest in time.
    """
    level_2a = sets["s2_l2a"]
    partners, alone = paired(
        level_2a, sets["s2_l1c"], lambda a: a[0].time[:10], lambda a, b: _same_time(a[0].time, b[0].time)
    )
    optical = [[*(partner or []), *files] for partner, files in zip(partners, level_2a, strict=True)] + alone
    radar, cover = sets["s1"], sets[LANDCOVER]
    nearest = nearest_in_time([files[0].time for files in radar])
    result = []
    for number, files in enumerate(optical or radar):
        if radar and optical:
            files = [*radar[nearest(files[-1].time, number)], *files]
        result.append([*files, *(cover[min(number, len(cover) - 1)] if cover else [])])
    return result


def _same_time(time: str, other: str) -> bool:
    """Whether two times are equal as far as both are known: one may be a date alone."""
    known = min(len(time), len(other))
    return known > 0 and time[:known] == other[:known]


def _acquisitions(files: Iterable[SceneFile]) -> list[list[SceneFile]]:
    """Files of one sensor grouped by product, or else by folder and date; each multi-band file is its own."""
    groups: dict[tuple[str, ...], list[SceneFile]] = defaultdict(list)
    for file in files:
        single = len(file.bands) == 1
        own = ((file.product,) if file.product else (str(Path(file.path).parent),)) if single else (file.path,)
        groups[(file.time, *own)].append(file)
    return [sorted(groups[key], key=lambda f: f.path) for key in sorted(groups)]


def _once(acquisitions: Sequence[list[SceneFile]]) -> list[list[SceneFile]]:
    """Without repetitions: of several sets of files of one product the most complete.

    Of equally complete sets the one of more files stays, which holds the bands at their own sampling.
    """
    best: dict[str, list[SceneFile]] = {}
    for files in acquisitions:
        first: dict[Any, SceneFile] = {}
        for file in files:
            first.setdefault((file.product or file.path, file.bands), file)
        product = files[0].product or files[0].path
        if _completeness(best.get(product, [])) < _completeness([*first.values()]):
            best[product] = [*first.values()]
    return list(best.values())


def _completeness(files: Sequence[SceneFile]) -> tuple[int, int]:
    named = {band for file in files for band in file.bands if band != CLOUD_MASK}
    whole = len(files) > 0 and any(not file.bands for file in files)  # a file that names none is taken for whole
    return max(len(named), 12 * whole), len(files)
