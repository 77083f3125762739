"""The GPU compiler compiles the kernels and a decode step without a GPU, and spills no register.

It comes with the extra `gpu-compiler`; without it this test is skipped. It compiles in a process of its own, since JAX
must find the compiler before it begins.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
import json
from benchmarks.gpu_compile import CASES, compile_decode, compile_layer, count_launches

found = []
for chip, name in json.loads({asked!r}):
    compiled = compile_layer(chip, CASES[name]) if name in CASES else compile_decode(chip, *map(int, name.split()))
    temporary = compiled.memory_analysis().temp_size_in_bytes
    found.append([chip, name, count_launches(compiled), temporary])
print(json.dumps(found))
"""
NORMALISED = {"importance_totals", "importance_scores", "select_top_k", "attend_to_tokens", "merge_splits"}


def run_apart(program: str) -> str:
    """What a program prints in a process of its own."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip('the GPU compiler is not installed; pip install -e ".[gpu-compiler]" brings it')
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def compile_all(asked: list[tuple[str, str]]) -> list:
    return json.loads(run_apart(PROGRAM.format(asked=json.dumps(asked))).splitlines()[-1])


def test_no_kernel_spills_and_a_call_is_few_launches():
    asked = [
        ("a100", "Llama-3.1-8B, 32,768 tokens"),
        ("h200", "the same, 131,072 tokens, batch 8, int8 k_imp"),
        ("h100", "the same, pooled by the maximum"),
        ("b200", "D = 256, float32"),
        ("h100", "G = 32, R = 128, int8 k_imp"),
        ("h100", "G = 32, R = 128, float32"),
        ("a100", "D = 80, float32"),
    ]
    for chip, name, launches, temporary in compile_all(asked):
        kernels = NORMALISED - ({"importance_totals"} if "maximum" in name else set())
        kernels = kernels | ({"bracket_threshold"} if "131,072" in name else set())
        assert launches == dict.fromkeys(kernels, 1), (chip, name, launches)
        assert temporary < 64 << 20, (chip, name, temporary)


def test_the_spans_of_a_tail_are_read_with_the_chosen_tokens():
    asked = [
        ("a100", "attention with a tail"),
        ("h200", "attention with a tail, one KV head, 1,048,576 tokens"),
        ("h200", "attention with a tail, D = 256, float32"),
        ("b200", "attention with a tail, G = 1, D = 80, float32"),
    ]
    for chip, name, launches, _ in compile_all(asked):
        kernels = {"attend_to_tokens": 1, "merge_splits": 1}
        assert kernels.items() <= launches.items() and sum(launches.values()) == 3, (chip, name, launches)


def test_a_decode_step_reads_its_weights_in_place_and_has_no_conditions():
    asked = [("h200", "5"), ("h200", "5 64")]  # a dense layer and two producers' two each; tokens of a span of the tail
    without, tail = (row[2:] for row in compile_all(asked))
    for launches, temporary in (without, tail):
        assert not {"cond", "conditional", "while"} & set(launches), launches
        assert launches["attend_to_tokens"] == 4
        for kernel in ("importance_totals", "importance_scores", "select_top_k"):
            assert launches[kernel] == 2, f"{kernel} runs once for the layers of a producer"
        assert temporary < 64 << 20, temporary
    added = sum(tail[0].values()) - sum(without[0].values())
    assert added <= 4 + 8, "the tail counts what each layer reads, and writes the means once"


def test_kernels_for_an_absent_chip_have_its_tiles():
    program = """
from benchmarks.gpu_compile import mesh_of
import jax
from pallas_kernels.gpu.tiles import current_tiles, tiles_of
with jax.set_mesh(mesh_of("a100")):
    found = jax.eval_shape(lambda: jax.numpy.zeros(current_tiles().choosers)).shape
assert found == (tiles_of("NVIDIA A100-SXM4-80GB").choosers,) != (tiles_of("NVIDIA H200").choosers,), found
"""
    run_apart(program)
