"""Caches in host memory give what those on the device give."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import butler_jax
from butler_jax.decoding import decode_step, prefill
from butler_jax.decoding.store import offload
from butler_jax.model import BaseModel
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.selection import SelectionConfig
from tests.decoding.letters import BASE, PROMPTS, Letters
from tests.host_devices import run_on_devices
from tests.marked import long

pytestmark = pytest.mark.usefixtures("few_optimisations")


@pytest.mark.slow
def test_offload_gives_the_resident_tokens(base, predictor):
    settings = dict(
        predictor=predictor,
        selection=SelectionConfig(budget=0.4, sinks=1, recent=3, unit=2, interval=2),
        max_new_tokens=20,
        stop=(),
    )
    resident = butler_jax.generate(base, PROMPTS, **settings)
    offloaded = butler_jax.generate(base, PROMPTS, offload=True, **settings)
    assert offloaded.tokens == resident.tokens and offloaded.attended == resident.attended


ODD = """
import sys

import jax

sys.path.insert(0, sys.argv[1])
import butler_jax
from butler_jax.parallel import make_mesh
from butler_jax.selection import SelectionConfig

base, prompt = butler_jax.load_base("tiny"), [5, 9, 17, 33, 65, 129, 257, 513, 3, 7]
how = dict(selection=SelectionConfig(budget=12), policy="oracle", max_new_tokens=4, capacity=63, stop=())
alone = butler_jax.generate(base, prompt, **how)
with jax.set_mesh(make_mesh("sequence=2")):
    split = butler_jax.generate(base, prompt, offload=True, **how)
assert split.tokens == alone.tokens and split.attended == alone.attended, (split, alone)
"""


@pytest.mark.slow
def test_offload_decodes_on_a_mesh_that_splits_the_chosen_tokens_and_not_the_cache():
    """A capacity of 63 has no halves, and the 12 tokens that are read have."""
    run_on_devices(2, ODD, timeout=600)


@pytest.mark.long  # the tokens above, and logits below
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "interval"), [("lookahead", 2), ("producer", 1)])
def test_offload_gives_the_resident_tokens_beside_layers_that_slide(kind, interval):
    slides = (True, False, True, True, False, True)
    config = dataclasses.replace(BASE, layers=6, sliding_window=7, sliding_layers=slides)
    model = BaseModel(config, jax.random.key(1))
    base = SimpleNamespace(model=model, tokenizer=Letters(), config=config, generation={})
    predictor = make_predictor(config, PredictorConfig(kind=kind, rank=8, stride=2, hidden=16))
    selection = SelectionConfig(budget=0.4, sinks=1, recent=3, interval=interval)
    settings = dict(predictor=predictor, selection=selection, max_new_tokens=16, stop=())
    resident = butler_jax.generate(base, PROMPTS, **settings)
    offloaded = butler_jax.generate(base, PROMPTS, offload=True, **settings)
    assert offloaded.tokens == resident.tokens and offloaded.attended == resident.attended


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fields", "pooling"),
    [
        ("lookahead", dict(budget=0.4, interval=3), "maximum"),
        ("contextual", dict(budget=0.5, unit=4), "normalised"),
        ("lookahead", dict(budget=0.4, tail=8), "normalised"),
        long("lookahead", dict(budget=0.4), "normalised"),
        long("producer", dict(budget=0.5, unit=4), "maximum"),
        long("producer", dict(budget=0.4, interval=3), "normalised"),
        long("contextual", dict(budget=0.4), "maximum"),
    ],
)
def test_offload_gives_the_resident_logits(base, kind, fields, pooling):
    # A layer's rows are fetched in the layer before it, where its choice is known. The program has its layers apart, so
    # that sums may be in another order.
    predictor = make_predictor(BASE, PredictorConfig(kind=kind, rank=8, stride=2, hidden=16))
    selection = SelectionConfig(sinks=1, recent=3, **fields)
    settings = dict(predictor=predictor, selection=selection, policy=make_policy("tokenbutler", pooling=pooling))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 24)), jnp.int32)
    fill = jax.jit(lambda t: prefill(base.model, t, jnp.asarray([24, 15]), capacity=48, **settings)[1])
    step = jax.jit(lambda t, s: decode_step(base.model, t, s, **settings))
    resident = jax.device_put(fill(tokens), jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    offloaded = dataclasses.replace(resident, kv=offload(resident.kv))
    for t in range(7):
        logits, resident, found = step(tokens[:, t], resident)
        own_logits, offloaded, own_found = step(tokens[:, t], offloaded)
        np.testing.assert_allclose(own_logits, logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(own_found.attended, found.attended)
    np.testing.assert_allclose(np.asarray(offloaded.kv.v), np.asarray(resident.kv.v), rtol=1e-5, atol=1e-6)
    assert offloaded.kv.k.sharding.memory_kind == "pinned_host"
