"""The state of a training run. Everything else (schedules, random numbers) is a function of ``step``."""

from __future__ import annotations

from typing import Any

import flax.struct
import jax

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
