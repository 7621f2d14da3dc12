"""Views against a slow pixel-by-pixel resampling, against PyTorch and against GDAL."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from views_fake import CASES, STATS, fake_batch, slow_view, unpatch, views_of

from terrafm_jax.sensors import SENSOR_KEYS, SENSORS
from terrafm_jax.ssl import resample
from terrafm_jax.ssl.views import ViewSpec

SPEC = ViewSpec(globals=1, locals=2, global_size=32, local_size=16, patch=8)


def expected_view(batch: dict, key: str, i: int, box: np.ndarray, flip: np.ndarray, out: int) -> np.ndarray:
    """Normalized view [out, out, C] of one sensor from the slow resampler; NaN where hardly any weight is valid."""
    s = SENSORS[key]
    mean, std = STATS[key]
    result = np.full((out, out, len(s.bands)), np.nan)
    offset = float(batch["offset"][i, SENSOR_KEYS.index(key)])
    for group, names in s.groups.items():
        values, share = slow_view(batch[key][group], i, box, flip, out)
        for b, name in enumerate(names):
            c = s.band_names.index(name)
            unit = values[..., b] * s.scale - offset
            plane = (unit - (mean[c] - 2 * std[c])) / (4 * std[c])
            result[..., c] = np.where(share > 0.02, plane, np.nan)
    return result


def group_views(entry: dict, mean: float, std: float, boxes: np.ndarray, flips: np.ndarray, out: int) -> np.ndarray:
    """One group of sample 0 cut to [V, out, out, bands] by the package, normalized with one mean and std."""
    bands = entry["dn"].shape[-1]

    @jax.jit
    def cut(entry: dict) -> jax.Array:
        stats = (np.full(bands, mean, np.float32), np.full(bands, std, np.float32))
        planes, mask = resample.masked_planes(entry, 1.0, *stats, jnp.zeros(1), jnp.float32)
        corners, mirrored = jnp.asarray(boxes, jnp.float32)[None], jnp.asarray(flips)[None]
        planes = resample.resample_group(planes, mask, entry, corners, mirrored, out, 8)
        return resample.to_patches(planes, 8)

    return unpatch(np.asarray(cut(entry)), 8)[0]


@pytest.mark.parametrize("case", CASES)
def test_every_group_matches_the_slow_resampler(case: str) -> None:
    batch = fake_batch(2, 60, **CASES[case])
    for views, out in zip(views_of(SPEC, batch), (32, 16), strict=True):
        for key in SENSOR_KEYS:
            images = unpatch(views.patches[key], SPEC.patch)
            for i in range(2):
                for v in range(images.shape[1]):
                    want = expected_view(batch, key, i, views.boxes[i, v], views.flips[i, v], out)
                    sure = np.isfinite(want)
                    assert sure.mean() > 0.3
                    np.testing.assert_allclose(images[i, v][sure], want[sure], atol=2e-4, err_msg=f"{key} {i} {v}")


def test_pixels_without_any_measurement_are_filled_after_normalization() -> None:
    batch = fake_batch(2, 60)
    for group in batch["s2_l2a"].values():
        group["valid"][:] = 0
    views, _ = views_of(SPEC, batch)
    np.testing.assert_array_equal(views.patches["s2_l2a"], resample.FILL)
    assert np.std(views.patches["s2_l1c"]) > 0.05


def test_nodata_values_do_not_leak() -> None:
    batch, other = fake_batch(2, 60, hole=0.3), fake_batch(2, 60, hole=0.3)
    for key in SENSOR_KEYS:
        for group in other[key].values():
            hidden = np.unpackbits(group["valid"], axis=2, count=group["dn"].shape[2]) == 0
            assert hidden.any()
            group["dn"][hidden] = np.iinfo(group["dn"].dtype).max
    for one, two in zip(views_of(SPEC, batch), views_of(SPEC, other), strict=True):
        for key in SENSOR_KEYS:
            np.testing.assert_array_equal(one.patches[key], two.patches[key])


def test_offset_is_subtracted_before_any_cast() -> None:
    """A tile with the +1000 offset gives bit for bit the view of the same tile without it, also in bfloat16."""
    batch, shifted = fake_batch(2, 60), fake_batch(2, 60)
    batch["offset"][:] = 0
    shifted["offset"][:, 1:] = 1000
    for key in ("s2_l1c", "s2_l2a"):
        for group in shifted[key].values():
            group["dn"] += 1000
    spec = ViewSpec(**{**SPEC.__dict__, "dtype": "bfloat16"})
    for key in SENSOR_KEYS:
        one, two = (np.asarray(views_of(spec, b)[0].patches[key], np.float32) for b in (batch, shifted))
        np.testing.assert_array_equal(one, two)


def test_bfloat16_is_close_to_float32() -> None:
    batch = fake_batch(2, 60, shift=0.4, hole=0.1)
    exact, _ = views_of(SPEC, batch)
    rough, _ = views_of(ViewSpec(**{**SPEC.__dict__, "dtype": "bfloat16"}), batch)
    for key in SENSOR_KEYS:
        assert rough.patches[key].dtype == jnp.bfloat16
        gap = np.asarray(rough.patches[key], np.float32) - exact.patches[key]
        assert np.sqrt(np.mean(gap**2)) < 0.004  # in units of four standard deviations


@pytest.mark.parametrize("box", [(0.1, 0.2, 0.35, 0.5), (0.0, 0.0, 1.0, 1.0), (0.125, 0.25, 0.875, 1.0)])
def test_agrees_with_torch_away_from_the_edges_of_the_box(box: tuple[float, ...]) -> None:
    import torch

    side, out = 96, 32
    entry = {k: jnp.asarray(v) for k, v in fake_batch(1, side)["s2_l2a"]["10m"].items()}
    image = np.asarray(entry["dn"][0], np.float32)
    cut = tuple(round(e * side) for e in box)
    whole = tuple(e / side for e in cut)
    crop = image[cut[0] : cut[2], cut[1] : cut[3]].transpose(2, 0, 1)[None]
    want = torch.nn.functional.interpolate(
        torch.from_numpy(crop.copy()), size=(out, out), mode="bilinear", antialias=True, align_corners=False
    )[0].permute(1, 2, 0)
    got = group_views(entry, 2.0, 1.0, [whole], [(False, False)], out)[0] * 4.0  # normalized: x / 4
    rim = 2
    np.testing.assert_allclose(got[rim:-rim, rim:-rim], want.numpy()[rim:-rim, rim:-rim], rtol=1e-4, atol=0.1)


@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_agrees_with_gdal_on_a_real_tile(real_data) -> None:
    """GDAL's bilinear read of a fractional window, on native 10, 20 and 60 m bands of a Major-TOM cell."""
    rasterio = pytest.importorskip("rasterio")
    from rasterio.enums import Resampling
    from rasterio.io import MemoryFile
    from rasterio.windows import Window

    folder = next((real_data / "train_tiles" / "majortom_core_native").rglob("B02.tif")).parent
    box, out = np.array([0.21, 0.33, 0.61, 0.72], np.float32), 32
    for name in ("B02", "B05", "B09"):
        with rasterio.open(folder / f"{name}.tif") as source:
            dn = source.read(1)[:178, :178].astype(np.uint16)
        rows, cols = dn.shape
        with MemoryFile() as memory:
            with memory.open(driver="GTiff", height=rows, width=cols, count=1, dtype="float32") as target:
                target.write(dn.astype(np.float32), 1)
            with memory.open() as source:
                window = Window(box[1] * cols, box[0] * rows, (box[3] - box[1]) * cols, (box[2] - box[0]) * rows)
                want = source.read(1, window=window, out_shape=(out, out), resampling=Resampling.bilinear)
        entry = {
            "dn": jnp.asarray(dn[None, ..., None]),
            "valid": jnp.asarray(np.packbits(np.ones((1, rows, cols), bool), axis=2)),
            "geometry": jnp.asarray([[0, rows, 0, cols]], jnp.float32),
            "extent": jnp.asarray([[rows, cols]], jnp.int32),
        }
        got = group_views(entry, 2.0, 1.0, [box], [(False, False)], out)[0, ..., 0] * 4.0
        np.testing.assert_allclose(got, want, rtol=2e-3, err_msg=name)


