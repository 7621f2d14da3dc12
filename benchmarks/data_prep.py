"""Speed of data preparation against what rasterio alone needs to decode the same bytes.

    python -m benchmarks.data_prep                       # makes a few full-size synthetic cells first
    python -m benchmarks.data_prep --source DIR --worldcover DIR/worldcover --cells 8 --repeat 3

Prints a table and, as the last line, JSON: seconds of decoding and of preparation per cell (wall and CPU
time of one process), their ratio, MB/s, cells an hour and core, projected core-hours for Major-TOM Core,
and size and speed of each shard compression. Both sides read the same parquet rows; they alternate, and
the median counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from array_record.python import array_record_module
from rasterio.io import MemoryFile

from benchmarks.timing import circumstances
from data_prep import majortom, parquet
from data_prep.cell import Options, prepare
from data_prep.chunks import Job, Unit, write_chunk
from data_prep.encode import encode_record
from data_prep.majortom import FOLDERS, MajorTom, Row
from data_prep.worldcover import WorldCover
from terrafm_jax.sensors import SENSORS

MAJOR_TOM_CELLS = 2_245_886  # rows of Core-S2L2A
COMPRESSIONS = ("uncompressed", "snappy", "zstd:1", "zstd:3", "zstd:6", "brotli:1", "transpose,zstd:1")


def synthetic_source(folder: Path, cells: int, size: int) -> Path:
    """Cells of the real size from the generator."""
    call = [sys.executable, "-m", "data_prep.synthetic", "--out", str(folder), "--cells", str(cells)]
    subprocess.run([*call, "--cell-size", str(size), "--seed", "0", "--missing", "0"], check=True, stdout=sys.stderr)
    return folder


def image_bytes(source: MajorTom, unit: Unit) -> list[memoryview]:
    """The GeoTIFFs that a unit consists of, as the parquet rows hold them."""
    found = []
    for key, row in unit.where.items():
        found += [v for v in _row(source, key, row).values() if isinstance(v, memoryview)]
    return found


def _row(source: MajorTom, key: str, row: Row) -> dict[str, Any]:
    sensor = SENSORS[key]
    names = [b.name.lower() if key == "s1" else b.name for b in (*sensor.bands, *sensor.dropped)]
    url = f"{source.source}/{FOLDERS[key]}/images/{row.file}"
    return parquet.read_row(url, row.row, [*names, *(["cloud_mask"] if key == "s2_l2a" else [])])


def decode_all(source: MajorTom, units: Sequence[Unit]) -> int:
    """Reads the rows and decodes every GeoTIFF with rasterio, nothing else; returns compressed bytes."""
    total = 0
    for unit in units:
        for data in image_bytes(source, unit):
            total += len(data)
            with MemoryFile(data) as memory, memory.open() as image:
                image.read(1)
    return total


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """(wall, CPU) seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(job: Job, units: Sequence[Unit], repeat: int) -> dict[str, float]:
    """Times decoding and preparation in turns; returns medians per cell."""
    source = job.source
    times: dict[str, list[tuple[float, float]]] = {"decode": [], "prepare": []}
    size = decode_all(source, units)  # warms caches and imports
    write_chunk(job, 0, units, (), lambda key: None)
    for turn in range(1, repeat + 1):
        for path in job.work.iterdir():  # else the page cache grows with every turn, unlike in a long job
            path.unlink()
        times["decode"].append(timed(lambda: decode_all(source, units)))
        times["prepare"].append(timed(lambda turn=turn: write_chunk(job, turn, units, (), lambda key: None)))
    result: dict[str, float] = {"megabytes_per_cell": size / len(units) / 1e6}
    for name, found in times.items():
        for kind, which in (("wall", 0), ("cpu", 1)):
            result[f"{name}_{kind}_seconds_per_cell"] = statistics.median(x[which] for x in found) / len(units)
    for kind in ("wall", "cpu"):
        result[f"ratio_{kind}"] = result[f"prepare_{kind}_seconds_per_cell"] / result[f"decode_{kind}_seconds_per_cell"]
    seconds = result["prepare_cpu_seconds_per_cell"]
    result["megabytes_per_second_per_core"] = result["megabytes_per_cell"] / seconds
    result["cells_per_hour_per_core"] = 3600 / seconds
    result["major_tom_core_hours"] = MAJOR_TOM_CELLS * seconds / 3600
    return result


def compressions(job: Job, units: Sequence[Unit], folder: Path) -> list[dict[str, Any]]:
    """Size, writing and reading time per tile of every shard compression, on the same records."""
    records = [
        encode_record(t.record()) for u in units for t in prepare(job.source.read(u), job.cover, job.options).tiles
    ]
    raw = sum(map(len, records))
    table = []
    for option in COMPRESSIONS:
        path = folder / f"{option.replace(':', '').replace(',', '_')}.array_record"

        def write(path: Path = path, option: str = option) -> None:
            writer = array_record_module.ArrayRecordWriter(str(path), f"group_size:1,{option}")
            for record in records:
                writer.write(record)
            writer.close()

        def read(path: Path = path) -> None:
            reader = array_record_module.ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
            for i in range(len(records)):
                reader.read([i])
            reader.close()

        writing, reading = (min(timed(work) for _ in range(3)) for work in (write, read))
        table.append(
            {
                "compression": option,
                "ratio": raw / path.stat().st_size,
                "write_cpu_ms_per_tile": 1e3 * writing[1] / len(records),
                "read_cpu_ms_per_tile": 1e3 * reading[1] / len(records),
                "read_wall_ms_per_tile": 1e3 * reading[0] / len(records),
            }
        )
    return table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser("benchmarks.data_prep", description=__doc__.split("\n")[0])
    parser.add_argument("--source", type=Path, default=None, help="Major-TOM folder (default: synthetic cells)")
    parser.add_argument("--worldcover", type=Path, default=None)
    parser.add_argument("--cells", type=int, default=3)
    parser.add_argument("--cell-size", type=int, default=1068, help="of the synthetic cells")
    parser.add_argument("--tile-size", type=int, default=534)
    parser.add_argument("--cells-per-shard", type=int, default=8, help="the cells are taken in turn")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        root = args.source or synthetic_source(Path(folder) / "source", args.cells, args.cell_size)
        source = MajorTom(str(root))
        joined, _ = majortom.join({key: source.rows(key) for key in FOLDERS}, [])
        units = [Unit(next(iter(u.values())).cell, i, u, split="train") for i, u in enumerate(joined[: args.cells])]
        shard = (units * args.cells_per_shard)[: args.cells_per_shard]
        cover = WorldCover.open(args.worldcover or root / "worldcover")
        job = Job(source, cover, Options(args.tile_size, args.tile_size, sea_keep=1.0), folder)
        job.work.mkdir()
        result: dict[str, Any] = speed(job, shard, args.repeat)
        result["compression"] = compressions(job, units, Path(folder))
    for name, value in result.items():
        if name != "compression":
            print(f"{name:<40}{value:>14.3f}")
    for row in result["compression"]:
        print("  ".join(f"{k} {v if isinstance(v, str) else round(v, 2)}" for k, v in row.items()))
    print(json.dumps(circumstances("benchmarks.data_prep", "numpy", "rasterio", "pyarrow", "array_record") | result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
