"""The whole decode step of a Llama-3.1-8B compiles for TPUs, within expected memory and communication."""

from __future__ import annotations

import pytest

from benchmarks import tpu_decode

MEMORY_GIB = {"v5e": 16, "v5p": 95, "v6e": 32}


@pytest.mark.slow
@pytest.mark.parametrize("chip", tpu_decode.CHIPS)
def test_a_decode_step_of_llama_compiles(chip, capsys):
    pytest.importorskip("libtpu", reason='libtpu is not installed; pip install "jax[tpu]" brings the TPU compiler')
    compiled = tpu_decode.compile_decode(chip)
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
