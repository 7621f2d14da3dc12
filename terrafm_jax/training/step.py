"""One training step as one pure function: views -> student and teacher -> loss -> update -> EMA and centers.

``train_step`` depends only on (spec, state, batch): all random numbers come from one key, folded
with the step, and every schedule is a function of the step. ``make_step`` compiles it for a mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from terrafm_jax import landcover
from terrafm_jax.models import drawn
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.terrafm import encode_cls, init_params, project
from terrafm_jax.models.vit import drop_path_keep
from terrafm_jax.sensors import Statistics
from terrafm_jax.ssl import schedules
from terrafm_jax.ssl.objective import (
    CenterSums,
    ObjectiveSpec,
    center_metrics,
    center_sums,
    init_centers,
    loss_metrics,
    move_centers,
    pair_cross_entropy,
    teacher_targets,
)
from terrafm_jax.ssl.views import ViewSet, ViewSpec, make_views, views_seen_at_most
from terrafm_jax.training.compiler import compiler_options
from terrafm_jax.training.gradients import value_and_grad
from terrafm_jax.training.optim import OptimSpec, ema, make_optimizer
from terrafm_jax.training.sharding import (
    EMBEDDING,
    PROTOTYPES,
    batch_sharding,
    check_batch,
    describe_parameters,
    gather_params,
    state_shardings,
    sums_whole,
)
from terrafm_jax.training.state import TrainState

Metrics = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """Everything that the compiled step depends on besides shapes.

    Attributes:
      model, views, optim, objective: specs of the parts.
      stats: normalization statistics of the sensors.
      frequent: per land-cover category, whether it feeds the second center.
      seed: of initialization and of everything drawn while training.
      microbatches: gradient accumulation over this many parts of the batch. Less memory; the same result up to
        rounding and different random draws.
      reduce_dtype: "float32" or "bfloat16", the dtype in which gradients of kernels are summed over devices, and
        in which kernels are gathered over the fsdp axis. bfloat16 halves the traffic and rounds the sums.
      overlap: on TPU, compiles with ``compiler.TPU_OPTIONS``, which overlap collectives with compute.
    """

    model: ModelSpec
    views: ViewSpec
    optim: OptimSpec
    objective: ObjectiveSpec
    stats: Statistics
    frequent: tuple[bool, ...]
    seed: int = 0
    microbatches: int = 1
    reduce_dtype: str = "float32"
    overlap: bool = True

    def __post_init__(self) -> None:
        faults = []
        if self.reduce_dtype not in ("float32", "bfloat16"):
            faults.append(f"reduce_dtype is {self.reduce_dtype!r}, expected float32 or bfloat16")
        if self.reduce_dtype == "bfloat16" and self.model.dtype != "bfloat16":
            faults.append(f"reduce_dtype bfloat16 needs model.dtype bfloat16, found {self.model.dtype}")
        if tuple(self.views.sensors) != tuple(self.model.sensors):
            faults.append(f"views.sensors {self.views.sensors} differ from model.sensors {self.model.sensors}")
        if self.views.patch != self.model.patch:
            faults.append(f"views.patch {self.views.patch} differs from model.patch {self.model.patch}")
        if len(self.frequent) != landcover.NUM_CATEGORIES:
            faults.append(f"frequent has {len(self.frequent)} entries, expected {landcover.NUM_CATEGORIES}")
        if self.model.stems == "drawn" and not self.views.modality_group:
            faults.append("model.stems 'drawn' needs views.modality_group of 1 or more (8 is usual), found 0")
        if len(self.model.sensors) > 1 and not self.model.fusion and self.views.modality_rule != "one":
            rule = self.views.modality_rule  # else tokens of several sensors would be added up, unnoticed
            faults.append(f"model.fusion False needs views.modality_rule 'one' (one sensor a view), found {rule!r}")
        if self.views.globals + self.views.locals < 2:
            faults.append("views.globals + views.locals must be at least 2: the loss compares views with each other")
        if self.microbatches < 1:
            faults.append(f"microbatches {self.microbatches} must be at least 1")
        if faults:
            raise ValueError("training: " + "; ".join(faults))

    def __hash__(self) -> int:
        names = [field.name for field in dataclasses.fields(self) if field.name != "stats"]  # mappings have no hash
        return hash((self.stats.to_json(), *(getattr(self, name) for name in names)))


# --- state ------------------------------------------------------------------------------------


def _new_state(spec: TrainSpec, key: jax.Array) -> TrainState:
    params = init_params(spec.model, key)
    moments = make_optimizer(spec.optim, params).init(params)
    teacher = jax.tree.map(jnp.copy, params)
    return TrainState(jnp.zeros((), jnp.int32), params, teacher, moments, init_centers(spec.model.prototypes))


def _key(spec: TrainSpec) -> jax.Array:
    return jax.random.key(spec.seed, impl="threefry2x32")  # the same numbers on every mesh and platform


def abstract_state(spec: TrainSpec, mesh: Mesh) -> TrainState:
    """The state as ShapeDtypeStructs with shardings: what a checkpoint is restored into.

    Raises:
      RuleError: a parameter that no optimizer rule or no sharding rule covers.
      ShardingError: a parameter that the mesh does not divide.
    """
    shapes = jax.eval_shape(lambda: _new_state(spec, _key(spec)))
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, state_shardings(mesh, shapes)
    )


def init_state(spec: TrainSpec, mesh: Mesh) -> TrainState:
    """A fresh state for ``spec.seed``, created sharded: no device ever holds more than its shard.

    Raises: as :func:`abstract_state`.
    """
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(spec, mesh))
    # The key is made inside, so that processes of one job need not agree on a concrete array first.
    return jax.jit(lambda: _new_state(spec, jax.random.fold_in(_key(spec), 0x1217)), out_shardings=shardings)()


def parameter_table(spec: TrainSpec, mesh: Mesh) -> str:
    """Text table of every parameter: shape, sharding, decay, learning-rate multiplier, frozen steps."""
    params = abstract_state(spec, mesh).params
    return describe_parameters(mesh, params, make_optimizer(spec.optim, params))


# --- networks ---------------------------------------------------------------------------------


def _merge(x: jax.Array) -> jax.Array:
    """[B, V, ...] -> [B V, ...]; sample-major, so the sharding of the batch survives."""
    return x.reshape(-1, *x.shape[2:])


def _places(spec: TrainSpec, views: ViewSet) -> tuple[int, ...] | None:
    """Per sensor, the places for views in its stem on each device (``models.drawn``); None computes all views."""
    samples, each, _ = views.student.shape
    return views_seen_at_most(spec.views, samples, each, drawn.parts()) if spec.model.stems == "drawn" else None


def _stems_over(spec: TrainSpec, *sets: tuple[ViewSet, jax.Array]) -> Metrics:
    """``stems_over``, the share of stems with more views than places on some device; empty if all views have places."""
    over = [
        ~drawn.fits(_merge(present), places)
        for views, present in sets
        if (places := _places(spec, views)) is not None
    ]  # fmt: skip
    return {"stems_over": jnp.mean(jnp.stack(over).astype(jnp.float32))} if over else {}


def _class_tokens(
    spec: TrainSpec,
    backbone: Any,
    sets: Sequence[tuple[ViewSet, jax.Array]],
    keep: Sequence[jax.Array | None] | None = None,
) -> list[jax.Array]:
    """Class tokens [B, V, d] of every set of views; views of one size are one batch.

    Args:
      sets: views, and the sensors seen of each, bool [B, V, S].
      keep: the result of :func:`_drop_path`; None turns the drop path off.
    """
    arguments = []
    for views, present in sets:
        mask = _merge(present) if len(spec.model.sensors) > 1 else None
        arguments.append(({name: _merge(x) for name, x in views.patches.items()}, mask))
    keep = [None] * len(sets) if keep is None else [x if x is None else x.reshape(*x.shape[:2], -1) for x in keep]
    places = [_places(spec, views) for views, _ in sets]
    tokens = encode_cls(spec.model, backbone, arguments, keep=keep, places=places)
    return [x.reshape(*present.shape[:2], -1) for x, (_, present) in zip(tokens, sets, strict=True)]


def _drop_path(spec: ModelSpec, sets: Sequence[ViewSet], key: jax.Array) -> list[jax.Array | None]:
    """Per set the drop path's factors for the residuals of its B samples and V views, [depth, 2, B, V], or None."""
    if not spec.drop_path:
        return [None] * len(sets)
    keys = (jax.random.fold_in(key, i) for i in range(len(sets)))
    shapes = (views.student.shape[:2] for views in sets)
    return [drop_path_keep(spec, b * v, k).reshape(spec.depth, 2, b, v) for (b, v), k in zip(shapes, keys, strict=True)]


