"""The published GEO-Bench kNN columns (m-EuroSat, m-BigEarthNet, m-So2Sat, m-Brick-Kiln), 100 % and 1 % of the labels.

Command: python -m terrafm_jax.evaluate --config=configs/eval/geobench.py --checkpoint PATH --data $GEO_BENCH_DIR
Hardware: any; features of 40,000 small images, about 10 minutes for B on one GPU, hours on a CPU.
Expected for the released B weights: 94.2 / 68.7 / 55.1 / 94.5 (TerraFM's table; protocol inferred from Galileo's).
The published 1 % numbers use the files' own 0.01x_train partition: add --partition 0.01x_train.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.suite = "geobench"
    c.names = ("m-eurosat", "m-bigearthnet", "m-so2sat", "m-brick-kiln")
    c.protocols = ("galileo-knn20",)
    c.image_size = 224  # the network's own input; the text does not say
    c.options = {"bands": "as_labelled"}  # what most published numbers did, wrong as it is (docs/evaluation.md)
    c.out = "eval_out/geobench"
    return c
