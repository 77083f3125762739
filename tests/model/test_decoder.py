"""The decoder against transformers, part by part, and against real models."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import (
    LOGICAL_AXES,
    BaseModel,
    check_length,
    dense_mixer,
    embed,
    forward,
    parameter_count,
    run_layers,
)
from butler_jax.model.hugging_face_config import base_config
from butler_jax.weights import load_base
from tests import reference_models
from tests.marked import long, slow

ATOL = 2e-5  # three layers of float32 sums over at most 64 terms of size 1, in another order
run = jax.jit(forward)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """name -> (transformers model, our Base), through save_pretrained and load_base."""

    @cache
    def pair(name):
        directory = tmp_path_factory.mktemp("model")
        return reference_models.save_model(name, directory), load_base(directory)

    return pair


def random_tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, 96, shape, dtype=np.int32)


# Each kind of layer once; the fast tests of loading read the other names.
OFTEN = {
    "llama",
    "llama with biases",
    "mistral with layer types",
    "qwen3 with sliding layers",
    "gemma2",
    "gpt_oss",
    "olmo2",
    "phi3 longrope",
    "qwen3_moe, normalised",
}


@pytest.mark.parametrize(
    "name",
    [name if name in OFTEN else slow(name) for name in reference_models.MODELS if "blocks" not in name],
)
def test_logits_equal_those_of_transformers(loaded, name):
    theirs, base = loaded(name)
    for length in (24, 48) if "longrope" in name else (24,):  # on both sides of the original context, 32
        tokens = random_tokens(2, length)
        np.testing.assert_allclose(run(base.model, tokens), reference_models.logits(theirs, tokens), atol=ATOL)


@pytest.mark.parametrize(
    "name",
    [
        "llama with biases",
        "gemma2",
        slow("gpt_oss"),
        *map(long, ("qwen2 with sliding layers", "qwen3", "phi3 longrope")),
    ],
)
def test_attention_and_every_layer_equal_those_of_transformers(loaded, name):
    theirs, base = loaded(name)
    tokens = random_tokens(2, 24)
    attended, entered = [], []
    hooks = []
    for layer in theirs.model.layers:
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(lambda _, x: attended.append(x[0].numpy())))
        hooks.append(layer.register_forward_hook(lambda _, __, y: entered.append(y.numpy())))
    reference_models.logits(theirs, tokens)
    for hook in hooks:
        hook.remove()

    dense = dense_mixer(base.config, None)

    def recording(carry, view):
        mixed, carry, _ = dense(carry, view)
        return mixed, carry, (view.x, mixed)

    positions = jnp.broadcast_to(jnp.arange(24)[None], (2, 24))
    x, _, (inputs, mixed) = run_layers(base.model, embed(base.model, tokens), positions, recording, None)
    assert len(attended) == base.config.layers
    for layer, expected in enumerate(attended):
        np.testing.assert_allclose(mixed[layer].reshape(2, 24, -1), expected, atol=ATOL)
    for got, expected in zip([*inputs[1:], x], entered, strict=True):
        np.testing.assert_allclose(got, expected, atol=ATOL)


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt_oss", *map(long, ("mistral with a sliding_window", "qwen3 with sliding layers", "phi3 longrope"))],
)
def test_padded_rows_equal_their_documents_alone(loaded, name):
    theirs, base = loaded(name)
    tokens, lengths = random_tokens(3, 24), (24, 17, 5)
    segments = (np.arange(24)[None] < np.array(lengths)[:, None]).astype(np.int32)
    got = run(base.model, tokens * segments, segments=segments)
    assert np.isfinite(got).all()
    for row, length in enumerate(lengths):
        expected = reference_models.logits(theirs, tokens[row : row + 1, :length])
        np.testing.assert_allclose(got[row, :length], expected[0], atol=ATOL)


@pytest.mark.parametrize(
    "name", ["llama", "qwen3 with sliding layers", *map(long, ("mistral with a sliding_window", "phi3 longrope"))]
)
def test_packed_documents_equal_the_documents_alone(loaded, name):
    theirs, base = loaded(name)
    lengths = (9, 3, 12, 6)  # and two tokens of padding
    tokens = random_tokens(1, 32)
    segments = np.repeat([1, 2, 3, 4, 0], [*lengths, 2])[None].astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 2)])[None].astype(np.int32)
    got = run(base.model, tokens, positions=positions, segments=segments)
    start = 0
    for length in lengths:
        expected = reference_models.logits(theirs, tokens[:, start : start + length])
        np.testing.assert_allclose(got[:, start : start + length], expected, atol=ATOL)
        start += length


def test_bfloat16_logits_stay_near_float32():
    config = base_config({"model_type": "llama", **reference_models.SIZES})
    models = [BaseModel(config, jax.random.key(1), dtype) for dtype in (jnp.float32, jnp.bfloat16)]
    wide, narrow = (run(model, random_tokens(1, 16)) for model in models)
    assert narrow.dtype == jnp.float32
    error = np.sqrt(np.mean((wide - narrow) ** 2) / np.mean(wide**2))
    assert error < 0.03  # bfloat16 keeps 2**-9 = 0.2 %; some twenty roundings follow each other


def test_every_parameter_has_logical_axes():
    sizes = {**reference_models.SIZES, "attention_bias": True, "mlp_bias": True}
    for family in ("llama", "qwen3", "qwen3_moe"):
        model = jax.eval_shape(lambda f=family: BaseModel(base_config({"model_type": f, **sizes}), jax.random.key(0)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(model):
            names = [str(getattr(p, "key", getattr(p, "name", p))) for p in path]
            axes = next(LOGICAL_AXES[name] for name in reversed(names) if name in LOGICAL_AXES)
            assert len(axes) == leaf.ndim, names


@pytest.mark.parametrize(
    ("values", "billions"),
    [
        (
            {
                "family": "llama",
                "vocab_size": 128256,
                "width": 2048,
                "hidden": 8192,
                "layers": 16,
                "heads": 32,
                "kv_heads": 8,
                "head_dim": 64,
                "context": 131072,
                "tied": True,
            },
            1.235814400,
        ),
        (
            {
                "family": "mistral",
                "vocab_size": 32000,
                "width": 4096,
                "hidden": 14336,
                "layers": 32,
                "heads": 32,
                "kv_heads": 8,
                "head_dim": 128,
                "context": 32768,
            },
            7.241732096,
        ),
        (
            {
                "family": "phi3",
                "vocab_size": 32064,
                "width": 3072,
                "hidden": 8192,
                "layers": 32,
                "heads": 32,
                "kv_heads": 32,
                "head_dim": 96,
                "context": 4096,
            },
            3.821079552,
        ),
        (
            {
                "family": "mixtral",
                "vocab_size": 32000,
                "width": 4096,
                "hidden": 14336,
                "layers": 32,
                "heads": 32,
                "kv_heads": 8,
                "head_dim": 128,
                "context": 32768,
                "experts": 8,
                "experts_per_token": 2,
            },
            46.702792704,
        ),
        (
            {
                "family": "qwen3_moe",
                "vocab_size": 151936,
                "width": 2048,
                "hidden": 768,
                "layers": 48,
                "heads": 32,
                "kv_heads": 4,
                "head_dim": 128,
                "context": 40960,
                "qk_norm": True,
                "experts": 128,
                "experts_per_token": 8,
            },
            30.532122624,
        ),
    ],
)
def test_parameter_counts_of_published_models(values, billions):
    model = jax.eval_shape(lambda: BaseModel(BaseConfig(**values), jax.random.key(0)))
    assert parameter_count(model) == round(billions * 1e9)


@pytest.mark.parametrize(
    ("values", "billions"),
    [
        ({"model_type": "gpt_oss", "num_hidden_layers": 24, "num_local_experts": 32}, 20.914757184),
        ({"model_type": "gemma2"}, 2.614341888),
    ],
)
def test_parameter_counts_of_families_with_sinks_and_caps(values, billions):
    model = jax.eval_shape(lambda: BaseModel(base_config(values), jax.random.key(0)))
    assert parameter_count(model) == round(billions * 1e9)


def test_length_beyond_the_context_is_refused():
    config = base_config({"model_type": "llama", **reference_models.SIZES})
    check_length(config, 256)
    model = jax.eval_shape(lambda: BaseModel(config, jax.random.key(0)))
    with pytest.raises(ValueError, match="length 257 is beyond the model's context of 256"):
        forward(model, np.zeros((1, 257), np.int32))


def greedy(base, tokens, count, bucket):
    """Tokens continued by `count` most probable ones, each from a full pass over a row of `bucket` tokens."""
    ids = list(tokens)
    for _ in range(count):
        row = np.zeros((1, bucket), np.int32)
        row[0, : len(ids)] = ids
        ids.append(int(np.argmax(run(base.model, row)[0, len(ids) - 1])))
    return ids


def nats(base, rows):
    """Negative log-likelihood [B, T-1] of each token after the first of rows [B, T]."""
    scores = jax.nn.log_softmax(run(base.model, rows)[:, :-1])
    return -np.asarray(jnp.take_along_axis(scores, jnp.asarray(rows[:, 1:, None]), axis=-1))[..., 0]


def test_stories_model_tells_its_known_story(shared_data):
    base = load_base(shared_data / "data" / "stories260K")
    text = base.tokenizer.decode(greedy(base, [base.tokenizer.bos], 60, 64))
    assert text.strip().startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )


@pytest.mark.slow
def test_stories_model_has_its_known_loss(shared_data):
    base = load_base(shared_data / "data" / "stories260K")
    text = (shared_data / "data" / "text" / "tinystories_valid_head.txt").read_text(encoding="utf-8")
    stories = text.split("\n\nOnce upon a time")[1:65]  # how a story begins
    rows, inside = np.zeros((64, 512), np.int32), np.zeros((64, 512), bool)
    for row, mask, story in zip(rows, inside, stories, strict=True):
        ids = base.tokenizer.encode("Once upon a time" + story, bos=True)[:512]
        row[: len(ids)], mask[: len(ids)] = ids, True
    assert nats(base, rows)[inside[:, 1:]].mean() == pytest.approx(1.28, abs=0.03)  # a sample of the known mean


@pytest.mark.long
@pytest.mark.slow
def test_smollm2_has_its_known_perplexity_and_facts(shared_data, smollm2_dir):
    base = load_base(smollm2_dir)
    text = (shared_data / "data" / "text" / "wikitext2_test.txt").read_text(encoding="utf-8")
    ids = np.asarray(base.tokenizer.encode(text[:120_000], bos=False)[:20480], np.int32).reshape(20, 1024)
    losses = np.concatenate([nats(base, row[None]) for row in ids])
    assert np.exp(losses.mean()) == pytest.approx(23.48, abs=0.01)  # known to two decimals

    prompt = base.tokenizer.encode("The capital of France is Paris. The capital of Italy is")
    continued = greedy(base, prompt, 7, 32)[len(prompt) :]
    assert base.tokenizer.decode(continued) == " Rome. The capital of Spain is"
