"""Where a raster is looked for: windows beyond its edges, and beyond the end of the degrees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from scenes_fake import call, surface, tokens, write

from terrafm_jax.sensors import SENSORS

pytestmark = pytest.mark.usefixtures("loaded")


@pytest.mark.parametrize("west", [179.992, -180.008])
def test_geographic_rasters_across_the_antimeridian(tmp_path: Path, west: float) -> None:
    # Seen from its UTM zone, the border of degrees at 180 is as any other between two zones.
    outs = []
    for name, left, code in (("greenwich", -0.008, 32631), ("antimeridian", west, 32601)):
        source = write(
            tmp_path / f"{name}.tif", surface(160, 192, 12), crs="EPSG:4326", names=SENSORS["s2_l2a"].band_names,
            transform=rasterio.Affine(8.983e-5, 0, left, 0, -8.983e-5, 10.0),
        )  # fmt: skip
        outs.append(tmp_path / f"{name}_e.tif")
        assert call(f"--crs=EPSG:{code}", "--batch=1", "--window=64", out=outs[-1], sensors={"s2_l2a": source}) == 0
    first, second = (tokens(out) for out in outs)
    assert np.array_equal(np.isnan(first), np.isnan(second))
    assert np.allclose(first, second, atol=1e-2, equal_nan=True)


def test_dates_far_apart_make_a_mosaic(tmp_path: Path) -> None:
    names = SENSORS["s2_l2a"].band_names
    north = write(tmp_path / "n.tif", surface(160, 160, 12), names=names)
    south = write(tmp_path / "s.tif", surface(160, 160, 12), names=names, north=5_100_000.0 - 4800)
    out = tmp_path / "e.tif"
    more = f"--sensor=s2_l2a={south}"
    assert call(more, "--window=64", "--overlap=0", out=out, sensors={"s2_l2a": north}) == 0
    valid = ~np.isnan(tokens(out)).all(-1)
    assert valid.shape == (40, 10)
    assert np.array_equal(valid.all(1), np.repeat([True, False, True], (10, 20, 10)))
    assert not valid[10:30].any()
