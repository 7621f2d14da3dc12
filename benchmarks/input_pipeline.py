"""Reading speed: records to host batches, against a plain file read and a PyTorch loader of GeoTIFFs.

    python -m benchmarks.input_pipeline [--data DIR | --tiles N --side PX --compression uncompressed] [--seconds S]

Everything is measured on one core in one run, on files that are in the page cache; the last line is JSON.

* ``plain``: the shards read record by record into one small buffer (which stays in the CPU cache: an upper
  bound that no reader that keeps its data can reach), ``plain_fresh``: into new memory for every batch,
  ``plain_files``: whole shards by ``read_bytes``. None of them checks or decodes anything.
* ``loader``: our pipeline without workers and without prefetch: read, check, decode, lay out a batch.
* ``tfds_grain``: the same records through plain TFDS and Grain (no code of ours, no padding, no canvas).
* ``torch_rasterio``: a PyTorch DataLoader (``num_workers=0``) whose data set opens one GeoTIFF per sensor
  and resolution group with rasterio (deflate, as such collections come) and stacks arrays to tensors.
* ``threads`` and ``workers``: our pipeline with reading threads in one process, with worker processes;
  these use all cores, as they do when they feed a device.

The peers run before our loader, which changes the allocator of the process (``data.memory``).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import circumstances
from terrafm_jax import landcover
from terrafm_jax.data import decode, tiles
from terrafm_jax.data.pipeline import make_loader, make_order
from terrafm_jax.data.sampling import SamplingSpec
from terrafm_jax.data.source import Records, open_split
from terrafm_jax.sensors import SENSOR_KEYS, SENSORS


def smooth_tile(number: int, side: int) -> dict[str, Any]:
    """A record that compresses about as Sentinel data does: a smooth surface plus noise of 3 %."""
    rng = np.random.default_rng(number)
    record: dict[str, Any] = {"tile_id": str(number), "cell": str(number), "crs": "EPSG:32631", "lat": 0.0, "lon": 3.0}
    record |= {"landcover": number % landcover.NUM_CLASSES, "fractions": np.zeros(landcover.NUM_CATEGORIES, np.float32)}
    record["landcover_map"] = np.full((2, 2), landcover.UNKNOWN, np.uint8)
    texts = dict.fromkeys(("product", "kind", "time", "orbit", "offset_source", "cloud_source"), "")
    for key, sensor in SENSORS.items():
        entry: dict[str, Any] = {"present": True, "offset": 0.0, "nodata": 0.0, "cloud": 0.0, **texts}
        for group, names in sensor.groups.items():
            gsd = int(group[:-1])
            n = side * 10 // gsd
            coarse = rng.integers(500, 4000, (n // 16 + 2, n // 16 + 2, len(names)))
            surface = np.repeat(np.repeat(coarse, 16, 0), 16, 1)[:n, :n] + rng.normal(0, 60, (n, n, len(names)))
            entry[group] = {
                "dn": surface.astype(sensor.dtype),
                "valid": tiles.pack_valid(np.ones((n, n), bool)),
                "transform": np.array([gsd, 0, 500_000.0, 0, -gsd, 5_000_000.0]),
            }
        record[key] = entry
    return record


def write_records(folder: Path, count: int, side: int, compression: str) -> None:
    """A prepared data set with one ArrayRecord shard per 16 tiles, just complete enough to be read."""
    from array_record.python.array_record_module import ArrayRecordWriter

    features = tiles.features()
    features.save_config(str(folder))
    lengths = [min(16, count - i) for i in range(0, count, 16)]
    for shard, length in enumerate(lengths):
        name = f"bench-train.array_record-{shard:05d}-of-{len(lengths):05d}"
        writer = ArrayRecordWriter(str(folder / name), f"group_size:1,{compression}")
        for i in range(length):
            writer.write(features.serialize_example(smooth_tile(shard * 16 + i, side)))
        writer.close()
    index = np.zeros(count, tiles.INDEX_DTYPE)
    index["present"] = (1 << len(SENSOR_KEYS)) - 1
    np.save(folder / "index_train.npy", index)
    layout = {f"{k}/{g}": [side * 10 // int(g[:-1])] * 2 for k, s in SENSORS.items() for g in s.groups}
    (folder / "layouts.json").write_text(json.dumps([layout]))
    split = {"name": "train", "shardLengths": [str(n) for n in lengths], "numBytes": "0"}
    split["filepathTemplate"] = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    info = {"fileFormat": "array_record", "name": "bench", "version": "1.0.0", "splits": [split]}
    (folder / "dataset_info.json").write_text(json.dumps(info))


def write_geotiffs(data: Path, folder: Path, count: int) -> list[list[Path]]:
    """The records as GeoTIFFs, one per sensor and group; returns the files of every tile."""
    import rasterio
    from rasterio.transform import Affine

    records, out = Records(open_split(data, "train")), []
    for number in range(count):
        record, files = decode.decode_record(records.read(number)), []
        for key, sensor in SENSORS.items():
            for group in sensor.groups if record[key]["present"] else ():
                dn = record[key][group]["dn"]
                path = folder / f"{number}_{key}_{group}.tif"
                options = {"driver": "GTiff", "compress": "deflate", "predictor": 2, "crs": record["crs"]}
                options["transform"] = Affine(*record[key][group]["transform"])
                rows, columns, bands = dn.shape
                with rasterio.open(
                    path, "w", height=rows, width=columns, count=bands, dtype=dn.dtype.name, **options
                ) as file:
                    file.write(np.moveaxis(dn, -1, 0))
                files.append(path)
        out.append(files)
    return out


def rate(step: Callable[[], tuple[int, int]], seconds: float) -> dict[str, float]:
    """Calls ``step`` (returns tiles, bytes) for about ``seconds`` after one warm-up round."""
    step()
    count = size = 0
    began, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() - began < seconds:
        n, b = step()
        count, size = count + n, size + b
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    return {
        "tiles_per_second": count / wall,
        "gigabytes_per_second": size / wall / 1e9,
        "tiles_per_core_second": count / cpu,
        "core_share": cpu / wall,
    }


def plain(data: Path, batch: int, fresh: bool) -> Callable[[], tuple[int, int]]:
    """Reads the stored bytes of whole shards in pieces of one record; no checksum, no decoding."""
    split = open_split(data, "train")
    files = [data / f for f in split.files]
    piece = sum(f.stat().st_size for f in files) // len(split)
    numbers = _cycle(len(split))
    handles = [os.open(f, os.O_RDONLY) for f in files]
    buffer, sizes = bytearray(piece), [f.stat().st_size for f in files]

    def step() -> tuple[int, int]:
        kept = []
        for _ in range(batch):
            shard, position = divmod(next(numbers) * len(files), len(split))
            target = np.empty(piece, np.uint8) if fresh else buffer
            os.preadv(handles[shard], [target], min(position * piece // len(files), sizes[shard] - piece))
            kept.append(target)
        return batch, batch * piece

    return step


def plain_files(data: Path) -> Callable[[], tuple[int, int]]:
    """Reads whole shards, one after the other."""
    split = open_split(data, "train")
    shards = _cycle(len(split.files))

    def step() -> tuple[int, int]:
        shard = next(shards)
        return split.lengths[shard], len((data / split.files[shard]).read_bytes())

    return step


def _cycle(n: int) -> Iterator[int]:
    while True:
        yield from range(n)


def ours(data: Path, batch: int, **options: Any) -> tuple[Callable[[], tuple[int, int]], Any]:
    order = make_order(data, "train", SamplingSpec("uniform"), batch_size=batch, seed=0)
    loader = make_loader(data, "train", order, **options)

    def step() -> tuple[int, int]:
        arrays = next(loader)
        return batch, sum(g["dn"].nbytes + g["valid"].nbytes for k in SENSOR_KEYS for g in arrays[k].values())

    return step, loader


def tfds_grain(data: Path, batch: int) -> Callable[[], tuple[int, int]]:
    import grain
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(data)).as_data_source("train")
    walk = iter(
        grain.MapDataset.source(source).shuffle(0).repeat().batch(batch).to_iter_dataset(grain.ReadOptions(0, 0))
    )

    def step() -> tuple[int, int]:
        arrays = next(walk)
        groups = [arrays[k][g] for k, s in SENSORS.items() for g in s.groups]
        return batch, sum(g["dn"].nbytes + g["valid"].nbytes for g in groups)

    return step


def torch_rasterio(files: list[list[Path]], batch: int) -> Callable[[], tuple[int, int]]:
    import rasterio
    import torch

    class Tiles(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, i: int) -> list[torch.Tensor]:
            out = []
            for path in files[i]:
                with rasterio.open(path) as file:
                    out.append(torch.from_numpy(file.read()))
            return out

    loader = torch.utils.data.DataLoader(Tiles(), batch, shuffle=True, num_workers=0, drop_last=True)
    walk: Iterator[Any] = iter(())

    def step() -> tuple[int, int]:
        nonlocal walk
        arrays = next(walk, None)
        if arrays is None:
            walk = iter(loader)
            arrays = next(walk)
        return batch, sum(a.numel() * a.element_size() for a in arrays)

    return step


def memory_over_time(data: Path, batch: int, steps: int) -> list[float]:
    """Resident memory in MB after each quarter of ``steps`` batches."""
    step, loader = ours(data, batch, prefetch=2)
    found = []
    for i in range(steps):
        step()
        if (i + 1) % (steps // 4) == 0:
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            found.append(pages * resource.getpagesize() / 1e6)
    loader.close()
    return found


def measure(data: Path, scratch: Path, args: argparse.Namespace) -> dict[str, Any]:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[:1])
    result: dict[str, Any] = {
        "plain": rate(plain(data, args.batch, fresh=False), args.seconds),
        "plain_fresh": rate(plain(data, args.batch, fresh=True), args.seconds),
    }
    result["plain_files"] = rate(plain_files(data), args.seconds)
    result["tfds_grain"] = rate(tfds_grain(data, args.batch), args.seconds)
    count = min(len(open_split(data, "train")), args.geotiffs)
    result["torch_rasterio"] = rate(torch_rasterio(write_geotiffs(data, scratch, count), args.batch), args.seconds)
    step, loader = ours(data, args.batch, prefetch=0)
    result["loader"] = rate(step, args.seconds)
    loader.close()
    os.sched_setaffinity(0, cores)
    for kind in ("threads", "workers"):
        step, loader = ours(data, args.batch, **{kind: args.workers})
        result[kind] = {kind: args.workers, **rate(step, args.seconds)}
        loader.close()
    result["resident_megabytes"] = memory_over_time(data, args.batch, args.memory_steps)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="", help="prepared data set; default: one is written for the occasion")
    parser.add_argument("--tiles", type=int, default=48)
    parser.add_argument("--side", type=int, default=534, help="pixels at 10 m, a multiple of 6")
    parser.add_argument(
        "--compression", default="uncompressed", help="of the ArrayRecord, as data_prep writes it; zstd:1, brotli:1"
    )
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=6.0, help="per measurement")
    parser.add_argument("--geotiffs", type=int, default=16, help="tiles written as GeoTIFF")
    parser.add_argument("--workers", type=int, default=2, help="threads, then processes")
    parser.add_argument("--memory-steps", type=int, default=80)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="terrafm_bench_") as scratch:
        data = Path(args.data or Path(scratch) / "data")
        if not args.data:
            data.mkdir()
            write_records(data, args.tiles, args.side, args.compression)
        split = open_split(data, "train")
        stored = sum((Path(split.directory) / f).stat().st_size for f in split.files)
        result = measure(Path(split.directory), Path(scratch), args)
    ours_, tile = result["loader"], stored / len(split)
    result |= {
        "records": len(split),
        "stored_bytes_per_record": tile,
        "compression": args.compression if not args.data else "as prepared",
    }
    # Shares are of tiles, not bytes: then both sides handle the same stored bytes. They are per second of this core's
    # processor time, so that other load on the machine does not count; `_wall` includes waiting.
    for unit, ending in (("tiles_per_core_second", ""), ("tiles_per_second", "_wall")):
        for other in ("plain", "plain_fresh", "plain_files"):
            result[f"share_of_{other}{ending}"] = ours_[unit] / result[other][unit]
        for other in ("tfds_grain", "torch_rasterio"):
            result[f"times_{other}{ending}"] = ours_[unit] / result[other][unit]
    packages = ("numpy", "rasterio", "array_record", "grain", "tensorflow-datasets", "torch")
    print(json.dumps(circumstances("benchmarks.input_pipeline", *packages) | result))


if __name__ == "__main__":
    main()
