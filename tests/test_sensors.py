"""The table of sensors: the released weights' bands, order and statistics; every family of names in use."""

from __future__ import annotations

import numpy as np
import pytest

from terrafm_jax.sensors import S1, S2_L1C, S2_L2A, SENSORS, Sensor, SensorError, Statistics, band_name, sensor

ESA = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
ESA_13 = (*ESA[:10], "B10", *ESA[10:])

# mean, std of the first author's port of the released weights, in the order of the bands
PUBLISHED = {
    "s1": ("-12.7572 -19.6423", "5.8491 5.8516"),
    "s2_l1c": (
        "2153.94 1937.191 1885.8236 1906.7263 2096.8369 2692.8083 3015.8569 2930.3957 3243.99 1389.849 2915.8289 "
        "2186.0514",
        "581.6321 619.9756 714.7784 1018.3657 1021.4312 1116.4055 1265.8559 1234.6123 1374.9582 608.362 1547.9093 "
        "1336.0316",
    ),
    "s2_l2a": (
        "1033.9414 1135.3391 1382.2553 1526.9789 1883.3911 2516.2726 2782.7811 2829.3833 2977.2936 3004.2905 "
        "2832.1983 2186.6507",
        "2761.4226 807.365 919.6919 1221.4198 1265.8146 1323.0764 1428.7845 1459.0343 1497.9797 1577.071 1738.6128 "
        "1620.8854",
    ),
}

# Names in ESA's order of 13 bands, as the packages write them.
FAMILIES = {
    "torchgeo": ESA_13,
    "torchgeo, unpadded": ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B8", "B8A", "B9", "B10", "B11", "B12"),
    "TerraTorch": ("COASTAL_AEROSOL", "BLUE", "GREEN", "RED", "RED_EDGE_1", "RED_EDGE_2", "RED_EDGE_3", "NIR_BROAD",
                   "NIR_NARROW", "WATER_VAPOR", "CIRRUS", "SWIR_1", "SWIR_2"),
    "torchgeo-bench": ("coastal_aerosol", "blue", "green", "red", "red_edge_1", "red_edge_2", "red_edge_3", "nir",
                       "red_edge_4", "water_vapour", "swir_cirrus", "swir_1", "swir_2"),
    "torchgeo-bench, source": ("01 - Coastal aerosol", "02 - Blue", "03 - Green", "04 - Red",
                               "05 - Vegetation Red Edge", "06 - Vegetation Red Edge", "07 - Vegetation Red Edge",
                               "08 - NIR", "08A - Vegetation Red Edge", "09 - Water vapour", "10 - SWIR - Cirrus",
                               "11 - SWIR", "12 - SWIR"),
    "STAC": ("coastal", "blue", "green", "red", "rededge071", "rededge075", "rededge078", "nir", "nir08", "nir09",
             "cirrus", "swir16", "swir22"),
    "STAC, Earth Search": ("coastal", "blue", "green", "red", "rededge1", "rededge2", "rededge3", "nir", "nir08",
                           "nir09", "cirrus", "swir16", "swir22"),
}  # fmt: skip


@pytest.mark.parametrize("key", SENSORS)
def test_statistics_are_the_published_ones(key: str) -> None:
    mean, std = (tuple(map(float, text.split())) for text in PUBLISHED[key])
    assert (SENSORS[key].mean, SENSORS[key].std) == (mean, std)
    for found, expected in zip(Statistics.published()[key], (mean, std), strict=True):
        np.testing.assert_array_equal(found, np.float32(expected))


def test_bands_stand_in_the_order_of_the_released_weights() -> None:
    assert S1.band_names == ("VV", "VH")
    assert S2_L1C.band_names == S2_L2A.band_names == ESA
    assert [b.name for b in S2_L1C.dropped] == ["B10"]
    assert not S1.dropped
    assert not S2_L2A.dropped


@pytest.mark.parametrize("family", FAMILIES)
def test_bands_are_known_by_the_names_of(family: str) -> None:
    names = FAMILIES[family]
    assert tuple(map(band_name, names)) == ESA_13
    seen = tuple(n for n, esa in zip(names, ESA_13, strict=True) if esa != "B10")
    for s in (S2_L1C, S2_L2A):
        assert s.canonical(seen) == ESA
    with pytest.raises(SensorError, match=f"unknown bands .*{names[10]}"):  # cirrus: known, and not seen by the model
        S2_L1C.canonical(names)


@pytest.mark.parametrize("names", [("VV", "VH"), ("vv", "vh")], ids=["torchgeo, TerraTorch", "torchgeo-bench, STAC"])
def test_polarizations_are_known_by_their_names(names: tuple[str, str]) -> None:
    assert S1.canonical(names) == ("VV", "VH")


@pytest.mark.parametrize(
    ("names", "meant"),
    [
        # ours, TerraTorch's, the collections of Planetary Computer, Earth Search and Copernicus Data Space
        (("s1", "S1RTC", "S1GRD", "sentinel-1", "sentinel-1-rtc", "sentinel-1-grd", "SENTINEL-1-RTC"), S1),
        (("s2_l1c", "S2L1C", "sentinel-2-l1c"), S2_L1C),
        (("s2_l2a", "S2L2A", "sentinel-2-l2a", "sentinel-2-c1-l2a"), S2_L2A),
    ],
    ids=["s1", "s2_l1c", "s2_l2a"],
)
def test_sensors_are_known_by_their_names(names: tuple[str, ...], meant: Sensor) -> None:
    assert [sensor(name) for name in names] == [meant] * len(names)


def test_no_name_means_two_bands() -> None:
    for s in SENSORS.values():
        names = [n for b in (*s.bands, *s.dropped) for n in {b.name.lower(), *b.aliases}]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", ["", "bands", "stackstac-0f3a", "B13", "THERMAL_INFRARED_1", "SCL"])
def test_other_names_are_none(name: str) -> None:
    assert band_name(name) is None