def _student(spec: TrainSpec, params: Any, sets: Sequence[ViewSet], keep: Sequence[jax.Array | None]) -> jax.Array:
    """Logits [B, V, K] of all views in the order of ``sets``; the head runs once."""
    tokens = _class_tokens(spec, params["backbone"], [(views, views.student) for views in sets], keep)
    return _project(spec.model, params["head"], jnp.concatenate(tokens, axis=1))


def _project(spec: ModelSpec, head: Any, tokens: jax.Array) -> jax.Array:
    return project(spec, head, _merge(tokens)).reshape(*tokens.shape[:2], -1)


# --- one step ---------------------------------------------------------------------------------


def _loss_and_gradients(
    spec: TrainSpec,
    state: TrainState,
    batch: Mapping[str, Any],
    key: jax.Array,
    teacher_temp: jax.Array,
) -> tuple[Any, CenterSums, Metrics]:
    """Gradients, center sums and metrics of a batch or microbatch."""
    gather = _gatherer(spec)
    view_key, drop_key = jax.random.split(key)
    stats = {name: spec.stats.arrays(name) for name in spec.model.sensors}
    with jax.named_scope("views"):
        # The column layout is cheaper to produce on TPU, the plain one elsewhere.
        layout = "columns" if spec.model.backend == "tpu" or spec.views.kernel == "pallas" else "patches"
        global_views, local_views = make_views(spec.views, stats, batch, view_key, layout=layout)
    with jax.named_scope("teacher"):
        weights = gather(state.teacher)
        (tokens,) = _class_tokens(spec, weights["backbone"], [(global_views, global_views.teacher)])
        teacher = jax.lax.stop_gradient(_project(spec.model, weights["head"], tokens))
    with jax.named_scope("loss"):
        targets = teacher_targets(teacher, state.centers, teacher_temp=teacher_temp, alpha=spec.objective.alpha)

    # Everything with a batch axis is an argument: on several TPU slices, each maps this over its own samples.
    def loss_fn(params: Any, sets: Sequence[ViewSet], probs: jax.Array, keep: Sequence[jax.Array | None]) -> jax.Array:
        with jax.named_scope("student"):
            student = _student(spec, gather(params), sets, keep)
        with jax.named_scope("loss"):
            return pair_cross_entropy(student, probs, spec.objective.student_temp)

    sets = [views for views in (global_views, local_views) if views.student.shape[1]]
    arguments = (sets, targets.probs, _drop_path(spec.model, sets, drop_key))
    loss, grads = value_and_grad(loss_fn, state.params, arguments, batch_axes=(0, 0, 2))
    sums = center_sums(teacher, jnp.asarray(spec.frequent)[batch["landcover"]])
    metrics = {"loss": loss, "feature_std": _feature_std(tokens), **loss_metrics(loss, targets)}
    metrics |= _stems_over(spec, (global_views, global_views.teacher), *((views, views.student) for views in sets))
    metrics |= _class_sums(metrics.pop("sample_entropy"), batch["landcover"])
    for network in ("student", "teacher"):
        seen = getattr(global_views, network)
        metrics[f"sensors_per_view_{network}"] = jnp.mean(jnp.sum(seen, axis=-1).astype(jnp.float32))
    return grads, sums, metrics


