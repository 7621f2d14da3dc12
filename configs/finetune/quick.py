"""A few hundred labelled images on a laptop: LoRA on every block, one rate, early stopping.

    python -m terrafm_jax.finetune --config=configs/finetune/quick.py --workdir=DIR
        --config.init_from=PATH --config.data.dir=FOLDER

Hardware: two CPU cores for S at 96 px and some hundred images (minutes); a GPU for more. Expected: a few points above a
linear probe; with fewer than ten labels a class prefer the probe. Works for classes, several labels and numbers.
"""

from ml_collections import ConfigDict

from terrafm_jax.finetuning.config import base, get


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.mode = "lora"
    c.image_size = 96
    c.epochs, c.patience = 40, 8
    c.batch_size, c.eval_batch_size = 32, 32
    c.rates = (1e-3,)
    c.head_norm = True
    c.label_smoothing = 0.1
    return get(c, arg)
