"""The state of a training run. Everything else (schedules, random numbers) is a function of ``step``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import numpy as np

from terrafm_jax import weights
from terrafm_jax.ssl.objective import Centers
from terrafm_jax.training.optim import Moments


@flax.struct.dataclass
class TrainState:
    """The state of pretraining; a pytree.

    Attributes:
      step: int32 [], number of updates made.
      params: the student's parameters, fp32, {"backbone": ..., "head": ...}.
      teacher: EMA of the student, same structure, fp32.
      opt_state: moments of AdamW.
      centers: overall and frequent center of the teacher's outputs, fp32 [K] each.
    """

    step: jax.Array
    params: Any
    teacher: Any
    opt_state: Moments
    centers: Centers


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
