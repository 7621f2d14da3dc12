"""Flags of ``terrafm_jax.embed`` and its subcommands."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from terrafm_jax.scenes.errors import SceneError
from terrafm_jax.sensors import SensorError, listed, sensor

if TYPE_CHECKING:
    from terrafm_jax.scenes.inputs import Declared

PROGRAM = "python -m terrafm_jax.embed"
_PLACES = ("--aoi", "--point", "--similar-to")


def quiet_libraries() -> None:
    """Quiets GDAL, rasterio and JAX in a command that reads scenes, and limits GDAL's cache."""
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.WARNING)  # it reports every accelerator that is missing
    os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB; by itself GDAL takes a twentieth of the machine's memory
    # rasterio warns about the arrays that it warps; files without a georeference are an error of ours.
    warnings.filterwarnings("ignore", message="Dataset has no geotransform")


def parse(argv: Sequence[str], description: str) -> tuple[str, argparse.Namespace]:
    """The subcommand (``scene`` if none is named) and its flags; leaves with code 2 if they are wrong."""
    parsers: dict[str, Callable[[], argparse.ArgumentParser]] = {
        "change": change_parser,
        "search": search_parser,
        "picture": picture_parser,
    }
    command = argv[0] if argv and argv[0] in parsers else "scene"
    if command == "scene":
        return command, scene_parser(description).parse_args(_joined(argv))
    return command, parsers[command]().parse_args(_joined(argv[1:]))


def _joined(argv: Sequence[str]) -> list[str]:
    """``--point -3.1,40`` -> ``--point=-3.1,40``: argparse would take a western longitude for a flag."""
    found: list[str] = []
    for text in argv:
        if found and found[-1] in _PLACES and re.match(r"-[\d.]", text):
            found[-1] += f"={text}"
        else:
            found.append(text)
    return found


def scene_parser(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(PROGRAM, description=description, formatter_class=_Help)
    add = parser.add_argument
    add("--checkpoint", required=True, help="workdir, checkpoint, hub folder, .pth or .safetensors")
    add(
        "--sensor",
        action="append",
        required=True,
        metavar="NAME=FILE",
        help="s2_l2a, s2_l1c or s1; FILE: a raster, "
        "several by comma, a folder of bands, a SAFE folder, a STAC item; again with the same NAME: another date",
    )
    add("--out", required=True, type=Path, help="OUT.tif, OUT.zarr or OUT.parquet")
    add_declarations(parser)
    add("--gsd", default="", help="meters a pixel; 'pretraining' is 20, what the model saw; default: the finest band's")
    add("--crs", default="", help="metric CRS of the output, e.g. EPSG:32631; default: that of the first sensor")
    add("--window", type=_count, default=224, help="pixels per side that the encoder sees at once")
    add(
        "--overlap",
        type=int,
        default=None,
        help="pixels that neighbors share; default: half a window (tokens), 0 (OUT.parquet)",
    )
    add("--stride", type=_count, default=16, help="pixels between tokens: 16, or 8, 4, 2, 1 for denser grids")
    add("--aoi", default="", help="GeoJSON polygon or WEST,SOUTH,EAST,NORTH: what to embed")
    add("--mask", action="append", default=[], help="raster (0 = leave out) or scl=FILE[:classes]")
    add("--use-scl", action="store_true", help="leave out clouds and shadows by each date's own SCL (SAFE, STAC)")
    add("--composite", default="first", choices=("first", "median", "mean"), help="of several dates, per valid pixel")
    add("--points", type=Path, default=None, help="CSV, GeoJSON or Parquet with lon, lat: embed these places only")
    add("--dtype", default="float32", choices=("float32", "float16", "int8"), help="of the output (OUT.tif, OUT.zarr)")
    add("--compute", default="", choices=("", "float32", "bfloat16"), help="of the encoder; default: the model's")
    add("--upstream-l2a-stem", action="store_true", help="the released code's fault: L2A through the stem of L1C")
    add("--batch", type=_count, default=16, help="windows at once")
    add("--threads", type=_count, default=2, help="reading threads")
    add("--save-seconds", type=float, default=30.0, help="between snapshots of an unfinished job")
    add("--overwrite", action="store_true", help="replace OUT, which holds something else")
    add("--dry-run", action="store_true", help="say windows, memory and time, and stop")
    return parser  # fmt: skip


def add_declarations(parser: argparse.ArgumentParser) -> None:
    """What the user knows about files that do not say it themselves."""
    add = parser.add_argument
    add(
        "--bands",
        action="append",
        default=[],
        metavar="NAME=B02,B03,...",
        help="band names of an unnamed raster, B01..B08 is a range; override,B02,B03,... against the names in the file",
    )
    add("--unit", action="append", default=[], metavar="NAME=UNIT", help="dn or reflectance; db or power (= linear)")
    add("--offset", action="append", default=[], metavar="NAME=DN", help="baseline offset still inside (1000 or 0)")
    add("--nodata", action="append", default=[], metavar="NAME=VALUE", help="nodata value that files do not declare")


def declared(args: argparse.Namespace) -> Declared:
    """The values of :func:`add_declarations`. Raises SceneError, also for a sensor that ``--sensor`` does not name."""
    from terrafm_jax.scenes.inputs import Declared

    found = Declared(
        bands=pairs("bands", args.bands, lambda v: tuple(listed(v))),
        unit=pairs("unit", args.unit, str),
        offset=pairs("offset", args.offset, float),
        nodata=pairs("nodata", args.nodata, float),
    )
    given = _sensors(args.sensor)
    stray = [
        f"--{name} names {key}"
        for name in ("bands", "unit", "offset", "nodata")
        for key in getattr(found, name)
        if given and key not in given
    ]
    if stray:
        raise SceneError(f"{'; '.join(stray)}, but --sensor gives {', '.join(given)} only; correct the name")
    return found


def _sensors(arguments: Sequence[str]) -> list[str]:
    """Keys of the sensors that ``--sensor NAME=SPEC`` name; those that nobody knows are said elsewhere."""
    found = []
    for text in arguments:
        with contextlib.suppress(SensorError):
            found.append(sensor(text.partition("=")[0]).key)
    return list(dict.fromkeys(found))


def change_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"{PROGRAM} change", description="1 - cosine of two dates")
    parser.add_argument("first", type=Path, help="GeoTIFF or Zarr")
    parser.add_argument("second", type=Path, help="of the same grid and weights")
    parser.add_argument("--out", required=True, type=Path, help="CHANGE.tif")
    return parser


