"""Registers, shared memory, instructions and loops of the GPU kernels' machine code: `python -m benchmarks.sass`.

It needs `pip install -e ".[gpu-compiler]" nvidia-cuda-nvcc nvidia-cuda-nvdisasm`, and no GPU. The model of the time
takes its instructions from here (`pallas_kernels/bench/assumptions.py`).

    python -m benchmarks.sass --chip h200 --tokens 32768
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax

from benchmarks.gpu_compile import STRICT, LayerCall, mesh_of
from pallas_kernels.bench.chips import CHIPS
from pallas_kernels.checks import POOLINGS

WRITTEN = {"xla_dump_emitter_re": ".*"}  # jax 0.12 writes PTX only where that matches


class KernelCode(NamedTuple):
    """Machine code of one kernel; loops are pairs of their instructions and the barriers among them."""

    name: str
    registers: int
    instructions: int
    loops: tuple[tuple[int, int], ...]


def find_tool(name: str) -> str:
    """The path of a program of CUDA's toolkit. Raises FileNotFoundError where it is not installed."""
    for root in map(Path, sys.path):
        for found in root.glob(f"nvidia/*/bin/{name}"):
            return str(found)
    if found := shutil.which(name):
        return found
    raise FileNotFoundError(f"{name} is not installed; pip install nvidia-cuda-nvcc nvidia-cuda-nvdisasm brings it")


def parse_sass(text: str) -> tuple[int, tuple[tuple[int, int], ...]]:
    """The instructions of nvdisasm's text, and of every loop: a branch backwards, what lies between, its barriers."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif one := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(one[1])
    loops = []
    for end, one in enumerate(instructions):
        branch = re.search(r"BRA.*\((\.L_x_\d+)\)", one)
        begin = labels.get(branch[1], end) if branch else end
        if begin < end - 1:  # the last instruction branches to itself
            inside = instructions[begin : end + 1]
            loops.append((len(inside), sum("BAR.SYNC" in each for each in inside)))
    return len(instructions), tuple(loops)


def read_kernels(folder: Path) -> list[KernelCode]:
    """The code of every kernel whose PTX lies in a folder."""
    found = []
    for path in sorted(folder.glob("*.ptx")):
        entry = re.search(r"\.entry (\w+)", path.read_text())
        if entry is None:
            continue
        target = re.search(r"\.target (\w+)", path.read_text())
        cubin = path.with_suffix(".cubin")
        command = [find_tool("ptxas"), f"-arch={target[1]}", "-v", str(path), "-o", str(cubin)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        command = [find_tool("nvdisasm"), "-c", str(cubin)]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found.append(KernelCode(entry[1], int(re.search(r"Used (\d+) registers", said)[1]), *parse_sass(sass)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", choices=CHIPS, default="h200")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pooling", choices=POOLINGS, default="normalised")
    asked = parser.parse_args()
    find_tool("ptxas"), find_tool("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        mesh = mesh_of(asked.chip)
        call = LayerCall(size=asked.tokens, batch=asked.batch, pooling=asked.pooling)
        with jax.set_mesh(mesh):
            call.lower(mesh).compile(STRICT | WRITTEN | {"xla_dump_to": folder})
        for code in read_kernels(Path(folder)):
            loops = ", ".join(f"{size} with {barriers} barriers" for size, barriers in code.loops) or "none"
            print(f"{code.name:18} {code.registers:4} registers {code.instructions:5} instructions; loops: {loops}")


if __name__ == "__main__":
    main()
