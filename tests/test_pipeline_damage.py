"""Damaged shards and records: found where they are, replaced, reported; too many of them end the run."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from pipeline_fake import UNIFORM, assert_same, loader, take
from tiles_fake import fake_record, write_dataset

from terrafm_jax.data import decode, source
from terrafm_jax.data.pipeline import iterate_split, make_order
from terrafm_jax.data.reader import Reader, TooManySkipped
from terrafm_jax.data.source import DataError, RecordError, Records, open_split
from terrafm_jax.sensors import SensorError, Statistics


def _overwrite(shard: Path, share: float, count: int = 64) -> None:
    data = bytearray(shard.read_bytes())
    at = int(len(data) * share)
    data[at : at + count] = bytes(b ^ 0xA5 for b in data[at : at + count])
    shard.write_bytes(data)


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """32 equal records in 4 shards; record 12 is overwritten, shard 3 (records 24-31) cut off."""
    data = write_dataset(
        tmp_path / "data", [fake_record(i, 24) for i in range(32)], options="group_size:1,uncompressed"
    )
    shards = sorted(data.glob("*.array_record-*"))
    _overwrite(shards[1], 0.31)  # a shard is padded to a multiple of 64 KiB; the records end at 55 %
    shards[3].write_bytes(shards[3].read_bytes()[:-20_000])
    return data


def _bad(data: Path) -> set[int]:
    records = Records(open_split(data, "train"))
    bad = set()
    for number in range(32):
        try:
            decode.decode_record(records.read(number))
        except (RecordError, decode.DecodeError):
            bad.add(number)
    return bad


def test_damage_is_found_where_it_is(damaged: Path) -> None:
    bad = _bad(damaged)
    assert bad == {12, *range(24, 32)}
    with pytest.raises(RecordError, match=r"record 12 .*00001-of-00004, position 4\).*hash mismatch"):
        Records(open_split(damaged, "train")).read(12)
    with pytest.raises(RecordError, match=r"record 27 \(fake-train.array_record-00003-of-00004, position 3\)"):
        Records(open_split(damaged, "train")).read(27)


def _away_and_back(shard: Path, meanwhile: Callable[[], None]) -> None:
    hidden = shard.rename(shard.with_name("away"))
    meanwhile()
    hidden.rename(shard)


@pytest.mark.parametrize("cache", ["none", "ram"])
def test_a_shard_that_was_away_is_read_again_later(cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data", [fake_record(i, 24) for i in range(4)])
    (shard, *_) = sorted(data.glob("*.array_record-*"))
    now, opened = [1000.0], []
    monkeypatch.setattr(source.time, "monotonic", lambda: now[0])
    plain = Records._open
    monkeypatch.setattr(Records, "_open", lambda self, number: opened.append(number) or plain(self, number))
    reader = Reader(open_split(data, "train"), ("s2_l2a",), [], cache=cache)
    _away_and_back(shard, lambda: [reader.fetch(0) for _ in range(3)])
    assert isinstance(reader.fetch(0), RecordError)
    assert opened == [0], "it is not opened for every record"
    now[0] += source.TRY_AGAIN
    assert not isinstance(reader.fetch(0), RecordError)
    assert opened == [0, 0]


def test_a_shard_that_fails_once_open_is_opened_anew(tmp_path: Path) -> None:
    class Stale:
        def read(self, positions: list[int]) -> list[bytes]:
            raise OSError(errno.ESTALE, "Stale file handle")

    data = write_dataset(tmp_path / "data", [fake_record(i, 24) for i in range(4)])
    records = Records(open_split(data, "train"))
    records._readers[0] = Stale()
    with pytest.raises(RecordError, match="Stale file handle"):
        records.read(0)
    decode.decode_record(records.read(0))


def test_damaged_records_are_replaced_from_the_same_slice(damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = _bad(damaged)
    clean = make_order(damaged, "train", UNIFORM, batch_size=8, seed=0)
    logging.getLogger("absl").propagate = True
    with caplog.at_level(logging.WARNING):
        batches = [loader(damaged, process=p, processes=2, max_skipped=1.0) for p in range(2)]
        found = [take(b, 8) for b in batches]
    for p in range(2):
        for step in range(8):
            slots = clean.batch(step)[p * 4 : p * 4 + 4]
            index = found[p][step]["index"]
            good = [n for n in slots if n not in bad]
            assert len(index) == 4
            assert not set(index) & bad
            for slot, number in zip(slots, index, strict=True):
                assert number == slot or (slot in bad and number in (good or index))
    assert sum(sum(b.skipped.values()) for b in batches) == 2 * len(bad), "every record comes twice in two epochs"
    assert "fake-train.array_record-00003-of-00004" in batches[0].skipped
    assert "skipped record 27 (fake-train.array_record-00003-of-00004, position 3)" in caplog.text
    again = take(loader(damaged, process=1, processes=2, max_skipped=1.0), 8)
    for first, second in zip(found[1], again, strict=True):
        assert_same(first, second)


def test_a_slice_without_a_good_record_takes_from_the_next_batches(damaged: Path) -> None:
    bad = _bad(damaged)
    order = make_order(damaged, "train", UNIFORM, batch_size=4, seed=0)
    for batch, step in zip(take(loader(damaged, 4, process=2, processes=4, max_skipped=1), 8), range(8), strict=True):
        wanted = [order.batch(s)[2] for s in range(step, step + 20)]
        assert batch["index"][0] == next(n for n in wanted if n not in bad)


def test_too_much_damage_ends_the_run(damaged: Path) -> None:
    batches = loader(damaged, max_skipped=0.1, stop_step=8)
    with pytest.raises(TooManySkipped, match=r"data.max_skipped = 0.1 allows; .* record \d+ \(.*array_record-0000"):
        list(batches)
    batches.close()
    tolerant = loader(damaged, max_skipped=0.5, skipped={"earlier": 40}, stop_step=8)
    with pytest.raises(TooManySkipped, match=r"[45][0-9] of"):
        list(tolerant)
    tolerant.close()
    assert tolerant.skipped["earlier"] == 40


def test_nothing_readable_at_all(damaged: Path) -> None:
    for shard in damaged.glob("*.array_record-*"):
        shard.write_bytes(b"no record here" * 100)
    batches = loader(damaged, max_skipped=1.0)
    with pytest.raises(TooManySkipped, match="no readable record"):
        next(batches)
    batches.close()


def _read_small_files(data: Path) -> None:
    split = open_split(data, "train")
    split.index()
    split.layouts()


@pytest.mark.parametrize("name", ["dataset_info.json", "layouts.json", "index_train.npy"])
def test_a_damaged_small_file_is_one_error_that_names_it(tmp_path: Path, name: str) -> None:
    """Cut off anywhere, or with a byte that is no text: never an error of a parser."""
    data = write_dataset(tmp_path, [fake_record(i, 24) for i in range(8)])
    whole = (data / name).read_bytes()
    cuts = [whole[:end] for end in range(0, len(whole) - 2, 7)]
    for broken in (*cuts, b"[7]", b'{"splits": 3}', whole[:50] + b"\xff" + whole[51:]):
        (data / name).write_bytes(broken)
        with pytest.raises(DataError, match=name):
            _read_small_files(data)


def test_an_index_with_unknown_land_cover_is_refused(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, [fake_record(i, 24) for i in range(8)])
    index = np.load(data / "index_train.npy")
    index["landcover"][3] = 99
    np.save(data / "index_train.npy", index)
    with pytest.raises(DataError, match=r"index_train.npy: land cover 99"):
        open_split(data, "train").index()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "damaged"),
        ('{"sensors": {"s1": {"bands": ["VV", "VH"], "mean": [-11, -18]}}}', "damaged .*'std'"),
        ('{"sensors": {"s1": {"bands": ["VV", "VH"], "mean": [-11], "std": [4]}}}', "1 means and 1 stds, expected 2"),
        ('{"sensors": {"s1": {"bands": ["VV", "VH"], "mean": [-11, -18], "std": [4, 0]}}}', "above zero"),
    ],
)
def test_damaged_statistics_name_their_file(text: str, message: str) -> None:
    with pytest.raises(SensorError, match=f"statistics here.json: .*{message}"):
        Statistics.from_json(text, "here.json")


def test_a_record_larger_than_its_layout_is_reported(tmp_path: Path) -> None:
    data = write_dataset(tmp_path, [fake_record(i, 24) for i in range(16)])
    layouts = [
        {k: [2, 2] if k == "s1/10m" else v for k, v in layout.items()}
        for layout in json.loads((data / "layouts.json").read_text())
    ]
    (data / "layouts.json").write_text(json.dumps(layouts))
    batches = loader(data, max_skipped=0.1)
    with pytest.raises(TooManySkipped, match=r"no readable record.*s1/10m is 24x24"):
        next(batches)
    batches.close()


def test_a_walk_masks_damaged_records(damaged: Path) -> None:
    bad = _bad(damaged)
    batches = list(iterate_split(damaged, "train", 5, max_skipped=1.0))
    seen = np.concatenate([b["index"][b["mask"]] for b in batches])
    assert set(seen) == set(range(32)) - bad
