"""A model of the time of a sparse and a dense call on a chip that need not be there.

A kernel takes its launch and the longest of three times: of its bytes from memory, of its bytes from the cache, and of
its waves. A wave is as many programs as the multiprocessors hold at once. `assumptions.py` has every figure.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from pallas_kernels.bench.assumptions import Assumptions
from pallas_kernels.bench.cases import Case
from pallas_kernels.bench.chips import GpuChip
from pallas_kernels.bench.work import KEPT, THREADS, KernelWork, work_of
from pallas_kernels.gpu.tiles import Tiles, tiles_of

REGISTERS = 65536  # of a multiprocessor
RESIDENT = 2048  # threads of a multiprocessor


def resident_programs(work: KernelWork, chip: GpuChip) -> int:
    """Programs that one multiprocessor holds at once."""
    threads = THREADS * work.launch.warps
    registers = -(-work.registers // 8) * 8 * threads
    room = (REGISTERS // registers, chip.shared * 1024 // (work.shared + 1024), RESIDENT // threads, 32)
    return max(1, int(min(room)))


def wave_seconds(work: KernelWork, chip: GpuChip, assumed: Assumptions) -> float:
    """Seconds of all waves of a kernel, if bytes cost nothing.

    A wave takes at least its longest chain: loads and barriers that wait for each other, and instructions of one warp.
    All waves together take at least the instructions that the warps of a multiprocessor issue in turn.
    """
    have, programs = assumed.values(), work.launch.programs
    waiting = work.loads * have["latency"] + work.barriers * have["barrier"]
    waves = -(-programs // (resident_programs(work, chip) * chip.multiprocessors))
    issued = -(-programs // chip.multiprocessors) * work.launch.warps * work.instructions / have["schedulers"]
    cycles = max(waves * (waiting + work.instructions * have["dependent"]), waiting + issued)
    return cycles / (chip.clock * 1e9)


def byte_seconds(work: KernelWork, chip: GpuChip, assumed: Assumptions) -> float:
    """Seconds of a kernel's bytes from memory, or of those from the cache where these take longer."""
    have = assumed.values()
    cached = work.again if work.again <= have["cache_share"] * chip.cache * 2**20 else 0.0
    memory = ((work.streamed - cached) / have["stream"] + work.gathered / have["gather"]) / chip.bandwidth
    rate = have["cache_rate"] * chip.multiprocessors * chip.clock * 1e9
    return max(memory, (work.shared_reads + cached) / rate)


def kernel_seconds(work: KernelWork, chip: GpuChip, assumed: Assumptions) -> float:
    """Seconds of a kernel with its launch."""
    launch = 1e-6 * assumed.launch.value
    return launch + max(byte_seconds(work, chip, assumed), wave_seconds(work, chip, assumed))


def dense_seconds(case: Case, chip: GpuChip, assumed: Assumptions) -> float:
    """Seconds of dense decode attention: its launches, and its bytes at the rate of a stream."""
    have = assumed.values()
    return 1e-6 * have["dense_launches"] * have["launch"] + case.dense_bytes / (have["stream"] * chip.bandwidth)


def kernels_seconds(
    case: Case, chip: GpuChip, assumed: Assumptions | None = None, tiles: Tiles | None = None
) -> dict[str, float]:
    """Seconds of every kernel that scores, chooses and attends, by its name; the share of one layer."""
    assumed = assumed or Assumptions()
    works = work_of(case, tiles or tiles_of(chip.name), assumed)
    found = Counter()
    for work in works:
        found[work.launch.name] += kernel_seconds(work, chip, assumed) / case.together
    return dict(found)


def predict_rows(
    case: Case, chip: GpuChip, intervals: Iterable[int], assumed: Assumptions | None = None
) -> list[dict[str, Any]]:
    """A row for each interval, in the terms of the measured ones: see `benchmark.py`."""
    assumed = assumed or Assumptions()
    found, dense = kernels_seconds(case, chip, assumed), dense_seconds(case, chip, assumed)
    first, again = sum(found.values()), sum(found[name] for name in KEPT)
    launches = sum(1 if name in KEPT else 1 / case.together for name in found)
    shared = dict(chip=chip.name, context=case.context, tokens=case.tokens, budget=case.tokens / case.context)
    shared |= dict(batch=case.batch, together=case.together)
    shared |= dict(dense_seconds=dense, predict_seconds=first, reuse_seconds=again)

    def row(interval):
        speeds = case.speeds(interval, dense, first, again)
        return shared | dict(interval=interval, launches=launches) | speeds | dict(kernels=found)

    return [row(interval) for interval in intervals]


def shortest_gain(rows: list[dict[str, Any]]) -> int | None:
    """The shortest context from which on every row is faster than dense; None where one of the longest is not."""
    slow = max((row["context"] for row in rows if row["speedup"] <= 1), default=0)
    return min((row["context"] for row in rows if row["context"] > slow), default=None)
