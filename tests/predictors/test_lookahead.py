"""The lookahead predictor: its initial values and its inputs."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.config import RopeConfig
from butler_jax.model.decoder import dense_mixer, embed, run_layers
from butler_jax.predictors import make_predictor
from butler_jax.predictors.base import at
from butler_jax.predictors.config import PredictorConfig
from butler_jax.training.config import TrainConfig
from butler_jax.training.distillation import init_predictor
from butler_jax.weights import Base
from tests.marked import long, slow
from tests.predictors.passes import all_scores, batch_of, model_of, views_of

STARTING = {
    "llama": {},
    "llama of all KV heads": {"kv_heads": 4, "rope": RopeConfig(theta=500.0)},
    "qwen2 with biases": {"family": "qwen2", "qkv_bias": True},
    "phi3 of partial rotary": {"family": "phi3", "rope": RopeConfig(fraction=0.75)},
    "scaled logits": {"attention_scale": 0.05},
    "longrope": {
        "family": "phi3",
        "rope": RopeConfig(
            kind="longrope",
            fraction=0.5,
            original_context=16,
            factor=4.0,
            short_factor=(1.0,) * 4,
            long_factor=(1.0, 2.0, 3.0, 4.0),
        ),
    },
}


def from_their_own_stream(predictor, model, batch, take):
    """take(q_imp, k_imp, view) of every layer, where the layer's own input stands for an earlier one's."""
    dense = dense_mixer(model.config, batch["segments"])

    @jax.jit
    def run(predictor, model):
        context = predictor.context(batch["positions"])

        def mixer(carry, view):
            head = at(predictor.heads, jnp.maximum(view.index - 1, 0))
            imp = [of(head, view.x, view, context) for of in (predictor.q_imp, predictor.k_imp)]
            return dense(None, view)[0], carry, take(*imp, view)

        return run_layers(model, embed(model, batch["tokens"]), batch["positions"], mixer, None)[2]

    return run(predictor, model)


@pytest.mark.parametrize(
    "name", [name if name in ("llama", "scaled logits", "longrope") else long(name) for name in STARTING]
)
def test_lookahead_starts_as_the_base_itself_at_full_rank(name):
    model, batch = model_of(**STARTING[name]), batch_of()
    base = model.config
    predictor = make_predictor(base, PredictorConfig(kind="lookahead", rank=base.head_dim))
    predictor = predictor.initialise(model, [batch])

    def both(q_imp, k_imp, view):
        pairs = (q_imp, k_imp), (view.q, view.k)
        return [jnp.einsum("bthr,bshr->bhts", q, jnp.repeat(k, base.group, axis=2)) / 4 for q, k in pairs]

    mine, true = from_their_own_stream(predictor, model, batch, both)
    # sums of 16 products in another order, float32; logits are below 30
    np.testing.assert_allclose(mine[1:], true[1:], atol=2e-5)


@pytest.mark.parametrize("changes", [{}, {"joint_qk_norm": True, "attention_scale": 0.05}], ids=["per head", "joint"])
def test_queries_with_a_norm_start_at_their_mean_size(changes):
    """The norm of a row is not linear in the stream: logits are those of the base but for a factor of row and head."""
    model, batch = model_of(family="qwen3", qk_norm=True, **changes), batch_of()
    base = model.config
    predictor = make_predictor(base, PredictorConfig(kind="lookahead", rank=base.head_dim))
    predictor = predictor.initialise(model, [batch])
    real = np.asarray(batch["segments"]) > 0
    both = from_their_own_stream(predictor, model, batch, lambda q_imp, _, view: (q_imp, view.q))
    mine, true = (np.asarray(a, np.float64)[1:][:, real] for a in both)  # [L - 1, rows, H, D]
    factor = np.sum(mine * true, axis=-1) / np.sum(true * true, axis=-1)
    np.testing.assert_allclose(mine, factor[..., None] * true, atol=2e-4)  # float32; numbers are below 30
    np.testing.assert_allclose(np.sum(mine**2, axis=(1, 3)), np.sum(true**2, axis=(1, 3)), rtol=1e-4)
    assert np.std(factor) > 0.05


@pytest.mark.parametrize("name", ["llama", long("qwen2 with biases"), slow("phi3 of partial rotary")])
def test_value_channels_start_as_the_norm_of_the_value_in_the_stream(name):
    model, batch = model_of(**STARTING[name]), batch_of()
    base = model.config
    config = PredictorConfig(rank=base.head_dim + 4, value_channels=4, target="value", offset="share")
    predictor = make_predictor(base, config).initialise(model, [batch])

    def take(q_imp, k_imp, view):
        scores = jnp.einsum("bthr,bshr->bhts", q_imp, jnp.repeat(k_imp, base.group, axis=2)) * config.rank**-0.5
        return scores, view.q, view.k, view.v

    scores, *arrays = from_their_own_stream(predictor, model, batch, take)
    q, k, v = (np.asarray(a, np.float64)[1:] for a in arrays)
    weights = np.asarray(model.layers.o[...], np.float64)[1:].reshape(
        -1, base.kv_heads, base.group, base.head_dim, base.width
    )
    norms = np.einsum("lbskd,lkgde->lbskge", v, weights)
    norms = np.log(np.sqrt((norms**2).sum(-1).mean(-1)))  # the root of the mean square over a group
    k, norms = np.repeat(k, base.group, axis=3), np.repeat(norms, base.group, axis=3)
    expected = np.einsum("lbthd,lbshd->lbhts", q, k) / 4 + norms.transpose(0, 1, 3, 2)[:, :, :, None]
    np.testing.assert_allclose(scores[1:], expected, atol=5e-5)  # float32; logits are below 30


def test_lookahead_reads_the_stream_at_the_producer_layer():
    model, batch = model_of(layers=6), batch_of()
    base = model.config
    predictor = make_predictor(base, PredictorConfig(kind="lookahead", rank=base.head_dim, stride=2))
    predictor = predictor.initialise(model, [batch])
    scores = np.asarray(all_scores(predictor, model, batch))
    views = jax.tree.map(np.asarray, views_of(model, batch))
    norms, weights = (np.asarray(w[...]) for w in (model.layers.attention_norm, model.layers.q))
    turns = np.exp(1j * np.asarray(batch["positions"])[..., None, None] * 10000.0 ** (-np.arange(8) / 8))
    for layer, producer in ((1, 0), (2, 0), (3, 2), (4, 2), (5, 4)):
        x = views["x"][producer]
        h = x / np.sqrt((x**2).mean(-1, keepdims=True) + base.norm_eps) * norms[layer]
        q = np.einsum("bte,ehd->bthd", h, weights[layer])
        turned = (q[..., :8] + 1j * q[..., 8:]) * turns
        q = np.concatenate([turned.real, turned.imag], axis=-1)
        expected = np.einsum("bthd,bshd->bhts", q, np.repeat(views["k"][layer], 2, axis=2)) / 4
        np.testing.assert_allclose(scores[layer], expected, atol=5e-5)  # float32; logits are below 30


@pytest.mark.parametrize("fraction", [slow(1.0), 0.75])
def test_lookahead_takes_the_pairs_of_most_energy_and_spread(fraction):
    model = model_of(rope=RopeConfig(fraction=fraction))
    base, calibration = model.config, [batch_of(1), batch_of(2)]
    predictor = init_predictor(Base("random", model, None, ""), PredictorConfig(rank=6), batches=calibration)
    half = base.rotary_dim // 2
    still = (base.head_dim - base.rotary_dim) // 2
    pairs = [(f, half + f) for f in range(half)]
    pairs += [(base.rotary_dim + f, base.rotary_dim + still + f) for f in range(still)]
    energy, spread = (np.zeros((base.layers, base.kv_heads, len(pairs))) for _ in range(2))
    for batch in calibration:
        real = np.asarray(batch["segments"]) > 0
        views = {name: np.asarray(value, np.float64) for name, value in views_of(model, batch).items()}
        for layer in range(base.layers):
            for head in range(base.kv_heads):
                k = views["k"][layer][real][:, head]
                queries = views["q"][layer][real][:, head * base.group : (head + 1) * base.group]
                for number, dims in enumerate(pairs):
                    dims = list(dims)
                    energy[layer, head, number] += (queries[..., dims] ** 2).sum(-1).mean()
                    spread[layer, head, number] += ((k[:, dims] - k[:, dims].mean(0)) ** 2).sum(-1).mean()
    for layer in range(1, base.layers):
        for head in range(base.kv_heads):
            best = np.sort(np.argsort(-energy[layer, head] * spread[layer, head])[:3])
            np.testing.assert_array_equal(np.asarray(predictor.heads.pairs[...])[layer - 1, head], best)


def test_lookahead_without_calibration_says_what_to_give():
    with pytest.raises(ValueError, match="give it calibration batches"):
        init_predictor(Base("random", model_of(), None, ""), PredictorConfig(rank=8))


def test_a_config_of_training_is_not_one_of_a_predictor():
    with pytest.raises(ValueError, match=r"got TrainConfig; a TrainConfig has \.predictor"):
        inspect.unwrap(init_predictor)(Base("random", model_of(), None, ""), TrainConfig())
