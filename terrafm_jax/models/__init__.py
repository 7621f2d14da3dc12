"""The network: per-sensor stems, fusion, ViT backbone and DINO head, as pure functions of plain parameter dicts."""

from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.terrafm import (
    Features,
    Prepared,
    encode,
    init_params,
    parameter_count,
    patchify,
    prepare,
    project,
)

__all__ = [
    "Features",
    "ModelSpec",
    "Prepared",
    "encode",
    "init_params",
    "parameter_count",
    "patchify",
    "prepare",
    "project",
]
