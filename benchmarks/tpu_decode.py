"""The decode step of Llama-3.1-8B, compiled by the TPU compiler without a TPU: `python -m benchmarks.tpu_decode`.

It needs `pip install "jax[tpu]"`. For each kind of chip it prints the memory and the traffic of a step as the compiler
counts them. Then come a step and a chunk of a prompt with keys and values in host memory.
"""

from __future__ import annotations

import dataclasses
import math
import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked what chip this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to share: another process may hold its lock

import re
from collections import Counter
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from butler_jax.decoding import decode_step, prefill
from butler_jax.decoding.cache import state_partition
from butler_jax.decoding.plan import Plan
from butler_jax.decoding.prefill_pass import Prefilled, nothing_read
from butler_jax.decoding.prompt_parts import end_reading, read_part
from butler_jax.decoding.store import HostStore, KVStore, ResidentStore
from butler_jax.model import LOGICAL_AXES, BaseConfig, BaseModel, RopeConfig
from butler_jax.parallel import module_shardings
from butler_jax.parallel.mesh import arrange, parse_mesh
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig

# Chips, and as many of them as hold the weights and the caches: 16, 95 and 32 GB a chip.
CHIPS = {"v5e": ("v5e:2x2", 4), "v5p": ("v5p:2x2x1", 1), "v6e": ("v6e:2x2", 2)}
LLAMA_8B = BaseConfig(
    family="llama",
    vocab_size=128256,
    width=4096,
    hidden=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    context=131072,
    rope=RopeConfig(kind="llama3", theta=500000.0, factor=8.0, original_context=8192),
)
SELECTION = SelectionConfig(budget=1 / 16, unit=16)
COLLECTIVES = r"= \S+ (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\("


def compile_decode(
    chip: str, *, base: BaseConfig = LLAMA_8B, batch: int = 1, capacity: int = 32768, parts: int = 1, **options: Any
):
    """Compile a decode step for a chip of CHIPS, with the heads split over the chips that it needs.

    parts: the tokens of the caches are split into this number, and the heads into correspondingly fewer. options: those
    of decode_step; selection is SELECTION by default. score_dtype: that of prefill. predictor: its configuration.
    """
    mesh = chips(chip, f"model={CHIPS[chip][1] // parts},sequence={parts}")
    return lower_decode(mesh, base=base, batch=batch, capacity=capacity, **options).compile()


def chips(chip: str, axes: str) -> Mesh:
    """A mesh of as many chips of a kind as the axes have."""
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0])
    sizes = parse_mesh(axes)
    return arrange(sizes, topology.devices[: math.prod(sizes.values())])


def lower_decode(mesh: Mesh, *, base: BaseConfig, batch: int, capacity: int, offload: bool = False, **options: Any):
    """Lower a decode step for the chips of a mesh, with offload for one chip. options: as in compile_decode."""
    score_dtype = options.pop("score_dtype", None)
    model, predictor = _modules(mesh, base, options.pop("predictor", PredictorConfig()))
    options = {"selection": SELECTION, "implementation": None if offload else "tpu", **options}
    tokens = jax.ShapeDtypeStruct((batch, 64), jnp.int32)
    lengths = jax.ShapeDtypeStruct((batch,), jnp.int32)
    fill = partial(prefill, capacity=capacity, selection=options["selection"], score_dtype=score_dtype)
    _, state = jax.eval_shape(lambda m, p, t, n: fill(m, t, n, predictor=p), model, predictor, tokens, lengths)
    state = _described(state, jax.tree.map(partial(NamedSharding, mesh), state_partition(state, mesh)))
    if offload:
        state = dataclasses.replace(state, kv=_on_host(state.kv))

    def step(model, predictor, tokens, state):
        return decode_step(model, tokens, state, predictor=predictor, **options)

    with jax.set_mesh(mesh):
        return jax.jit(step, donate_argnums=3).lower(model, predictor, _everywhere(lengths, mesh), state)


def lower_chunk(mesh: Mesh, *, base: BaseConfig, capacity: int, offload: bool, chunk: int = 512):
    """Lower the reading of a chunk of a prompt for one chip, with offload as well."""
    model, predictor, filled = _nothing_read(mesh, base, capacity, offload)
    tokens, one, row = _everywhere([jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, chunk), (), (1,))], mesh)
    with jax.set_mesh(mesh):
        return read_part.lower(model, predictor, tokens, one, row, one, filled)