def _gatherer(spec: TrainSpec) -> Callable[[Any], Any]:
    """:func:`gather_params` with the options of this spec, for teacher and student alike."""
    return functools.partial(
        gather_params,
        kernel_dtype=jnp.bfloat16 if spec.reduce_dtype == "bfloat16" else None,
        in_place=f"{PROTOTYPES}|{EMBEDDING}" if spec.model.folded else PROTOTYPES,
        sum_whole=spec.model.sum_whole,
    )


def _feature_std(tokens: jax.Array) -> jax.Array:
    """Spread over the batch of the L2-normalized class tokens, times sqrt(d): 1 for random directions, 0 collapsed."""
    tokens = _merge(tokens).astype(jnp.float32)
    unit = tokens / jnp.maximum(jnp.linalg.norm(tokens, axis=-1, keepdims=True), 1e-12)
    return jnp.mean(jnp.std(unit, axis=0)) * jnp.sqrt(jnp.float32(tokens.shape[-1]))


def _class_sums(entropy: jax.Array, classes: jax.Array) -> Metrics:
    """Per land-cover category the share of the batch and the summed teacher entropy, [NUM_CATEGORIES] each."""
    member = jax.nn.one_hot(classes, landcover.NUM_CATEGORIES, dtype=jnp.float32)
    return {"class_share": jnp.mean(member, axis=0), "class_entropy": jnp.mean(member * entropy[:, None], axis=0)}


def _accumulate(
    spec: TrainSpec,
    state: TrainState,
    batch: Mapping[str, Any],
    key: jax.Array,
    teacher_temp: jax.Array,
) -> tuple[Any, CenterSums, Metrics]:
    """Gradient accumulation: :func:`_loss_and_gradients` over ``spec.microbatches`` parts, each sharded evenly."""
    parts = spec.microbatches
    if parts == 1:
        return _loss_and_gradients(spec, state, batch, key, teacher_temp)
    # Part i takes rows i, i + parts, ...: splitting the axis this way moves nothing between devices.
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)

    def body(total: Any, part: tuple[Any, jax.Array]) -> tuple[Any, None]:
        found = _loss_and_gradients(spec, state, part[0], jax.random.fold_in(key, part[1]), teacher_temp)
        return jax.tree.map(jnp.add, total, found), None

    first = jax.tree.map(lambda x: x[0], split)
    shapes = jax.eval_shape(lambda: _loss_and_gradients(spec, state, first, key, teacher_temp))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, sums, metrics), _ = jax.lax.scan(body, zeros, (split, jnp.arange(parts)))
    return jax.tree.map(lambda x: x / parts, grads), sums, jax.tree.map(lambda x: x / parts, metrics)


