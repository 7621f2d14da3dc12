"""Looks at a prepared data set: text, an HTML page with pictures, and tiles written back as GeoTIFF.

    python -m data_prep.inspect DIR                          # prints, and writes DIR/inspect/index.html
    python -m data_prep.inspect DIR --export 199U_1099R/r0_c534 OUT

``--export`` takes a tile id or ``split:number`` (the fast way in a large data set).
"""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.dataset import DataSet
from data_prep.doubts import looks_wrong
from data_prep.write import of_sensor
from terrafm_jax import landcover
from terrafm_jax.data.decode import parse_example
from terrafm_jax.data.sampling import MODES
from terrafm_jax.data.source import DataError, RecordError, Records
from terrafm_jax.sensors import SENSOR_KEYS, SENSORS

# --- text -------------------------------------------------------------------------------------


def describe(data: DataSet) -> str:
    """Everything that can be said in lines of text."""
    parts = [_doubts(data), _sizes(data), _sensors(data), _classes(data), _statistics(data), _left_out(data)]
    return "\n\n".join(part for part in parts if part)


def _doubts(data: DataSet) -> str:
    """What the values cannot or should not be; "" if nothing."""
    return "\n".join(f"looks wrong: {text}" for text in data.summary.get("looks_wrong", looks_wrong(data.statistics)))


def _sizes(data: DataSet) -> str:
    shards = list(data.directory.glob("*.array_record-*"))
    size = sum(path.stat().st_size for path in shards)
    tiles = sum(map(len, data.splits.values()))
    each = f"{size / tiles / 1e3:.0f} kB a tile"
    lines = [f"{data.directory}: {tiles} tiles, {size / 1e6:.1f} MB in {len(shards)} shards, {each}"]
    for name, split in data.splits.items():
        rows = data.index[name]
        area = ", ".join(f"{name} {rows[name].min():.1f}..{rows[name].max():.1f}" for name in ("lat", "lon"))
        lines.append(f"  {name:<11}{len(split):>9} tiles, {int(rows['sea'].sum())} open sea, {area}")
    return "\n".join(lines)


def _sensors(data: DataSet) -> str:
    rows = np.concatenate(list(data.index.values()))
    lines = ["sensors"]
    for bits in sorted(set(rows["present"].tolist()), reverse=True):
        names = " + ".join(key for i, key in enumerate(SENSOR_KEYS) if bits >> i & 1)
        lines.append(f"  {names:<24}{int((rows['present'] == bits).sum()):>9} tiles")
    lines.append(f"  tiles with nodata: {(rows['nodata'] > 0).mean():.1%}, mean share {rows['nodata'].mean():.3%}")
    lines.append("shapes")
    counts = np.bincount(rows["layout"], minlength=len(data.layouts))
    for layout, count in zip(data.layouts, counts, strict=True):
        shapes = ", ".join(f"{name} {h}x{w}" for name, (h, w) in layout.items())
        lines.append(f"  {int(count):>9} x {shapes}")
    return "\n".join(lines)


def _classes(data: DataSet) -> str:
    lines = [
        f"{'land cover (majority)':<26}"
        + "".join(f"{name:>12}" for name in data.splits)
        + f"{'drawn: uniform':>16}{'paper':>10}{'balanced':>10}"
    ]
    drawn = {mode: order.expected_histogram() for mode, order in data.sampling().items()}
    for i, category in enumerate(landcover.CATEGORIES):
        counts = [int((rows["landcover"] == i).sum()) for rows in data.index.values()]
        if any(counts):
            shares = "".join(f"{drawn[mode][i]:>10.2%}" for mode in MODES)
            lines.append(f"{category.title:<26}" + "".join(f"{n:>12}" for n in counts) + "      " + shares)
    return "\n".join(lines)


def _statistics(data: DataSet) -> str:
    found = data.statistics.get("sensors", {})
    if not found:
        return "statistics: none"
    lines = [
        f"statistics ({data.statistics.get('source', '?')}; harmonized DN, dB)",
        f"  {'sensor':<8}{'band':<5}{'mean':>9}{'std':>9}{'min':>9}{'p1':>9}{'p50':>9}{'p99':>9}{'max':>9}{'nodata':>8}"
        f"{'published mean':>16}{'std':>9}",
    ]
    for key, entry in found.items():
        ranks = [entry["percentile_ranks"].index(p) for p in (1, 50, 99)]
        for i, band in enumerate(entry["bands"]):
            low, middle, high = (entry["percentiles"][i][r] for r in ranks)
            numbers = (entry["mean"][i], entry["std"][i], entry["min"][i], low, middle, high, entry["max"][i])
            lines.append(
                f"  {key:<8}{band:<5}" + "".join(f"{x:>9.1f}" for x in numbers) + f"{entry['nodata'][i]:>8.2%}"
                f"{SENSORS[key].mean[i]:>16.1f}{SENSORS[key].std[i]:>9.1f}"
            )
    return "\n".join(lines)


