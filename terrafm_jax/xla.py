"""What is set before JAX computes: one XLA flag that results depend on, and the folder of compiled programs.

jaxlib 0.10.2 and 0.11 hand some reductions on CPU to a library (``__ynn_fusion``) that returns silently
wrong, thread-dependent sums: https://github.com/jax-ml/jax/issues/39103; the fused embedding of this
project met it (errors of order 1 in features). jaxlib 0.12 is right again. Switching the offload off
costs nothing measurable here.
"""

from __future__ import annotations

import os
from importlib import metadata

FLAG = "--xla_cpu_experimental_ynn_fusion_type"


def avoid_wrong_sums() -> None:
    """Adds ``FLAG=`` (off) to XLA_FLAGS where jaxlib is affected, unless the user set it.

    XLA reads its flags once, at the first computation; ``import terrafm_jax`` before that.
    """
    try:
        version = tuple(int(part) for part in metadata.version("jaxlib").split(".")[:3] if part.isdigit())
    except metadata.PackageNotFoundError:
        return
    flags = os.environ.get("XLA_FLAGS", "")
    if (0, 10, 2) <= version < (0, 12) and FLAG not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FLAG}=".strip()


def cache_compilations() -> None:
    """Keeps compiled programs in the user's cache: a second start need not compile again."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.join(os.path.expanduser("~"), ".cache", "terrafm_jax"))
