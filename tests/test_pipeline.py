"""From prepared records to batches: decoding, canvases, resuming, sharding, bad data sets."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pipeline_fake import UNIFORM, assert_same, leaves, loader, map_tree, take
from tiles_fake import fake_record, write_dataset

from terrafm_jax import landcover
from terrafm_jax.data import canvas, decode, pipeline, tiles
from terrafm_jax.data.pipeline import iterate_split, make_loader, make_order
from terrafm_jax.data.sampling import SamplingSpec
from terrafm_jax.data.source import DataError, open_split
from terrafm_jax.sensors import SENSOR_KEYS, SENSORS


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """40 records in three sizes, every fifth without S1."""
    return [fake_record(i, (24, 24, 36, 48)[i % 4], SENSOR_KEYS if i % 5 else SENSOR_KEYS[1:]) for i in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, records: list[dict[str, Any]]) -> Path:
    return write_dataset(tmp_path_factory.mktemp("tiles"), records)


# --- decoding ---


def test_decoding_agrees_with_tfds(records: list[dict[str, Any]]) -> None:
    features = tiles.features()
    for record in records[:6]:
        data = features.serialize_example(record)
        ours, theirs = leaves(decode.decode_record(data)), leaves(features.deserialize_example_np(data))
        assert ours.keys() == theirs.keys()
        for path, value in theirs.items():
            found = ours[path].astype(value.dtype) if value.dtype.kind == "S" else ours[path]
            assert np.array_equal(found, value, equal_nan=value.dtype.kind == "f"), path


def test_plain_tfds_reads_the_data_set(folder: Path, records: list[dict[str, Any]]) -> None:
    import tensorflow_datasets as tfds

    source = tfds.builder_from_directory(str(folder)).as_data_source("train")
    assert len(source) == 40
    assert np.array_equal(source[7]["s2_l2a"]["20m"]["dn"], records[7]["s2_l2a"]["20m"]["dn"])


def test_decoding_reads_unpacked_numbers_and_negative_integers() -> None:
    # Hand-written wire format: {"n": int64_list(1: unpacked 3, 1: unpacked -1), "x": float_list(unpacked 1.5)}
    minus_one = b"\x08" + b"\xff" * 9 + b"\x01"
    ints = b"\x1a" + bytes([2 + len(minus_one)]) + b"\x08\x03" + minus_one
    floats = b"\x12\x05\x0d\x00\x00\xc0\x3f"

    def entry(name: bytes, feature: bytes) -> bytes:
        body = b"\x0a\x01" + name + b"\x12" + bytes([len(feature)]) + feature
        return b"\x0a" + bytes([len(body)]) + body

    body = entry(b"n", ints) + entry(b"x", floats)
    assert decode.parse_example(b"\x0a" + bytes([len(body)]) + body) == {"n": [3, -1], "x": [1.5]}


def test_damaged_bytes_are_a_decode_error_wherever_they_are_cut(records: list[dict[str, Any]]) -> None:
    data = tiles.features().serialize_example(records[0])
    for cut in (0, 1, 7, 100, len(data) // 2, len(data) - 1):
        with pytest.raises(decode.DecodeError):
            decode.decode_record(data[:cut])


def test_a_flipped_bit_anywhere_gives_a_record_or_a_decode_error() -> None:
    data = tiles.features().serialize_example(fake_record(0, 6, ("s2_l1c",)))
    refused = 0
    for at in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[at] ^= 1 << bit
            try:
                record = decode.decode_record(bytes(broken))
            except decode.DecodeError:
                refused += 1
            else:
                assert 0 <= record["landcover"] < landcover.NUM_CATEGORIES
    assert refused > len(data)  # most bits are names, sizes and shapes


def test_reading_imports_no_framework(folder: Path) -> None:
    code = (
        "import sys; from terrafm_jax.data import canvas, decode, reader, sampling, source\n"
        f"r = source.Records(source.open_split({str(folder)!r}, 'train'))\n"
        "decode.decode_record(r.read(3))\n"
        "print(sorted({'jax', 'tensorflow', 'torch', 'rasterio', 'tensorflow_datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- batches ---


def test_batch_holds_the_records_on_their_canvas(folder: Path, records: list[dict[str, Any]]) -> None:
    for batch in take(loader(folder, canvases=2), 12):
        for row, number in enumerate(batch["index"]):
            record = records[number]
            assert batch["landcover"][row] == record["landcover"]
            for column, key in enumerate(SENSOR_KEYS):
                assert batch["present"][row, column] == record[key]["present"]
                assert batch["offset"][row, column] == record[key]["offset"]
                for group in SENSORS[key].groups:
                    _check_group(batch[key][group], row, record, key, group)


def _check_group(target: dict[str, Any], row: int, record: dict[str, Any], key: str, group: str) -> None:
    dn, packed = target["dn"][row], target["valid"][row]
    if not record[key]["present"]:
        assert not dn.any()
        assert not packed.any()
        return
    source = record[key][group]
    rows, columns = target["extent"][row]
    assert (rows, columns) == source["dn"].shape[:2]
    assert np.array_equal(dn[:rows, :columns], source["dn"])
    assert not dn[rows:].any()
    assert not dn[:, columns:].any()
    valid = np.unpackbits(packed, axis=1).astype(bool)
    assert np.array_equal(valid[:rows, :columns], tiles.unpack_valid(source["valid"], columns))
    assert not valid[rows:].any()
    assert not valid[:, columns:].any()
    assert np.array_equal(target["geometry"][row], tiles.geometry(record, key, group))


def test_a_subset_of_sensors(folder: Path, records: list[dict[str, Any]]) -> None:
    batch = take(loader(folder, sensors=("s1", "s2_l2a")), 1)[0]
    assert "s2_l1c" not in batch
    assert batch["present"].shape == (8, 2)
    assert batch["present"][:, 1].all()
    only = loader(folder, sensors=("s1",))
    assert only.order.num_eligible == 32
    assert all(b["present"].all() for b in take(only, 5))


@pytest.mark.parametrize("echo", [1, 2])
def test_what_comes_is_announced_in_order(folder: Path, echo: int) -> None:
    batches = loader(folder, canvases=3, start_step=4, echo=echo)
    announced = [{k: (v.shape, v.dtype) for k, v in leaves(s).items()} for s in batches.coming(12)]
    found: list[dict] = []
    for _ in range(12):
        shapes = {k: (v.shape, v.dtype) for k, v in leaves(next(batches)).items()}
        found += [] if shapes in found else [shapes]
    assert found == announced
    assert len(found) > 1
    batches.close()


def test_starting_at_a_step_equals_going_there(folder: Path) -> None:
    through = take(loader(folder), 9)
    resumed = loader(folder, start_step=5)
    assert resumed.attempted == 40
    for first, second in zip(through[5:], take(resumed, 4), strict=True):
        assert_same(first, second)
    stopped = loader(folder, start_step=5, stop_step=7)
    assert len(list(stopped)) == 2


def test_echo_hands_out_the_same_tiles_several_times(folder: Path) -> None:
    plain = take(loader(folder), 4)
    echoed = loader(folder, echo=3, stop_step=11)
    first, second = next(echoed), next(echoed)
    assert first is second
    found = [first, second, *echoed]
    assert len(found) == 11
    assert echoed.attempted == 32
    for step, batch in enumerate(found):
        assert_same(batch, plain[step // 3])
    resumed = loader(folder, echo=3, start_step=5)
    assert_same(next(resumed), plain[1])
    assert_same(next(resumed), plain[2])
    resumed.close()


@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_the_global_batch(folder: Path, count: int) -> None:
    whole = take(loader(folder), 6)
    parts = [take(loader(folder, process=p, processes=count), 6) for p in range(count)]
    for step, batch in enumerate(whole):
        joined = {k: np.concatenate([leaves(p[step])[k] for p in parts]) for k in leaves(batch)}
        assert_same(batch, canvas.nested({k.lstrip("/"): v for k, v in joined.items()}))


def test_an_epoch_of_two_processes_omits_and_repeats_nothing(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, [fake_record(i, 12) for i in range(32)])
    seen = [b["index"] for p in range(2) for b in take(loader(data, process=p, processes=2), 4)]
    assert np.array_equal(np.sort(np.concatenate(seen)), np.arange(32))


def test_process_count_may_change_in_between(folder: Path) -> None:
    whole = [b["index"] for b in take(loader(folder), 8)]
    before = [take(loader(folder, process=p, processes=4, stop_step=4), 4) for p in range(4)]
    after = [take(loader(folder, start_step=4, process=p, processes=2), 4) for p in range(2)]
    for step in range(8):
        parts = before if step < 4 else after
        assert np.array_equal(np.concatenate([p[step % 4]["index"] for p in parts]), whole[step])


@pytest.mark.slow
def test_worker_processes_change_nothing(folder: Path) -> None:
    alone = take(loader(folder, workers=0), 6)
    for first, second in zip(alone, take(loader(folder, workers=2, threads=2), 6), strict=True):
        assert_same(first, second)


def test_threads_prefetch_and_cache_change_nothing(folder: Path) -> None:
    plain = take(loader(folder), 8)
    for options in ({"threads": 4}, {"prefetch": 0}, {"cache": "ram"}, {"cache": "ram", "threads": 2}):
        for first, second in zip(plain, take(loader(folder, **options), 8), strict=True):
            assert_same(first, second)


def test_a_batch_that_is_held_is_not_overwritten(folder: Path) -> None:
    batches = loader(folder, canvases=1)
    held = [next(batches) for _ in range(4)]
    copies = [map_tree(np.copy, b) for b in held]
    views = held[0]["s2_l2a"]["10m"]["dn"][3, 2:5]
    kept = views.copy()
    for _ in range(12):
        next(batches)
    for batch, copy in zip(held, copies, strict=True):
        assert_same(batch, copy)
    del held, batch
    for _ in range(12):
        next(batches)
    assert np.array_equal(views, kept)
    batches.close()


def test_memory_of_batches_is_used_again() -> None:
    slabs = canvas.Slabs(keep=2)
    address = slabs.take(1000).ctypes.data
    assert address % 64 == 0
    again = slabs.take(1000)
    assert again.ctypes.data == address
    assert slabs.take(1000).ctypes.data != address


def test_open_sea_is_not_thinned_twice(tmp_path: Path) -> None:
    sea = [fake_record(i, 12, category=landcover.SEA if i % 2 else 0) for i in range(16)]
    data = write_dataset(tmp_path, sea)
    paper = SamplingSpec("paper", sea_keep=0.25)
    assert make_order(data, "train", paper, batch_size=4, seed=0).epoch_size == 10
    (data / "summary.json").write_text(json.dumps({"left_out": {"open ocean": 392}}))
    order = make_order(data, "train", paper, batch_size=4, seed=0)
    assert order.epoch_size == 16
    before, after = order.natural_histogram(), order.expected_histogram()
    assert before[landcover.SEA] == pytest.approx(400 / 408), "a picture of both shows what preparation has thinned"
    assert after[landcover.SEA] == pytest.approx(0.5)
    assert "392 of open sea that preparation has left out already, so all of the rest is drawn" in order.describe()


# --- canvases ---


def test_layouts_merge_cheapest_first() -> None:
    sizes = [534, 530, 264, 224, 224]
    layouts = [{f"s2_l2a/{g}": (s * 10 // int(g[:-1]),) * 2 for g in SENSORS["s2_l2a"].groups} for s in sizes]
    layouts[4] |= {"s1/10m": (224, 224)}
    canvases, table = canvas.plan_canvases(layouts, [10, 10, 10, 10, 0], ("s2_l2a",), limit=2)
    assert table[0] == table[1] != table[2]
    assert table[2] == table[3] == table[4]
    assert canvases[table[3]].shapes["s2_l2a/10m"] == (264, 264)
    three, table = canvas.plan_canvases(layouts, [10, 10, 10, 10, 0], ("s2_l2a",), limit=3)
    assert len(three) == 3, "534 and 530 share one, padding costs too little to compile another"
    _, alone = canvas.plan_canvases(layouts, [10] * 5, ("s1",), limit=1)
    assert set(alone) == {0}


def test_canvas_of_many_layouts_stays_in_bounds() -> None:
    rng = np.random.default_rng(0)
    layouts = [{"s1/10m": tuple(int(v) for v in rng.integers(100, 600, 2))} for _ in range(60)]
    canvases, table = canvas.plan_canvases(layouts, rng.integers(1, 50, 60), ("s1",), limit=4)
    assert len(canvases) <= 4
    for layout, bucket in zip(layouts, table, strict=True):
        assert all(a <= b for a, b in zip(layout["s1/10m"], canvases[bucket].shapes["s1/10m"], strict=True))


# --- walking through a split ---


def test_a_walk_covers_every_record_once(folder: Path, records: list[dict[str, Any]]) -> None:
    for count in (1, 3):
        batches = [
            list(iterate_split(folder, "train", 4, canvases=2, process_index=p, process_count=count))
            for p in range(count)
        ]
        assert len({len(b) for b in batches}) == 1
        seen = np.concatenate([b["index"][b["mask"]] for part in batches for b in part])
        assert np.array_equal(np.sort(seen), np.arange(40))
        for batch in (b for part in batches for b in part):
            assert len(batch["index"]) == 4
            assert (batch["index"][~batch["mask"]] == -1).all()
            assert not batch["present"][~batch["mask"]].any()
    chosen = np.array([3, 9, 30])
    found = list(iterate_split(folder, "train", 2, records=chosen))
    assert np.array_equal(np.sort(np.concatenate([b["index"][b["mask"]] for b in found])), chosen)


# --- bad data sets ---


def test_faults_of_a_data_set_are_named(folder: Path, tmp_path: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    with pytest.raises(DataError, match=r"no dataset_info.json"):
        open_split(tmp_path, "train")
    with pytest.raises(DataError, match=r"no split 'holdout', found \['train'\]"):
        open_split(folder, "holdout")
    broken = copy("shards")
    for shard in sorted(broken.glob("*.array_record-*"))[1:3]:
        shard.unlink()
    with pytest.raises(DataError, match=r"lacks 2 of 5 shards.*00001.*00002"):
        open_split(broken, "train")
    broken = copy("index")
    np.save(broken / "index_train.npy", np.zeros(3, tiles.INDEX_DTYPE))
    with pytest.raises(DataError, match=r"3 rows.*promises 40 records"):
        loader(broken)
    (broken / "index_train.npy").unlink()
    with pytest.raises(DataError, match=r"index_train.npy is missing"):
        loader(broken)
    broken = copy("layouts")
    (broken / "layouts.json").write_text("[]")
    with pytest.raises(DataError, match=r"layouts.json lists 0"):
        loader(broken)
    nested = tmp_path / "nested"
    shutil.copytree(folder, nested / "tiles" / "1.0.0")
    assert len(open_split(nested, "train")) == 40


def test_faults_of_the_call_are_named(folder: Path) -> None:
    with pytest.raises(DataError, match=r"rows \[7, 8\] are not rows of a batch of 8"):
        loader(folder, rows=np.array([7, 8]))
    with pytest.raises(DataError, match=r"unknown \['s3'\]"):
        loader(folder, sensors=("s3",))
    with pytest.raises(DataError, match="echo = 0"):
        loader(folder, echo=0)
    with pytest.raises(DataError, match="cache = 'disk'"):
        loader(folder, cache="disk")
    order = make_order(folder, "train", UNIFORM, batch_size=8, seed=0)
    with pytest.raises(DataError, match="order was made for sensors"):
        make_loader(folder, "train", order, sensors=("s1",))
    with pytest.raises(DataError, match=r"statistics.json is missing"):
        pipeline.load_statistics(folder)
    assert len(pipeline.load_index(folder, "train")) == 40
