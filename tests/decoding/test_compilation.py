"""A decode step compiles within expected memory and communication: for TPUs at the sizes of Llama-3.1-8B, and here."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import pytest

from benchmarks import tpu_decode
from butler_jax.decoding import decode_step, prefill
from butler_jax.model import BaseModel
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig
from tests.marked import long

MEMORY_GIB = {"v5e": 16, "v5p": 95, "v6e": 32}


@pytest.mark.slow  # .ci/run takes v5e in pages of 16 with the newer Python
@pytest.mark.parametrize(("chip", "unit"), [*(long(chip, 16) for chip in tpu_decode.CHIPS), ("v5p", 2)])
def test_a_decode_step_of_llama_compiles(chip, unit, capsys):
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    selection = dataclasses.replace(tpu_decode.SELECTION, unit=unit)
    compiled = tpu_decode.compile_decode(chip, selection=selection)
    found, text = tpu_decode.summary(compiled), compiled.as_text()
    with capsys.disabled():
        print(f"\nLlama-3.1-8B, one step on {tpu_decode.CHIPS[chip][1]} x {chip}: {found}")
    for kernel in ("importance_scores", "select_top_k", "attend_to_pages"):
        assert f"%{kernel}" in text, f"{kernel} is not in the program"
    assert found["arguments_gib"] + found["temporary_gib"] < MEMORY_GIB[chip]
    cache = 2 * 32 * 8 * 32768 * 128 * 2 / 2**30 / tpu_decode.CHIPS[chip][1]
    assert found["temporary_gib"] < cache / 16  # no layer of the caches is copied, no cache written anew
    assert set(found["collectives"]) <= {"all-reduce"}  # heads are apart: only sums over them are exchanged


@pytest.mark.slow
def test_a_cache_split_along_its_tokens_moves_scores_and_choices_alone():
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    heads, tokens = (tpu_decode.compile_decode("v5e", parts=parts) for parts in (1, 4))
    by_heads, found = tpu_decode.summary(heads), tpu_decode.summary(tokens)
    assert f"{found['arguments_gib']:.1f}" == f"{by_heads['arguments_gib']:.1f}"  # weights and caches: a quarter each
    assert found["temporary_gib"] < 2 * 32 * 8 * 32768 * 128 * 2 / 2**30 / 4 / 16
    assert set(found["collectives"]) == {"all-reduce", "all-to-all", "all-gather"}


@pytest.mark.slow
def test_with_offload_a_chip_holds_a_few_layers_of_the_cache_at_a_time():
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    mesh, base = tpu_decode.chips("v5e", "model=1"), dataclasses.replace(tpu_decode.LLAMA_8B, layers=4)
    given, layer = dict(base=base, capacity=32768), 2 * 8 * 32768 * 128 * 2 / 2**30

    def needs(program):
        compiled = program.compile()
        found, memory = tpu_decode.summary(compiled), compiled.memory_analysis()
        assert found["host_gib"] == base.layers * layer
        assert memory.host_alias_size_in_bytes >= memory.host_argument_size_in_bytes  # written in place
        return found["temporary_gib"]

    resident = tpu_decode.summary(tpu_decode.lower_chunk(mesh, offload=False, **given).compile())["temporary_gib"]
    assert needs(tpu_decode.lower_chunk(mesh, offload=True, **given)) < resident + 2 * layer
    for selection in (SelectionConfig(budget=1 / 16, interval=8, tail=64), None):
        step = tpu_decode.lower_decode(mesh, batch=1, offload=True, selection=selection, **given)
        assert needs(step) < 2 * layer


def stepper(base, predictor, selection, layers=None):
    """(a jitted step, its state of 2 rows, tokens)."""
    config = base.config if layers is None else dataclasses.replace(base.config, layers=layers)
    make = lambda: BaseModel(config, jax.random.key(0))  # noqa: E731
    model = base.model if layers is None else jax.eval_shape(make)
    if layers is not None:
        predictor = jax.eval_shape(lambda: make_predictor(config, PredictorConfig(rank=8, stride=2)))
    tokens, lengths = jnp.ones((2, 4), jnp.int32), jnp.asarray([4, 3])
    fill = partial(prefill, capacity=96, selection=selection)
    state = jax.eval_shape(lambda m, p: fill(m, tokens, lengths, predictor=p)[1], model, predictor)
    step = jax.jit(lambda m, p, t, s: decode_step(m, t, s, predictor=p, selection=selection)[:2], donate_argnums=3)
    return step.lower(model, predictor, jax.ShapeDtypeStruct((2,), jnp.int32), state), state


@pytest.mark.slow
def test_a_deeper_model_is_no_longer_a_program(base, predictor):
    selection = SelectionConfig(budget=0.25, interval=2)
    few, many = (len(stepper(base, predictor, selection, n)[0].as_text().splitlines()) for n in (4, 32))
    assert many < few * 1.05


@pytest.mark.parametrize("tail", [0, 8])
def test_caches_are_written_in_place(base, predictor, tail):
    lowered, state = stepper(base, predictor, SelectionConfig(budget=0.25, tail=tail))
    sizes = lowered.compile().memory_analysis()
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves((state.kv, state.spans)))
    assert sizes.alias_size_in_bytes >= held
    assert sizes.temp_size_in_bytes < held  # no second cache
