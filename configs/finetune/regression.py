"""A number per image (yield, biomass, cover): whole network, targets standardized, RMSE, MAE and R2 reported.

    python -m terrafm_jax.finetune --config=configs/finetune/regression.py --workdir=DIR
        --config.init_from=PATH --config.data.dir=FOLDER

The folder's dataset.yaml says ``task: regression`` and ``labels: table.csv`` with columns file and value.
Hardware: one GPU for B; a laptop for S with ``--config.mode=lora``. Expected: compare with ``evaluate --protocol
galileo-linear``, which often is as good with few labels.
"""

from ml_collections import ConfigDict

from terrafm_jax.finetuning.config import base, get


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.batch_size, c.eval_batch_size = 64, 64
    c.rates = (3e-5, 1e-4, 3e-4)
    c.layer_decay = 0.75
    c.patience = 10
    return get(c, arg)
