"""NVIDIA chips that kernels are compiled and modelled for, without having one."""

from __future__ import annotations

from typing import NamedTuple


class GpuChip(NamedTuple):
    """A chip by NVIDIA's data sheets."""

    name: str
    capability: tuple[int, int]
    multiprocessors: int
    bandwidth: int  # bytes a second
    memory: int  # GiB
    cache: int  # MiB
    shared: int  # KiB of shared memory, a multiprocessor
    clock: float = 1.8  # GHz; the A100's is the highest of its data sheet, the others' are below theirs

    def describe(self) -> str:
        """The description that XLA's compiler needs, a text proto of xla.GpuTargetConfigProto."""
        device = dict(
            threads_per_block_limit=1024,
            threads_per_warp=32,
            threads_per_core_limit=2048,
            registers_per_core_limit=65536,
            registers_per_block_limit=65536,
            shared_memory_per_block=48 << 10,
            shared_memory_per_block_optin=(self.shared - 1) << 10,
            shared_memory_per_core=self.shared << 10,
            core_count=self.multiprocessors,
            fpus_per_core=128,
            clock_rate_ghz=self.clock,
            block_dim_limit_x=2**31 - 1,
            block_dim_limit_y=65535,
            block_dim_limit_z=65535,
            memory_bandwidth=self.bandwidth,
            device_memory_size=self.memory << 30,
            l2_cache_size=self.cache << 20,
            driver_version='"13.0.0"',
        )
        major, minor = self.capability
        lines = [f"cuda_compute_capability {{ major: {major} minor: {minor} }}"]
        lines += [f"{name}: {value}" for name, value in device.items()]
        versions = "dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }"
        inside = "\n  ".join(lines)
        return (
            f'gpu_device_info {{\n  {inside}\n}}\nplatform_name: "CUDA"\n{versions}\n'
            f'device_description_str: "{self.name}"\n'
        )


CHIPS = {
    "a100": GpuChip("NVIDIA A100-SXM4-80GB", (8, 0), 108, 2_039_000_000_000, 80, 40, 164, 1.41),
    "h100": GpuChip("NVIDIA H100 80GB HBM3", (9, 0), 132, 3_350_000_000_000, 80, 50, 228),
    "h200": GpuChip("NVIDIA H200", (9, 0), 132, 4_800_000_000_000, 141, 50, 228),
    "b200": GpuChip("NVIDIA B200", (10, 0), 148, 8_000_000_000_000, 180, 126, 228),
}