def search_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"{PROGRAM} search", description="places that look alike")
    parser.add_argument("files", nargs="+", type=Path, help="outputs to search, GeoTIFF, Zarr or GeoParquet")
    parser.add_argument("--query", required=True, type=Path, help="output (GeoTIFF or Zarr) that holds the place")
    parser.add_argument("--point", required=True, type=_lonlat, metavar="LON,LAT")
    parser.add_argument("--k", type=_count, default=20)
    parser.add_argument("--out", required=True, type=Path, help="HITS.csv or HITS.geojson")
    return parser


def picture_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(f"{PROGRAM} picture", description="an embedding as a picture")
    parser.add_argument("file", type=Path, help="GeoTIFF or Zarr")
    parser.add_argument("--out", required=True, type=Path, help="PNG")
    parser.add_argument("--similar-to", type=_lonlat, default=None, metavar="LON,LAT", help="default: PCA as RGB")
    return parser


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the description's line breaks, and shows the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = "default" in (action.help or "") or action.default in (None, "", [], False)
        return action.help if said else super()._get_help_string(action)


def _lonlat(text: str) -> tuple[float, float]:
    lon, lat = text.split(",")
    return float(lon), float(lat)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected at least 1")
    return number


def pairs(name: str, given: Sequence[str], convert: Any) -> dict[str, Any]:
    """``["s1=db"]`` -> ``{"s1": "db"}`` with canonical sensor keys. Raises SceneError."""
    found: dict[str, Any] = {}
    for text in given:
        key, is_pair, value = text.partition("=")
        if not is_pair:
            raise SceneError(f"--{name} {text}: of which sensor? expected SENSOR=VALUE, such as --{name} s2_l2a={text}")
        try:
            canonical, converted = sensor(key).key, convert(value)
        except (SensorError, ValueError) as error:
            raise SceneError(f"--{name} {text}: expected SENSOR=VALUE ({error})") from None
        if canonical in found and found[canonical] != converted:
            raise SceneError(f"--{name} {text}: {canonical} has {found[canonical]} already; give one value")
        found[canonical] = converted
    return found
