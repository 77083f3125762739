"""Qwen3 of google-tunix, through its adapter, gives the numbers of BaseModel with the same weights."""

from __future__ import annotations

import importlib.util

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import butler_jax
from butler_jax.model import BaseModel, forward
from butler_jax.policies import make_policy
from butler_jax.predictors import PredictorConfig
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import simulate
from butler_jax.training.objective import DistillationObjective
from butler_jax.weights import Base, adapt_model, fingerprint
from tests.tiny_models import make_batch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tunix") is None,
        reason='google-tunix is not installed: pip install -e ".[tunix]"',
    ),
]
SIZES = dict(num_layers=3, vocab_size=61, embed_dim=32, hidden_dim=48, num_heads=4, head_dim=16, num_kv_heads=2)
BATCH = make_batch([(60, 70), (100,)], 140)


@pytest.fixture(autouse=True)
def rank_promotion():
    """Tunix's code multiplies arrays of different ranks."""
    with jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture(scope="module")
def tunix_qwen3():
    """The module of Tunix. A setting of Flax that it changes when it is imported is set back after these tests."""
    before = flax.config.flax_always_shard_variable
    from tunix.models.qwen3 import model

    yield model
    flax.config.update("flax_always_shard_variable", before)


def make_qwen3(module, **settings):
    """A random model whose norms matter too."""
    config = module.ModelConfig(**{**SIZES, "rope_theta": 1_000_000, "norm_eps": 1e-6, **settings})
    model, rng = module.Qwen3(config, rngs=nnx.Rngs(0)), np.random.default_rng(0)

    def draw(path, leaf):
        norm = "norm" in jax.tree_util.keystr(path)
        return jnp.asarray(rng.normal(float(norm), 0.3 if norm else 0.125, leaf.shape), leaf.dtype)

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree_util.tree_map_with_path(draw, state))


def carry_over(model, config) -> BaseModel:
    """A BaseModel with the weights of Tunix's model."""
    ours, own = BaseModel(config, jax.random.key(0)), ours_of(model)
    for name, value in own.items():
        leaf = getattr(ours.layers, name)
        leaf[...] = value.reshape(leaf.shape)  # a norm of all heads has an axis of one head here
    ours.embedding[...] = model.embedder.input_embedding[...]
    ours.final_norm[...] = model.final_norm.w[...]
    if not config.tied:
        ours.unembedding[...] = model.lm_head.w[...].T
    return ours


def ours_of(model) -> dict[str, jax.Array]:
    """The stacked parameters of Tunix's layers by their names in BaseModel."""

    def stack(get):
        return jnp.stack([get(layer)[...] for layer in model.layers])

    projections = {n: stack(lambda layer, n=n: getattr(layer.attn, f"{n}_proj").w) for n in "qkvo"}
    norms = {f"{n}_norm": stack(lambda layer, n=n: getattr(layer.attn, f"{n}_norm").w) for n in "qk"}
    block = {n: stack(lambda layer, n=n: getattr(layer.mlp, f"{n}_proj").kernel) for n in ("gate", "up", "down")}
    outer = {
        "attention_norm": stack(lambda layer: layer.input_layernorm.w),
        "mlp_norm": stack(lambda layer: layer.post_attention_layernorm.w),
    }
    return {**projections, **norms, **block, **outer}


@pytest.fixture(scope="module")
def bases(tunix_qwen3):
    """Tunix's model and ours with the same weights, as bases."""
    from butler_jax.model.tunix import TunixQwen3

    with jax.numpy_rank_promotion("allow"):
        base = adapt_model(TunixQwen3(make_qwen3(tunix_qwen3), context=512), "tunix")
    ours = carry_over(base.model.model, base.config)
    return base, Base("ours", ours, None, fingerprint(ours))


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_tunix_own_and_ours(tunix_qwen3, tied):
    from butler_jax.model.tunix import TunixQwen3

    model = make_qwen3(tunix_qwen3, use_tied_embedding=tied)
    adapter = TunixQwen3(model, context=512)
    tokens = jnp.asarray(BATCH["tokens"])
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None], (2, 140, 140))
    expected, _ = model(tokens, positions, None, mask)
    assert float(jnp.std(expected)) > 0.3
    for one in (adapter, carry_over(model, adapter.config)):
        np.testing.assert_allclose(jax.jit(forward)(one, tokens), expected, atol=3e-5)  # float32 sums in another order


def test_a_training_step_has_the_same_loss_and_gradient(bases):
    objective = DistillationObjective("cross_entropy", sinks=2, recent=4)
    batch = {name: jnp.asarray(array) for name, array in BATCH.items()}
    steps = []
    for base in bases:
        predictor = butler_jax.init_predictor(base, PredictorConfig(rank=8), batches=[BATCH])
        steps.append(jax.tree.leaves(jax.jit(objective.differentiate)(predictor, base.model, batch)))
    for found, expected in zip(*steps, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * float(jnp.abs(expected).max()) + 1e-12)


def test_a_simulation_reads_the_same_keys_at_the_same_perplexity(bases):
    selection = SelectionConfig(budget=0.25, sinks=2, recent=4)
    predictor = butler_jax.init_predictor(bases[0], PredictorConfig(rank=8), batches=[BATCH])
    found, expected = (simulate(b.model, BATCH, make_policy("tokenbutler"), selection, predictor) for b in bases)
    np.testing.assert_array_equal(found.shares, expected.shares)
    np.testing.assert_allclose(found.stream, expected.stream, atol=1e-4)  # a key more or less moves it by 0.01 and more
    counted = np.asarray(BATCH["segments"]) > 0
    perplexities = [float(np.exp(np.mean(np.asarray(one.nll)[counted]))) for one in (found, expected)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-5)


def test_generation_gives_the_same_tokens(bases):
    prompts = [list(range(1, 40)), list(range(7, 20))]
    found, expected = (butler_jax.generate(base, prompts, max_new_tokens=8) for base in bases)
    assert found.tokens == expected.tokens


def test_what_the_adapter_cannot_honour_is_refused(tunix_qwen3):
    from butler_jax.model.tunix import TunixQwen3

    with pytest.raises(ValueError, match="rotates by 1e\\+06"):
        TunixQwen3(make_qwen3(tunix_qwen3, rope_theta=10_000))
