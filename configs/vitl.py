"""TerraFM-L: the paper's large model (width 1024, 24 blocks, 345 M parameters).

    python -m terrafm_jax.main --config=configs/vitl.py --workdir=RUN --config.data.dir=DATA

Hardware: written for 64 accelerators at a global batch of 2048 (the authors report about 183 h on 64
GPUs; docs/scaling.md has the projected chip-hours). Parameters are sharded over fsdp. Expected, if the
recipe is reproduced (published kNN of TerraFM-L): m-EuroSat 95.1, m-BigEarthNet 69.4 F1. Not yet
reproduced here.

Arguments after a colon: ``runlocal`` shrinks the config into a smoke test of itself; ``single``,
``modality``, ``fusion`` and ``full`` are the rows of the published ablation.
"""

from ml_collections import ConfigDict

from terrafm_jax.config import apply_argument, base


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.model.size = "l"
    c.batch_size = 2048
    c.total_steps = "200 epochs"
    c.mesh.fsdp = 8
    return apply_argument(c, arg)