def _left_out(data: DataSet) -> str:
    summary = data.summary
    if not summary:
        return ""
    lines = [
        f"left out: {n} {'times' if of_sensor(reason) else 'tiles'}, {reason}"
        for reason, n in summary.get("left_out", {}).items()
    ]
    lines.append(f"lost between splits: {summary.get('lost_between_splits', 0):.2%} of the tiles")
    lines.append(f"rejected cells: {summary.get('rejected', 0)}")
    lines += [f"  {n} x {reason}" for reason, n in summary.get("rejected_reasons", {}).items()]
    lines.append(f"products whose id and pixels disagree on the offset: {summary.get('offset_conflicts', 0)}")
    return "\n".join(lines)


# --- page -------------------------------------------------------------------------------------


def write_page(data: DataSet, out: Path, text: str, tiles: int = 16) -> Path:
    """Pictures and ``index.html`` in ``out``; returns the page."""
    from data_prep import pictures

    out.mkdir(parents=True, exist_ok=True)
    made = pictures.draw_all(data, out, tiles)
    figures = "\n".join(
        f'<h2>{html.escape(title)}</h2>\n<p><a href="{name}"><img src="{name}" alt="{html.escape(title)}"></a></p>'
        for name, title in made.items()
    )
    doubts = "\n".join(f'<p class="wrong">{html.escape(line)}</p>' for line in _doubts(data).splitlines())
    page = out / "index.html"
    page.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(data.directory.name)}: prepared tiles</title>
<style>body{{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#1d2733}}
img{{max-width:100%;border:1px solid #d5dbe1}}
pre{{background:#f4f6f8;padding:1em;overflow:auto;font-size:12.5px}}
.wrong{{background:#fde8e6;border-left:4px solid #b3261e;padding:.5em 1em}}</style>
</head><body><h1>Prepared tiles: {html.escape(data.directory.name)}</h1>
{doubts}
<pre>{html.escape(text)}</pre>
{figures}
<p><small>Contains modified Copernicus Sentinel data. Land cover: ESA WorldCover (CC-BY-4.0). Major-TOM: CC-BY-SA-4.0.
</small></p></body></html>
""",
        encoding="utf-8",
    )
    return page


# --- one tile ---------------------------------------------------------------------------------


def find(data: DataSet, name: str) -> dict[str, Any]:
    """The record of a tile id, or of ``split:number``. Raises DataError naming a few ids where there is none."""
    split, sign, number = name.partition(":")
    if sign and split in data.splits and number.isdigit():
        if int(number) >= len(data.splits[split]):
            raise DataError(f"{name}: split {split} has {len(data.splits[split])} records")
        return data.record(split, int(number))
    known = []
    for split, found in data.splits.items():
        records = Records(found)
        for i in range(len(found)):
            try:
                raw = records.read(i)
            except RecordError as error:
                print(f"data_prep.inspect: {error}", file=sys.stderr)
                continue
            start, stop = parse_example(raw)["tile_id"]
            tile = raw[start:stop].decode()
            if tile == name:
                return data.record(split, i)
            known.append(tile)
    raise DataError(f"no tile {name!r} in {data.directory}; for example {known[:5]}")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        "python -m data_prep.inspect", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("directory", type=Path, help="prepared data set")
    result.add_argument("--out", type=Path, default=None, help="folder of the page (default DIR/inspect)")
    result.add_argument("--tiles", type=int, default=16, help="tiles on the sheet of quick-looks")
    result.add_argument("--export", nargs=2, metavar=("ID", "OUT"), default=None, help="write one tile as GeoTIFFs")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        data = DataSet.open(args.directory)
        if args.export:
            from data_prep.export import export

            for path in export(find(data, args.export[0]), Path(args.export[1])):
                print(path)
            return 0
        text = describe(data)
        _say(text)
        page = write_page(data, args.out or args.directory / "inspect", text, args.tiles)
    except (DataError, RecordError) as error:
        print(f"data_prep.inspect: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a folder that cannot be written, a full disk
        place = args.export[1] if args.export else args.out or args.directory
        print(f"data_prep.inspect: {place}: {error}", file=sys.stderr)
        return 1
    _say(f"\npage with pictures: {page}")
    return 0


def _say(text: str) -> None:
    """Prints, also where nobody listens any more (``| head``): the page is still to be written."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
