"""``Model.encode`` with everything users may hand it: units, offsets, bands, masks, sizes, precision, faults."""

from __future__ import annotations

import dataclasses
import logging
import re

import jax
import numpy as np
import pytest
from weights_samples import TINY, images, sample

from terrafm_jax import checks
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


def test_encode_equals_the_network_on_normalized_patches(model):
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
    thirteen = np.insert(x, 10, 12, axis=-1)
    close(model.encode(s2_l1c=thirteen, bands={"s2_l1c": names}), model.encode(s2_l1c=x))
    with pytest.raises(InputError, match=r"13 bands without names; with B10 name them.*'B09', 'B10', 'B11'"):
        model.encode(s2_l1c=thirteen)
    with pytest.raises(InputError, match=r"count of Level-1C .*use s2_l1c"):
        model.encode(s2_l2a=thirteen)
    with pytest.raises(SensorError, match="B10 means Level-1C: use s2_l1c"):
        model.encode(s2_l2a=thirteen, bands={"s2_l2a": names})


def test_b10_tells_the_offset_of_l1c(model, caplog):
    x = images(SMALL, sensors=("s2_l1c",))["s2_l1c"]
    names = {"s2_l1c": [*SENSORS["s2_l1c"].band_names, "B10"]}
    late = np.concatenate([x + 1000, np.full((*x.shape[:3], 1), 1012)], -1).astype(np.uint16)
    with pytest.raises(UnitError, match=r"B10 stand at 1012 DN.*offset=\{'s2_l1c': 1000\}"):
        model.encode(s2_l1c=late, bands=names)
    close(model.encode(s2_l1c=late, bands=names, offset=1000), model.encode(s2_l1c=x))
    model.encode(s2_l1c=late, bands=names, offset=0)
    assert "taken as declared" in caplog.text
    early = np.concatenate([x, np.full((*x.shape[:3], 1), 12)], -1).astype(np.uint16)
    with pytest.raises(UnitError, match=r"B10 stand at 12 DN.*removed before"):
        model.encode(s2_l1c=early, bands=names, offset=1000)


def test_the_sign_of_the_offset_and_an_offset_that_is_not_there(model):
    x = images(SMALL, sensors=("s2_l2a",))["s2_l2a"]
    cases = [
        (-1000, InputError, "give offset={'s2_l2a': 1000}"),
        ({"s2_l2a": [1000, -1000]}, InputError, "give offset={'s2_l2a': 1000}"),
        (0.1, InputError, "is a reflectance"),
        (np.nan, InputError, "expected a number"),
        ("much", InputError, "expected DN"),
        (1000, UnitError, "was removed before or never inside; pass offset={'s2_l2a': 0}"),
        ([0, 1000], UnitError, "was removed before"),
    ]
    for offset, error, words in cases:
        with pytest.raises(error) as caught:
            model.encode(s2_l2a=x, offset=offset)
        assert words in str(caught.value)


def test_an_offset_left_inside_is_warned_of_once(model, caplog):
    x = images(SMALL, sensors=("s2_l2a",))["s2_l2a"] + np.uint16(950)
    model.encode(s2_l2a=x)
    model.encode(s2_l2a=x)
    assert caplog.text.count("still inside; if so, pass offset={'s2_l2a': 1000}") == 1
    caplog.clear()
    model.encode(s2_l2a=x, offset=0)
    assert not caplog.records


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