def test_flips_mirror_the_view() -> None:
    entry = {k: jnp.asarray(v) for k, v in fake_batch(1, 60, hole=0.2)["s2_l2a"]["20m"].items()}
    flips = [(False, False), (True, False), (False, True), (True, True)]
    plain, down, across, both = group_views(entry, 1.0, 2000.0, [(0.1, 0.2, 0.8, 0.7)] * 4, flips, 32)
    np.testing.assert_allclose(down, plain[::-1], atol=1e-5)
    np.testing.assert_allclose(across, plain[:, ::-1], atol=1e-5)
    np.testing.assert_allclose(both, plain[::-1, ::-1], atol=1e-5)


def test_all_sensors_and_groups_see_the_same_ground() -> None:
    """One smooth field sampled by every group, with shifted grids, gives the same picture in every band."""
    side = 120
    batch = fake_batch(3, side, shift=0.5)
    for key in SENSOR_KEYS:
        for name, group in batch[key].items():
            factor = int(name[:-1]) // 10
            inner = side // factor
            for i in range(3):
                y0, _, x0, _ = group["geometry"][i]
                v, u = np.meshgrid((np.arange(inner) + 0.5 - x0) / inner, (np.arange(inner) + 0.5 - y0) / inner)
                field = 0.5 + 0.3 * np.sin(2.5 * u + i) * np.cos(2.0 * v)  # wanted normalized value
                s = SENSORS[key]
                bands = list(s.indices(s.groups[name]))
                mean, std = STATS[key][0][bands], STATS[key][1][bands]
                unit = field[..., None] * 4 * std + mean - 2 * std + batch["offset"][i, SENSOR_KEYS.index(key)]
                # L1C B01 and L2A B01 reach below zero DN for small values: int32 keeps this a test of geometry.
                group.setdefault("exact", np.zeros(group["dn"].shape, np.int32))[i] = np.round(unit / s.scale)
            group["dn"] = group.pop("exact")
    spec = ViewSpec(globals=2, locals=0, global_size=32, patch=8, local_size=8, global_scale=(0.2, 0.6))
    views, _ = views_of(spec, batch)
    stack = np.concatenate([unpatch(views.patches[k], 8) for k in SENSOR_KEYS], axis=-1)
    spread = stack.max(-1) - stack.min(-1)
    assert np.std(stack[..., 0]) > 0.05
    assert np.median(spread) < 0.01
    assert np.percentile(spread, 99) < 0.04  # at the rim the coarse groups continue their edge value


