"""The three predictors: their sizes, their place in the layers, what they start from, and their causality."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.attention import causal_attention
from butler_jax.model.config import BaseConfig, RopeConfig
from butler_jax.model.decoder import BaseModel, dense_mixer, embed, parameter_count, run_layers
from butler_jax.predictors import PREDICTORS, make_predictor, walk
from butler_jax.predictors.base import at, schedule
from butler_jax.predictors.config import PredictorConfig
from butler_jax.training.distillation import init_predictor
from butler_jax.weights import Base

# Sizes as the models' published config.json files give them.
MODELS = {
    "Llama-3.2-1B": BaseConfig(
        family="llama", vocab_size=128256, width=2048, hidden=8192, layers=16, heads=32, kv_heads=8, head_dim=64,
        context=131072, tied=True,
    ),
    "Llama-3.2-3B": BaseConfig(
        family="llama", vocab_size=128256, width=3072, hidden=8192, layers=28, heads=24, kv_heads=8, head_dim=128,
        context=131072, tied=True,
    ),
    "Llama-2-7B": BaseConfig(
        family="llama", vocab_size=32000, width=4096, hidden=11008, layers=32, heads=32, kv_heads=32, head_dim=128,
        context=4096,
    ),
    "Llama-3.1-8B": BaseConfig(
        family="llama", vocab_size=128256, width=4096, hidden=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
        context=131072,
    ),
    "Mistral-7B": BaseConfig(
        family="mistral", vocab_size=32000, width=4096, hidden=14336, layers=32, heads=32, kv_heads=8, head_dim=128,
        context=32768, sliding_window=4096,
    ),
    "Phi-3-mini": BaseConfig(
        family="phi3", vocab_size=32064, width=3072, hidden=8192, layers=32, heads=32, kv_heads=32, head_dim=96,
        context=4096, sliding_window=2047,
    ),
    "Qwen2.5-3B": BaseConfig(
        family="qwen2", vocab_size=151936, width=2048, hidden=11008, layers=36, heads=16, kv_heads=2, head_dim=128,
        context=32768, tied=True, qkv_bias=True,
    ),
}  # fmt: skip
BASE_PARAMETERS = {  # the totals the models' cards and index files give
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-2-7B": 6_738_415_616,
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B": 7_241_732_096,
    "Phi-3-mini": 3_821_079_552,
    "Qwen2.5-3B": 3_085_938_688,
}
PUBLISHED = {  # R, I and count of the paper's first version, its dead weight included
    "Llama-3.2-1B": (16, 512, 12_393_472),
    "Llama-3.2-3B": (16, 1024, 32_598_528),
    "Llama-2-7B": (32, 1024, 83_113_984),
    "Llama-3.1-8B": (32, 1024, 83_113_984),
    "Mistral-7B": (32, 1024, 83_113_984),
    "Phi-3-mini": (16, 1024, 44_132_864),
    "Qwen2.5-3B": (32, 768, 33_364_992),
}


def count(base: BaseConfig, **settings) -> int:
    """Parameters of a predictor, without making it."""
    return parameter_count(jax.eval_shape(lambda: make_predictor(base, PredictorConfig(**settings))))


@pytest.mark.parametrize("name", MODELS)
def test_base_sizes_are_the_known_totals(name):
    shapes = jax.eval_shape(lambda: BaseModel(MODELS[name], jax.random.key(0)))
    assert parameter_count(shapes) == BASE_PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_contextual_counts_are_the_published_ones_less_dead_weight(name):
    base, (rank, hidden, published) = MODELS[name], PUBLISHED[name]
    ours = count(base, kind="contextual", rank=rank, hidden=hidden)
    unread_norm = 2 * base.width  # a LayerNorm over E (scale and bias) whose output nothing reads
    slots_of_layer_0 = 2 * hidden * base.heads * rank  # query and key outputs of a layer that is always dense
    assert ours + unread_norm + slots_of_layer_0 == published


@pytest.mark.parametrize("name", MODELS)
def test_overhead_is_about_one_percent_where_the_paper_says_so(name):
    rank, hidden, published = PUBLISHED[name]
    ours = count(MODELS[name], kind="contextual", rank=rank, hidden=hidden)
    assert ours / (BASE_PARAMETERS[name] + ours) < 0.012
    paper = {
        "Llama-3.2-1B": 0.993, "Llama-3.2-3B": 1.004, "Llama-2-7B": 1.218, "Llama-3.1-8B": 1.024,
        "Mistral-7B": 1.135, "Phi-3-mini": 1.142, "Qwen2.5-3B": 1.070,
    }[name]  # fmt: skip
    # the paper's figures are rounded to 0.001 %
    assert 100 * published / (BASE_PARAMETERS[name] + published) == pytest.approx(paper, abs=6e-4)


def test_producer_and_lookahead_counts_of_an_8b_model():
    base, total = MODELS["Llama-3.1-8B"], BASE_PARAMETERS["Llama-3.1-8B"]
    producer, lookahead = (count(base, kind=kind, rank=16) for kind in ("producer", "lookahead"))
    assert (producer, lookahead) == (25_755_648, 65_519_616)
    assert round(100 * producer / total, 2) == 0.32
    assert round(100 * lookahead / total, 2) == 0.82


@pytest.mark.parametrize("layers", [2, 3, 5, 9, 12])
@pytest.mark.parametrize("stride", [1, 2, 4, 7])
def test_schedule_equals_a_walk_by_hand(layers, stride):
    stride = min(stride, layers - 1)
    predictor = types.SimpleNamespace(stride=stride, base=types.SimpleNamespace(layers=layers))
    expected = {0: (False, None, None, False, False)}
    for number, producer in enumerate(range(0, layers - 1, stride)):
        block = list(range(producer + 1, min(producer + stride, layers - 1) + 1))
        for layer in block:
            expected[layer] = (True, number, layer - 1, layer == block[0], layer == block[-1])
    assert sorted(expected) == list(range(layers))
    places = jax.tree.map(np.asarray, schedule(predictor, jnp.arange(layers)))
    for layer, (serves, number, head, starts, ends) in expected.items():
        place = jax.tree.map(lambda a, i=layer: a[i], places)
        assert (place.serves, place.starts, place.ends) == (serves, starts, ends)
        if serves:
            assert (place.producer, place.head) == (number, head)
        if layer < layers - 1:  # what the last layer hands over, nobody reads
            assert place.captures == (layer in range(0, layers - 1, stride))


def config_of(**changes) -> BaseConfig:
    sizes = dict(vocab_size=61, width=64, hidden=96, layers=4, heads=4, kv_heads=2, head_dim=16, context=64)
    return BaseConfig(**{"family": "llama", **sizes, **changes})


def model_of(**changes) -> BaseModel:
    """A random model whose norms and biases matter too."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path)
        if "norm" in name or "bias" in name:
            return jnp.asarray(rng.normal("norm" in name, 0.3, leaf.shape), jnp.float32)
        return jnp.asarray(rng.normal(0, 0.125, leaf.shape), jnp.float32)

    shapes = jax.eval_shape(lambda: BaseModel(config_of(**changes), jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(draw, shapes)


def batch_of(seed: int = 0, rows: int = 2, length: int = 24) -> dict[str, jnp.ndarray]:
    """Two documents in the first row, padding at the end of the second."""
    tokens = np.random.default_rng(seed).integers(1, 61, (rows, length)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    segments[0, 15:], segments[1, 20:] = 2, 0
    positions[0, 15:] -= 15
    return {"tokens": jnp.asarray(tokens), "segments": jnp.asarray(segments), "positions": jnp.asarray(positions)}


@jax.jit
def all_scores(predictor, model, batch):
    """Importance scores [L, B, H, T, S] of every pair, as a pass over whole sequences has them."""
    segments, positions = batch["segments"], batch["positions"]
    context = predictor.context(positions, positions.shape[1])
    dense = dense_mixer(model.config, segments)

    def attend(_, q, k, v):
        return causal_attention(q, k, v, segments=segments), None

    def mixer(state, view):
        step = walk.step(predictor, state, view, context, attend)
        p = predictor.q_imp(step.head, step.features, view, context)
        r = predictor.k_imp(step.head, step.features, view, context)
        r = jnp.repeat(r, p.shape[2] // r.shape[2], axis=2)
        return dense(None, view)[0], step.state, jnp.einsum("bthr,bshr->bhts", p, r) * p.shape[-1] ** -0.5

    x = embed(model, batch["tokens"])
    return run_layers(model, x, positions, mixer, walk.begin(predictor, x, context))[2]


@jax.jit
def views_of(model, batch):
    """Every layer's view, stacked over layers."""
    dense = dense_mixer(model.config, batch["segments"])
    x = embed(model, batch["tokens"])

    def mixer(carry, view):
        return dense(None, view)[0], carry, {"x": view.x, "q": view.q, "k": view.k, "k_pre": view.k_pre}

    return run_layers(model, x, batch["positions"], mixer, None)[2]


@pytest.mark.parametrize("kind", PREDICTORS)
def test_scores_never_depend_on_later_tokens(kind):
    model, batch = model_of(layers=6, qkv_bias=True), batch_of()
    predictor = make_predictor(model.config, PredictorConfig(kind=kind, rank=8, stride=2, hidden=32))
    predictor = predictor.initialise(model, [batch])

    def run(tokens):
        return np.asarray(all_scores(predictor, model, {**batch, "tokens": tokens}))

    before = run(batch["tokens"])
    for t in (3, 11):
        tokens = np.array(batch["tokens"])
        tokens[:, t] = (tokens[:, t] + 7) % 61
        after = run(tokens)
        # the same arithmetic on the same numbers: equal but for products that are blocked otherwise
        np.testing.assert_allclose(after[1:, :, :, :t, :t], before[1:, :, :, :t, :t], atol=1e-6)
        assert np.abs(after[1:, :, :, t, :t] - before[1:, :, :, t, :t]).max() > 1e-3
    tokens = np.array(batch["tokens"])
    tokens[0, 15:] = 5  # a second document, seen from the first
    other = run(tokens)
    np.testing.assert_allclose(other[1:, 0, :, :15, :15], before[1:, 0, :, :15, :15], atol=1e-6)


def test_a_document_scores_alike_wherever_it_is_packed():
    model, batch = model_of(layers=6), batch_of()
    alone = {k: v[:1, 15:24] for k, v in batch.items()}
    alone["segments"] = jnp.ones_like(alone["segments"])
    for kind in PREDICTORS:
        predictor = make_predictor(model.config, PredictorConfig(kind=kind, rank=8, stride=2, hidden=32))
        packed = all_scores(predictor, model, batch)[1:, :1, :, 15:, 15:]
        # float32 sums over other lengths; scores are below 10
        np.testing.assert_allclose(packed, all_scores(predictor, model, alone)[1:], atol=2e-5)


STARTING = {
    "llama": {},
    "llama of all KV heads": {"kv_heads": 4, "rope": RopeConfig(theta=500.0)},
    "qwen2 with biases": {"family": "qwen2", "qkv_bias": True},
    "phi3 of partial rotary": {"family": "phi3", "rope": RopeConfig(fraction=0.75)},
    "longrope": {
        "family": "phi3",
        "rope": RopeConfig(
            kind="longrope", fraction=0.5, original_context=16, factor=4.0, short_factor=(1.0,) * 4,
            long_factor=(1.0, 2.0, 3.0, 4.0),
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", STARTING)
def test_lookahead_starts_as_the_base_itself_at_full_rank(name):
    model, batch = model_of(**STARTING[name]), batch_of()
    base = model.config
    predictor = make_predictor(base, PredictorConfig(kind="lookahead", rank=base.head_dim))
    predictor = predictor.initialise(model, [batch])
    dense = dense_mixer(base, batch["segments"])

    @jax.jit
    def both(predictor, model):
        context = predictor.context(batch["positions"], batch["positions"].shape[1])

        def mixer(carry, view):
            head = at(predictor.heads, jnp.maximum(view.index - 1, 0))
            p = predictor.q_imp(head, view.x, view, context)  # the layer's own input, not an earlier one's
            r = predictor.k_imp(head, view.x, view, context)
            pairs = (p, r), (view.q, view.k)
            scores = [jnp.einsum("bthr,bshr->bhts", q, jnp.repeat(k, base.group, axis=2)) / 4 for q, k in pairs]
            return dense(None, view)[0], carry, scores

        return run_layers(model, embed(model, batch["tokens"]), batch["positions"], mixer, None)[2]

    mine, true = both(predictor, model)
    # sums of 16 products in another order, float32; logits are below 30
    np.testing.assert_allclose(mine[1:], true[1:], atol=2e-5)


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


@pytest.mark.parametrize("fraction", [1.0, 0.75])
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


def test_contextual_follows_the_rotary_embedding_of_the_base():
    def scores(rope: RopeConfig, stretch: int):
        model, batch = model_of(rope=rope), batch_of()
        predictor = make_predictor(model.config, PredictorConfig(kind="contextual", rank=8, hidden=32))
        batch["positions"] = batch["positions"] * stretch
        return np.asarray(all_scores(predictor, model, batch))[1:]

    plain = scores(RopeConfig(theta=100.0), 1)
    # linear interpolation by 4 at four times the positions is no interpolation; exact powers of two
    np.testing.assert_allclose(scores(RopeConfig(theta=100.0, kind="linear", factor=4.0), 4), plain, atol=1e-5)
    assert np.abs(scores(RopeConfig(theta=5000.0), 1) - plain).max() > 1e-3
    assert np.abs(scores(RopeConfig(theta=100.0, kind="linear", factor=4.0), 1) - plain).max() > 1e-3


def test_contextual_importance_is_rotated_by_relative_position():
    model = model_of(rope=RopeConfig(theta=100.0))
    predictor = make_predictor(model.config, PredictorConfig(kind="contextual", rank=8, hidden=32))
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(1, 6, 32)), jnp.float32)
    positions = jnp.asarray([[3, 4, 9, 10, 30, 31]], jnp.int32)
    context = predictor.context(positions, 64)
    found = np.asarray(predictor.q_imp(at(predictor.heads, 0), (hidden, hidden), None, context))
    flat = np.einsum("bti,ihr->bthr", hidden, np.asarray(predictor.heads.query[...])[0])
    turns = np.exp(1j * np.asarray(positions)[..., None, None] * 100.0 ** (-np.arange(4) / 4))
    turned = (flat[..., :4] + 1j * flat[..., 4:]) * turns
    # float32 angles of up to 31 radians
    np.testing.assert_allclose(found, np.concatenate([turned.real, turned.imag], axis=-1), atol=2e-5)


@pytest.mark.parametrize(
    ("settings", "base", "message"),
    [
        ({"rank": 18}, {}, "rank 18 exceeds the base's head dimension 16; use at most 16"),
        ({"rank": 7}, {}, "rank must be positive and even, got 7"),
        ({"rank": 0}, {}, "rank must be positive and even, got 0"),
        ({"stride": 0}, {}, "stride must be at least 1, got 0"),
        ({"kind": "oracle"}, {}, "unknown predictor 'oracle'; known: lookahead, producer, contextual"),
        ({"kind": "contextual"}, {"width": 72}, "multiple of 16, got 72; use --predictor lookahead"),
        ({}, {"layers": 1}, "at least 2 layers, got 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, base, message):
    with pytest.raises(ValueError, match=message):
        make_predictor(config_of(**base), PredictorConfig(**settings))


def test_lookahead_without_calibration_says_what_to_give():
    with pytest.raises(ValueError, match="give it calibration batches"):
        init_predictor(Base("random", model_of(), None, ""), PredictorConfig(rank=8))
