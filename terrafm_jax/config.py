"""The configuration: every field, its default and where the default comes from.

``base()`` is both schema and recipe (TerraFM-B). Files in ``configs/`` start from it and say what
differs. ``check`` refuses unknown or mistyped keys, ``Duration`` turns "10 epochs", "5%", "1e6
examples" or "300 steps" into steps, ``train_spec`` builds the frozen objects that the jitted code sees.

Source tags: [paper] TerraFM, arXiv 2506.06281; [code] its public inference code; [DINO], [Panopticon]
ancestors whose defaults are used where the paper is silent; [ours] our inference or choice.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from terrafm_jax import landcover
from terrafm_jax.sensors import SENSOR_KEYS, Statistics

if TYPE_CHECKING:
    from terrafm_jax.data.sampling import SamplingSpec
    from terrafm_jax.models.spec import ModelSpec
    from terrafm_jax.training.step import TrainSpec


class ConfigError(ValueError):
    """A configuration key is unknown, of the wrong type or of an impossible value."""


def base() -> ConfigDict:
    """The TerraFM-B recipe, complete; durations are strings (see :class:`Duration`)."""
    c = ConfigDict()
    c.seed = 0
    c.total_steps = "150 epochs"  # [paper] B 150, L 200
    c.batch_size = 1024  # global; [paper] B 1024, L 2048
    c.microbatches = 1  # the batch in so many parts, gradients averaged: less memory, same size of step
    c.stop_at_step = 0  # > 0: checkpoint and exit there (schedules still aim at total_steps)
    c.init_from = ""  # weights only: a workdir, a checkpoint folder or a released .pth / .safetensors
    c.allow_config_change = False  # resume a workdir although its recipe differs
    c.exit_code_preempted = 42  # a launcher requeues on it
    c.max_nonfinite = 3  # consecutive non-finite losses or gradients before the run aborts

    c.data = ConfigDict()
    c.data.dir = ""  # prepared data set (TFDS layout), local or gs://
    c.data.split = "train"
    c.data.statistics = "dataset"  # "dataset": its statistics.json; "published": those of the released weights
    c.data.workers = 8  # reading processes per training process; 0 reads inside it
    c.data.cache = "none"  # "ram": decode a small data set once and keep it
    c.data.echo = 1  # [ours] steps that share one batch of tiles, with other views; above 1 only when input-bound
    c.data.canvases = 4  # tiles of different sizes are padded to at most so many shapes, one compilation each
    c.data.max_skipped = 0.01  # share of unreadable records at which the run aborts
    c.data.sampling = "paper"  # "uniform", "paper" (open sea thinned) or "balanced" (over land cover)
    c.data.sea_keep = 0.02  # [paper] 2 % of ocean tiles stay; 1 where preparation has thinned them already
    c.data.power = 0.5  # of what is balanced: 0 uniform over tiles, 1 uniform over classes, bands or zones
    c.data.balance_latitude = False  # [ours] the paper spreads over climate and regions, quotas unknown
    c.data.latitude_band = 15.0  # degrees, height of a band for balance_latitude [ours]
    c.data.balance_climate = False  # needs a climate column in the index of the data set
    c.data.max_repeats = 0.0  # no tile is drawn more often an epoch, on average; 0: no limit [ours]
    c.data.max_nodata = 1.0  # tiles whose worst sensor lacks more are left out
    c.data.complete = False  # True: only tiles with all configured sensors [paper keeps cells with all three]

    c.model = ConfigDict()
    c.model.size = "b"  # "s", "b", "l", or "" with width, depth and heads given
    c.model.width, c.model.depth, c.model.heads = 0, 0, 0
    c.model.sensors = SENSOR_KEYS
    c.model.fusion = True  # cross-attention over the sensors of a view [paper]
    c.model.queries = 5  # [paper] 5; its ablation: 1 query 57.2/89.2, 5 queries 58.1/90.4
    c.model.fusion_heads = 16  # [Panopticon]
    c.model.drop_path = 0.1  # student only [paper]
    c.model.prototypes = 65536  # [paper]
    c.model.head_hidden = 2048  # [DINO]
    c.model.head_bottleneck = 256  # [DINO]
    c.model.init_std = 0.02  # [code] linear layers; narrow models want about 0.7 / sqrt(width) [ours]

    c.views = ConfigDict()
    c.views.globals = 2  # [paper]
    c.views.locals = 8  # [DINO]; the paper does not say
    c.views.global_size = 224  # [paper]
    c.views.local_size = 96  # [paper]
    c.views.global_scale = (0.25, 1.0)  # [paper]
    c.views.local_scale = (0.05, 0.25)  # [paper]
    c.views.flips = True  # [ours]; color jitter, blur and solarization are left out on purpose [paper]
    c.views.modality_rule = "bernoulli"  # [ours] best reading; "fuse_or_one", "one", "all"
    c.views.modality_threshold = 0.5  # [paper]
    c.views.modality_group = 0  # [ours] samples whose views share out the subsets evenly; 0: each draws by itself
    c.views.aspect = (0.75, 4 / 3)  # of a box, width to height [DINO]
    c.views.min_valid = 0.5  # a box with fewer measured pixels is redrawn [ours]
    c.views.box_tries = 4  # boxes drawn for one; where none is valid enough the best is taken [ours]

    c.objective = ConfigDict()
    c.objective.alpha = 0.8  # share of the overall center; 1 is plain DINO [paper]
    c.objective.frequent = ()  # names of the high-frequency classes; empty: share above 1 / number that occur [ours]
    c.objective.center_momentum = 0.9  # [DINO]
    c.objective.student_temp = 0.1  # [DINO]
    c.objective.teacher_temp_start = 0.04  # [paper]
    c.objective.teacher_temp = 0.06  # [paper]
    c.objective.teacher_temp_warmup = "30 epochs"  # [DINO]
    c.objective.ema_start = 0.996  # [paper]
    c.objective.ema_end = 1.0

    c.optim = ConfigDict()
    c.optim.base_lr = 5e-4  # for a batch of 256, scaled linearly [DINO]
    c.optim.min_lr = 1e-6  # [DINO]
    c.optim.warmup = "10 epochs"  # [DINO]
    c.optim.decay_start = 0.04  # [DINO]
    c.optim.decay_end = 0.4  # [DINO]
    c.optim.clip = 3.0  # per tensor, not global [DINO]
    c.optim.freeze_last = "1 epoch"  # last layer of the head [DINO]
    c.optim.b1, c.optim.b2, c.optim.eps = 0.9, 0.999, 1e-8  # AdamW's own

    c.compute = ConfigDict()
    c.compute.dtype = "bfloat16"  # matrix products; parameters, norms, softmax, loss and EMA stay fp32
    c.compute.scan = False  # lax.scan over blocks: compiles faster, needs more memory
    c.compute.remat = "none"  # "block" recomputes blocks in the backward pass, "dots" all but their matrix products
    c.compute.attention = "auto"  # "xla", "head_major", "cudnn" or "pallas"
    c.compute.fusion_kernel = "auto"  # "xla", or "pallas": one pass over the values; "auto" takes it on TPU
    c.compute.view_kernel = "auto"  # "xla", or "pallas": nothing turned round in memory; "auto" takes it on TPU
    c.compute.reduce_dtype = "float32"  # of sums of gradients over devices; "bfloat16" halves the traffic
    c.compute.overlap = True  # TPU: sums gradients beside computing, by options that another compiler may not know
    c.compute.stems = "all"  # of all views, or of those that "drawn" the sensor; that needs views.modality_group
    c.compute.folded = True  # stems and fusion as merged products: same parameters and gradients, fewer FLOPs

    c.mesh = ConfigDict()
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = -1, 0, 1  # -1 takes the devices that are left; fsdp 0: 16 on TPU, else 1

    c.checkpoint = ConfigDict()
    c.checkpoint.every = "1 epoch"
    c.checkpoint.keep_last = 2
    c.checkpoint.keep_every = "50 epochs"  # written besides, and stay forever; "0": none
    c.checkpoint.teacher_every = "10 epochs"  # weights alone, for users; one at the end in any case

    c.log = ConfigDict()
    c.log.every = "50 steps"
    c.log.tensorboard = True
    c.log.wandb = ""  # project name; needs wandb installed
    c.log.pictures = True  # views of the first batch before step 1

    c.knn = ConfigDict()
    c.knn.every = "10 epochs"  # "0": never; also runs at step 0 (random init) and at the end
    c.knn.split = "validation"  # queries
    c.knn.gallery = "train"  # labelled neighbors
    c.knn.train_examples = 10000
    c.knn.test_examples = 5000
    c.knn.batch_size = 256
    c.knn.protocol = "galileo-knn20"
    c.knn.labelled = ""  # folder of labelled images to evaluate as well, with the same protocol (docs/evaluation.md)
    c.knn.suite = "folder"  # what that folder is: a suite of terrafm_jax.evaluate

    c.profile = ConfigDict()
    c.profile.start, c.profile.stop = 0, 0  # steps between which a profiler trace is written
    return c


def small(c: ConfigDict) -> ConfigDict:
    """Shrinks any config into a smoke test of itself: the same switches, tiny sizes (``:runlocal``)."""
    c.batch_size, c.total_steps = 8, "4"
    c.model.size, c.model.width, c.model.depth, c.model.heads = "", 48, 2, 3
    c.model.prototypes, c.model.head_hidden, c.model.head_bottleneck, c.model.fusion_heads = 128, 64, 32, 4
    c.views.global_size, c.views.local_size, c.views.locals = 64, 32, 2
    c.data.workers = 0
    c.mesh.data, c.mesh.fsdp, c.mesh.tensor = -1, 1, 1
    c.optim.warmup, c.optim.freeze_last, c.objective.teacher_temp_warmup = "1", "1", "2"
    c.checkpoint.every, c.checkpoint.keep_every, c.checkpoint.teacher_every = "2", "0", "0"
    c.log.every, c.log.tensorboard = "1", False
    c.knn.every, c.knn.train_examples, c.knn.test_examples, c.knn.batch_size = "4", 64, 64, 16
    return c


# One row of the published ablation each (facts: B model, 200k samples); every row adds one thing.
_PLAIN = {"model.fusion": False, "views.modality_rule": "one", "objective.alpha": 1.0}
ABLATIONS: dict[str, dict[str, Any]] = {
    "single": {**_PLAIN, "model.sensors": ("s2_l2a",)},
    "modality": _PLAIN,
    "fusion": {"objective.alpha": 1.0},
    "full": {},
}


def apply_argument(c: ConfigDict, argument: str | None) -> ConfigDict:
    """Reads the part of ``--config=FILE:ARG`` after the colon: ``runlocal``, an ablation row, or both by comma."""
    for word in filter(None, (argument or "").split(",")):
        if word == "runlocal":
            c = small(c)
        elif word in ABLATIONS:
            for key, value in ABLATIONS[word].items():
                section, field = key.split(".")
                c[section][field] = value
        else:
            raise ConfigError(f"config argument {word!r}: expected runlocal or one of {list(ABLATIONS)}")
    return c


# --- checking ---------------------------------------------------------------------------------

_CHOICES = {
    "data.statistics": ("dataset", "published"),
    "data.cache": ("none", "ram"),
    "data.sampling": ("uniform", "paper", "balanced"),
    "model.size": ("", "s", "b", "l"),
    "views.modality_rule": ("bernoulli", "fuse_or_one", "one", "all"),
    "compute.dtype": ("float32", "bfloat16"),
    "compute.reduce_dtype": ("float32", "bfloat16"),
}
_SIGNED = ("seed", "mesh.data", "mesh.fsdp", "mesh.tensor")  # of a mesh -1 is what is left
_POSITIVE = (  # of what there has to be some; where 0 is a size it means none, or all
    "batch_size", "microbatches", "data.echo", "data.canvases", "model.queries", "model.fusion_heads",
    "model.prototypes", "model.head_hidden", "model.head_bottleneck", "knn.batch_size",
)  # fmt: skip
_PAIRS = ("views.global_scale", "views.local_scale", "views.aspect")
_DURATIONS = (
    "total_steps", "objective.teacher_temp_warmup", "optim.warmup", "optim.freeze_last", "checkpoint.every",
    "checkpoint.keep_every", "checkpoint.teacher_every", "log.every", "knn.every",
)  # fmt: skip


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested config -> {"section.field": value}; sequences become tuples."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = tuple(value) if isinstance(value, list | tuple) else value
    return flat


def schema_faults(want: Mapping[str, Any], have: Mapping[str, Any], choices: Mapping[str, Sequence[str]]) -> list[str]:
    """What is wrong with a flat config against ``want``, the flat defaults; ``choices``: key -> values it may have."""
    faults = []
    for key in have.keys() - want.keys():
        near = difflib.get_close_matches(key, want, 1, 0.5)
        faults.append(f"config.{key}: unknown" + (f"; did you mean config.{near[0]}?" if near else ""))
    faults += [f"config.{key}: missing" for key in want.keys() - have.keys()]
    for key in want.keys() & have.keys():
        value, default = have[key], want[key]
        whole_for_float = isinstance(default, float) and type(value) is int
        if type(value) is not type(default) and not whole_for_float:
            faults.append(f"config.{key}: found {value!r} ({type(value).__name__}), expected {type(default).__name__}")
        elif key in choices and value not in choices[key]:
            faults.append(f"config.{key}: found {value!r}, expected one of {list(choices[key])}")
        elif isinstance(value, int | float) and value < (low := int(key in _POSITIVE)) and key not in _SIGNED:
            faults.append(f"config.{key}: found {value!r}, expected {low} or more")
    return faults


def check(config: ConfigDict) -> None:
    """Raises ConfigError that lists every unknown, missing, mistyped or impossible key."""
    want, have = flatten(base()), flatten(config)
    faults = schema_faults(want, have, _CHOICES)
    for key in want.keys() & have.keys():
        value = have[key]
        if key in _DURATIONS and isinstance(value, str):
            faults += [f"config.{key}: {e}" for e in Duration.faults(value)]
        elif key in _PAIRS and isinstance(value, tuple) and [type(v) in (int, float) for v in value] != [True, True]:
            faults.append(f"config.{key}: found {value!r}, expected two numbers, such as {want[key]}")
    faults += [f"config.model.sensors: unknown {s!r}, expected some of {list(SENSOR_KEYS)}"
               for s in have.get("model.sensors", ()) if s not in SENSOR_KEYS]  # fmt: skip
    faults += [f"config.objective.frequent: unknown {n!r}, expected some of {list(landcover.NAMES)}"
               for n in have.get("objective.frequent", ()) if n not in landcover.NAMES]  # fmt: skip
    refuse(faults)


def refuse(faults: Sequence[str]) -> None:
    """Raises ConfigError that lists the faults, if there are any."""
    if faults:
        count = f"{len(faults)} fault{'s' * (len(faults) != 1)}"
        raise ConfigError("\n  ".join([f"{count} in the config:", *sorted(faults)]))


# --- durations --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Duration:
    """Converts written durations to steps, given the batch size and the records per epoch."""

    batch_size: int
    examples_per_epoch: int
    total_steps: int | None = None

    _PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e[0-9]+)?)\s*(steps?|epochs?|examples?|%|)\s*", re.IGNORECASE)

    @classmethod
    def faults(cls, text: str) -> list[str]:
        if cls._PATTERN.fullmatch(text):
            return []
        return [f"found {text!r}, expected a number of steps, epochs, examples or %, such as '10 epochs'"]

    def steps(self, text: str) -> int:
        """ "10 epochs", "5%" (of total_steps), "1e6 examples", "300 steps" or "300" -> steps, rounded.

        What is more than nothing is at least one step: 0 means never.
        """
        match = self._PATTERN.fullmatch(text)
        if not match:
            raise ConfigError(self.faults(text)[0])
        number, unit = float(match.group(1)), match.group(2).lower().rstrip("s")
        if unit == "epoch":
            number *= self.examples_per_epoch / self.batch_size
        elif unit == "example":
            number /= self.batch_size
        elif unit == "%":
            if self.total_steps is None:
                raise ConfigError(f"total_steps cannot be a percentage: {text!r}")
            number *= self.total_steps / 100
        return max(1, round(number)) if number else 0


def durations(config: ConfigDict, examples_per_epoch: int) -> dict[str, int]:
    """Every duration of the config in steps, keyed by its dotted name. Raises ConfigError for a run of no steps."""
    clock = Duration(config.batch_size, examples_per_epoch)
    total = clock.steps(config.total_steps)
    if not total:
        raise ConfigError(f"config.total_steps: found {config.total_steps!r}, expected more than nothing")
    clock = dataclasses.replace(clock, total_steps=total)
    flat = flatten(config)
    return {key: total if key == "total_steps" else clock.steps(flat[key]) for key in _DURATIONS}


# --- what the jitted code sees ----------------------------------------------------------------


def model_spec(config: ConfigDict) -> ModelSpec:
    """The ModelSpec of a config. Raises ConfigError unless either a size or all of width, depth and heads are given."""
    from terrafm_jax.models.spec import ModelSpec

    m, how = config.model, config.compute
    fields = dict(
        sensors=tuple(m.sensors), fusion=m.fusion, queries=m.queries, fusion_heads=m.fusion_heads,
        drop_path=m.drop_path, init_std=m.init_std, prototypes=m.prototypes, head_hidden=m.head_hidden,
        head_bottleneck=m.head_bottleneck,
        dtype=how.dtype, scan=how.scan, remat=how.remat, attention=how.attention, fusion_kernel=how.fusion_kernel,
        stems=how.stems, folded=how.folded,
    )  # fmt: skip
    if m.size:
        ignored = [f"{field} = {m[field]}" for field in ("width", "depth", "heads") if m[field]]
        if ignored:
            raise ConfigError(
                f"config.model: size {m.size!r} sets width, depth and heads, found {', '.join(ignored)} too; "
                "for another network give all three and an empty --config.model.size="
            )
        return ModelSpec.of_size(m.size, **fields)
    if not (m.width and m.depth and m.heads):
        raise ConfigError("config.model: give size, or all of width, depth and heads")
    return ModelSpec(width=m.width, depth=m.depth, heads=m.heads, **fields)


def sampling_spec(config: ConfigDict) -> SamplingSpec:
    """The SamplingSpec of a config."""
    from terrafm_jax.data.sampling import SamplingSpec

    d = config.data
    return SamplingSpec(
        mode=d.sampling, power=d.power, sea_keep=d.sea_keep, balance_latitude=d.balance_latitude,
        latitude_band=d.latitude_band, balance_climate=d.balance_climate, max_repeats=d.max_repeats,
        max_nodata=d.max_nodata, complete=d.complete,
    )  # fmt: skip


def train_spec(config: ConfigDict, steps: Mapping[str, int], stats: Statistics, shares: Sequence[float]) -> TrainSpec:
    """The TrainSpec of a config.

    Args:
      steps: from :func:`durations`.
      stats: normalization statistics.
      shares: [NUM_CATEGORIES] expected share of each land-cover category among the sampled records. Where no
        frequent class is among them (maps were not given), there is one center: alpha is 1.
    """
    from terrafm_jax.ssl.views import ViewSpec
    from terrafm_jax.training.optim import OptimSpec
    from terrafm_jax.training.step import ObjectiveSpec, TrainSpec

    v, o, opt = config.views, config.objective, config.optim
    frequent = landcover.frequent(shares, o.frequent)
    # A center that no record feeds stays zero and would only weaken the other.
    alpha = o.alpha if (frequent & (np.asarray(shares) > 0)).any() else 1.0
    return TrainSpec(
        model=model_spec(config),
        views=ViewSpec(
            sensors=tuple(config.model.sensors), globals=v.globals, locals=v.locals, global_size=v.global_size,
            local_size=v.local_size, global_scale=tuple(v.global_scale), local_scale=tuple(v.local_scale),
            flips=v.flips, modality_rule=v.modality_rule, modality_threshold=v.modality_threshold,
            modality_group=v.modality_group,
            aspect=tuple(v.aspect), min_valid=v.min_valid, box_tries=v.box_tries, dtype=config.compute.dtype,
            kernel=config.compute.view_kernel,
        ),
        optim=OptimSpec(
            base_lr=opt.base_lr, batch_size=config.batch_size, warmup_steps=steps["optim.warmup"], min_lr=opt.min_lr,
            decay_start=opt.decay_start, decay_end=opt.decay_end, clip=opt.clip,
            freeze_last_steps=steps["optim.freeze_last"], b1=opt.b1, b2=opt.b2, eps=opt.eps,
            total_steps=steps["total_steps"],
        ),
        objective=ObjectiveSpec(
            student_temp=o.student_temp, teacher_temp_start=o.teacher_temp_start, teacher_temp=o.teacher_temp,
            teacher_temp_warmup_steps=steps["objective.teacher_temp_warmup"], ema_start=o.ema_start,
            ema_end=o.ema_end, alpha=alpha, center_momentum=o.center_momentum,
        ),
        stats=stats,
        frequent=tuple(bool(f) for f in frequent),
        seed=config.seed,
        microbatches=config.microbatches,
        reduce_dtype=config.compute.reduce_dtype,
        overlap=config.compute.overlap,
    )  # fmt: skip
