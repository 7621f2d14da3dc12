"""The demo: a tiny model (width 128, 3 blocks) on synthetic tiles; `make demo` runs it.

    python -m terrafm_jax.main --config=configs/demo.py --workdir=RUN --config.data.dir=DATA

Hardware: two CPU cores, under five minutes. Expected: kNN above random init by five points or more
(docs/experiments.md has the three seeds).

Arguments after a colon: ``runlocal`` shrinks the config into a smoke test of itself; ``single``,
``modality``, ``fusion`` and ``full`` are the rows of the published ablation.
"""

from ml_collections import ConfigDict

from terrafm_jax.config import apply_argument, base


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.total_steps = "500"
    c.batch_size = 32
    c.data.workers, c.data.cache = 0, "ram"
    c.data.sampling = "paper"
    c.model.size, c.model.width, c.model.depth, c.model.heads = "", 128, 3, 4
    c.model.prototypes, c.model.head_hidden, c.model.head_bottleneck = 1024, 256, 64
    c.model.drop_path, c.model.fusion_heads = 0.0, 8
    c.views.global_size, c.views.local_size, c.views.locals = 64, 32, 4
    c.objective.teacher_temp_warmup = "20%"
    c.objective.ema_start = 0.99  # a short run needs a faster teacher
    c.optim.base_lr, c.optim.warmup, c.optim.freeze_last = 4e-3, "10%", "5%"
    c.compute.dtype = "float32"
    c.checkpoint.every, c.checkpoint.keep_every, c.checkpoint.teacher_every = "100", "0", "0"
    c.log.every = "10"
    c.knn.every, c.knn.train_examples, c.knn.test_examples = "50%", 2000, 2000
    return apply_argument(c, arg)
