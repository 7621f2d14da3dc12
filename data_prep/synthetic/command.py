"""Synthetic Sentinel cells in the layout of Major-TOM Core, with WorldCover maps and ground truth.

    python -m data_prep.synthetic --out DIR --cells 600 --heldout 130 --cell-size 240 --seed 0

Writes::

    DIR/Core-S2L2A/{metadata.parquet,images/part_00000.parquet}   likewise Core-S2L1C, Core-S1RTC
    DIR/worldcover/ESA_WorldCover_10m_2021_v200_*_Map.tif         the real 3-degree lattice, sparse
    DIR/truth.parquet                                             what is true of every cell
    DIR/splits.csv                                                grid_cell,split

Cells go through ``data_prep.majortom`` like downloaded ones; there is no shortcut to records.
The pixels are licensed like the code; nothing in them is a measurement.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.raster import first_line
from data_prep.synthetic import writer
from data_prep.synthetic.cell import render
from data_prep.synthetic.geography import CellPlan
from data_prep.synthetic.plan import plan_cells


def encode(plan: CellPlan, cloudy: float, wedges: float) -> dict[str, Any]:
    """Renders one cell and encodes all of its files; runs in a worker process."""
    cell = render(plan, cloudy, wedges)
    return {
        "rows": {key: (writer.image_row(cell, key), writer.metadata_row(cell, key)) for key in cell.products},
        "truth": writer.truth_row(cell),
        "patches": writer.worldcover_patches(cell),
    }


def _encoded(plans: list[CellPlan], workers: int, job: Any) -> Iterator[dict[str, Any]]:
    """Encoded cells in the order of the plans, whatever the number of workers."""
    if workers <= 1:
        yield from map(job, plans)
        return
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        yield from pool.imap(job, plans, chunksize=2)


def generate(
    out: Path, plans: list[CellPlan], *, workers: int = 1, cloudy: float = 0.12, wedges: float = 0.06,
    rows_per_part: int = 500, progress: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Writes the planned cells to ``out`` and returns a summary. Files do not depend on ``workers``."""
    out.mkdir(parents=True, exist_ok=True)
    collections = {key: writer.Collection(out, key, rows_per_part) for key in writer.FOLDERS}
    last_use = {block: plan.index for plan in plans for block in writer.blocks_of(plan)}
    pending: dict[tuple[int, int], list[writer.Patch]] = {}
    truths, files, started = [], 0, time.monotonic()
    job = partial(encode, cloudy=cloudy, wedges=wedges)
    shown = tqdm(_encoded(plans, workers, job), total=len(plans), unit="cell", disable=not progress)
    for plan, made in zip(plans, shown, strict=True):
        for key, (image, metadata) in made["rows"].items():
            for _ in range(2 if plan.defect == "duplicate" else 1):
                collections[key].add(image, metadata)
        truths.append(made["truth"])
        for patch in made["patches"]:
            pending.setdefault(patch.block, []).append(patch)
        for block in [b for b in pending if last_use.get(b, plan.index) <= plan.index]:
            writer.write_worldcover(out / "worldcover", pending.pop(block))
            files += 1
    for patches in pending.values():
        writer.write_worldcover(out / "worldcover", patches)
        files += 1
    for collection in collections.values():
        collection.finish()
    writer.write_truth(out, truths)
    seconds = time.monotonic() - started
    return {
        "cells": len(plans),
        "worldcover_files": files,
        "seconds": round(seconds, 1),
        "cells_per_second": round(len(plans) / max(seconds, 1e-9), 2),
    }


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m data_prep.synthetic", description=__doc__.split("\n")[0])
    result.add_argument("--out", type=Path, required=True, help="folder to write (must be empty or absent)")
    result.add_argument("--cells", type=int, required=True, help="training cells")
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--cell-size", type=int, default=1068, help="pixels of 10 m, a multiple of 12")
    result.add_argument("--classes", choices=("longtail", "balanced"), default="longtail", help="of the training cells")
    result.add_argument("--heldout", type=int, default=0, help="additional class-balanced cells, split holdout")
    result.add_argument("--validation", type=int, default=0, help="additional class-balanced cells, split validation")
    result.add_argument("--cloudy", type=float, default=0.12, help="share of Sentinel-2 overpasses with clouds")
    result.add_argument("--wedges", type=float, default=0.06, help="share of products with a nodata wedge")
    result.add_argument("--missing", type=float, default=0.08, help="share of training cells that lack a sensor")
    result.add_argument("--defects", type=float, default=0.0, help="share of training cells with a planted defect")
    result.add_argument("--rows-per-part", type=int, default=500)
    result.add_argument("--workers", type=int, default=1, help="processes")
    return result


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """What the command line says; ends with an error that names every wrong value."""
    args = parser().parse_args(argv)
    faults = [f"--{n} {getattr(args, n)}: expected 0..1" for n in ("cloudy", "wedges", "missing", "defects")
              if not 0 <= getattr(args, n) <= 1]  # fmt: skip
    if args.cell_size % 12 or args.cell_size < 24:
        faults.append(f"--cell-size {args.cell_size}: expected a multiple of 12, at least 24")
    for name in ("cells", "rows_per_part", "workers"):
        if getattr(args, name) < 1:
            faults.append(f"--{name.replace('_', '-')} {getattr(args, name)}: expected at least 1")
    for name in ("heldout", "validation", "seed"):
        if getattr(args, name) < 0:
            faults.append(f"--{name} {getattr(args, name)}: expected 0 or more")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        faults.append(f"--out {args.out}: expected an empty or absent folder")
    if faults:
        parser().error("; ".join(faults))
    return args


def main(argv: list[str] | None = None) -> int:
    """Entry point; prints a JSON summary as its last line. Returns 1 where files cannot be written, 130 on Ctrl-C."""
    args = parse(argv)
    plans = plan_cells(
        seed=args.seed, size=args.cell_size, cells=args.cells, validation=args.validation, heldout=args.heldout,
        classes=args.classes, missing=args.missing, defects=args.defects,
    )  # fmt: skip
    try:
        summary = generate(
            args.out, plans, workers=args.workers, cloudy=args.cloudy, wedges=args.wedges,
            rows_per_part=args.rows_per_part, progress=sys.stderr.isatty(),
        )  # fmt: skip
    except OSError as error:
        print(f"data_prep.synthetic: {args.out}: {first_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"data_prep.synthetic: stopped; {args.out} is incomplete, delete it", file=sys.stderr)
        return 130
    print(json.dumps(summary))
    return 0
