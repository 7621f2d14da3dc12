"""Segmentation with one linear layer per patch on a frozen encoder (Galileo's probe, with flips).

    python -m terrafm_jax.finetune --config=configs/finetune/segmentation_linear.py --workdir=DIR
        --config.init_from=PATH --config.data.suite=geobench --config.data.dir=DIR --config.data.name=m-cashew-plant

Hardware: one GPU, about 10 minutes for B. ``evaluate --protocol segmentation-linear`` is the cached and much faster way
to the published cell (34.1 for m-cashew-plant); this one adds augmentation and writes maps.
"""

from ml_collections import ConfigDict

from terrafm_jax.finetuning.config import base, get


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.mode, c.head = "frozen", "patch_linear"
    c.batch_size, c.eval_batch_size = 64, 64
    c.rates = (1e-3, 1e-2, 1e-1)
    return get(c, arg)
