"""The op of tokamax gives what the kernels give, and tokamax finds it, tunes it and uses what it found."""

from __future__ import annotations

import importlib.util
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tokamax") is None,
        reason='tokamax is not installed: pip install -e ".[tokamax]" with Python 3.12 or newer',
    ),
]
N = 16
RULES = dict(sinks=2, recent=4)


@pytest.fixture(scope="module")
def op():
    """The module, registered."""
    from pallas_kernels import tokamax_op

    with jax.numpy_rank_promotion("allow"):
        tokamax_op.register()
    logging.getLogger("absl").setLevel(logging.ERROR)  # it warns of every configuration that was never tuned
    return tokamax_op


@pytest.fixture(scope="module")
def operands():
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (2, 4, 32), (2, 2, 64, 32), (2, 2, 64, 32), (2, 2, 2, 8), (2, 2, 8, 64)
    return *map(jax.random.normal, keys, shapes), jnp.array([50, 64])


@pytest.fixture
def interpreted(op, monkeypatch):
    """The GPU's op, interpreted, with two configurations to try."""
    monkeypatch.setattr(op, "TRIALS", {"score_tokens": (128,)})
    return op.TritonSparseDecodeAttention(interpret=True)


def test_the_op_is_the_kernels_attention_with_its_log_sum_exp(op, operands):
    import tokamax

    how = dict(**RULES, counts=jnp.array([16, 9]), pooling="maximum", unit=2, scale=0.5)

    @jax.jit
    def both(*operands):
        op_found = tokamax.sparse_decode_attention(*operands, N, return_residuals=True, **how)
        how_expected = dict(**how, return_residual=True, implementation="xla")
        return op_found, pallas_kernels.sparse_decode_attention(*operands, N, **how_expected)

    found, expected = both(*operands)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)
    stacked = operands[0], *(a[None] for a in operands[1:3]), operands[3], operands[4][None], operands[5]
    found = jax.jit(lambda layer: tokamax.ops.sparse_decode_attention(*stacked, N, layer=layer, **how))(0)
    np.testing.assert_allclose(found, expected[0], atol=1e-6)


def test_the_op_for_tpus_gives_the_same(op, operands):
    kernel = op.MosaicSparseDecodeAttention(interpret=True)
    how = dict(unit=16, **RULES)
    expected = pallas_kernels.sparse_decode_attention(*operands, 2, implementation="reference", **how)
    np.testing.assert_allclose(kernel(*operands, 2, **how), expected, atol=1e-5)


def test_an_implementation_of_another_device_or_name_is_refused(op, operands):
    with pytest.raises(ExceptionGroup) as caught:
        op.sparse_decode_attention(*operands, N, implementation=("triton", "mosaic"))
    assert "Not supported on cpu" in str(caught.value.exceptions[0])
    with pytest.raises(ValueError, match=r"unknown implementation .*'cuda'.* xla, triton, mosaic"):
        op.sparse_decode_attention(*operands, N, implementation="cuda")
    with pytest.raises(ValueError, match="n = 65 is more than the cache's 64 tokens"):
        op.sparse_decode_attention(*operands, 65)


def test_tokamax_reads_the_op_out_of_a_program_and_tunes_with_full_rows(op, operands):
    import tokamax
    from tokamax._src.numerics import random_initialize

    def step(*operands):
        return op.sparse_decode_attention(*operands, N, first=jnp.zeros(2, jnp.int32), **RULES)

    (bound,) = tokamax.autotuning.get_bound_args(step, *operands)
    assert type(bound.op) is op.SparseDecodeAttention and bound.arguments["n"] == N
    assert random_initialize(bound.arguments["lengths"]).min() >= 64
    assert random_initialize(bound.arguments["first"]).max() == 0
    tuned = tokamax.autotune(step, *operands, all_implementations=True, progress_bar=False)
    assert [type(one.op) for one, _ in tuned.data] == [op.SparseDecodeAttention]  # the only one for this device


def test_what_tuning_found_is_stored_and_used(op, operands, interpreted):
    import tokamax

    def step(*operands):
        return interpreted(*operands, N, **RULES)

    bound = interpreted.bind(*operands, N, **RULES)
    assert bound.default_config == op.current_tiles()
    tuned = tokamax.AutotuningResult.loads(tokamax.autotune(step, *operands, progress_bar=False).dumps())
    ((_, times),) = tuned.data
    assert {tiles.score_tokens for tiles in times} == {128, op.current_tiles().score_tokens}
    with tuned:
        assert bound.default_config == times.fastest_config
        expected = pallas_kernels.sparse_decode_attention(*operands, N, **RULES)
        np.testing.assert_allclose(jax.jit(step)(*operands), expected, atol=1e-5)


def test_all_trials_are_configurations_of_the_kernels(op, operands):
    configs = op.IMPLEMENTATIONS["triton"].bind(*operands, N).autotuning_configs
    assert len(configs) == 1 + sum(map(len, op.TRIALS.values()))
