"""Small networks with every parameter off its initial value, for the tests of loading and exporting."""

from __future__ import annotations

import numpy as np

from terrafm_jax import weights
from terrafm_jax.loader import Loaded, expected_shapes
from terrafm_jax.models import ModelSpec
from terrafm_jax.sensors import SENSORS, Statistics

TINY = ModelSpec(
    width=64, depth=4, heads=1, fusion_heads=16, prototypes=48, head_hidden=40, head_bottleneck=24, drop_path=0.0
)


def sample(spec: ModelSpec = TINY, *, head: bool = True, seed: int = 0) -> Loaded:
    rng = np.random.default_rng(seed)
    flat = {}
    for path, shape in expected_shapes(spec, head=head).items():
        fan_in = shape[0] if path.endswith("kernel") else 100
        value = rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)
        flat[path] = value + np.float32(path.endswith("scale"))
    stats = Statistics.published()
    stats = Statistics({k: tuple(v + 10.0 for v in m) for k, m in stats.mean.items()}, stats.std, "test")
    meta = {"step": 7, "config": {"seed": 3, "batch_size": 8, "data.dir": "/somewhere/tiles"}}
    return Loaded(weights.unflatten(flat), spec, stats, meta, "sample")


def images(size: tuple[int, int], batch: int = 2, sensors: tuple[str, ...] = TINY.sensors) -> dict[str, np.ndarray]:
    """Plausible values [B, H, W, bands] in DN and dB."""
    rng = np.random.default_rng(1)
    found = {}
    for key in sensors:
        shape = (batch, *size, len(SENSORS[key].bands))
        if SENSORS[key].unit == "DN":
            found[key] = rng.integers(1, 6000, shape).astype(np.uint16)
        else:
            found[key] = rng.normal(-14, 4, shape).astype(np.float32)
    return found


TOLERANCE = 1e-4  # relative to the largest value, float32


def assert_close(ours, theirs) -> None:
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= TOLERANCE * np.abs(theirs).max()


def assert_bitwise(a: dict, b: dict) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
