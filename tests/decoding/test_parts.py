"""Decoding with the tokens of the caches split over devices, against one device that holds them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.decoding.parts import Part
from butler_jax.selection import Chosen
from tests.host_devices import host_devices, run_on_devices

REPOSITORY = Path(__file__).parent.parent.parent


def test_a_choice_is_dealt_out_to_the_parts_that_hold_it():
    rng = np.random.default_rng(0)
    units, room, unit, parts = 24, 10, 4, 3
    for count in (0, 1, 7, 10):
        picked = np.sort(rng.choice(units, count, replace=False))
        indices = jnp.asarray(np.pad(picked, (0, room - count)), jnp.int32)[None, None]
        chosen = Chosen(indices, (jnp.arange(room) < count)[None, None])
        found = []
        for number in range(parts):
            size = units * unit // parts
            own = Part("", jnp.asarray(number * size), size).own(chosen, unit)
            held = int(own.valid.sum())
            assert np.asarray(own.valid)[0, 0, :held].all(), "the valid ones come first"
            found += (np.asarray(own.indices)[0, 0, :held] + number * size // unit).tolist()
        assert found == picked.tolist()


STEPS = """
import json, re, sys
import jax
import numpy as np
jax.config.update("jax_numpy_rank_promotion", "raise")
sys.path.insert(0, sys.argv[1])
from butler_jax import PredictorConfig, SelectionConfig
from butler_jax.model.decoder import LOGICAL_AXES, BaseModel
from butler_jax.model.config import BaseConfig
from butler_jax.decoding.step import decode_step
from butler_jax.decoding.prefill_pass import prefill
from butler_jax.policies import make_policy
from butler_jax.predictors import make_predictor
from butler_jax.parallel.mesh import make_mesh, place

CAPACITY, STEPS = 128, 3
sizes = dict(
    family="llama", vocab_size=61, layers=4, width=32, heads=8, kv_heads=4, head_dim=8, hidden=48, context=256
)
rng = np.random.default_rng(0)
tokens = rng.integers(0, 61, (2, 101 + STEPS)).astype(np.int32)
lengths = np.array([101, 9], np.int32)
cases = {
    "normalised, with details": dict(details=True),
    "maximum in int8, sliding": dict(pooling="maximum", score_dtype="int8", sliding_window=20),
    "oracle, with a tail": dict(policy="oracle", tail=8),
    "oracle, with spans across the parts": dict(policy="oracle", tail=24),
    "streaming, with sinks and a soft cap": dict(policy="streaming", attention_sinks=True, attention_softcap=0.5),
}
found, moved = {}, {}
for text in ("data=1", *sys.argv[2:]):
    mesh = make_mesh(text)
    for name, case in cases.items():
        sliding = {}
        if "sliding_window" in case:
            sliding = dict(sliding_window=case["sliding_window"], sliding_layers=(True, False) * 2)
        terms = {key: case[key] for key in ("attention_sinks", "attention_softcap") if key in case}
        config = BaseConfig(**sizes, **sliding, **terms)
        model = BaseModel(config, jax.random.key(0))
        if terms:
            model.layers.sinks[...] = jax.random.normal(jax.random.key(1), model.layers.sinks.shape)
        model = place(model, LOGICAL_AXES, mesh)
        predictor = make_predictor(config, PredictorConfig(rank=4, stride=2))
        predictor = place(predictor, predictor.logical_axes, mesh)
        options = {"pooling": case["pooling"]} if "pooling" in case else {}
        policy = make_policy(case.get("policy", "tokenbutler"), **options)
        selection = SelectionConfig(budget=0.25, sinks=2, recent=4, tail=case.get("tail", 0))
        dtype, details = case.get("score_dtype"), case.get("details", False)

        def fill(model, predictor, tokens, lengths):
            how = dict(capacity=CAPACITY, predictor=predictor, chunk=32, score_dtype=dtype)
            return prefill(model, tokens, lengths, selection=selection, policy=policy, **how)

        def step(model, predictor, token, state):
            return decode_step(
                model, token, state, predictor=predictor, selection=selection, policy=policy, details=details
            )

        with jax.set_mesh(mesh):
            logits, state = jax.jit(fill)(model, predictor, tokens[:, :101], lengths)
            advance = jax.jit(step).lower(model, predictor, tokens[:, 0], state).compile()
            rows = [logits]
            for number in range(STEPS):
                logits, state, seen = advance(model, predictor, tokens[:, 101 + number], state)
                rows += [logits, seen.attended] + ([seen.chosen[1:], seen.scores[1:]] if details else [])
        found[text, name] = [np.asarray(row, np.float64) for row in rows]
        gathered = re.findall(r"= (\\w+)\\[([\\d,]*)\\][^=]* all-gather", advance.as_text())
        moved[text, name] = max([int(np.prod([int(n) for n in dims.split(",") if n])) for _, dims in gathered] or [0])
apart = {}
for (text, name), rows in found.items():
    for own, other in zip(rows, found["data=1", name], strict=True):
        finite = np.isfinite(other)
        assert (np.isfinite(own) == finite).all(), (text, name)
        worst = float(np.abs(own[finite] - other[finite]).max())
        apart[f"{text}: {name}"] = max(apart.get(f"{text}: {name}", 0), worst)
print(json.dumps([apart, {f"{text}: {name}": size for (text, name), size in moved.items()}]))
"""


@pytest.mark.slow
def test_parts_of_a_cache_decode_like_the_whole_and_never_come_together():
    apart, moved = json.loads(run_on_devices(8, STEPS, "data=2,model=2,sequence=2").splitlines()[-1])
    # logits of size 1 after four layers of float32 sums in another order; counts and sets are exact
    assert max(apart.values()) < 2e-5, apart
    # half a layer's keys of half the rows are 2 * 128 * 8 numbers; the scores of a block of two layers fewer
    assert max(moved.values()) < 2 * 128 * 8, moved


def test_a_cache_is_not_split_inside_a_unit():
    code = (
        "import jax; from butler_jax.decoding.parts import check_units; from butler_jax.parallel import make_mesh\n"
        "with jax.set_mesh(make_mesh('sequence=4')):\n    check_units(64, 16); check_units(66, 32); check_units(96, 16)"
    )
    environment = {**os.environ, "XLA_FLAGS": host_devices(4), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    message = (
        "ValueError: a cache of 96 tokens in 4 parts does not hold whole units of 16; choose a capacity that is a "
    )
    assert message + "multiple of 64" in done.stderr


@pytest.mark.slow
def test_the_command_generates_on_a_mesh_and_says_what_it_cannot_do_there():
    environment = {**os.environ, "XLA_FLAGS": host_devices(4), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "butler_jax", "generate", "--base", "tiny", "--policy", "streaming"]
    command += ["--prompt", "def main(args):", "--max-new-tokens", "12"]

    def done(*more: str) -> subprocess.CompletedProcess:
        run = [*command, *more]
        return subprocess.run(run, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)

    alone, together = done(), done("--mesh", "model=2,sequence=2")
    assert together.returncode == 0, together.stderr[-4000:]
    assert together.stdout == alone.stdout != ""
    refused = done("--mesh", "sequence=2", "--offload")
    assert refused.returncode == 1 and "leave out offload, or the sequence axis" in refused.stderr
