"""Names and shapes of PyTorch state dicts, both ways, on NumPy arrays and bit for bit.

The *upstream* dict is flat and headless: ``patch_embed.conv2d_s1.weight`` [3d, C, 16, 16],
``blocks.0.attn.qkv.weight`` [3d, d], ``pos_embed`` [1, 197, d]. The *full* dict has two groups more:
``patch_embed.fusion.{queries, key.weight, pool}`` and ``head.{mlp.0..2.weight, mlp.0..2.bias, last_layer.weight}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from terrafm_jax import weights
from terrafm_jax.sensors import SENSORS

_HEAD = "head."
_STEM = "conv2d_"
_FUSION = "patch_embed.fusion."


def to_torch(params: Mapping[str, Any], *, head: bool = True, fusion: bool = True) -> dict[str, np.ndarray]:
    """``{"backbone": ..., "head": ...}`` -> {torch name: contiguous array}.

    Args:
      params: as ``models.init_params`` gives it; ``head`` may be missing.
      head, fusion: False leaves the group out, which gives the upstream dict.
    """
    trees = [("", params["backbone"])]
    if head and params.get("head"):
        trees.append((_HEAD, params["head"]))
    found: dict[str, np.ndarray] = {}
    for prefix, tree in trees:
        for path, value in weights.flatten(tree).items():
            name, array = _to_torch(path, np.asarray(value))
            if fusion or not name.startswith(_FUSION):
                found[prefix + name] = np.ascontiguousarray(array)
    return found


def from_torch(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of :func:`to_torch`: nested ``{"backbone": ..., "head": ...}``, ``head`` only if it is there."""
    flat = {}
    for name, value in state.items():
        group, rest = ("head", name.removeprefix(_HEAD)) if name.startswith(_HEAD) else ("backbone", name)
        path, array = _from_torch(rest, np.asarray(value))
        flat[f"{group}/{path}"] = np.ascontiguousarray(array)
    return weights.unflatten(flat)


def _to_torch(path: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    *parents, leaf = path.split("/")
    if leaf == "scale":
        return ".".join([*parents, "weight"]), value
    if leaf != "kernel":
        return path.replace("/", "."), value
    name = ".".join([*parents, "weight"])
    if not parents[-1].startswith(_STEM):
        return name, value.T
    bands = len(SENSORS[parents[-1].removeprefix(_STEM)].bands)
    side = math.isqrt(value.shape[0] // bands)
    return name, value.reshape(side, side, bands, -1).transpose(3, 2, 0, 1)


def _from_torch(name: str, value: np.ndarray) -> tuple[str, np.ndarray]:
    *parents, leaf = name.split(".")
    if leaf != "weight":
        return name.replace(".", "/"), value
    if value.ndim == 1:
        return "/".join([*parents, "scale"]), value
    if value.ndim == 4:
        value = value.transpose(2, 3, 1, 0).reshape(-1, value.shape[0])
    else:
        value = value.T
    return "/".join([*parents, "kernel"]), value