def test_a_window_of_a_tile_gives_the_view_of_the_tile() -> None:
    """The same box read from a window with the tile's geometry, where the window holds all that the filter reads."""
    whole = fake_batch(1, 120, shift=0.5)
    window = fake_batch(1, 120, shift=0.5)
    for key in SENSOR_KEYS:
        for name, group in window[key].items():
            first, last = (24 * 10 // int(name[:-1]), 108 * 10 // int(name[:-1]))
            group["dn"] = group["dn"][:, first:last, first:last]
            bits = np.unpackbits(group["valid"], axis=2)[:, first:last, first:last]
            group["valid"] = np.packbits(bits, axis=2)
            group["geometry"] = group["geometry"] - np.array([first, 0, first, 0], np.float32)
            group["extent"] = np.full((1, 2), last - first, np.int32)
    box, flips = jnp.asarray([[[0.4, 0.35, 0.7, 0.65]]], jnp.float32), jnp.zeros((1, 1, 2), bool)

    def cut(key: str, entry: dict) -> jax.Array:
        return resample.resample_sensor(key, entry, STATS[key], jnp.zeros(1), [(box, flips, 32)], 8, "float32")[0]

    for key in SENSOR_KEYS:
        one, two = (jax.jit(cut, static_argnums=0)(key, b[key]) for b in (whole, window))
        np.testing.assert_allclose(one, two, atol=3e-5)
        assert np.std(one) > 0.02
