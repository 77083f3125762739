"""The benchmark of the kernels: its byte model, its rows, and its messages for invalid flags."""

from __future__ import annotations

import json

import jax.numpy as jnp
import pytest

from pallas_kernels.bench import benchmark, cases

LLAMA = cases.SHAPES["llama8b"]


def case(context, **changed):
    settings = dict(shape=LLAMA, context=context, batch=1, tokens=2048, dtype=jnp.bfloat16)
    return cases.Case(**(settings | changed))


@pytest.mark.parametrize("context, cap", [(32768, 8.0), (131072, 12.8)])
def test_the_byte_model_gives_the_caps_worked_out_by_hand(context, cap):
    """Llama-3.1-8B in bfloat16, 2048 tokens, R = 16, scores not counted: dense 2*S*D, sparse S*R + 2*n*D numbers."""
    scores = 2 * 8 * context * 4
    found = case(context).dense_bytes / (case(context).sparse_bytes(1) - scores)
    assert found == pytest.approx(cap, abs=0.05)


def test_the_whole_model_gains_less_because_its_weights_are_read_too():
    """At batch 1 with attention free: (weights + cache) / weights, 1.27 at 32K."""
    one = case(32768)
    cache = LLAMA.layers * one.dense_bytes
    assert 1 + cache / (2 * LLAMA.weights) == pytest.approx(1.27, abs=0.005)
    assert 1 < one.model_cap(1) < one.model_cap(16) < 1.27
    assert case(32768, batch=16).model_cap(16) > 3


def test_budgets_are_fractions_or_tokens():
    assert [float(b) for b in benchmark.budgets("1/16,0.25,2048,1")] == [0.0625, 0.25, 2048.0, 1.0]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--budget", "0"], "must be above 0"),
        (["--budget", "1.5"], "a fraction is at most 1"),
        (["--budget", "half"], "give fractions or tokens"),
        (["--context", "4k"], "give whole numbers"),
        (["--batch", "0"], "at least 1"),
        (["--shape", "gpt"], "invalid choice"),
        (["--h200"], "needs a GPU, the platform is cpu"),
        (["--implementation", "gpu"], "needs a GPU, the platform is cpu"),
        (["--unit", "3"], "unit must be a power of two"),
        (["--model", "h200", "--unit", "0"], "unit must be a power of two"),
        (["--repeats", "0"], "at least 1"),
    ],
)
def test_bad_flags_are_told_in_a_line(flags, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(flags)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_writes_the_rows_it_prints(tmp_path, capsys):
    path = tmp_path / "rows" / "small.json"
    flags = (
        "--shape smollm2 --context 512,256 --budget 1/4,384 --batch 2 --interval 1,4 --together 1,4 --repeats 1".split()
    )
    assert benchmark.main([*flags, "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    keys = {"context", "budget", "batch", "interval", "seconds", "dense_seconds", "speedup", "cap", "share_of_cap"}
    keys |= {"predicted_bytes", "gb_s", "copy_gb_s", "model_cap", "peers"}
    assert len(report["rows"]) == 12 and all(keys <= set(row) for row in report["rows"])
    assert [entry["why"] for entry in report["left_out"]] == 2 * ["384 tokens are more than the context of 256"]
    row = report["rows"][0]
    assert row["speedup"] == pytest.approx(row["dense_seconds"] / row["seconds"])
    assert row["dense_seconds"] <= row["peers"]["einsum"]
    printed = capsys.readouterr().out
    assert "left out: 384 tokens" in printed and f"plot: {path.with_suffix('.png')}" in printed
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
