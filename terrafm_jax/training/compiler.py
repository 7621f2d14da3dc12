"""Options of XLA that the train step is compiled with on TPU (docs/scaling.md has what they change)."""

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
# On a v4 a product and a sum at once ask for 12 KiB more than its 16 MiB of on-chip memory: nothing compiles.
# A v5p's fusions may take half of its 64 MiB, not a quarter: larger blocks, and room for gathers of weights beside
# them. On v5e, whose compiler gathers so by itself, and v6e the memory gains nothing (docs/tpu_notes.md has what is
# left to try there).
BY_CHIP = {
    "TPU v4": {"xla_tpu_overlap_compute_collective_tc": "false"},
    "TPU v5": {  # JAX's name of a v5p
        "xla_tpu_scoped_vmem_limit_kib": "32768",
        "xla_enable_async_all_gather": "true",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    },
}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """TPU_OPTIONS as the devices of ``mesh`` can take them."""
    return TPU_OPTIONS | BY_CHIP.get(mesh.devices.flat[0].device_kind, {})