def views_of_step(spec: TrainSpec, batch: Mapping[str, Any], step: int) -> tuple[ViewSet, ViewSet]:
    """The (global, local) views that step number ``step`` trains on, for pictures (wrong with microbatches)."""
    view_key, _ = jax.random.split(jax.random.fold_in(_key(spec), step))
    stats = {name: spec.stats.arrays(name) for name in spec.model.sensors}
    return make_views(spec.views, stats, batch, view_key)


def train_step(spec: TrainSpec, state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
    """One update. Pure; see ``data/tiles.py`` for the batch. Where arrays are sharded, their mesh must be in context.

    The order is DINO's: loss with the centers before this batch, AdamW, then the teacher's EMA of the new
    student, then the centers. A step whose loss or gradient is not finite leaves all of them as they were.

    Returns:
      The new state and fp32 scalars, means over the global batch: loss, kl, teacher_entropy,
      marginal_entropy, feature_std, center_norm, center_frequent_norm, center_distance, grad_norm (unclipped),
      grad_norm_{backbone,head,max}, grad_clipped, update_skipped, lr, weight_decay, momentum, teacher_temp,
      sensors_per_view_{student,teacher}, class_share/NAME and class_entropy/NAME (nan where absent), and, with
      ``models.drawn``, stems_over.
    """
    step, goal = state.step, spec.objective
    teacher_temp = schedules.teacher_temperature(
        step, start=goal.teacher_temp_start, end=goal.teacher_temp, warmup_steps=goal.teacher_temp_warmup_steps
    )
    rate = schedules.ema_rate(step, start=goal.ema_start, end=goal.ema_end, total_steps=spec.optim.total_steps)
    grads, sums, metrics = _accumulate(spec, state, batch, jax.random.fold_in(_key(spec), step), teacher_temp)
    with jax.named_scope("update"):
        optimizer = make_optimizer(spec.optim, state.params)
        params, moments, optim_metrics = optimizer.update(grads, state.opt_state, state.params, step)
        teacher = ema(state.teacher, params, rate)
        centers = move_centers(state.centers, sums, momentum=goal.center_momentum)
        # One sample that overflows must not end the run: such a step changes nothing but ``state.step``.
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(optim_metrics["grad_norm"])
        params, teacher, moments, centers = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, teacher, moments, centers),
            (state.params, state.teacher, state.opt_state, state.centers),
        )
    metrics |= optim_metrics | center_metrics(centers) | {"update_skipped": 1.0 - finite.astype(jnp.float32)}
    metrics |= {"teacher_temp": teacher_temp, "momentum": 1.0 - rate}
    return TrainState(step + 1, params, teacher, moments, centers), _named(metrics)


def _named(metrics: Metrics) -> Metrics:
    """Expands the per-class arrays to scalars with the names of the categories."""
    share, entropy = metrics.pop("class_share"), metrics.pop("class_entropy")
    mean = jnp.where(share > 0, entropy / jnp.maximum(share, 1e-12), jnp.nan)
    for i, name in enumerate(landcover.NAMES):
        metrics[f"class_share/{name}"], metrics[f"class_entropy/{name}"] = share[i], mean[i]
    return metrics


def make_step(spec: TrainSpec, mesh: Mesh) -> Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]:
    """The jitted step for a mesh: ``step(state, batch) -> (state, metrics)``; the old state is donated.

    ``.lower(abstract_state(...), batch shapes)`` serves ahead-of-time compilation.

    Raises:
      ShardingError: the mesh does not divide the batch or the parameters.
      RuleError: a parameter that no rule covers.
    """
    check_batch(mesh, spec.optim.batch_size, spec.microbatches)
    state = jax.tree.map(lambda x: x.sharding, abstract_state(spec, mesh))
    if sums_whole(mesh):
        spec = dataclasses.replace(spec, model=dataclasses.replace(spec.model, sum_whole=True))

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return train_step(spec, state, batch)

    return jax.jit(
        step,
        in_shardings=(state, batch_sharding(mesh)),
        out_shardings=(state, NamedSharding(mesh, P())),
        donate_argnums=0,
        compiler_options=compiler_options(mesh, spec.model.backend, spec.overlap),
    )
