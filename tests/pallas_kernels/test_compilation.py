"""The kernels compile without their chips: TPU kernels by libtpu; GPU kernels are lowered.

Needs no accelerator. libtpu comes with `pip install "jax[tpu]"`; the tests that need it are skipped where it is not.
"""

from __future__ import annotations

import functools
import os
import re

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked what chip this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to share: another process may hold its lock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import pallas_kernels as pk
from tests.marked import long

CHIPS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
TRITON = "__gpu$xla.gpu.triton"

# batch, K, G, R, S, D, n, unit, dtype: Llama-3.1-8B's layer, SmolLM2's, and the corners of what is supported.
LLAMA = (16, 8, 4, 16, 32768, 128, 128, 16, jnp.bfloat16)
SMOLLM2 = (2, 3, 3, 16, 4096, 64, 16, 16, jnp.float32)
CORNERS = [
    (2, 2, 1, 32, 1008, 80, 10, 16, jnp.float32),
    (1, 2, 16, 16, 2048, 256, 8, 32, jnp.bfloat16),
    (3, 1, 7, 8, 2048, 96, 2, 128, jnp.bfloat16),
    (2, 2, 4, 16, 8192, 128, 1024, 2, jnp.bfloat16),
    (1, 3, 3, 16, 4096, 64, 256, 1, jnp.float32),
]
LONGEST = [(1, 8, 4, 16, 524288, 128, 128, 16, jnp.bfloat16), (1, 2, 7, 32, 1048576, 128, 128, 16, jnp.bfloat16)]


def arguments(case, key_dtype, sharding=None):
    """Described operands of one layer out of two, with the current token."""
    batch, heads, group, rank, size, dim, _, _, dtype = case
    array = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    cache, new = array((2, batch, heads, size, dim), dtype), array((batch, heads, dim), dtype)
    return dict(
        q=array((batch, heads * group, dim), dtype),
        k=cache,
        v=cache,
        q_imp=array((batch, heads, group, rank), dtype),
        k_imp=array((2, batch, heads, rank, size), key_dtype or dtype),
        lengths=array((batch,), jnp.int32),
        layer=array((), jnp.int32),
        new_k=new,
        new_v=new,
        scales=array((heads,), jnp.float32) if key_dtype else None,
    )


def layer_of(case, implementation, **options):
    *_, n, unit, _ = case
    return functools.partial(
        pk.sparse_decode_attention, n=n, unit=unit, sinks=4, recent=8, implementation=implementation, **options
    )


@functools.cache
def compile_for(chip, case, key_dtype=None, **options):
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip])
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    described = arguments(case, key_dtype, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        return jax.jit(layer_of(case, "tpu", **options)).lower(**described).compile()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chip", "case", "key_dtypes"),
    [
        ("v5e", LLAMA, (None, jnp.int8)),
        *(long(chip, LLAMA, (None, jnp.int8)) for chip in ("v5p", "v6e")),
        ("v5e", SMOLLM2, (None, jnp.int8)),
        *(("v5e", case, (None,)) for case in CORNERS),
        *(long("v6e", case, (None,)) for case in CORNERS),
        ("v5p", CORNERS[1], (jnp.int8,)),
        *(("v5p", case, (None,)) for case in LONGEST),
        *(long("v5p", case, (jnp.int8,)) for case in (CORNERS[0], CORNERS[2])),
    ],
    ids=lambda one: one if isinstance(one, str) else "-".join(str(getattr(part, "__name__", part)) for part in one),
)
def test_every_tpu_kernel_compiles(chip, case, key_dtypes):
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    for key_dtype in key_dtypes:
        compiled = compile_for(chip, case, key_dtype)
        text, memory = compiled.as_text(), compiled.memory_analysis()
        for kernel in ("importance_scores", "select_top_k", "attend_to_pages"):
            assert f"%{kernel}" in text, f"{kernel} is not in the program"
        cost = compiled.cost_analysis()
        print(
            f"{chip} {case[:-1]} k_imp {jnp.dtype(key_dtype or case[-1])}: "
            f"arguments {memory.argument_size_in_bytes / 2**20:.1f} MiB, "
            f"temporary {memory.temp_size_in_bytes / 2**20:.1f} MiB, "
            f"bytes accessed {cost.get('bytes accessed', 0) / 2**20:.1f} MiB"
        )


