"""Prepared data sets of random pixels for tests and benchmarks, written through TFDS itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from terrafm_jax import landcover
from terrafm_jax.data import tiles
from terrafm_jax.sensors import SENSOR_KEYS, SENSORS

WEST, NORTH = 500_000.0, 5_000_000.0


def fake_record(
    number: int, side: int = 24, sensors: Sequence[str] = SENSOR_KEYS, category: int | None = None
) -> dict[str, Any]:
    """A record of side x side 10 m pixels (a multiple of 6) whose content follows from ``number``."""
    rng = np.random.default_rng(number)
    category = int(rng.integers(0, landcover.NUM_CLASSES)) if category is None else category
    record: dict[str, Any] = {
        "tile_id": f"cell{number // 4}/r0_c{number % 4}",
        "cell": f"cell{number // 4}",
        "crs": "EPSG:32631",
        "lat": float(rng.uniform(-60, 60)),
        "lon": 3.0,
        "landcover": category,
        "fractions": np.eye(landcover.NUM_CATEGORIES, dtype=np.float32)[category],
        "landcover_map": np.full((2, 2), landcover.UNKNOWN, np.uint8),
    }
    for key, sensor in SENSORS.items():
        present = key in sensors
        entry: dict[str, Any] = {
            "present": present,
            "product": f"{key}-{number}",
            "kind": "RTC gamma0" if key == "s1" else key[3:].upper(),
            "time": "2021-06-01T10:00:00Z",
            "orbit": "ascending" if key == "s1" else "",
            "offset": 1000.0 if key == "s2_l2a" and number % 2 else 0.0,
            "offset_source": "product id",
            "nodata": 0.0,
            "cloud": float("nan"),
            "cloud_source": "",
        }
        for group, names in sensor.groups.items():
            gsd = int(group[:-1])
            n = side * 10 // gsd if present else 2
            dn = rng.integers(1, 9000, (n, n, len(names))) if present else np.zeros((n, n, len(names)))
            valid = rng.random((n, n)) < 0.9 if present else np.zeros((n, n), bool)
            entry[group] = {
                "dn": dn.astype(sensor.dtype),
                "valid": tiles.pack_valid(valid),
                "transform": np.array([gsd, 0, WEST, 0, -gsd, NORTH]) if present else np.zeros(6),
            }
        record[key] = entry
    return record


def write_dataset(
    folder: Path,
    records: Sequence[dict[str, Any]],
    *,
    split: str = "train",
    per_shard: int = 8,
    options: str = "group_size:1",
) -> Path:
    """Writes records as a TFDS data set with index and layouts, the way data_prep does; one split."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    features = tiles.features()
    shards = [records[i : i + per_shard] for i in range(0, len(records), per_shard)]
    size = 0
    for i, shard in enumerate(shards):
        writer = ArrayRecordWriter(str(folder / f"fake-{split}.array_record-{i:05d}-of-{len(shards):05d}"), options)
        for record in shard:
            data = features.serialize_example(record)
            size += len(data)
            writer.write(data)
        writer.close()
    info = tfds.core.SplitInfo(
        name=split,
        shard_lengths=[len(s) for s in shards],
        num_bytes=size,
        filename_template=tfds.core.ShardedFileTemplate(
            data_dir=folder, dataset_name="fake", split=split, filetype_suffix="array_record"
        ),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=[info], check_data=False, version="1.0.0"
    )
    _write_index(folder, split, records)
    return folder


def _write_index(folder: Path, split: str, records: Sequence[dict[str, Any]]) -> None:
    layouts: list[dict[str, list[int]]] = []
    index = np.zeros(len(records), tiles.INDEX_DTYPE)
    for row, record in zip(index, records, strict=True):
        shapes = {
            f"{k}/{g}": list(record[k][g]["dn"].shape[:2])
            for k, s in SENSORS.items()
            for g in s.groups
            if record[k]["present"]
        }
        if shapes not in layouts:
            layouts.append(shapes)
        row["landcover"], row["layout"] = record["landcover"], layouts.index(shapes)
        row["present"] = sum(1 << i for i, k in enumerate(SENSOR_KEYS) if record[k]["present"])
        row["sea"] = record["landcover"] == landcover.SEA
        row["lat"], row["lon"] = record["lat"], record["lon"]
    np.save(folder / f"index_{split}.npy", index)
    (folder / "layouts.json").write_text(json.dumps(layouts))
