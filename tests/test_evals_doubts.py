"""Warnings about values that contradict their declaration: units, level's offset, eight-bit previews."""

from __future__ import annotations

import numpy as np
import pytest

from terrafm_jax.evals.datasets.base import Dataset, DatasetInfo, Input, Sample, Split
from terrafm_jax.evals.datasets.doubts import doubts
from terrafm_jax.evals.datasets.labels import S2_13
from terrafm_jax.sensors import SENSORS

BANDS = ("B02", "B03", "B04", "B08")
RNG = np.random.default_rng(0)
LAND = RNG.gamma(2.0, 700.0, (8, 8, 4)) + np.array([150, 120, 80, 60])  # DN, offset removed
L2A, TWELVE = SENSORS["s2_l2a"].band_names, np.tile(LAND, 3)
POWER = RNG.gamma(2.0, 0.05, (8, 8, 2)) * np.array([1.0, 0.25])  # VV, VH


def a_set(source: Input, image: np.ndarray, **sample) -> Dataset:
    info = DatasetInfo("mine", "classification", ("a", "b"), {source.sensor: source})
    read = lambda i: Sample(str(i), {source.sensor: image}, 0, **sample)  # noqa: E731
    return Dataset(info, {"train": Split(["0", "1"], read)})


def edged(image: np.ndarray, nodata: float) -> np.ndarray:
    """With a column of nodata."""
    return np.where(np.arange(8)[:, None] == 0, nodata, image)


def optical(image, bands=BANDS, sensor="s2_l2a", **fields) -> list[str]:
    sample = {"offset": fields.pop("own")} if "own" in fields else {}
    return doubts(a_set(Input(sensor, bands, **fields), image, **sample))


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (lambda: optical(LAND), None),
        (lambda: optical(LAND / 1e4, unit="reflectance"), None),
        (lambda: optical(LAND + 1000, offset=1000), None),
        (lambda: optical(LAND + 1000, own={"s2_l2a": 1000}), None),  # each image says its own
        (lambda: optical(LAND * 0), "nothing was measured in 2 of 2 images: 0, 1"),
        (lambda: optical(LAND / 1e4), "unit: reflectance"),
        (lambda: optical(LAND / 40), "eight-bit"),
        (lambda: optical(LAND, unit="reflectance"), "unit: DN"),
        (lambda: optical(LAND + 1000), "offset: 1000 inside"),
        (lambda: optical(LAND, offset=1000), "offset: 0"),
        (lambda: optical(TWELVE, L2A, "s2_l1c"), "12 bands without B10"),
        (lambda: optical(TWELVE, L2A, "s2_l1c", level="L1C"), None),
        (lambda: optical(TWELVE, L2A), None),
        (lambda: doubts(a_set(Input("s1", ("VV", "VH"), "dB"), 10 * np.log10(POWER))), None),
        (lambda: doubts(a_set(Input("s1", ("VV", "VH"), "Linear"), POWER)), None),
        (lambda: doubts(a_set(Input("s1", ("VV", "VH"), "dB"), POWER)), "unit: power"),
        (lambda: doubts(a_set(Input("s1", ("VV", "VH"), "power"), 900 * POWER)), "amplitude"),
        (lambda: doubts(a_set(Input("s1", ("VV", "VH"), "dB"), edged(10 * np.log10(POWER), 0))), "-a_nodata 0 FILE"),
        (lambda: doubts(a_set(Input("s1", ("VV", "VH"), "dB"), edged(10 * np.log10(POWER), -99))), "-99"),
        (lambda: optical(edged(LAND, -9999)), "pass it to gdal_edit.py -a_nodata -9999 FILE"),
        (lambda: doubts(a_set(Input("s1", ("VH", "VV"), "dB"), 10 * np.log10(POWER))), "are they exchanged?"),
    ],
)  # fmt: skip
def test_values_against_their_declaration(found, words):
    texts = found()
    assert len(texts) == (words is not None)
    assert words is None or words in texts[0]


@pytest.mark.parametrize(
    ("source", "usual", "odd", "words"),
    [
        (Input("s2_l2a", BANDS), LAND, LAND / 1e4, "look like reflectance"),
        (Input("s2_l2a", BANDS), LAND, np.where(LAND > 1500, -9999.0, LAND), "-9999 is no reflectance"),
        (Input("s2_l2a", BANDS, "reflectance"), LAND / 1e4, LAND, "look like DN"),
        (Input("s1", ("VV", "VH"), "dB"), 10 * np.log10(POWER), POWER / 3, "look like power; pass unit: power"),
        (Input("s2_l2a", BANDS), LAND, LAND + 1000, None),  # clouds, or an offset: one image does not tell
    ],
)
def test_a_few_images_in_another_unit(source, usual, odd, words):
    images = [odd if i in (3, 7) else usual for i in range(12)]
    info = DatasetInfo("mine", "classification", ("a", "b"), {source.sensor: source})
    read = lambda i: Sample(f"n{i}", {source.sensor: images[i]}, 0)  # noqa: E731
    texts = doubts(Dataset(info, {"train": Split([f"n{i}" for i in range(12)], read)}))
    if words is None:
        assert texts == []
        return
    (text,) = texts
    assert "2 of 12 images looked at are not like the others (n3, n7): " in text
    assert words in text


def test_cirrus_decides_for_level_1c():
    bright = LAND + 900  # a desert: no band is dark, B10 nevertheless is
    cirrus = RNG.uniform(5, 50, (8, 8, 1))
    bands = (*BANDS, "B10")
    assert optical(np.concatenate([bright, cirrus], -1), bands, "s2_l1c") == []
    (text,) = optical(np.concatenate([bright, cirrus + 1000], -1), bands, "s2_l1c")
    assert "B10" in text


def test_the_darkest_band_of_level_1c_is_cirrus():
    bands = (*BANDS, "B10", "B11")
    planes = np.concatenate([LAND, RNG.uniform(5, 50, (8, 8, 1)), RNG.uniform(800, 900, (8, 8, 1))], -1)
    assert optical(planes, bands, "s2_l1c") == []
    swapped = (*BANDS, "B11", "B10")
    (text,) = optical(planes, swapped, "s2_l1c")
    assert "band 6 is declared B10" in text
    assert "that of band 5 (B11)" in text
    assert "order" in optical(planes / 1e4, swapped, "s2_l1c", unit="reflectance")[0]


def test_the_real_images_are_what_they_are_declared_to_be(real_data, tmp_path):
    from terrafm_jax.evals.datasets import open_suite

    pytest.importorskip("rasterio")
    bands = "B01, B02, B03, B04, B05, B06, B07, B08, B09, B10, B11, B12, B8A"
    described = tmp_path / "eurosat.yaml"
    for offset, count in ((0, 0), (1000, 1)):
        inputs = f"s2_l1c: {{bands: [{bands}], unit: DN, offset: {offset}}}"
        described.write_text(f"root: {real_data / 'eval_labelled/eurosat_ms'}\ninputs:\n  {inputs}\n")
        (dataset,) = open_suite("folder", described)
        assert len(doubts(dataset)) == count
    inputs = f"s2_l1c: {{bands: [{', '.join(S2_13)}], unit: DN}}"  # ESA's order, which EuroSAT does not follow
    described.write_text(f"root: {real_data / 'eval_labelled/eurosat_ms'}\ninputs:\n  {inputs}\n")
    (text,) = doubts(*open_suite("folder", described))
    assert "that of band 10 (B09)" in text