def test_images_without_any_measurement_have_no_vector(model, caplog):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    wanted = model.encode(**x)
    x["s1"][1], x["s2_l2a"][1] = np.nan, 0
    found = model.encode(**x)
    close(found.cls[0], wanted.cls[0])
    assert np.isnan(found.cls[1]).all()
    assert np.isnan(found.patches[1]).all()
    assert "1 of 2 images hold no measurement, they get NaN: [1]" in caplog.text
    for nothing in (
        {"s2_l2a": np.zeros((1, *SMALL, 12), np.uint16)},
        {"s2_l2a": np.full((1, *SMALL, 12), np.nan)},
        {"s2_l2a": np.zeros((1, *SMALL, 12)), "units": {"s2_l2a": "reflectance"}},
        {"s1": np.zeros((1, *SMALL, 2)), "units": {"s1": "power"}},
    ):
        with pytest.raises(InputError, match="no image holds a measurement"):
            model.encode(**nothing)


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
        ({"s2_l2a": dn / 100.0}, "look like percent"),
        ({"s2_l2a": dn / 100.0, "units": {"s2_l2a": "reflectance"}}, "look like percent"),
        ({"s2_l2a": (dn % 256).astype(np.uint8)}, "8-bit preview"),
        ({"s2_l2a": (dn - 3000.0) / 1700.0}, "look standardized"),
        ({"s2_l2a": np.where(dn > 3000, dn.astype(np.float32), -9999)}, "-9999 is no reflectance but nodata"),
        ({"s2_l2a": np.where(dn[..., :1] > 3000, dn.astype(np.int16), -1000)}, "-1000 in all bands, which is nodata"),
        (
            {"s2_l2a": np.where(dn[..., :1] > 3000, dn / 1e4, -0.1), "units": {"s2_l2a": "reflectance"}},
            "-0.1 in all bands, which is nodata",
        ),
        ({"s1": (s1 + 14) / 4}, "look standardized"),
        ({"s1": -s1.clip(None, -1)}, "lost their sign"),
        ({"s1": (10 ** (s1 / 20) * 2000).astype(np.uint16)}, "amplitude in DN"),
        ({"s1": 10 ** ((s1 + 4) / 20)}, "power.*or amplitude"),
        ({"s1": 10 ** (s1 / 20) * 2000, "units": {"s1": "power"}}, "amplitude in DN"),
        ({"s1": s1 * 0}, "nothing but zeros"),
        ({"s1": s1 * 0 - 99}, "no backscatter in dB; is nodata masked"),
        ({"s2_l2a": dn.astype(np.float64) * 100}, "cannot be DN"),
        ({"s2_l2a": dn, "units": {"s2_l2a": "reflectance"}}, "cannot be reflectance.*look like DN"),
        ({"s2_l2a": dn, "units": {"s2_l2a": "dB"}}, "expected one of .*reflectance"),
        ({"s1": 10 ** (s1 / 10)}, "look like power"),
        ({"s1": s1, "units": {"s1": "linear"}}, "cannot be power.*look like dB"),
        ({"s1": np.where(s1 < -25, -9999, s1)}, "cannot be dB.*mask"),
    ]
    for arguments, message in cases:
        with pytest.raises(UnitError, match=message) as caught:
            model.encode(**arguments)
        assert "\n" not in str(caught.value)


def test_all_images_of_a_batch_that_are_wrong_are_named_at_once(model):
    x = images(SMALL, batch=14, sensors=("s1", "s2_l2a"))
    dn, db = x["s2_l2a"].astype(np.float32), x["s1"].copy()
    bad = dn.copy()
    bad[[2, 5]] /= 10_000
    bad[3, :20] = -9999
    with pytest.raises(UnitError) as caught:
        model.encode(s2_l2a=bad)
    assert re.search(
        r"images 2, 5 of 14: .*look like reflectance.*; image 3 of 14: .*-9999 is no reflec", str(caught.value)
    )
    assert "encode them apart" in str(caught.value)
    db[1:13] = 10 ** (db[1:13] / 10)
    db[13] = -db[13].clip(None, -1)
    with pytest.raises(
        UnitError, match=r"images 1, 2, .* 10 and 2 more of 14: .*power.*; image 13 of 14: .*lost their sign"
    ):
        model.encode(s1=db)
    dn[4, 7, 7] = 1e6  # one pixel that no unit holds
    with pytest.raises(UnitError, match=r"image 4 of 14: .*cannot be DN"):
        model.encode(s2_l2a=dn)


def test_one_pixel_of_nodata_is_found_in_any_number_of_images(model):
    """It spoils its patch, but no sample of the pixels shows it."""
    for count, side in ((40, 96), (1, 320)):
        dn = np.full((count, side, side, 12), 1500, np.int16)
        dn += np.arange(side, dtype=np.int16)[:, None]
        dn[-1, 41, 43, 2] = -9999
        with pytest.raises(UnitError, match=rf"{'image 39 of 40: ' if count > 1 else ''}.*-9999 is no reflectance but"):
            model.encode(s2_l2a=dn)
        mask = np.zeros(dn.shape[:3], bool)
        mask[-1, 41, 43] = True
        assert np.isfinite(model.encode(s2_l2a=dn, mask=mask).cls).all()


def test_a_dark_image_among_others_is_not_refused(model):
    lakes = images(SMALL, batch=3, sensors=("s2_l2a",))["s2_l2a"] * 1.001  # resampled, so no whole numbers
    lakes[1] = 8 + 60 * (lakes[1] / lakes[1].max())
    close(jax.tree.map(lambda a: a[:2], model.encode(s2_l2a=lakes)), model.encode(s2_l2a=lakes[:2]))
    with pytest.raises(UnitError, match="look like percent"):
        model.encode(s2_l2a=lakes[1])


def test_masked_arrays_hide_their_pixels(model):
    x = images(SMALL, sensors=("s1",))["s1"]
    mask = np.zeros(x.shape[:3], bool)
    mask[:, :9] = True
    wanted = model.encode(s1=x, mask=mask)
    hidden = np.ma.masked_less(np.where(mask[..., None], -9999.0, x), -9000)
    for given in (hidden, list(hidden)):
        close(model.encode(s1=given), wanted)
    close(model.encode(s1=hidden[1]), jax.tree.map(lambda a: a[1:], wanted))


