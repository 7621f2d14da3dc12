"""``Model.encode`` with everything users may hand it: units, offsets, bands, masks, sizes, precision, faults."""

from __future__ import annotations

import dataclasses
import logging

import jax
import numpy as np
import pytest
from weights_samples import TINY, images, sample

from terrafm_jax.inference import InputError, Model
from terrafm_jax.models import encode, patchify
from terrafm_jax.sensors import SENSORS, SensorError, normalize
from terrafm_jax.units import UnitError


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(sample())


@pytest.fixture(scope="module")
def plain() -> Model:
    spec = dataclasses.replace(TINY, fusion=False)
    return Model(sample(spec))


SMALL = (32, 32)


def close(a, b, atol: float = 1e-5) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol * max(1.0, float(np.abs(y).max())))


def test_encode_equals_the_network_on_normalised_patches(model):
    x = images((32, 48))
    patches = {
        k: patchify(normalize(v.astype(np.float32), *(a[None, None, None] for a in model.stats[k])), 16)
        for k, v in x.items()
    }
    wanted = jax.jit(encode, static_argnums=0, static_argnames="layers")(
        model.spec, model.backbone, patches, layers=(1, 3)
    )
    found = model.encode(**x, layers=(1, -1))
    assert found.cls.dtype == np.float32
    assert found.patches.shape == (2, 2, 3, 64)
    close(found, wanted)


def test_batches_are_split_over_devices_and_put_together_again(model):
    x = images(SMALL, batch=19)
    whole = model.encode(**x, batch_size=64)
    assert whole.cls.shape == (19, 64)
    close(model.encode(**x, batch_size=1), whole)
    close(model.encode(**{k: v[3:4] for k, v in x.items()}).cls, whole.cls[3:4])
    assert len(jax.local_devices()) == 8


def test_one_image_is_a_batch_of_one(model):
    x = images(SMALL, batch=1, sensors=("s1",))["s1"]
    close(model.encode(s1=x[0]), model.encode(s1=x))


