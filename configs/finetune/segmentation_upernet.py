"""Segmentation with UPerNet and the whole network: layer-wise rate decay, class weights, early stopping.

    python -m terrafm_jax.finetune --config=configs/finetune/segmentation_upernet.py --workdir=DIR
        --config.init_from=PATH --config.data.suite=landslide4sense --config.data.dir=DIR

Hardware: one GPU with 40 GB for B at 224 px and batch 16 (about 2 hours on Landslide4Sense).
``--config.mode=frozen`` is Copernicus-Bench's setting. Expected for the released B weights on Landslide4Sense:
mIoU about 70.8 (its recipe is not published).
"""

from ml_collections import ConfigDict

from terrafm_jax.finetuning.config import base, get


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.head = "upernet"
    c.batch_size, c.eval_batch_size = 16, 16
    c.rates = (1e-4,)
    c.layer_decay = 0.75
    c.class_weights = "balanced"
    c.patience = 10
    return get(c, arg)
