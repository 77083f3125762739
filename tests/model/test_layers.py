"""layers.py against transformers' modules and against plain float64 arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from butler_jax.model.angles import rope_angles
from butler_jax.model.config import BaseConfig, RopeConfig
from butler_jax.model.hugging_face_config import base_config
from butler_jax.model.layers import gated, layer_norm, rms_norm, rope_frequencies, rotary, rotary_angles

SIZES = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
HALF = [1.0 + 0.1 * i for i in range(8)]
LONG = [2 * f for f in HALF]
SCALINGS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "yarn with mscale": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.3,
        "truncate": False,
    },
    "yarn with attention factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "attention_factor": 1.25,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": HALF,
        "long_factor": LONG,
        "original_max_position_embeddings": 64,
    },
}


def spelled(scaling: dict, spelling: str) -> dict:
    """The same rotary settings in the old or the new spelling of config.json."""
    if spelling == "new":
        return {**SIZES, "rope_parameters": {"rope_theta": 500.0, **scaling}}
    old = {"type" if key == "rope_type" else key: value for key, value in scaling.items()}
    return {**SIZES, "rope_theta": 500.0, "rope_scaling": old if old["type"] != "default" else None}


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("length", [48, 200])
@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_tables_equal_those_of_transformers(kind, length, spelling):
    values = spelled(SCALINGS[kind], spelling)
    config = base_config(values)
    theirs = LlamaRotaryEmbedding(LlamaConfig(**{k: v for k, v in values.items() if k != "model_type"}))
    positions = np.arange(length)[None]
    cos, sin = theirs(torch.zeros(1, length, 64), torch.from_numpy(positions))

    frequencies, factor = rope_frequencies(config.rope, config.rotary_dim, context=config.context, length=length)
    got = rotary_angles(jnp.asarray(positions), frequencies, factor)
    # A frequency differs by a few units in the last place (6e-8); times position 200 that is 1e-5.
    for ours, expected in zip(got, (cos, sin), strict=True):
        np.testing.assert_allclose(ours, expected[..., :8].numpy(), atol=3e-5)


@pytest.mark.parametrize("name", ["longrope", "su", "yarn"])
@pytest.mark.parametrize("length", [60, 70])
def test_partial_longrope_changes_factors_at_the_original_context(name, length):
    short, long = [1.0, 1.5, 2.0, 2.5, 3.0, 3.5], [2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
    values = {
        **SIZES,
        "model_type": "phi3",
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75,
        "rope_scaling": {"type": name, "short_factor": short, "long_factor": long},
        "pad_token_id": 0,
    }
    config = base_config(values)
    values["rope_scaling"]["type"] = "longrope"  # the only name that transformers still takes
    theirs = Phi3RotaryEmbedding(Phi3Config(**{k: v for k, v in values.items() if k != "model_type"}))
    cos, sin = theirs(torch.zeros(1, length, 64), torch.arange(length)[None])
    frequencies, factor = rope_frequencies(config.rope, config.rotary_dim, context=config.context, length=length)
    got = rotary_angles(jnp.arange(length)[None], frequencies, factor)
    assert config.rotary_dim == 12
    for ours, expected in zip(got, (cos, sin), strict=True):
        np.testing.assert_allclose(ours, expected[..., :6].numpy(), atol=2e-5)  # as above, positions below 70


def test_layers_that_slide_take_the_factors_of_the_row_where_positions_skip():
    rope = RopeConfig(
        kind="longrope", factor=4.0, original_context=64, short_factor=tuple(HALF), long_factor=tuple(LONG)
    )
    sizes = dict(vocab_size=9, width=16, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=16, context=256)
    config = BaseConfig(family="llama", rope=rope, sliding_window=8, sliding_layers=(True, False), **sizes)
    near, skipping = jnp.arange(50)[None], jnp.asarray([*range(25), *range(175, 200)])[None]
    whole, found = rope_angles(config, near, 200), rope_angles(config, skipping, near=near)
    np.testing.assert_array_equal(found.of(0)[0], whole.of(0)[0])


def test_rotation_equals_that_of_transformers():
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, 5, 4, 16)), rng.normal(size=(2, 5, 2, 16))
    frequencies, _ = rope_frequencies(base_config(SIZES).rope, 16, context=256, length=5)
    positions = jnp.asarray([[0, 1, 2, 3, 4], [7, 8, 9, 10, 11]])
    cos, sin = (a[:, :, None] for a in rotary_angles(positions, frequencies))
    table = [torch.from_numpy(np.concatenate([a[:, :, 0]] * 2, axis=-1)) for a in (cos, sin)]
    expected = apply_rotary_pos_emb(*(torch.from_numpy(a.swapaxes(1, 2)).float() for a in (q, k)), *table)
    for ours, theirs in zip((q, k), expected, strict=True):
        got = rotary(jnp.asarray(ours, jnp.float32), cos, sin)
        np.testing.assert_allclose(got, theirs.swapaxes(1, 2).numpy(), atol=1e-6)  # two float32 roundings


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**16), shift=st.integers(0, 200), gap=st.integers(0, 100))
def test_rotary_scores_depend_on_the_distance_alone(seed, shift, gap):
    rng = np.random.default_rng(seed)
    q, k = (jnp.asarray(rng.normal(size=(1, 16)), jnp.float32) for _ in range(2))
    frequencies, _ = rope_frequencies(base_config(SIZES).rope, 16, context=256, length=256)

    def score(at_q, at_k):
        rotated = [rotary(x, *rotary_angles(jnp.asarray([p]), frequencies)) for x, p in ((q, at_q), (k, at_k))]
        return jnp.sum(rotated[0] * rotated[1])

    # Angles near 300 radians carry an error of 2e-5 in float32; a score sums 16 products of about 1.
    np.testing.assert_allclose(score(gap + shift, shift), score(gap, 0), atol=1e-3)


def test_unrotated_dimensions_pass():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, 10)), jnp.float32)
    cos, sin = rotary_angles(jnp.arange(3), np.array([1.0, 0.5, 0.25], np.float32))
    np.testing.assert_array_equal(rotary(x, cos, sin)[:, 6:], x[:, 6:])


def test_rms_norm_equals_that_of_transformers():
    rng = np.random.default_rng(2)
    x, scale = rng.normal(size=(2, 3, 64)).astype(np.float32), rng.normal(size=64).astype(np.float32)
    module = LlamaRMSNorm(64, eps=1e-5)
    module.weight.data = torch.from_numpy(scale)
    expected = module(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), expected, atol=1e-6)  # rounding


def test_rms_norm_is_computed_in_float32_for_bfloat16():
    x = jnp.full((1, 8192), 3.0, jnp.bfloat16)  # a bfloat16 sum of 8192 squares would stop growing at 2304
    np.testing.assert_array_equal(rms_norm(x, jnp.ones(8192, jnp.bfloat16), 0.0), jnp.ones_like(x))


def test_layer_norm_and_gated_equal_those_of_torch():
    rng = np.random.default_rng(3)
    x, y = (rng.normal(size=(4, 32)).astype(np.float32) for _ in range(2))
    scale, bias = (rng.normal(size=32).astype(np.float32) for _ in range(2))
    weights = [torch.from_numpy(a) for a in (scale, bias)]
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (32,), *weights)
    np.testing.assert_allclose(layer_norm(*map(jnp.asarray, (x, scale, bias))), expected.numpy(), atol=2e-6)  # rounding
    expected = torch.nn.functional.silu(torch.from_numpy(x)) * torch.from_numpy(y)
    np.testing.assert_allclose(gated(jnp.asarray(x), jnp.asarray(y)), expected.numpy(), atol=1e-6)  # rounding


def test_rotary_tables_trace_under_jit():
    rope = dataclasses.replace(base_config(SIZES).rope, theta=777.0)
    frequencies, factor = rope_frequencies(rope, 16, context=256, length=4)
    plain = rotary_angles(jnp.arange(4), frequencies, factor)
    jitted = jax.jit(lambda p: rotary_angles(p, frequencies, factor))(jnp.arange(4))
    np.testing.assert_allclose(plain, jitted, atol=1e-6)  # fused arithmetic may round differently
