"""The fine-tuning configuration: every field, its default and where it comes from.

Source tags: [Galileo] the fine-tuning protocol behind the published GEO-Bench table; [BEiT] layer-wise decay;
[ours] our choice. ``base()`` is the schema; files in ``configs/finetune`` say what differs.
"""

from __future__ import annotations

from ml_collections import ConfigDict

from terrafm_jax.config import ConfigError, flatten, refuse, schema_faults

CHOICES = {
    "mode": ("full", "frozen", "last", "lora"),
    "head": ("auto", "linear", "patch_linear", "upernet"),
    "class_weights": ("none", "balanced"),
    "data.cache": ("none", "ram"),
    "compute.dtype": ("", "float32", "bfloat16"),
}


def base() -> ConfigDict:
    """Galileo's fine-tuning of a whole network on one data set, without its learning-rate sweep."""
    c = ConfigDict()
    c.seed = 0
    c.init_from = ""  # PATH, random:SIZE[:SEED] or random@PATH[:SEED], as evaluate's --checkpoint
    c.name = ""  # in the tables; empty: from init_from
    c.upstream_l2a_stem = False  # released weights: L2A through the L1C stem, as the published numbers did
    c.allow_config_change = False
    c.stop_at_epoch = 0  # > 0: checkpoint and exit there

    c.data = ConfigDict()
    c.data.suite = "folder"
    c.data.dir = ""
    c.data.name = ""  # data set of the suite; may be empty when there is only one
    c.data.bands = ""  # geobench: corrected or as_labelled
    c.data.inputs = ()  # sensors, several are fused; empty: all the data set has and the weights take
    c.data.fraction = 1.0  # of the train labels, per class
    c.data.shots = 0  # labels per class instead
    c.data.tile = 0  # cut segmentation images into windows of so many px
    c.data.limit = 0  # samples per split at most
    c.data.threads = 4  # reading threads
    c.data.cache = "none"  # "ram": keep decoded images

    c.image_size = 224  # 0: the images' own size rounded up to whole patches
    c.mode = "full"  # full, frozen (head only), last (the last blocks), lora
    c.last_blocks = 2  # mode last; the final norm trains with them
    c.lora_rank = 8  # [ours] on qkv, proj, fc1 and fc2 of every block
    c.lora_alpha = 16.0
    c.head = "auto"  # linear for images, patch_linear for masks, or upernet
    c.head_norm = False  # batch norm before the linear head
    c.upernet_channels = 512
    c.drop_path = 0.1

    c.epochs = 50  # [Galileo]
    c.batch_size = 256  # [Galileo] effective; microbatches split it
    c.microbatches = 1
    c.rates = (1e-4,)  # several: one run each, the best on validation is taken
    c.min_rate = 1e-6  # [Galileo] end of the cosine
    c.warmup = 0.1  # [Galileo] share of all steps
    c.weight_decay = 0.01  # [Galileo uses AdamW's default]
    c.clip = 1.0  # [Galileo] global norm; 0: off
    c.layer_decay = 1.0  # [BEiT] 0.65-0.75 suit large models; 1: all layers alike, as Galileo
    c.mixup = 0.0  # alpha of the Beta distribution; classification and multilabel only
    c.label_smoothing = 0.0
    c.flips = True  # up-down and left-right; scenes have no preferred direction
    c.class_weights = "none"  # balanced: inverse frequency
    c.patience = 0  # epochs without a better validation score before it stops; 0: never

    c.compute = ConfigDict()
    c.compute.dtype = ""  # of products; empty: that of the weights
    c.mesh = ConfigDict()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = -1, 1, 1

    c.eval_batch_size = 64
    c.resamples = 1000
    c.predictions = True  # writes test predictions (masks as GeoTIFF where the images are georeferenced)
    c.tensorboard = False
    return c


def small(c: ConfigDict) -> ConfigDict:
    """Shrinks any config into a smoke test of itself (``:runlocal``)."""
    c.init_from = c.init_from or "random:s"
    c.image_size, c.epochs, c.batch_size, c.eval_batch_size = 32, 2, 8, 8
    c.rates, c.upernet_channels, c.data.limit, c.resamples = c.rates[:2], 8, 16, 20
    return c


def get(c: ConfigDict, argument: str | None) -> ConfigDict:
    """Applies the text behind the colon of ``--config=FILE:TEXT``. Raises ConfigError on an unknown word."""
    for word in (argument or "").split(","):
        if word == "runlocal":
            c = small(c)
        elif word:
            raise ConfigError(f"configs: unknown argument {word!r}, expected 'runlocal'")
    return c


def check(config: ConfigDict) -> None:
    """Raises ConfigError that lists every unknown, missing, mistyped or impossible key."""
    faults = schema_faults(flatten(base()), flatten(config), CHOICES)
    refuse(faults or [text for wrong, text in _values(config) if wrong])


def _values(c: ConfigDict) -> list[tuple[bool, str]]:
    return [
        (not c.init_from, "config.init_from: empty; give weights, or random:SIZE for a baseline"),
        (not c.data.dir, "config.data.dir: empty; give the folder of the labelled data"),
        (not c.rates or min(c.rates) <= 0, f"config.rates: found {tuple(c.rates)}, expected numbers above 0"),
        (c.epochs < 1 or c.batch_size < 1, f"config.epochs {c.epochs}, config.batch_size {c.batch_size}: at least 1"),
        (
            c.microbatches < 1 or c.batch_size % max(c.microbatches, 1) != 0,
            f"config.microbatches: {c.microbatches} does not divide batch_size {c.batch_size}",
        ),
        (not 0 < c.layer_decay <= 1, f"config.layer_decay: found {c.layer_decay}, expected above 0, at most 1"),
        (c.eval_batch_size < 1, f"config.eval_batch_size: found {c.eval_batch_size}, expected at least 1"),
        (not 0 <= c.label_smoothing < 1, f"config.label_smoothing: found {c.label_smoothing}, expected 0..1"),
        (not 0 <= c.drop_path < 1, f"config.drop_path: found {c.drop_path}, expected 0..1"),
        (not 0 <= c.warmup < 1, f"config.warmup: found {c.warmup}, expected 0..1"),
        (c.mode == "lora" and c.lora_rank < 1, f"config.lora_rank: found {c.lora_rank}, expected at least 1"),
    ]