def test_doubtful_values_pass_and_declared_units_win(model, caplog):
    dark = np.ones((1, *SMALL, 12), np.uint16)
    dark[..., :3, :3, :] = 2
    with caplog.at_level(logging.WARNING):
        model.encode(s2_l2a=dark)  # dark water, median 1, or a preview in 16 bits
        assert "look like an 8-bit preview" in caplog.text
        model.encode(s2_l2a=dark * 0.7, units={"s2_l2a": "DN"})
        assert "look like reflectance, not DN" in caplog.text
        assert "taken as declared" in caplog.text
        model.encode(s2_l2a=dark * np.uint16(25_000))
        assert "very bright" in caplog.text
        model.encode(s1=np.full((1, *SMALL, 2), -99.0), units={"s1": "dB"})
        assert "is nodata masked?" in caplog.text


def test_units_have_one_vocabulary(model):
    x = images(SMALL, sensors=("s1", "s2_l2a"))
    wanted = model.encode(**x)
    for db, dn in (("db", "DN"), ("dB", "dn")):
        close(model.encode(**x, units={"s1": db, "s2_l2a": dn}), wanted)
    for word in ("power", "linear", "POWER"):
        close(model.encode(s1=10 ** (x["s1"] / 10), units={"s1": word}), model.encode(s1=x["s1"]), 1e-4)


def test_arguments_that_do_not_fit(model, plain):
    x = images(SMALL)
    mask = np.zeros((2, *SMALL), bool)
    cases = [
        (model, {}, "no sensor given"),
        (plain, x, "have no fusion"),
        (model, {**x, "s1": x["s1"][:, :16]}, r"differ in \[B, H, W\]"),
        (model, {"s1": x["s1"][:, :8]}, "at least 16"),
        (model, {"s1": np.moveaxis(x["s1"], -1, 1)}, r"bands come last: np.moveaxis\(images, -3, -1\)"),
        (model, {"s1": [x["s1"][0], x["s1"][1, :20]]}, "images of 2 shapes"),
        (model, {"s1": x["s1"], "mask": mask[0, 0]}, r"bool \(\d+,\); expected"),
        (model, {"s1": x["s2_l2a"]}, "12 bands without names"),
        (model, {"s1": x["s1"], "mask": mask.astype(int)}, "expected bool"),
        (model, {"s1": x["s1"], "units": {"s2_l2a": "DN"}}, "names s2_l2a, which was not given"),
        (model, {"s1": x["s1"], "offset": {"s1": 3}}, "only Sentinel-2"),
        (model, {"s2_l2a": x["s2_l2a"], "offset": [1, 2, 3]}, r"a number or \[2\]"),
        (model, {"s1": x["s1"], "layers": (4,)}, "depth is 4"),
        (model, {"s1": x["s1"].astype(str)}, "integers or floats"),
        (model, {"s1": x["s1"], "bands": {"s1": ["VV"]}}, "2 bands but 1 names"),
        (model, {"s1": x["s1"], "layers": "all"}, "numbers of blocks in a list"),
        (model, {"s1": x["s1"], "layers": 2}, "numbers of blocks in a list"),
        (model, {"s1": x["s1"], "layers": ["last"]}, "whole numbers of blocks"),
        (model, {"s2_l2a": x["s2_l2a"], "units": "reflectance"}, "expected a dict by sensor, such as units="),
        (model, {"s2_l2a": x["s2_l2a"], "bands": ["B02"]}, "expected a dict by sensor, such as bands="),
        (model, {"s2_l2a": x["s2_l2a"], "bands": {"s2_l2a": "B02"}}, "expected a list of names"),
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


NAMES = SENSORS["s2_l1c"].band_names
THIRTEEN = (*NAMES[:10], "B10", *NAMES[10:])
CIRRUS_LAST = (*NAMES[:8], "B09", "B10", "B11", "B12", "B8A")


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
            names = {12: NAMES, 13: CIRRUS_LAST if row["group"] == "eurosat_ms" else THIRTEEN, 2: ("VV", "VH")}
            ignore = ~np.isfinite(image).all(-1)
            if key == "s1":
                ignore |= (image <= -99).all(-1)
            offset = row[{"s2_l1c": "L1C_offset", "s2_l2a": "L2A_offset"}.get(key, "group")] == "1000"
            pixels = dict(zip(names[image.shape[-1]], image[~ignore].T, strict=True))
            said = checks.Declared("db" if key == "s1" else "dn", offset=1000.0 * offset)
            if not ignore.all():
                assert checks.values(key, pixels, said, cirrus=pixels.pop("B10", None)) == [], row[column]
            found = to_sensor_unit(image, SENSORS[key], None, ignore)
            np.testing.assert_array_equal(found[~ignore], image.astype(np.float32)[~ignore], err_msg=row[column])
            seen += 1
    assert seen > 90
