"""Galileo's fine-tuning protocol: the whole network, AdamW, 50 epochs, nine learning rates chosen on validation.

    python -m terrafm_jax.finetune --config=configs/finetune/classification.py --workdir=DIR
        --config.init_from=PATH --config.data.suite=geobench --config.data.dir=DIR --config.data.name=m-eurosat

Hardware: one GPU; B on 2,000 images of 224 px: about 4 minutes a rate, 40 minutes in all. Multilabel sets
(m-bigearthnet) take the same file. Expected for the released B weights: m-eurosat 98.1, m-bigearthnet 72.6 (F1),
m-so2sat 64.9, m-brick-kiln 98.7. Argument ``runlocal`` shrinks it into a smoke test.
"""

from ml_collections import ConfigDict

from terrafm_jax.finetuning.config import base, get


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.rates = (1e-5, 3e-5, 6e-5, 1e-4, 3e-4, 6e-4, 1e-3, 3e-3, 6e-3)
    return get(c, arg)
