"""The demo: a tiny model (width 128, 3 blocks) on synthetic tiles; `make demo` runs it.

    python -m terrafm_jax.main --config=configs/demo.py --workdir=RUN --config.data.dir=DATA

Hardware: two CPU cores, about five minutes. Expected: kNN on held-out tiles above random init
(docs/experiments.md says by how much, and over which seeds).

Arguments after a colon: ``runlocal`` shrinks the config into a smoke test of itself; ``single``,
``modality``, ``fusion`` and ``full`` are the rows of the published ablation.
"""

from ml_collections import ConfigDict

from terrafm_jax.config import apply_argument, base


def get_config(arg: str | None = None) -> ConfigDict:
    c = base()
    c.total_steps = "575"
    c.batch_size = 32
    c.data.workers, c.data.cache, c.data.canvases = 0, "ram", 1  # tiles that lack a sensor are padded, too
    c.model.size, c.model.width, c.model.depth, c.model.heads = "", 128, 3, 4
    c.model.prototypes, c.model.head_hidden, c.model.head_bottleneck = 1024, 256, 64
    c.model.drop_path, c.model.fusion_heads = 0.0, 8
    c.model.init_std = 0.06  # with 0.02 the signal of so narrow a model dies out, and features collapse
    c.views.global_size, c.views.local_size, c.views.locals = 64, 32, 4
    c.views.modality_threshold = 0.3  # mostly one or two sensors a view: what two views share is the ground
    c.objective.teacher_temp_start = c.objective.teacher_temp = 0.03  # few prototypes want sharper targets
    c.objective.ema_start, c.objective.ema_end = 0.99, 0.998  # a short run needs a faster teacher
    c.optim.base_lr, c.optim.warmup, c.optim.freeze_last = 4e-3, "10%", "0"
    c.optim.decay_end = 0.04
    c.compute.dtype = "float32"
    c.checkpoint.every, c.checkpoint.keep_every, c.checkpoint.teacher_every = "200", "0", "0"
    c.log.every = "20"
    c.knn.every, c.knn.gallery, c.knn.split = "50%", "validation", "holdout"
    c.knn.train_examples = c.knn.test_examples = 2000
    return apply_argument(c, arg)
