"""Your own labelled folder, every protocol that fits it, with raw band statistics and random weights beside.

Command: python -m terrafm_jax.evaluate --config=configs/eval/folder.py --checkpoint PATH --checkpoint raw
  --checkpoint random@PATH --data DIR
Hardware: a laptop for some thousand images.
Expected: a useful encoder lies clearly above raw statistics, also with 1 % of the labels.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.suite = "folder"
    c.protocols = ("galileo-knn20", "torchgeo-bench-knn5", "logreg", "galileo-linear", "segmentation-linear",
                   "change-difference")  # fmt: skip
    c.fractions = (0.01, 0.05, 0.2, 1.0)
    c.seeds = 3
    c.image_size = 224
    return c
