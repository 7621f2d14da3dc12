"""Options of XLA that the train step is compiled with (docs/scaling.md has what TPU's change)."""

from __future__ import annotations

from jax.sharding import Mesh

# TPU's compiler, left alone, sums all gradients at once after the backward pass, and computes nothing meanwhile.
# These let it sum each one as soon as it is there, beside what is computed next. The last keeps it from cutting
# products with gathered weights into one part per device, which takes longer than gathering.
TPU_OPTIONS = {
    "xla_jf_crs_combiner_threshold_in_bytes": "1000000",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
}
# Gathers weights beside what is computed before they are needed, too. For v5e the compiler does so by itself.
_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}
# On a v4 a product and a sum at once ask for 12 KiB more than its 16 MiB of on-chip memory: nothing compiles.
# A v5p's fusions may take half of its 64 MiB, not a quarter: larger blocks, and room for gathers of weights beside
# them. On v5e and v6e the memory gains nothing.
BY_CHIP = {
    "TPU v4": {"xla_tpu_overlap_compute_collective_tc": "false", **_GATHERS},
    "TPU v5": {"xla_tpu_scoped_vmem_limit_kib": "32768", **_GATHERS},  # JAX's name of a v5p
    "TPU v6 lite": _GATHERS,
}


# XLA:CPU takes barriers away before it fuses. Kept, they stop it from computing things again (layers.written_down).
CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}


def compiler_options(mesh: Mesh, backend: str, overlap: bool = True) -> dict[str, str] | None:
    """Those for the devices of ``mesh``.

    Args:
      backend: "cpu", "gpu" or "tpu", what the step is traced for.
      overlap: on TPU; False leaves its options out.
    """
    if backend == "tpu" and overlap:
        return TPU_OPTIONS | BY_CHIP.get(mesh.devices.flat[0].device_kind, {})
    return CPU_OPTIONS if backend == "cpu" else None
