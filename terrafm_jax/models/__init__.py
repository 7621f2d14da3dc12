"""The network: per-sensor stems, fusion, ViT backbone and DINO head, as pure functions of plain parameter dicts."""

from terrafm_jax.models.spec import ModelSpec
from terrafm_jax.models.terrafm import (
    Features,
    encode,
    init_params,
    parameter_count,
    patchify,
    project,
)

__all__ = [
    "Features",
    "ModelSpec",
    "encode",
    "init_params",
    "parameter_count",
    "patchify",
    "project",
]
