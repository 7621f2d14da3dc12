"""Flags, exit codes and the closing report that all sources share."""

from __future__ import annotations

import argparse
import itertools
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cell import Options
from data_prep.chunks import COMPRESSIONS, DiskFull, Job, Source, SourceUnavailable, Unit
from data_prep.raster import BadInput
from data_prep.run import PrepareError, prepare_all
from data_prep.splits import BlockSplit, read_splits
from data_prep.worldcover import WorldCover
from terrafm_jax.data.tiles import SPLITS
from terrafm_jax.sensors import SensorError, sensor

# Exit codes; 2 is argparse's.
OK, FAILED, SOME_REJECTED, DISK_FULL, UNAVAILABLE, STOPPED = 0, 1, 3, 4, 5, 130
EXIT_CODES = """exit codes: 0 all cells prepared; 3 prepared, but some cells rejected (rejected.csv; see --tolerate);
1 nothing prepared or wrong arguments; 2 unknown or malformed flags; 4 disk full; 5 source not available; 130 stopped.
After 4, 5 and 130 the same command continues where it stopped."""
RUNNERS = ("local", "DirectRunner", "FlinkRunner", "SparkRunner", "DataflowRunner")


def add_arguments(parser: argparse.ArgumentParser, *, require: str, snap: str, sea_keep: float = 0.02) -> None:
    """Adds the flags that do not depend on the source."""
    parser.add_argument("--out", required=True, type=_folder, help="folder of the prepared data set, local or mounted")
    parser.add_argument("--worldcover", required=True, help="folder of ESA WorldCover maps, or 'none'")
    parser.add_argument(
        "--worldcover-missing", choices=("error", "sea"), default="error", help="what a map that is not there means"
    )
    parser.add_argument("--tile-size", type=int, default=534, help="pixels at 10 m, a multiple of 6 (default 534)")
    parser.add_argument("--stride", type=int, default=None, help="pixels at 10 m, a multiple of 6 (default: tile size)")
    parser.add_argument("--require", default=require, help="sensors a cell must have, by comma")
    parser.add_argument("--max-nodata", type=float, default=0.5, help="a sensor with more nodata is absent from a tile")
    parser.add_argument("--sea-keep", type=float, default=sea_keep, help="share of open-ocean tiles to keep")
    parser.add_argument("--splits", type=Path, default=None, help="CSV grid_cell,split; cells not listed are left out")
    parser.add_argument("--split-shares", default="0.9,0.05,0.05", help="train,validation,holdout share of the blocks")
    parser.add_argument("--block-degrees", type=float, default=1.0, help="height of the blocks that splits are made of")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of blocks")
    parser.add_argument(
        "--snap-origin", choices=("on", "off", "auto"), default=snap,
        help="move the bands' origins to multiples of their pixel size; auto: where Major-TOM's defect shows",
    )  # fmt: skip
    parser.add_argument("--no-landcover-map", action="store_true", help="do not store the land-cover map of each tile")
    parser.add_argument("--workers", type=int, default=1, help="processes (1: this one)")
    parser.add_argument("--cells-per-shard", type=int, default=32, help="cells in one file of the result")
    parser.add_argument("--compression", choices=COMPRESSIONS, default=COMPRESSIONS[0], help="of the shards")
    parser.add_argument(
        "--tolerate", type=float, default=0.0, help="share of cells that may be rejected with exit code 0"
    )
    parser.add_argument("--limit", type=int, default=None, help="only the first so many cells, by name")
    parser.add_argument("--bbox", type=float, nargs=4, metavar=("W", "S", "E", "N"), default=None, help="degrees")
    parser.add_argument("--runner", choices=RUNNERS, default="local", help="local processes or an Apache Beam runner")
    parser.epilog = EXIT_CODES


def _folder(text: str) -> Path:
    """A folder of the file system. Raises ArgumentTypeError on URLs, which Path would turn into odd local folders."""
    if "://" in text:
        raise argparse.ArgumentTypeError(
            f"{text}: shards are written to a local or mounted folder (array_record knows no others, and locks and "
            "renames need a file system); mount the bucket, or prepare locally and copy the finished folder"
        )
    return Path(text)


