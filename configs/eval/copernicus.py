"""Copernicus-Bench, frozen: Cloud-S2, EuroSAT-S1/S2, BigEarthNet-S1/S2, DFC2020-S1/S2, LCZ-S2 under its own protocols.

Command: python -m terrafm_jax.evaluate --config=configs/eval/copernicus.py --checkpoint PATH --data DIR
Hardware: one GPU, about 3 hours for B (UPerNet on 3,156 + 1,699 images dominates).
Expected for the released B weights: 67.9, 87.8, 99.1, 76.9, 84.4, 55.4, 63.8, 87.0. LCZ-S2 was measured at 112 px:
run it apart with --names LCZ-S2 --image_size 112. Flips during probing are not reproduced: features are cached.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.suite = "copernicus"
    c.protocols = ("copernicus-linear", "copernicus-upernet")
    c.image_size = 224
    c.inputs = ("each",)
    c.out = "eval_out/copernicus"
    return c
