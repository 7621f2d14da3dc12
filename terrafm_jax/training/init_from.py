"""Starting from the weights of ``config.init_from``: what fits is taken; what does not, or may mislead, is told."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np

from terrafm_jax import weights
from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.sensors import Statistics
from terrafm_jax.training.state import TrainState


class Weights(Protocol):
    """What ``config.init_from`` holds; ``terrafm_jax.loader.read`` returns it.

    Attributes:
      params: {"backbone": ..., "head": ...}; the head is optional.
      spec, stats: the network that the parameters are of, and the statistics that it normalizes with.
    """

    @property
    def params(self) -> Mapping[str, Any]: ...

    @property
    def spec(self) -> ModelSpec: ...

    @property
    def stats(self) -> Statistics: ...


_SHIFT = 0.1  # deviations by which statistics of two samples of the Earth may well differ


def doubts_about(given: Weights, model: ModelSpec, stats: Statistics) -> list[str]:
    """What makes weights mean something else in this run although their shapes fit: warnings, in lines.

    Args:
      given: the weights.
      model, stats: the network of this run and its normalization.
    """
    doubts = [
        f"{field} {theirs} there, {mine} here (config.model.{field}): the same shapes, but another network"
        for field, theirs, mine in (
            ("heads", given.spec.heads, model.heads),
            ("fusion_heads", given.spec.fusion_heads, model.fusion_heads),
        )
        if theirs != mine and (field == "heads" or "fusion" in given.params["backbone"]["patch_embed"])
    ]
    shifts = {key: _shift(given.stats, stats, key) for key in model.sensors if key in given.spec.sensors}
    if shifted := [f"{key} by up to {shift:.2g} deviations" for key, shift in shifts.items() if shift > _SHIFT]:
        released = all(_shift(given.stats, Statistics.published(), key) == 0 for key in shifts)
        remedy = (
            "--config.data.statistics=published has those"
            if released
            else "its statistics.json in place of the data set's keeps those"
        )
        doubts.append(
            f"normalized with other statistics ({', '.join(shifted)}), so its stems know other values; {remedy}"
        )
    return doubts


def _shift(a: Statistics, b: Statistics, key: str) -> float:
    """How far a value within two deviations of a band's mean moves at most, in deviations of ``a``: the worst band."""
    mean, std, other_mean, other_std = (np.asarray(v[key], np.float64) for v in (a.mean, a.std, b.mean, b.std))
    return float(np.max((np.abs(other_mean - mean) + 2 * np.abs(other_std - std)) / std))


def with_weights(state: TrainState, params: Mapping[str, Any]) -> tuple[TrainState, str]:
    """Sets student and teacher to ``params`` wherever path and shape agree; the rest keeps its random values.

    Returns:
      The new state, in the shardings of the old, and a sentence on what was taken and what was not.

    Raises:
      ValueError: no tensor fits, so the weights belong to another size of model.
    """
    given, own = weights.flatten(params), weights.flatten(state.params)
    fitting = {k for k in given.keys() & own.keys() if tuple(given[k].shape) == tuple(own[k].shape)}
    if not fitting:
        example = next(iter(own))
        theirs = tuple(given[example].shape) if example in given else "absent"
        raise ValueError(
            f"init_from: none of its {len(given)} tensors fits this model; for instance {example} is "
            f"{theirs} there and {tuple(own[example].shape)} here"
        )
    random = sorted(own.keys() - fitting)

    def merged(tree: Any) -> Any:
        flat = weights.flatten(tree)
        return weights.unflatten(
            {
                k: jax.device_put(np.asarray(given[k], v.dtype), v.sharding) if k in fitting else v
                for k, v in flat.items()
            }
        )

    left = f"; random: {', '.join(random[:4])}{' ...' if len(random) > 4 else ''}" if random else ""
    report = f"{len(fitting)} of {len(own)} tensors{left}"
    return dataclasses.replace(state, params=merged(state.params), teacher=merged(state.teacher)), report


def unread_weights(init_from: str, meta: Mapping[str, Any]) -> str:
    """A warning where a run is told to begin with other weights than it did: it goes on with its own; else ""."""
    before = meta.get("config", {}).get("init_from", init_from)
    if not init_from or before == init_from:
        return ""
    began = before or "random ones"
    return f"warning: config.init_from={init_from} is not read: this run began with {began}; give another --workdir"
