"""The record schema of prepared tiles, and the batch that training makes of them.

A prepared data set is a TFDS data set (ArrayRecord shards, ``features.json``, ``dataset_info.json``;
``tfds.builder_from_directory(DIR).as_data_source("train")`` reads it) with a few small files beside
the shards:

* ``statistics.json``: per sensor and band mean, std, ... (``sensors.Statistics.from_json`` reads it)
* ``index_{split}.npy``: one :data:`INDEX_DTYPE` row per record, in the order of the data source
* ``layouts.json``: the distinct array shapes of the records, ``index["layout"]`` points into it

Pixels are stored as delivered: DN with the processing-baseline offset still in, S1 as hundredths of
dB, every band at the ground sampling the source holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from terrafm_jax import landcover
from terrafm_jax.sensors import SENSORS

SPLITS = ("train", "validation", "holdout")

# One row per record; what sampling, splits and canvas buckets need without touching the records.
INDEX_DTYPE = np.dtype(
    [
        ("landcover", "u1"),  # majority category, index into landcover.CATEGORIES
        ("layout", "u1"),  # row of layouts.json
        ("present", "u1"),  # bit i set: sensor i of SENSOR_KEYS is in the record
        ("sea", "?"),  # at least 99 % sea: thinned by the paper-like sampling
        ("lat", "f4"),  # degrees of the tile center
        ("lon", "f4"),
        ("nodata", "f4"),  # largest nodata share of the sensors present, 0..1
    ]
)


def features() -> Any:
    """The TFDS FeaturesDict of a record (imports tensorflow-datasets, not TensorFlow).

    Tensors are ``encoding="bytes"``. A sensor that is absent holds 2x2 zero placeholders and
    ``present`` = False, because TFDS has no optional features (2x2, since tfds 4.9.10 cannot decode
    a tensor that has fewer bytes than axes: ``valid`` and ``landcover_map`` of 1x1 would not come back).

    Per sensor and resolution group (``10m``, ``20m``, ``60m``):
      dn: ``[H, W, bands of the group]`` as delivered (``Sensor.dtype``).
      valid: ``[H, ceil(W / 8)]`` uint8, one bit a pixel (np.packbits along W, big-endian), 1 = measured.
        A pixel is nodata only if *all* bands of the sensor are, so zero in a few bands stays valid.
      transform: float64 [6], the affine (a, b, c, d, e, f) of the snapped grid in ``crs``.
    """
    import tensorflow_datasets as tfds

    def tensor(shape: tuple[int | None, ...], dtype: str) -> Any:
        return tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes")

    def scalar(dtype: str) -> Any:
        return tfds.features.Scalar(dtype=np.dtype(dtype))

    schema: dict[str, Any] = {
        "tile_id": tfds.features.Text(),  # "199U_1099R/r0_c534"
        "cell": tfds.features.Text(),
        "crs": tfds.features.Text(),  # "EPSG:32648"
        "lat": scalar("float64"),
        "lon": scalar("float64"),
        "landcover": scalar("int64"),
        "fractions": tensor((landcover.NUM_CATEGORIES,), "float32"),
        # Land-cover map on the finest grid: category indices; 2x2 UNKNOWN when not kept.
        "landcover_map": tensor((None, None), "uint8"),
    }
    for key, s in SENSORS.items():
        entry: dict[str, Any] = {
            "present": scalar("bool"),
            "product": tfds.features.Text(),
            "kind": tfds.features.Text(),  # "L2A", "L1C", "RTC gamma0", "GRD sigma0"
            "time": tfds.features.Text(),  # ISO 8601, UTC
            "orbit": tfds.features.Text(),  # "ascending", "descending", ""
            "offset": scalar("float32"),  # DN still inside the stored values
            "offset_source": tfds.features.Text(),  # "product id", "pixels", ...
            "nodata": scalar("float32"),
            "cloud": scalar("float32"),  # 0..1, NaN unknown
            "cloud_source": tfds.features.Text(),
        }
        for group, names in s.groups.items():
            entry[group] = {
                "dn": tensor((None, None, len(names)), s.dtype),
                "valid": tensor((None, None), "uint8"),
                "transform": tensor((6,), "float64"),
            }
        schema[key] = entry
    return tfds.features.FeaturesDict(schema)


def pack_valid(valid: np.ndarray) -> np.ndarray:
    """bool [H, W] -> uint8 [H, ceil(W / 8)]."""
    valid = np.asarray(valid, bool)
    if not valid.all():
        return np.packbits(valid, axis=1)
    packed = np.full((valid.shape[0], -(-valid.shape[1] // 8)), 0xFF, np.uint8)  # the usual case, three times as fast
    if valid.shape[1] % 8:
        packed[:, -1] = 0xFF << (8 - valid.shape[1] % 8) & 0xFF
    return packed


def unpack_valid(packed: np.ndarray, width: int) -> np.ndarray:
    """uint8 [H, ceil(W / 8)] -> bool [H, W]."""
    return np.unpackbits(packed, axis=1, count=width).astype(bool)


# --- the batch --------------------------------------------------------------------------------
#
# A batch is a plain dict of arrays with a leading batch axis B (the same shapes in every process):
#
#   index      int32   [B]      position of the record in the split
#   landcover  int32   [B]      majority category
#   present    bool    [B, S]   which of the S configured sensors the record has, in the order of SENSOR_KEYS
#   offset     float32 [B, S]   DN to subtract
#   <sensor>/<group>, for every configured sensor (absent ones are zero canvases):
#     dn        uint16 | int16 [B, H, W, bands]   zero-padded to the canvas of the batch's bucket
#     valid     uint8   [B, H, ceil(W / 8)]
#     geometry  float32 [B, 4]   (y0, sy, x0, sx): the point (u, v) in [0, 1]^2 of the tile's ground
#                                extent (u down, v right) lies at row y0 + sy * u and column
#                                x0 + sx * v of the stored array, in pixel-edge coordinates (the
#                                center of row i is at i + 0.5)
#     extent    int32   [B, 2]   rows and columns of the canvas that hold the record
#
# For example batch["s2_l2a"]["20m"]["dn"]. The ground extent of a tile is that of the finest group of
# the first present sensor among s2_l2a, s2_l1c, s1.

EXTENT_ORDER = ("s2_l2a", "s2_l1c", "s1")


def extent_affine(record: dict[str, Any]) -> tuple[np.ndarray, tuple[int, int]]:
    """Affine [6] and (rows, columns) of the array that defines the ground extent of a record."""
    for key in EXTENT_ORDER:
        if record[key]["present"]:
            group = record[key][next(iter(SENSORS[key].groups))]
            return np.asarray(group["transform"], np.float64), group["dn"].shape[:2]
    raise ValueError(f"record {record.get('tile_id')}: no sensor is present")


def geometry(record: dict[str, Any], key: str, group: str) -> np.ndarray:
    """float32 [4] (y0, sy, x0, sx) of one resolution group; see the batch description above."""
    (a, _, c, _, e, f), (rows, cols) = extent_affine(record)
    ga, _, gc, _, ge, gf = np.asarray(record[key][group]["transform"], np.float64)
    return np.array([(f - gf) / ge, e * rows / ge, (c - gc) / ga, a * cols / ga], np.float32)
