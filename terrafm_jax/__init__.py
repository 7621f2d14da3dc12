"""TerraFM in JAX: self-supervised pretraining on Sentinel-1 and Sentinel-2, and what to do with the result."""

from __future__ import annotations

from typing import Any

from terrafm_jax.xla import avoid_wrong_sums

avoid_wrong_sums()

__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """Imports the loader (and with it JAX) only when asked for: data workers need neither."""
    if name == "load":
        from terrafm_jax.inference import load

        return load
    raise AttributeError(f"module 'terrafm_jax' has no attribute {name!r}")
