"""What every reader declares, draws and batches; suites that are there."""

from __future__ import annotations

import numpy as np
import pytest

from terrafm_jax.evals import datasets
from terrafm_jax.evals.datasets import labels
from terrafm_jax.evals.datasets.base import (
    Dataset,
    DatasetError,
    DatasetInfo,
    Input,
    Sample,
    Split,
    batches,
    by_image,
    canonical,
    collate,
    few_shot,
    held_out,
    label_fraction,
)

pytest.importorskip("rasterio")


def test_landsat_and_unknown_bands_are_refused():
    with pytest.raises(DatasetError, match="sensor 'landsat8' cannot be evaluated"):
        Input("landsat8", ("B1",))
    with pytest.raises(DatasetError, match=r"unknown bands \['B99'\], repeated bands \['B02'\]"):
        Input("s2_l2a", ("B02", "blue", "B99"))
    with pytest.raises(DatasetError, match=r"unit 'kelvin', expected one of \['DN', 'reflectance'\]"):
        Input("s2_l2a", ("B02",), "kelvin")
    with pytest.raises(DatasetError, match=r"geobench: refused \['m-forestnet \(Landsat 8\)'\]"):
        datasets.open_suite("geobench", ".", ["m-forestnet"])
    with pytest.raises(DatasetError, match="HLS mixes Landsat"):
        datasets.open_suite("geobench2", ".", ["burn_scars"])


def test_canonical_order_units_and_nodata():
    source = Input("s2_l1c", labels.EUROSAT_BANDS)
    image = np.broadcast_to(np.arange(1, 14, dtype=np.uint16) * 1000, (4, 4, 13)).copy()
    image[0, 0] = 0
    image[1, 1, 3] = 0  # dark in one band: valid
    out = canonical(source, image)
    assert np.isnan(out[0, 0]).all()
    assert out[1, 1, 3] == 0
    np.testing.assert_array_equal(out[2, 2], np.array([1, 2, 3, 4, 5, 6, 7, 8, 13, 9, 11, 12]) * 1000)
    assert source.missing == ()
    half = Input("s2_l2a", ("nir", "red"), "reflectance")
    out = canonical(half, np.full((2, 2, 2), 0.25))
    assert half.mask.sum() == 2
    assert out[0, 0, 7] == out[0, 0, 3] == 2500
    assert out[0, 0, 0] == 0
    radar = canonical(Input("s1", ("VH", "VV"), "linear"), np.array([[[0.01, 0.1], [0.0, 1.0]]]))
    np.testing.assert_allclose(radar[0, 0], [-10, -20], atol=1e-5)
    assert np.isnan(radar[0, 1]).all(), "a hole in one polarization is one in both, as in preparation"
    damaged = np.full((2, 2, 2), 0.25)
    damaged[0, 1, 0] = np.nan
    np.testing.assert_array_equal(np.isnan(canonical(half, damaged)).any(-1), [[False, True], [False, False]])
    assert np.isnan(canonical(half, damaged)[0, 1, [3, 7]]).all()
    with pytest.raises(DatasetError, match=r"expected \[H, W, 13\]"):
        canonical(source, np.zeros((4, 4, 12)))


def test_stratified_fractions_and_shots():
    y = np.repeat([0, 1, 2], [100, 40, 2])
    rows = label_fraction(y, 0.05, seed=1)
    np.testing.assert_array_equal(np.bincount(y[rows]), [5, 2, 1])
    assert not np.array_equal(rows, label_fraction(y, 0.05, seed=2))
    np.testing.assert_array_equal(rows, label_fraction(y, 0.05, seed=1))
    np.testing.assert_array_equal(np.bincount(y[few_shot(y, 5, 0)]), [5, 5, 2])
    assert len(label_fraction(np.zeros((50, 3), bool), 0.2, 0)) == 10
    with pytest.raises(DatasetError, match="label fraction 2"):
        label_fraction(y, 2, 0)


def test_what_is_held_out_leaves_every_class_to_learn_from():
    y = np.repeat([0, 1, 2], [50, 2, 1])
    rest, held = held_out(y, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([rest, held])), np.arange(53))
    np.testing.assert_array_equal(np.bincount(y[held], minlength=3), [10, 1, 0])
    for few in (np.arange(4), np.array([7]), np.zeros((1, 3), bool)):  # nothing to spare: chosen by what is learned
        for part in held_out(few, seed=0):
            np.testing.assert_array_equal(part, np.arange(len(few)))


def test_windows_are_told_by_their_image():
    ids = ["a/r0_c0", "b/r0c1", "a/r0_c64", "c.tif", "b/r1c0"]
    assert [rows.tolist() for rows in by_image(ids)] == [[0, 2], [1, 4], [3]]
    assert [rows.tolist() for rows in by_image(ids[:1] + ids[2:3])] == [[0], [1]], "one image has to be parted"


def test_batches_split_where_sizes_change():
    info = DatasetInfo("x", "classification", ("a", "b"), {"s1": Input("s1", ("VV", "VH"))})
    sizes = [8, 8, 8, 16, 16, 8]
    split = Split([str(i) for i in range(6)], lambda i: Sample(str(i), {"s1": np.ones((sizes[i], 8, 2))}, 0))
    assert [len(b) for b in batches(split, 2)] == [2, 1, 2, 1]
    with pytest.raises(DatasetError, match="differ in size"):
        collate(info, [split[0], split[3]], ["s1"])
    dataset = Dataset(info, {"train": split})
    assert dataset.fingerprint("train", ["s1"]) != Dataset(info, {"train": split.subset([1, 0])}).fingerprint(
        "train", ["s1"]
    )


def test_unknown_suites_and_options():
    with pytest.raises(DatasetError, match="suite 'imagenet', expected one of"):
        datasets.open_suite("imagenet", ".")
    with pytest.raises(DatasetError, match=r"options \['bands'\]"):
        datasets.open_suite("copernicus", ".", bands="corrected")
