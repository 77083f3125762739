"""What the GPU compiler makes of the kernels and of a decode step, without a GPU: `python -m benchmarks.gpu_compile`.

It needs `pip install -e ".[gpu-compiler]"`, and no driver. XLA compiles for the description of a chip, down to its
machine code, and a register that is spilled is an error. The table shows how many kernels a call launches and what
memory it needs beside its arguments.

    python -m benchmarks.gpu_compile --json benchmarks/gpu_compile.json
"""

from __future__ import annotations

import os

os.environ["JAX_PLATFORMS"] = "cpu"  # else the plugin looks for CUDA's libraries

import argparse
import dataclasses
import functools
import json
import pathlib
import re
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import pallas_kernels as pk
from benchmarks.about import about
from benchmarks.hlo import parse_program
from benchmarks.tpu_decode import LLAMA_8B, lower_decode
from butler_jax.parallel.mesh import arrange, parse_mesh
from butler_jax.selection import SelectionConfig
from pallas_kernels.bench.chips import CHIPS

STRICT = {"xla_gpu_fail_ptx_compilation_on_register_spilling": True}
LAUNCHED = ("fusion", "custom-call", "copy", "sort", "scatter", "while", "conditional")
KERNEL = re.compile(r'name = "(\w+)"')


@dataclass(frozen=True, kw_only=True)
class LayerCall:
    """The sparse attention of one layer out of two; the letters are those of `pallas_kernels/api.py`."""

    batch: int = 1
    heads: int = 8
    group: int = 4
    rank: int = 16
    dim: int = 128
    size: int = 32768
    unit: int = 1
    dtype: Any = jnp.bfloat16
    int8: bool = False
    pooling: str = "normalised"
    tail: int = 0  # tokens of a span; with one, the attention to a choice and to spans is lowered alone

    def lower(self, mesh: Mesh) -> Any:
        """Lower a call on described arrays. A sixteenth of the tokens is read."""
        array = functools.partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, PartitionSpec()))
        caches = array((2, self.batch, self.heads, self.size, self.dim), self.dtype)
        new = array((self.batch, self.heads, self.dim), self.dtype)
        key_dtype = jnp.int8 if self.int8 else self.dtype
        n, how = max(1, self.size // 16 // self.unit), dict(unit=self.unit, implementation="gpu")
        attended = dict(
            q=array((self.batch, self.heads * self.group, self.dim), self.dtype),
            k=caches,
            v=caches,
            lengths=array((self.batch,), jnp.int32),
            layer=array((), jnp.int32),
            new_k=new,
            new_v=new,
        )
        if self.tail:
            chosen = (self.batch, self.heads, n)
            means = array((*caches.shape[:3], self.size // self.tail, self.dim), self.dtype)
            spans = pk.Spans(means, means, array((*chosen[:2], means.shape[3]), jnp.int32))
            listed = dict(indices=array(chosen, jnp.int32), valid=array(chosen, jnp.bool_))
            call = functools.partial(pk.masked_topk_decode_attention, **how)
            return jax.jit(call).lower(**attended, **listed, spans=spans)
        scored = dict(
            q_imp=array((self.batch, self.heads, self.group, self.rank), self.dtype),
            k_imp=array((2, self.batch, self.heads, self.rank, self.size), key_dtype),
            scales=array((self.heads,), jnp.float32) if self.int8 else None,
        )
        how |= dict(n=n, sinks=4, recent=8, pooling=self.pooling)
        return jax.jit(functools.partial(pk.sparse_decode_attention, **how)).lower(**attended, **scored)


LLAMA = LayerCall()
CASES = {
    "Llama-3.1-8B, 32,768 tokens": LLAMA,
    "the same, pooled by the maximum": LayerCall(pooling="maximum"),
    "the same, 131,072 tokens, batch 8, int8 k_imp": LayerCall(size=131072, batch=8, int8=True),
    "the same, float32": LayerCall(dtype=jnp.float32),
    "the same, pages of 16": LayerCall(unit=16),
    "SmolLM2, float32": LayerCall(heads=3, group=3, dim=64, size=8192, dtype=jnp.float32),
    "D = 80, float32": LayerCall(dim=80, size=4096, dtype=jnp.float32),
    "D = 256, float32": LayerCall(heads=4, dim=256, size=4096, dtype=jnp.float32),
    "G = 32, R = 128, int8 k_imp": LayerCall(heads=1, group=32, rank=128, size=8192, int8=True),
    "G = 32, R = 128, float32": LayerCall(heads=1, group=32, rank=128, size=8192, dtype=jnp.float32),
    "1,048,576 tokens": LayerCall(size=1 << 20),
    "attention with a tail": LayerCall(tail=64),
    "attention with a tail, G = 1, D = 80, float32": LayerCall(group=1, dim=80, size=4096, dtype=jnp.float32, tail=64),
    "attention with a tail, one KV head, 1,048,576 tokens": LayerCall(heads=1, group=8, size=1 << 20, tail=64),
    "attention with a tail, D = 256, float32": LayerCall(heads=4, dim=256, size=4096, dtype=jnp.float32, tail=64),
}


def mesh_of(chip: str) -> Mesh:
    """A mesh of one such chip."""
    described = CHIPS[chip].describe()
    topology = topologies.get_topology_desc(platform="cuda", target_config=described, topology="1x1x1")
    return Mesh(np.array(topology.devices[:1]), ("one",))


def compile_layer(chip: str, layer: LayerCall) -> Any:
    """Compile a layer for a chip. Raises JaxRuntimeError where a kernel spills registers."""
    mesh = mesh_of(chip)
    with jax.set_mesh(mesh):
        return layer.lower(mesh).compile(STRICT)


def compile_decode(chip: str, layers: int = 32, tail: int = 0) -> Any:
    """Compile a decode step of Llama-3.1-8B with so many layers: batch 1, 1/16 of 32,768 tokens read.

    tail: tokens of a span of the tail; 0 for none.
    """
    mesh = arrange(parse_mesh("model=1,sequence=1"), [*mesh_of(chip).devices.ravel()])
    how = dict(batch=1, capacity=32768, implementation=None, selection=SelectionConfig(budget=1 / 16, tail=tail))
    return lower_decode(mesh, base=dataclasses.replace(LLAMA_8B, layers=layers), **how).compile(STRICT)


def count_launches(compiled: Any) -> dict[str, int]:
    """Kernels and copies that a program launches, by name; those inside a fusion or a loop are part of it."""
    computations, entry = parse_program(compiled.as_text())
    found: Counter[str] = Counter()
    for line in computations[entry]:
        if line.op in LAUNCHED:
            kernel = KERNEL.search(line.rest) if line.op == "custom-call" else None
            found[kernel[1] if kernel else re.sub(r"[.\d]+$", "", line.name)] += 1
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=[*CHIPS])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    asked = parser.parse_args()
    rows = []
    for chip in asked.chips:
        calls = {name: functools.partial(compile_layer, chip, layer) for name, layer in CASES.items()}
        for name, call in (calls | {"Llama-3.1-8B, a decode step": functools.partial(compile_decode, chip)}).items():
            start = time.monotonic()
            try:
                compiled = call()
            except jax.errors.JaxRuntimeError as error:
                row = {"error": str(error)[:200]}
            else:
                temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
                launches = count_launches(compiled)
                row = {"launches": sum(launches.values()), "kernels": launches, "temporary_mib": round(temporary, 2)}
            rows.append({"chip": chip, "program": name, **row, "seconds": round(time.monotonic() - start, 1)})
            print({k: v for k, v in rows[-1].items() if k != "kernels"}, flush=True)
    if asked.json:
        asked.json.write_text(json.dumps({**about("gpu_compile"), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
