"""Small scenes and a tiny random model for the tests of scene embedding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from terrafm_jax import embed
from terrafm_jax.inference import Model
from terrafm_jax.loader import Loaded
from terrafm_jax.models import ModelSpec, init_params
from terrafm_jax.scenes.grid import Plan
from terrafm_jax.scenes.readback import open_embedding, whole
from terrafm_jax.sensors import SENSORS, Statistics

WEST, NORTH = 600_000.0, 5_100_000.0
CRS = "EPSG:32632"


def tiny_model(seed: int = 0, **fields: Any) -> Model:
    """A small network with random weights, as ``terrafm_jax.load`` returns it."""
    spec = ModelSpec(
        **{"width": 24, "depth": 2, "heads": 2, "fusion_heads": 4, "prototypes": 64, "head_hidden": 32,
           "head_bottleneck": 16, **fields}
    )  # fmt: skip
    params = init_params(spec, jax.random.key(seed))
    # Fresh weights are tiny: larger ones make features that depend visibly on the pixels.
    backbone = jax.tree.map(lambda a: np.asarray(a * 3.0 if a.ndim > 1 else a), params["backbone"])
    backbone["pos_embed"] = smooth_positions(spec, backbone["pos_embed"])
    return Model(Loaded({"backbone": backbone}, spec, Statistics.published(), {}, "tiny"))


def smooth_positions(spec: ModelSpec, fresh: np.ndarray) -> np.ndarray:
    """Position embeddings that vary slowly over the window, as those of trained weights do (fresh ones are noise)."""
    at = (np.arange(spec.grid) + 0.5) / spec.grid * np.pi
    waves = [np.cos(a * at)[:, None] * np.cos(b * at)[None] for a in range(3) for b in range(3) if a + b]
    mixed = np.random.default_rng(5).normal(size=(len(waves), spec.width)) * 0.15
    grid = np.tensordot(np.stack(waves, -1), mixed, 1).reshape(1, -1, spec.width)
    return np.concatenate([fresh[:, :1], grid], 1).astype(np.float32)


def surface(rows: int, columns: int, bands: int, gsd: float = 10.0, seed: int = 0) -> np.ndarray:
    """uint16 [bands, rows, columns]: smooth fields with edges, a function of the ground position."""
    y, x = (np.arange(n)[:, None] * gsd if i == 0 else np.arange(n)[None] * gsd for i, n in enumerate((rows, columns)))
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(bands):
        a, b, c, d = rng.uniform(0.5, 2.0, 4)
        field = np.sin(x / 500 * a) * np.cos(y / 400 * b) + 0.4 * np.sign(np.sin(x / 900 * c + y / 700 * d))
        out.append(1500 + 600 * field)
    return np.stack(out).astype(np.uint16)


def write(
    path: Path,
    data: np.ndarray,
    *,
    gsd: float = 10.0,
    west: float = WEST,
    north: float = NORTH,
    crs: str | None = CRS,
    names: Sequence[str] = (),
    nodata: float | None = None,
    **options: Any,
) -> Path:
    """A GeoTIFF of [bands, rows, columns]."""
    bands, rows, columns = data.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    transform = options.pop("transform", from_origin(west, north, gsd, gsd))
    with rasterio.open(
        path, "w", driver="GTiff", height=rows, width=columns, count=bands, dtype=data.dtype, crs=crs,
        transform=transform, nodata=nodata, **options,
    ) as file:  # fmt: skip
        file.write(data)
        if names:
            file.descriptions = tuple(names)
    return path


def optical(path: Path, rows: int = 300, columns: int = 330, key: str = "s2_l2a", **options: Any) -> Path:
    """A 12-band Sentinel-2 scene with band names."""
    return write(path, surface(rows, columns, 12), names=SENSORS[key].band_names, **options)


def radar(path: Path, rows: int = 300, columns: int = 330, power: bool = False, **options: Any) -> Path:
    """A Sentinel-1 scene in dB (or linear power)."""
    db = (surface(rows, columns, 2, seed=1).astype(np.float32) - 1500) / 200 - np.array([12.0, 18.0])[:, None, None]
    data = 10 ** (db / 10) if power else db
    return write(path, data.astype(np.float32), names=("VV", "VH"), **options)


def call(*args: Any, out: Path, sensors: dict[str, Any] | None = None, window: int = 96) -> int:
    """Runs the command as a user would; its exit code."""
    given = [f"--sensor={k}={v}" for k, v in (sensors or {}).items()]
    return embed.main(["--checkpoint=x", *given, f"--out={out}", f"--window={window}", "--batch=8", *map(str, args)])


def tokens(path: Path) -> np.ndarray:
    """float32 [rows, columns, d] of an output."""
    with open_embedding(path) as source:
        return whole(source)


def borders(plan: Plan) -> list[int]:
    """Output columns at which a window begins, but for the first."""
    return sorted({plan.tokens_of(chunk, at)[1].start for chunk in plan.chunks() for at in chunk.columns} - {0})


def jumps(values: np.ndarray, borders: Sequence[int], axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosine jumps between neighboring lines of tokens [rows, columns, d]: across window borders, elsewhere."""
    unit = np.moveaxis(values / np.linalg.norm(values, axis=-1, keepdims=True), axis, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # lines of nodata
        found = np.nanmean(1 - (unit[1:] * unit[:-1]).sum(-1), 1)
    at = np.isin(np.arange(len(found)) + 1, list(borders))
    return found[at], found[~at]


NAMES = SENSORS["s2_l2a"].band_names
THIRTEEN = (*NAMES[:10], "B10", *NAMES[10:])
DARK = surface(64, 64, 12) // 6  # from 110 DN on


def fails(capsys: pytest.CaptureFixture, *args: str) -> str:
    """The one line with which embedding refuses these arguments."""
    assert embed.main(["--checkpoint=none.pth", "--out=e.tif", *args]) == 1
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line
