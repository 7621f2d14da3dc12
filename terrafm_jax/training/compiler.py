"""Options of XLA that the train step is compiled with (docs/scaling.md has what TPU's change)."""

from __future__ import annotations

from jax.sharding import Mesh

# By default the TPU compiler all-reduces all gradients at once after the backward pass, and computes nothing meanwhile.
# These options let it all-reduce each gradient as soon as it is ready, overlapped with what is computed next. The last
# two keep it from splitting products with gathered weights into one part per device (windowed einsum), which takes
# longer than gathering, and from joining an all-reduce with the cut that follows it: on eight chips of v5e nothing
# overlaps the joined form, and for L on two slices of v5p the compiler fails to make it.
TPU_OPTIONS = {
    "xla_jf_crs_combiner_threshold_in_bytes": "1000000",
    "xla_enable_async_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_tpu_enable_all_reduce_scatter_fusion": "false",
}
# Overlap all-gathers of weights with compute, too. For v5e the compiler does so by itself.
_GATHERS = {
    "xla_enable_async_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
}
# v4: a product overlapped with an all-reduce needs 12 KiB more than the 16 MiB of on-chip memory, and fails to compile.
# v5p: fusions may use half of its 64 MiB of on-chip memory instead of a quarter, for larger blocks and for overlapped
# all-gathers. On v5e and v6e a larger share gains nothing.
BY_CHIP = {
    "TPU v4": {"xla_tpu_overlap_compute_collective_tc": "false", **_GATHERS},
    "TPU v5": {"xla_tpu_scoped_vmem_limit_kib": "32768", **_GATHERS},  # JAX's name of a v5p
    "TPU v6 lite": _GATHERS,
}

# By default XLA:CPU removes optimization barriers before it fuses; ``layers.materialize_gradient`` needs them kept.
CPU_OPTIONS = {"xla_disable_hlo_passes": "cse_barrier_expander"}

# By default XLA:GPU merges products with the same weights, those of both sizes of views, and copies their operands into
# one array to do so.
GPU_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": "0"}


def compiler_options(mesh: Mesh, backend: str, overlap: bool = True) -> dict[str, str] | None:
    """The options for the devices of ``mesh``; None for XLA's defaults.

    Args:
      backend: "cpu", "gpu" or "tpu", what the step is traced for.
      overlap: whether to use the options for TPU; without effect elsewhere.
    """
    if backend == "tpu" and overlap:
        return TPU_OPTIONS | BY_CHIP.get(mesh.devices.flat[0].device_kind, {})
    return {"cpu": CPU_OPTIONS, "gpu": GPU_OPTIONS}.get(backend)
