"""TerraFM-S: a small model (width 384, 12 blocks) of ours for one GPU; the paper has none.

    python -m terrafm_jax.main --config=configs/vits.py --workdir=RUN --config.data.dir=DATA

Hardware: one GPU. At a batch of 128 the activations take some 20 GB by count, which no GPU has confirmed;
``--config.microbatches=2`` halves them. No published number to compare with.

Arguments after a colon: ``runlocal`` shrinks the config into a smoke test of itself; ``single``,
``modality``, ``fusion`` and ``full`` are the rows of the published ablation.
"""

from ml_collections import ConfigDict

from terrafm_jax.config import apply_argument, base


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.model.size = "s"
    c.batch_size = 128
    c.total_steps = "100 epochs"
    c.data.workers = 4
    return apply_argument(c, arg)