def lower_end(mesh: Mesh, *, base: BaseConfig, capacity: int, offload: bool, plan: Plan):
    """Lower the end of reading a prompt for one chip, which makes the state of the steps under a plan."""
    model, _, filled = _nothing_read(mesh, base, capacity, offload)
    row = _everywhere(jax.ShapeDtypeStruct((1,), jnp.int32), mesh)
    with jax.set_mesh(mesh):
        return end_reading.lower(model, row, *filled, plan=plan, score_dtype=None)


def _nothing_read(mesh: Mesh, base: BaseConfig, capacity: int, offload: bool) -> tuple[Any, Any, Prefilled]:
    """Base, predictor, and what reading a prompt begins with, of one row."""
    model, predictor = _modules(mesh, base, PredictorConfig())
    filled = jax.eval_shape(lambda m, p: nothing_read(m, p, 1, capacity), model, predictor)
    last, kv, scores = _everywhere(filled, mesh)
    with jax.set_mesh(mesh):
        return model, predictor, (last, _on_host(kv) if offload else kv, scores)


def _modules(mesh: Mesh, base: BaseConfig, config: PredictorConfig) -> tuple[Any, Any]:
    """Base and predictor in bfloat16, split over the mesh, without values."""
    bfloat16 = partial(jax.tree.map, lambda a: jax.ShapeDtypeStruct(a.shape, _narrow(a.dtype)))
    model = bfloat16(jax.eval_shape(lambda: BaseModel(base, jax.random.key(0))))
    predictor = bfloat16(jax.eval_shape(lambda: make_predictor(base, config)))
    axes = (model, LOGICAL_AXES), (predictor, predictor.logical_axes)
    return tuple(_described(module, module_shardings(module, names, mesh)) for module, names in axes)


def _described(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), tree, shardings)


def _everywhere(tree: Any, mesh: Mesh) -> Any:
    """Whole on every chip of the mesh."""
    return jax.tree.map(lambda a: _described(a, NamedSharding(mesh, PartitionSpec())), tree)


def _on_host(kv: KVStore) -> HostStore:
    """The store in host memory."""
    far = (_described(a, a.sharding.with_memory_kind("pinned_host")) for a in (kv.k, kv.v))
    near = (jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype, sharding=a.sharding) for a in (kv.k, kv.v))
    return HostStore(*far, ResidentStore(*near))


def _narrow(dtype: Any) -> Any:
    return jnp.bfloat16 if dtype == jnp.float32 else dtype


def summary(compiled: Any) -> dict[str, Any]:
    """GiB of a chip's arguments and temporaries, GB that a step accesses, and collectives by kind."""
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "arguments_gib": memory.argument_size_in_bytes / 2**30,
        "temporary_gib": memory.temp_size_in_bytes / 2**30,
        "host_gib": memory.host_argument_size_in_bytes / 2**30,
        "accessed_gb": cost.get("bytes accessed", float("nan")) / 1e9,
        "gigaflops": cost.get("flops", float("nan")) / 1e9,
        "collectives": dict(Counter(re.findall(COLLECTIVES, compiled.as_text()))),
    }


def main() -> None:
    """Compile for every chip and print a line for each."""
    print("a decode step of Llama-3.1-8B in bfloat16, R = 16, 32,768 tokens of cache, budget 1/16 in pages of 16")
    for chip, (_, count) in CHIPS.items():
        for score_dtype in (None, "int8"):
            found = summary(compile_decode(chip, score_dtype=score_dtype))
            print(
                f"{chip} x {count}, k_imp {score_dtype or 'bfloat16':8}: a chip keeps "
                f"{found['arguments_gib']:.2f} GiB, needs {found['temporary_gib']:.3f} GiB more; accesses "
                f"{found['accessed_gb']:.2f} GB, {found['gigaflops']:.1f} GFLOP a step; in the program: "
                f"{found['collectives'] or 'no collectives'}",
                flush=True,
            )
    mesh = chips("v5p", "model=1")
    given = dict(base=LLAMA_8B, capacity=131072)
    lowered = {
        "a step": lower_decode(mesh, batch=1, offload=True, **given),
        "a chunk of 512 tokens": lower_chunk(mesh, offload=True, **given),
    }
    print("131,072 tokens of cache in host memory, on one v5p")
    for name, program in lowered.items():
        found = summary(program.compile())
        print(
            f"{name}: the chip keeps {found['arguments_gib']:.2f} GiB, needs {found['temporary_gib']:.2f} GiB more; "
            f"the host keeps {found['host_gib']:.2f} GiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