def test_units_and_offset_reach_the_same_values(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    wanted = model.encode(**x)
    reflectance = (x["s2_l2a"] / 10_000.0).astype(np.float32)
    linear = (10.0 ** (x["s1"] / 10.0)).astype(np.float32)
    units = {"s2_l2a": "Reflectance", "s1": "linear"}
    close(model.encode(s2_l2a=reflectance, s1=linear, units=units), wanted, 1e-4)
    late = x["s2_l2a"] + np.uint16(1000)
    close(model.encode(s2_l2a=late, s1=x["s1"], offset=1000), wanted)
    close(model.encode(s2_l2a=late, s1=x["s1"], offset={"s2_l2a": [1000, 1000]}), wanted)
    assert np.abs(model.encode(s2_l2a=late, s1=x["s1"]).cls - wanted.cls).max() > 1e-3


def test_bands_by_name_in_any_order_slice_the_stem(model, caplog):
    x = images(SMALL, sensors=("s2_l2a",))["s2_l2a"]
    order = [3, 2, 1, 7]
    names = ["red", "B3", "blue", "B08"]
    with caplog.at_level(logging.INFO):
        found = model.encode(s2_l2a=x[..., order], bands={"s2_l2a": names})
        model.encode(s2_l2a=x[..., order], bands={"s2_l2a": names})
    assert [r.message for r in caplog.records if "stem sliced" in r.message] == [
        "s2_l2a: stem sliced to B04, B03, B02, B08; without B01, B05, B06, B07, B09, B11, B12, B8A"
    ]
    mean, std = model.stats["s2_l2a"]
    zeroed = normalize(x.astype(np.float32), mean, std)
    zeroed[..., [i for i in range(12) if i not in order]] = 0.0
    close(found, jax.jit(encode, static_argnums=0)(model.spec, model.backbone, {"s2_l2a": patchify(zeroed, 16)}))


def test_thirteen_l1c_bands_lose_b10_when_named(model):
    x = images(SMALL, sensors=("s2_l1c",))["s2_l1c"]
    names = [*SENSORS["s2_l1c"].band_names]
    names.insert(10, "B10")
    thirteen = np.insert(x, 10, 999, axis=-1)
    close(model.encode(s2_l1c=thirteen, bands={"s2_l1c": names}), model.encode(s2_l1c=x))
    with pytest.raises(InputError, match="13 bands without names"):
        model.encode(s2_l1c=thirteen)


def test_masked_pixels_do_not_matter(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    mask = np.zeros((2, *SMALL), bool)
    mask[:, 3:9, 20:] = True
    wanted = model.encode(**x, mask=mask)
    spoiled = {k: v.astype(np.float32) for k, v in x.items()}
    spoiled["s1"][mask] = -9999
    spoiled["s2_l2a"][mask] = 60_000
    close(model.encode(**spoiled, mask=mask), wanted)
    spoiled["s1"][mask] = np.nan
    spoiled["s2_l2a"][mask] = 0
    close(model.encode(**spoiled), wanted)
    close(model.encode(**spoiled, mask={"s1": mask}), wanted)
    assert np.abs(model.encode(**x).cls - wanted.cls).max() > 1e-4


def test_a_sensor_without_any_measurement_takes_no_part(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    x["s1"][1] = np.nan
    found = model.encode(**x)
    close(found.cls[1:], model.encode(s2_l2a=x["s2_l2a"][1:]).cls)
    nothing = {k: np.full(v.shape, np.nan, np.float32) for k, v in x.items()}
    assert np.isfinite(model.encode(**nothing).cls).all()


def test_any_size_continues_the_edge(model):
    x = images((35, 50), sensors=("s1",))["s1"]
    found = model.encode(s1=x)
    assert found.patches.shape == (2, 3, 4, 64)
    close(found, model.encode(s1=np.pad(x, ((0, 0), (0, 13), (0, 14), (0, 0)), mode="edge")))
    assert model.encode(s1=x[:, :16, :16]).patches.shape == (2, 1, 1, 64)


def test_bfloat16_is_close():
    loaded = sample()
    low = Model(dataclasses.replace(loaded, spec=dataclasses.replace(loaded.spec, dtype="bfloat16")))
    x = images(SMALL)
    a, b = low.encode(**x).cls, Model(loaded).encode(**x).cls
    assert a.dtype == np.float32
    assert ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min() > 0.999


def test_upstream_fault_is_selectable(plain):
    x = images(SMALL, sensors=("s2_l2a",))["s2_l2a"]
    right = plain.encode(s2_l2a=x)
    plain.upstream_l2a_stem = True
    wrong = plain.encode(s2_l2a=x)
    plain.upstream_l2a_stem = False
    patches = patchify(normalize(x.astype(np.float32), *plain.stats["s2_l2a"]), 16)
    close(wrong, jax.jit(encode, static_argnums=0)(plain.spec, plain.backbone, {"s2_l1c": patches}))
    assert np.abs(wrong.cls - right.cls).max() > 1e-3
    close(plain.encode(s2_l2a=x), right)


def test_values_that_cannot_be_what_they_are_called(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    s1, dn = x["s1"], x["s2_l2a"]
    cases = [
        ({"s2_l2a": dn / 10_000.0}, "look like reflectance.*units="),
        ({"s2_l2a": dn * 2.8e-4 / 2.8}, "look like reflectance"),
        ({"s2_l2a": dn.astype(np.float64) * 100}, "cannot be DN"),
        ({"s2_l2a": dn, "units": {"s2_l2a": "reflectance"}}, "cannot be reflectance.*look like DN"),
        ({"s2_l2a": dn, "units": {"s2_l2a": "dB"}}, "expected one of .*reflectance"),
        ({"s1": 10 ** (s1 / 10)}, "look like power"),
        ({"s1": s1, "units": {"s1": "power"}}, "cannot be power.*look like dB"),
        ({"s1": s1 - 9999}, "cannot be dB.*mask"),
    ]
    for arguments, message in cases:
        with pytest.raises(UnitError, match=message) as caught:
            model.encode(**arguments)
        assert "\n" not in str(caught.value)


def test_doubtful_values_pass_and_declared_units_win(model, caplog):
    dark = np.ones((1, *SMALL, 12), np.uint16)
    dark[..., :3, :3, :] = 2
    with caplog.at_level(logging.WARNING):
        model.encode(s2_l2a=dark)  # dark water, median 1
        assert not caplog.records
        model.encode(s2_l2a=dark * 0.7, units={"s2_l2a": "DN"})
        assert "declared DN but look like reflectance" in caplog.text
        model.encode(s2_l2a=dark * np.uint16(25_000))
        assert "very bright" in caplog.text
        model.encode(s1=np.full((1, *SMALL, 2), -99.0))
        assert "is nodata masked?" in caplog.text


def test_arguments_that_do_not_fit(model, plain):
    x = images(SMALL)
    mask = np.zeros((2, *SMALL), bool)
    cases = [
        (model, {}, "no sensor given"),
        (plain, x, "have no fusion"),
        (model, {**x, "s1": x["s1"][:, :16]}, r"differ in \[B, H, W\]"),
        (model, {"s1": x["s1"][:, :8]}, "at least 16"),
        (model, {"s1": x["s2_l2a"]}, "12 bands without names"),
        (model, {"s1": x["s1"], "mask": mask.astype(int)}, "expected bool"),
        (model, {"s1": x["s1"], "units": {"s2_l2a": "DN"}}, "names s2_l2a, which was not given"),
        (model, {"s1": x["s1"], "offset": {"s1": 3}}, "only Sentinel-2"),
        (model, {"s2_l2a": x["s2_l2a"], "offset": [1, 2, 3]}, r"a number or \[2\]"),
        (model, {"s1": x["s1"], "layers": (4,)}, "depth is 4"),
        (model, {"s1": x["s1"].astype(str)}, "integers or floats"),
        (model, {"s1": x["s1"], "bands": {"s1": ["VV"]}}, "2 bands but 1 names"),
    ]
    for which, arguments, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            which.encode(**arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(SensorError, match="unknown bands"):
        model.encode(s1=x["s1"], bands={"s1": ["VV", "HH"]})
    with pytest.raises(SensorError, match="given twice"):
        model.encode(s1=x["s1"], bands={"s1": ["VV", "vv"]})
    only_s1 = Model(sample(dataclasses.replace(TINY, sensors=("s1",))))
    with pytest.raises(InputError, match="no stem for s2_l2a"):
        only_s1.encode(s2_l2a=x["s2_l2a"])


def test_weights_hash_depends_on_the_backbone_alone():
    loaded = sample()
    assert Model(loaded).weights_hash == Model(sample(head=False)).weights_hash
    assert Model(loaded).weights_hash != Model(sample(seed=5)).weights_hash


def test_real_tiles_are_neither_refused_nor_misread(real_data):
    """Every stacked real tile, in the unit its manifest states, passes the checks and comes out unchanged."""
    import csv

    rasterio = pytest.importorskip("rasterio")
    from terrafm_jax.units import to_sensor_unit

    rows = list(csv.DictReader((real_data / "tile_index.csv").open()))
    seen = 0
    for row in rows:
        for column, key in (("S1", "s1"), ("S2L1C", "s2_l1c"), ("S2L2A", "s2_l2a")):
            if not row[column]:
                continue
            with rasterio.open(real_data / row[column]) as source:
                image = source.read().transpose(1, 2, 0)[None]
            ignore = ~np.isfinite(image).all(-1)
            if key == "s1":
                ignore |= (image <= -99).all(-1)
            found = to_sensor_unit(image, SENSORS[key], None, ignore)
            np.testing.assert_array_equal(found[~ignore], image.astype(np.float32)[~ignore], err_msg=row[column])
            seen += 1
    assert seen > 90
