"""Records are the messages that TFDS would write, and TFDS and our reader both read them."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.encode import encode_record
from terrafm_jax import landcover
from terrafm_jax.data.decode import decode_record
from terrafm_jax.data.tiles import features, pack_valid, unpack_valid
from terrafm_jax.sensors import SENSORS


def random_record(seed: int, present: tuple[bool, ...]) -> dict:
    """A record with arrays of odd sizes, empty and non-ASCII text, NaN and large numbers."""
    rng = np.random.default_rng(seed)
    record = {
        "tile_id": "Zürich/r0_c534", "cell": "" if seed else "x" * 300, "crs": "EPSG:32632",
        "lat": -12.25, "lon": 179.5, "landcover": int(rng.integers(0, 13)),
        "fractions": rng.random(landcover.NUM_CATEGORIES).astype(np.float32),
        "landcover_map": rng.integers(0, 13, (54, 37), np.uint8),
    }  # fmt: skip
    for (key, sensor), there in zip(SENSORS.items(), present, strict=True):
        texts = {n: f"{n} {seed}" for n in ("product", "kind", "time", "orbit", "offset_source", "cloud_source")}
        entry = {"present": there, "offset": 1000.0, "nodata": 0.25, "cloud": float("nan"), **texts, "orbit": ""}
        for group, bands in sensor.groups.items():
            h, w = (54 * 10 // int(group[:-1]), 37) if there else (2, 2)
            dn = rng.integers(0, 30_000, (h, w, len(bands))).astype(sensor.dtype)
            valid = rng.random((h, w)) < 0.7
            entry[group] = {"dn": dn, "valid": pack_valid(valid), "transform": rng.normal(0, 1e6, 6)}
        record[key] = entry
    return record


@pytest.mark.parametrize("present", [(True, True, True), (False, True, False), (True, False, False)])
def test_message_equals_that_of_tfds(present: tuple[bool, ...]):
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    schema = features()
    serializer = ExampleSerializer(schema.get_serialized_info())
    for seed in range(2):
        record = random_record(seed, present)
        example = serializer.get_tf_example(schema.encode_example(record))
        data = encode_record(record)
        assert len(data) == example.ByteSize(), "only the order of the fields may differ"
        assert type(example).FromString(data) == example


@pytest.mark.parametrize("width", [8, 37, 534])
def test_valid_is_packed_bit_by_bit(width: int):
    valid = np.ones((5, width), bool)
    for _ in range(2):  # without and with a hole
        packed = pack_valid(valid)
        assert packed.dtype == np.uint8
        assert (packed == np.packbits(valid, axis=1)).all()
        assert (unpack_valid(packed, width) == valid).all()
        valid[2, -1] = False


def test_what_is_written_is_read():
    record = random_record(0, (True, True, False))
    data = encode_record(record)
    for found in (decode_record(data), features().deserialize_example_np(data)):
        for key, sensor in SENSORS.items():
            assert bool(found[key]["present"]) == record[key]["present"]
            for group in sensor.groups:
                for name in ("dn", "valid", "transform"):
                    assert (np.asarray(found[key][group][name]) == record[key][group][name]).all()
        assert np.isnan(found["s1"]["cloud"])
