"""GPUs that are not there: what XLA needs to know to compile for one, and what bounds the time of its kernels.

XLA compiles for a GPU from a description of it (its ``GpuTargetConfigProto``). Without the device it cannot try out
which of several kernels is fastest, so the compiled program is not the one that would run, but close: the same kernels
but for the choice within a product.

Sources: the vendor's data sheets for peak, memory, bandwidth and links; its occupancy tables for what a core holds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Mapping, Sequence

from jax.stages import Compiled, Lowered

from terrafm_jax.ahead import hlo

# XLA measures which tiling suits a product written in Triton, which takes a device. cuBLAS products need no choice.
OPTIONS = {"xla_gpu_enable_triton_gemm": False}
JAX_SHARE = 0.75  # of the memory, which JAX takes unless XLA_CLIENT_MEM_FRACTION says otherwise
LATENCY = 10e-6  # of a collective of NCCL


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
      flops: peak dense bf16 FLOP/s. memory: bytes; ``bandwidth`` its bytes/s.
      nvlink: bytes/s in one direction of all links of a GPU to the others of its host; ``nic`` of its share of the
        network.
      clock: Hz. cores: streaming multiprocessors. shared: bytes that the blocks of a core share; ``block_shared`` of
        them at most for one block. l2: bytes. capability: CUDA's number of the generation.
    """

    name: str
    kind: str
    flops: float
    memory: int
    bandwidth: float
    nvlink: float
    nic: float
    clock: float
    cores: int
    shared: int
    block_shared: int
    l2: int
    capability: tuple[int, int]

    @property
    def hbm(self) -> float:
        """Bytes that a program may use."""
        return JAX_SHARE * self.memory

    def target(self) -> str:
        """The description that XLA compiles for, as a text proto."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA"
            device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 8 }}
            runtime_version {{ major: 12 minor: 9 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores} fpus_per_core: {128 if major >= 9 else 64} clock_rate_ghz: {self.clock / 1e9}
              memory_bandwidth: {self.bandwidth:.0f} device_memory_size: {self.memory} l2_cache_size: {self.l2}
              shared_memory_per_core: {self.shared} shared_memory_per_block: 49152
              shared_memory_per_block_optin: {self.block_shared}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}"""


_MIB = 2**20
GPUS: dict[str, Gpu] = {
    g.name: g
    for g in (
        Gpu("a100", "NVIDIA A100-SXM4-80GB", 312e12, 81920 * _MIB, 2.039e12, 300e9, 25e9, 1.41e9, 108, 167936, 166912,
            40 * _MIB, (8, 0)),
        Gpu("h100", "NVIDIA H100 80GB HBM3", 989e12, 81559 * _MIB, 3.35e12, 450e9, 50e9, 1.98e9, 132, 233472, 232448,
            50 * _MIB, (9, 0)),
        Gpu("h200", "NVIDIA H200", 989e12, 143771 * _MIB, 4.8e12, 450e9, 50e9, 1.98e9, 132, 233472, 232448,
            60 * _MIB, (9, 0)),
    )
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Hosts:
    """``hosts`` machines with ``each`` GPUs of one kind."""

    chip: Gpu
    each: int
    hosts: int = 1
    platform = "gpu"
    package = "jaxlib"
    slices = 1

    @classmethod
    def parse(cls, text: str) -> Hosts:
        """Reads ``h200:8`` or ``4*h100:8`` (four machines of eight). Raises ValueError."""
        found = re.fullmatch(r"(?:(\d+)\*)?(\w+):(\d+)", text.strip())
        if not found or found.group(2) not in GPUS or not int(found.group(3)) or found.group(1) == "0":
            raise ValueError(
                f"--topology={text}: expected [HOSTS*]GPU:N, for example h200:8 or 4*h100:8, with GPU one of "
                f"{list(GPUS)}"
            )
        return cls(GPUS[found.group(2)], int(found.group(3)), int(found.group(1) or 1))

    @property
    def chips(self) -> int:
        return self.hosts * self.each

    @property
    def name(self) -> str:
        """The spelling that :meth:`parse` reads."""
        return f"{f'{self.hosts}*' if self.hosts > 1 else ''}{self.chip.name}:{self.each}"


@dataclasses.dataclass(frozen=True)
class Links:
    """Time of collectives between the GPUs of a host and between hosts; counterpart of ``network.Network``."""

    topology: Hosts
    coordinates: tuple[int, ...]  # host per partition

    @classmethod
    def of(cls, topology: Hosts, devices: Sequence) -> Links:
        """From the devices in mesh order (``mesh.devices.flat``)."""
        return cls(topology, tuple(d.id // topology.each for d in devices))

    def seconds(self, opcode: str, size: float, members: Sequence[int]) -> float:
        """Least time of one collective over ``size`` bytes; arguments as for ``Network.seconds``.

        Every GPU sends its part over NVLink; between hosts, each GPU of a host sends its share of what leaves the host.
        """
        n, hosts = len(members), len({self.coordinates[m] for m in members})
        if n < 2:
            return 0.0
        both = 2 if opcode == "all-reduce" else 1
        here = n // hosts
        inside = both * size * (here - 1) / here / self.topology.chip.nvlink
        between = both * size / here * (hosts - 1) / hosts / self.topology.chip.nic
        return inside + between + LATENCY


def available() -> bool:
    """Whether JAX's plugin for CUDA is installed (``pip install terrafm_jax[cuda]``)."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def compile_only_devices(topology: Hosts) -> list:
    """All devices of ``topology``, host by host. Raises RuntimeError where the plugin is not installed."""
    if not available():
        raise RuntimeError(f"compiling for {topology.name} needs JAX's CUDA plugin: pip install 'terrafm_jax[cuda]'")
    from jax.experimental import topologies

    found = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.name,
        topology=f"1x{topology.hosts}x{topology.each}",
        target_config=topology.chip.target(),
    ).devices
    if len(found) != topology.chips:
        raise RuntimeError(f"{topology.name}: expected {topology.chips} devices, the compiler lists {len(found)}")
    return sorted(found, key=lambda d: d.id)


def compile_only(
    lowered: Lowered, options: Mapping[str, str | bool | int] | None = None
) -> tuple[Compiled, hlo.Module]:
    """Compiles for absent devices, with XLA ``options`` by name. Returns the executable and its program."""
    compiled = lowered.compile(compiler_options=OPTIONS | dict(options or {}))
    return compiled, hlo.parse(compiled.as_text())