def options_of(args: argparse.Namespace) -> Options:
    """The options that decide about the content. Raises ValueError naming the flag."""
    for name in ("workers", "cells_per_shard"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    if not 0 <= args.tolerate <= 1:
        raise ValueError(f"--tolerate {args.tolerate}: expected 0..1")
    try:
        require = tuple(sensor(name).key for name in args.require.split(",") if name.strip())
        shares = tuple(float(x) for x in args.split_shares.split(","))
    except SensorError as error:
        raise ValueError(f"--require: {error}") from error
    if args.bbox and not (-90 <= args.bbox[1] < args.bbox[3] <= 90 and max(map(abs, args.bbox)) <= 360):
        given = " ".join(f"{degrees:g}" for degrees in args.bbox)
        raise ValueError(f"--bbox {given}: expected west, south, east, north in degrees, south below north")
    return Options(
        tile_size=args.tile_size,
        stride=args.tile_size if args.stride is None else args.stride,
        require=require,
        max_nodata=args.max_nodata,
        sea_keep=args.sea_keep,
        blocks=BlockSplit(shares, args.block_degrees, args.seed),
        keep_map=not args.no_landcover_map,
        snap=args.snap_origin,
    )


def outlook(center: tuple[float, float] | None, blocks: BlockSplit) -> str:
    """Split that a cell of about 10 km around (lat, lon) will have, ``mixed`` or ``unknown``."""
    if center is None:
        return "unknown"
    lat, lon = center
    margin = 0.08  # degrees
    wide = margin / max(0.05, float(np.cos(np.radians(lat))))
    return blocks.split(np.array([lon - wide, lon + wide]), np.array([lat - margin, lat + margin])) or "mixed"


def check_maps(cover: WorldCover, needed: Iterable[str]) -> None:
    """Raises ValueError naming all WorldCover maps that are needed and missing: now, and not after days of work."""
    missing = cover.missing(needed)
    if missing:
        raise ValueError(
            f"--worldcover {cover.folder}: {len(missing)} maps are missing: {', '.join(missing[:40])}"
            f"{' ...' if len(missing) > 40 else ''}; download them, list those that do not exist (open sea) in "
            "absent.txt beside the maps, or pass --worldcover-missing=sea"
        )


# (flags, options, land cover) -> the source, the units to prepare, and counts for the summary
Planner = Callable[[argparse.Namespace, Options, WorldCover], tuple[Source, list[Unit], dict[str, Any]]]


def run(parser: argparse.ArgumentParser, plan: Planner, argv: Sequence[str] | None) -> int:
    """Parses and runs; flags that the parser does not know go to Beam, where a Beam runner is chosen."""
    args, rest = parser.parse_known_args(argv)
    if rest and args.runner == "local":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        return _prepare(args, plan, rest)
    finally:
        signal.signal(signal.SIGTERM, before)


def _prepare(args: argparse.Namespace, plan: Planner, beam_options: Sequence[str]) -> int:
    """Plans, prepares, reports; returns the exit code. Every expected failure is one clear message."""
    try:
        options = options_of(args)
        source = str(getattr(args, "source", ""))
        if source and "://" not in source and Path(source).resolve() == args.out.resolve():
            raise ValueError(f"--out {args.out}: is the folder of the source, whose files stay apart; give another one")
        cover = WorldCover.open(args.worldcover, args.worldcover_missing)
        source, units, seen = plan(args, options, cover)
        if not units:
            counts = ", ".join(f"{n} {what}" for what, n in seen.items())
            also = "--collection, --datetime, " if hasattr(args, "datetime") else ""
            raise ValueError(f"no cell to prepare: {counts}; is it {also}--require, --bbox, --splits or --limit?")
        job = Job(source, cover, options, str(args.out), args.compression)
        summary = prepare_all(
            job, units, workers=args.workers, chunk_size=args.cells_per_shard, plan=seen, runner=args.runner,
            beam_options=beam_options,
        )  # fmt: skip
    except (ValueError, FileNotFoundError, PrepareError, BadInput) as error:
        print(f"data_prep: {error}", file=sys.stderr)
        return FAILED
    except DiskFull as error:
        print(
            f"data_prep: {error}\nFinished shards are kept; free space, start the same command again.", file=sys.stderr
        )
        return DISK_FULL
    except SourceUnavailable as error:
        print(f"data_prep: {error}\nFinished shards are kept; start the same command again.", file=sys.stderr)
        return UNAVAILABLE
    except KeyboardInterrupt:
        print("data_prep: stopped; start the same command again to continue.", file=sys.stderr)
        return STOPPED
    print(report(summary, args.out))
    return _exit_code(summary, len(units), args.tolerate)


class Formatter(argparse.RawTextHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keeps the examples of the module docstring as they are; a default that says nothing, or is said, is left out."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = "default" in (action.help or "") or action.default in (None, "", [], False)
        return action.help if said else super()._get_help_string(action)


def _terminate(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _exit_code(summary: dict[str, Any], units: int, tolerate: float) -> int:
    if not summary["tiles"]:
        return FAILED
    return SOME_REJECTED if summary["rejected"] > tolerate * units else OK


_OF_THE_JOB = ("sea_keep", "digest", "job")


def report(summary: dict[str, Any], directory: Path) -> str:
    """The closing summary for people."""
    if not summary["tiles"]:
        lines = [f"nothing prepared, no tile is left for {directory}:", *_cells(summary), *_losses(summary, directory)]
        return "\n".join([*lines, f"  look at: {_suspects(summary, directory)}"])
    lines = [f"prepared data set: {directory} ({summary['bytes'] / 1e6:.1f} MB of records)"]
    seen = itertools.takewhile(lambda item: item[0] != "tiles", summary.items())  # what planning counted comes first
    lines.append("  source: " + ", ".join(f"{n} {what}" for what, n in seen if what not in _OF_THE_JOB))
    lines += _cells(summary)
    lines += [f"  {split}: {summary['tiles'][split]} tiles" for split in SPLITS if split in summary["tiles"]]
    lines.append(f"  lost between splits: {100 * summary['lost_between_splits']:.2f} % of the tiles")
    if summary.get("cells_sharing_ground"):
        lines.append(f"  {summary['cells_sharing_ground']} x cells in different splits SHARE GROUND:")
        lines += [f"    {text}" for text in summary["cells_sharing_ground_examples"][:5]]
    if summary["offset_conflicts"]:
        lines.append(f"  {summary['offset_conflicts']} products whose id and pixels disagree on the offset")
    lines += _losses(summary, directory)
    lines += [f"  LOOKS WRONG: {text}" for text in summary.get("looks_wrong", [])]
    lines.append(f"  look at it: python -m data_prep.inspect {directory}")
    return "\n".join(lines)


def _cells(summary: dict[str, Any]) -> list[str]:
    """What became of the cells: one line that adds up; [] for summaries of earlier versions, which did not count."""
    if "cells_without_tile" not in summary:
        return []
    rejected, without = summary["rejected"], summary["cells_without_tile"]
    prepared = summary["units"] - rejected - without
    return [f"  cells: {prepared} prepared, {rejected} rejected, {without} without a tile (of {summary['units']})"]


def _suspects(summary: dict[str, Any], directory: Path) -> str:
    """Where to look when no tile is left: the reasons of rejected cells, the flags behind what was left out."""
    flags = {
        "straddles splits": "--block-degrees, --split-shares or --splits",
        "shares ground with another split": "--splits",
        "open ocean": "--sea-keep",
        "black": "the files (nodata everywhere)",
        "nodata": "--max-nodata, --require",
    }
    found = [str(directory / "rejected.csv")] if summary["rejected"] else []
    found += [what for reason, what in flags.items() if any(text.startswith(reason) for text in summary["left_out"])]
    return "; ".join(found)


def _losses(summary: dict[str, Any], directory: Path) -> list[str]:
    """What was left out or rejected, each reason with its first case."""
    lines = []
    if summary["left_out"]:
        left_out = ", ".join(f"{n} {reason}" for reason, n in summary["left_out"].items())
        lines.append(f"  tiles left out: {left_out}")
    if summary["rejected"]:
        lines.append(f"  {summary['rejected']} cells REJECTED, see {directory / 'rejected.csv'}:")
        examples = summary.get("rejected_examples", {})
        for reason, n in summary["rejected_reasons"].items():
            lines.append(f"    {n} x {reason}" + (f"; for example {examples[reason]}" if reason in examples else ""))
    return lines


def chosen_cells(
    names: Sequence[str], centers: Sequence[tuple[float, float] | None], args: argparse.Namespace
) -> tuple[list[bool], dict[str, str]]:
    """Which cells --splits, --bbox and --limit leave, and the fixed split of each cell of --splits."""
    fixed = dict(read_splits(args.splits)) if args.splits else {}
    keep = [not args.splits or name in fixed for name in names]
    if args.bbox:
        for i, center in enumerate(centers):
            keep[i] &= center is not None and in_bbox(args.bbox, *center)
    if args.limit is not None:
        allowed = set(sorted({n for n, k in zip(names, keep, strict=True) if k})[: args.limit])
        keep = [k and n in allowed for n, k in zip(names, keep, strict=True)]
    return keep, fixed


def in_bbox(bbox: Sequence[float], lat: float, lon: float) -> bool:
    """Whether a place lies in (west, south, east, north); west may be larger than east, across the antimeridian."""
    west, south, east, north = bbox
    width = 360.0 if east - west >= 360 else (east - west) % 360
    return south <= lat <= north and (lon - west) % 360 <= width
