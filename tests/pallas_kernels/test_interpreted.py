"""The TPU kernels under the interpreter that simulates their memories: unwritten memory is NaN, and races are found.

And both kinds of kernel on more shapes and dtypes than the fast tests have time for. Oracles and tolerances are those
of definitions.py.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator
from jax.experimental.pallas import tpu as pltpu

import pallas_kernels as pk
from tests.marked import long
from tests.pallas_kernels.definitions import attention_case, check_attention, check_choice, normal, oracle_scores, run

SIMULATED = pltpu.InterpretParams(uninitialized_memory="nan", detect_races=True)
FEW = settings(max_examples=6, deadline=None, derandomize=True, database=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dim, unit, dtype", [long(64, 16, jnp.float32), (128, 32, jnp.bfloat16), (128, 2, jnp.bfloat16)]
)
def test_simulated_tpu_memories_leak_no_nan_and_see_no_race(dim, unit, dtype):
    batch, heads, group, size, n = 2, 2, 3, max(10 * unit, 160), 9 if unit > 2 else 70
    case = attention_case(1, batch=batch, heads=heads, group=group, dim=dim, size=size, n=n, unit=unit, dtype=dtype)
    q, keys = normal(2, batch, heads, group, 8, dtype=dtype), normal(3, batch, heads, 8, size, dtype=dtype)
    options = dict(lengths=case.lengths, implementation="tpu", interpret=SIMULATED)
    scores = pk.importance_scores(q, keys, **options)
    assert not simulator.races.races_found
    expected = oracle_scores(q.astype(jnp.float32), keys.astype(jnp.float32), case.lengths, "normalised")
    np.testing.assert_allclose(scores, expected, atol=2e-2 if dtype == jnp.bfloat16 else 1e-5)

    ours = pk.select_top_k(scores, n=n, unit=unit, sinks=2, recent=3, **options)
    assert not simulator.races.races_found
    theirs = pk.select_top_k(scores, case.lengths, n, unit=unit, sinks=2, recent=3, implementation="reference")
    np.testing.assert_array_equal(ours.indices, theirs.indices)

    attend = functools.partial(pk.masked_topk_decode_attention, case.q, case.k, case.v, case.indices, case.valid)
    out, residual = attend(unit=unit, return_residual=True, **options)
    assert not simulator.races.races_found
    sound = attend(unit=unit, return_residual=True, lengths=case.lengths, implementation="reference")
    tolerance = 2e-2 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(out.astype(jnp.float32), sound[0].astype(jnp.float32), atol=tolerance)
    np.testing.assert_allclose(residual, sound[1], atol=tolerance)


@pytest.mark.slow
def test_simulated_tpu_memories_of_several_tiles_and_blocks():
    options = dict(implementation="tpu", interpret=SIMULATED)
    case = attention_case(1, batch=2, heads=2, group=3, dim=128, size=1792, n=100, unit=16)  # four tiles
    lengths = jnp.asarray([1700, 901])
    attend = functools.partial(pk.masked_topk_decode_attention, case.q, case.k, case.v, case.indices, case.valid)
    attend = functools.partial(attend, unit=16, lengths=lengths, return_residual=True)
    for own, sound in zip(attend(**options), attend(implementation="reference"), strict=True):
        np.testing.assert_allclose(own, sound, atol=1e-5)
    q, keys, lengths = normal(2, 2, 2, 3, 8), normal(3, 2, 2, 8, 20000), jnp.asarray([20000, 9000])  # three blocks
    scores = pk.importance_scores(q, keys, lengths, implementation="reference")
    np.testing.assert_allclose(pk.importance_scores(q, keys, lengths, **options), scores, atol=1e-5)
    rules = dict(n=60, unit=16, sinks=4, recent=8)
    sound = pk.select_top_k(scores, lengths, implementation="reference", **rules)
    for own, other in zip(pk.select_top_k(scores, lengths, **rules, **options), sound, strict=True):
        np.testing.assert_array_equal(own, other)
    assert not simulator.races.races_found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("implementation", "dim", "dtype"),
    [
        ("tpu", 80, jnp.float32),
        ("tpu", 128, jnp.bfloat16),
        ("gpu", 96, jnp.float32),
        ("gpu", 256, jnp.float32),
        ("gpu", 128, jnp.bfloat16),
        long("tpu", 80, jnp.bfloat16),
        long("tpu", 96, jnp.bfloat16),
        long("tpu", 128, jnp.float32),
        long("tpu", 256, jnp.float32),
        long("gpu", 80, jnp.bfloat16),
    ],
)
def test_attention_kernels_take_every_width_and_bfloat16(implementation, dim, dtype):
    group = 16 if dim == 128 else 1
    case = attention_case(4, batch=2, heads=1, group=group, dim=dim, size=96, n=5, unit=16, dtype=dtype)
    check_attention(case, implementation, 1e-5 if dtype == jnp.float32 else 2e-2)


@pytest.mark.slow
def test_the_gpu_kernel_attends_single_tokens_of_a_cache_of_any_length():
    case = attention_case(5, batch=3, heads=2, group=3, dim=80, size=211, n=130, unit=1, layers=2)
    check_attention(case, "gpu", 1e-5, new=(normal(6, 3, 2, 80), normal(7, 3, 2, 80)))


@pytest.mark.slow
@FEW
@given(
    implementation=st.sampled_from(["tpu", "gpu"]),
    size=st.integers(1, 400),
    unit=st.sampled_from([1, 4, 16]),
    seed=st.integers(0, 9),
    share=st.floats(0, 1),
    ties=st.booleans(),
)
def test_selection_kernels_choose_as_defined_at_any_size(implementation, size, unit, seed, share, ties):
    rng = np.random.default_rng(seed)
    scores = normal(seed, 2, 2, size)
    scores = jnp.round(scores) if ties else scores
    n = int(share * -(-size // unit))
    counts = jnp.asarray(rng.integers(0, n + 1, (2, 2)), jnp.int32)
    lengths = jnp.asarray(rng.integers(0, size + 1, 2), jnp.int32)
    options = dict(n=n, unit=unit, sinks=int(rng.integers(0, 5)), recent=int(rng.integers(0, 5)), counts=counts)
    check_choice(implementation, scores, lengths, **options)


@pytest.mark.slow
@FEW
@given(
    implementation=st.sampled_from(["tpu", "gpu"]),
    size=st.integers(1, 700),
    group=st.integers(1, 5),
    rank=st.sampled_from([4, 16, 24]),
    pooling=st.sampled_from(["normalised", "maximum"]),
    seed=st.integers(0, 9),
)
def test_score_kernels_score_as_defined_at_any_size(implementation, size, group, rank, pooling, seed):
    q, keys = normal(seed, 2, 1, group, rank), normal(seed + 1, 2, 1, rank, size)
    lengths = jnp.asarray(np.random.default_rng(seed).integers(0, size + 1, 2), jnp.int32)
    found = run(pk.importance_scores, q, keys, lengths, pooling=pooling, implementation=implementation)
    np.testing.assert_allclose(found, oracle_scores(q, keys, lengths, pooling), atol=1e-5)


@pytest.mark.slow
def test_the_whole_tpu_step_is_the_reference_under_simulated_memories():
    batch, heads, group, dim, size = 1, 2, 2, 64, 128
    arrays = (
        normal(0, batch, heads * group, dim),
        *(normal(i, batch, heads, size, dim) for i in (1, 2)),
        normal(3, batch, heads, group, 8),
        normal(4, batch, heads, 8, size),
        jnp.array([101]),
    )
    options = dict(n=4, unit=16, sinks=2, recent=3)
    ours = jax.jit(functools.partial(pk.sparse_decode_attention, implementation="tpu", interpret=SIMULATED, **options))(
        *arrays
    )
    theirs = run(pk.sparse_decode_attention, *arrays, implementation="reference", **options)
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