@pytest.mark.slow
def test_the_totals_of_split_keys_and_the_scores_of_two_layers_compile_for_tpus():
    """With an offset, log-sum-exps that are not given are computed by the kernel of the scores."""
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')

    def score(q_imp, k_imp, lengths, layer):
        q_imp, lengths = (jnp.repeat(a, 2, axis=0) for a in (q_imp, lengths))
        options = dict(layer=jnp.stack([layer, 1 - layer]), implementation="tpu")
        totals = pk.importance_totals(q_imp, k_imp, lengths, **options)
        given = pk.importance_scores(q_imp, k_imp, lengths, totals=totals, **options)
        return given, pk.importance_scores(q_imp, k_imp, lengths, offset=totals, **options)

    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS["v5e"])
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    described = arguments(LLAMA, None, NamedSharding(mesh, PartitionSpec()))
    with jax.set_mesh(mesh):
        text = jax.jit(score).lower(*(described[n] for n in ("q_imp", "k_imp", "lengths", "layer"))).compile().as_text()
    for kernel, times in {"%importance_totals": 1, "%importance_scores": 2}.items():
        assert len(re.findall(f"{kernel}\\S* = .*custom-call", text)) == times, kernel


@pytest.mark.slow
@pytest.mark.parametrize("size", [64, 300, 5000])
def test_normalised_scores_of_a_room_that_128_does_not_divide_compile_for_tpus(size):
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    topology = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS["v5e"])
    mesh = Mesh(np.array(topology.devices[:1]), ("one",))
    shapes = ((2, 3, 2, 16), jnp.bfloat16), ((2, 3, 16, size), jnp.bfloat16), ((2,), jnp.int32)
    described = (jax.ShapeDtypeStruct(*one, sharding=NamedSharding(mesh, PartitionSpec())) for one in shapes)
    with jax.set_mesh(mesh):
        jax.jit(functools.partial(pk.importance_scores, implementation="tpu")).lower(*described).compile()


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", *map(long, ("v5p", "v6e"))])
def test_a_layer_is_not_copied_out_of_the_cache(chip):
    """Temporary memory of a step is a small part of one layer's keys and values, however they are stacked."""
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    batch, heads, *_, size, dim, _, _, dtype = LLAMA
    layer_bytes = 2 * batch * heads * size * dim * jnp.dtype(dtype).itemsize
    for options in ({}, {"pooling": "maximum"}):
        memory = compile_for(chip, LLAMA, None, **options).memory_analysis()
        assert memory.temp_size_in_bytes < layer_bytes / 16


@pytest.mark.parametrize(
    "case, key_dtype",
    [
        (LLAMA[:-2] + (1, jnp.bfloat16), None),
        (SMOLLM2[:4] + (4097, 80, 512, 1, jnp.float32), None),
        pytest.param(CORNERS[1], jnp.int8, marks=pytest.mark.slow),
        pytest.param(CORNERS[2], None, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_every_gpu_kernel_is_lowered_for_cuda(case, key_dtype):
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("one",), (AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        exported = export.export(
            jax.jit(layer_of(case, "gpu")),
            platforms=["cuda"],
            disabled_checks=[export.DisabledSafetyCheck.custom_call(TRITON)],
        )(**arguments(case, key_dtype))
    kernels = 5 if case[2] > 1 else 4  # normalised pooling has a kernel of its own
    assert exported.mlir_module().count(f"@{TRITON}") == kernels
