"""Sentinel-1 of a synthetic cell: gamma0 in linear power with speckle.

Mean backscatter follows the confusable groups of the optical side; members differ in the texture that
their structure imposes (bright scatterers, dark creeks, parcels, swell).
"""

from __future__ import annotations

import math

import numpy as np

from data_prep.synthetic.geography import Acquisition, CellPlan
from data_prep.synthetic.landscape import Landscape
from terrafm_jax import landcover

# Mean VV and VH in dB, spread of the mean between cells, spatial standard deviation in dB.
BACKSCATTER: dict[str, tuple[float, float, float, float]] = {
    "tree": (-8.8, -14.6, 0.9, 1.9), "shrub": (-9.4, -15.4, 0.9, 2.4), "mangrove": (-9.0, -15.0, 0.9, 2.5),
    "grass": (-12.0, -19.0, 1.1, 2.0), "crop": (-11.8, -18.6, 1.1, 2.6), "wetland": (-12.0, -19.2, 1.1, 2.7),
    "built": (-10.0, -18.0, 1.3, 3.4), "bare": (-11.6, -19.4, 1.4, 2.7), "moss": (-11.4, -19.2, 1.3, 2.5),
    "snow": (-11.0, -18.5, 1.5, 1.9), "water": (-20.0, -27.0, 1.5, 2.0), "sea": (-18.8, -26.0, 1.6, 2.5),
}  # fmt: skip
LOOKS = 4.4  # equivalent number of looks of an IW GRDH product at 10 m


def gamma0(plan: CellPlan, land: Landscape, acquired: Acquisition) -> np.ndarray:
    """float32 [n, n, 2]: VV and VH in linear power, with speckle.

    Gain, moisture and contrast are drawn per product; the mean level of a class per cell.
    """
    rng = plan.rng(30, acquired.stream)
    gain, moisture, contrast = rng.normal(0, 1.2, 2), rng.normal(0, 0.8), math.exp(rng.normal(0, 0.40))
    level = np.empty((*land.classes.shape, 2), np.float32)
    for name in land.present:
        inside = land.classes == landcover.category(name)
        vv, vh, spread, swing = BACKSCATTER[name]
        own = plan.rng(31, landcover.category(name))
        common, apart = own.normal(0, spread), own.normal(0, 0.5 * spread)
        shape, turn = land.structures[name], plan.rng(32, acquired.stream).uniform(-1, 1)
        texture = contrast * swing * (shape.radar + 0.6 * turn * shape.parcel)[inside]
        wet = moisture * (name not in ("tree", "mangrove", "built"))
        level[inside, 0] = vv + common + wet + texture
        level[inside, 1] = vh + common + apart + 0.6 * wet + 0.85 * texture
    # Slopes towards the sensor; terrain correction leaves a part of it.
    look = 1 if acquired.orbit == "ascending" else -1
    flat = np.isin(land.classes, [landcover.WATER, landcover.SEA])
    level += np.where(flat, 0, look * plan.rng(23).uniform(0.0, 0.7) * land.slope[1])[..., None]
    power = np.power(np.float32(10), (level + gain.astype(np.float32)) / 10)
    return power * rng.standard_gamma(LOOKS, level.shape, np.float32) / np.float32(LOOKS)
