"""Generation: the tokens of whole passes, alone or in a ragged batch, dense, sparse, offloaded, streamed."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import butler_jax
from butler_jax import load_base
from butler_jax.decoding import generation
from butler_jax.decoding.config import SamplingConfig
from butler_jax.decoding.prefill_pass import prefill
from butler_jax.decoding.step import decode_step
from butler_jax.model.decoder import BaseModel, forward
from butler_jax.policies import Evicting, make_policy
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import simulate
from butler_jax.weights.loading import TINY
from tests.decoding.letters import BASE, PROMPTS, Letters
from tests.marked import long, slow


@pytest.fixture(scope="module")
def dense(base):
    return butler_jax.generate(base, PROMPTS, max_new_tokens=20, stop=())


def test_greedy_tokens_are_those_of_whole_passes(base, dense):
    run = jax.jit(forward)
    for prompt, tokens in zip(PROMPTS, dense.tokens, strict=True):
        sequence = np.zeros((1, 40), np.int32)
        sequence[0, : len(prompt) + len(tokens)] = prompt + tokens
        best = np.asarray(run(base.model, jnp.asarray(sequence)))[0].argmax(-1)
        assert tokens == best[len(prompt) - 1 : len(prompt) + len(tokens) - 1].tolist()
    assert dense.attended == [1.0] * 3 and dense.prompt_tokens == [11, 1, 5]


@pytest.mark.parametrize(
    "fields",
    [slow(dict()), dict(unit=4, interval=3, neighbours=True)],
    ids=lambda f: "-".join(f) or "tokens",
)
def test_a_budget_of_everything_gives_dense_tokens(base, predictor, dense, fields):
    selection = SelectionConfig(budget=1.0, **fields)
    found = butler_jax.generate(base, PROMPTS, predictor=predictor, selection=selection, max_new_tokens=20, stop=())
    assert found.tokens == dense.tokens and found.attended == pytest.approx([1.0] * 3)


def test_a_batch_gives_each_rows_own_tokens(base, predictor):
    settings = dict(
        predictor=predictor,
        selection=SelectionConfig(budget=0.3, sinks=1, recent=3),
        max_new_tokens=25,
        stop=(),
        sampling=SamplingConfig(temperature=1.0, top_p=0.9, repetition_penalty=1.1),
        capacity=48,
    )
    together = butler_jax.generate(base, PROMPTS, seed=[4, 5, 6], **settings)
    for b, prompt in enumerate(PROMPTS):
        alone = butler_jax.generate(base, prompt, seed=4 + b, **settings)
        assert alone.tokens[0] == together.tokens[b]
        assert alone.attended[0] == pytest.approx(together.attended[b])
    assert all(0.25 < share < 0.6 for share in (together.attended[0], together.attended[2]))


def test_shares_read_are_those_of_served_layers_and_of_all():
    model = BaseModel(
        dataclasses.replace(BASE, sliding_window=6, sliding_layers=(True, False, True)), jax.random.key(0)
    )
    mixed = SimpleNamespace(model=model, tokenizer=Letters(), config=model.config, generation={})
    under = dict(selection=SelectionConfig(budget=8, sinks=1, recent=3), policy="streaming")
    found = butler_jax.generate(mixed, PROMPTS[0], max_new_tokens=5, stop=(), **under)
    held = np.arange(len(PROMPTS[0]) + 1, len(PROMPTS[0]) + 5)
    assert found.attended == pytest.approx([np.mean(8 / held)])
    assert found.attended_of_dense == pytest.approx([np.mean((6 + 6 + 8) / (6 + 6 + held))])


def test_stop_tokens_end_a_row_and_pieces_are_the_text(base, dense):
    row = dense.tokens[0]
    stop = row[4]
    pieces = []
    found = butler_jax.generate(base, PROMPTS, max_new_tokens=20, stop=[stop], stream=pieces.append)
    for own, whole, text in zip(found.tokens, dense.tokens, found.texts, strict=True):
        end = whole.index(stop) + 1 if stop in whole else len(whole)
        assert own == whole[:end] and text == Letters().decode(own)
    for b in range(3):
        assert [p.token for p in pieces if p.row == b] == found.tokens[b]
        assert "".join(p.text for p in pieces if p.row == b) == found.texts[b]


def test_a_row_ends_at_every_token_that_generation_config_names(tmp_path):
    shutil.copytree(TINY, tmp_path / "tiny")
    (tmp_path / "tiny" / "generation_config.json").write_text('{"eos_token_id": [0, 588]}')
    found = butler_jax.generate(load_base(tmp_path / "tiny"), "Return the", max_new_tokens=30)
    assert len(found.tokens[0]) == 7 and found.tokens[0][-1] == 588  # as transformers


@pytest.mark.parametrize("cut", [slice(3, 4), slice(3, 6)], ids=["one token", "three tokens"])
def test_a_text_stops_a_row_across_tokens_and_is_never_streamed(base, dense, cut):
    stop, pieces = dense.texts[0][cut], []
    found = butler_jax.generate(base, PROMPTS, max_new_tokens=20, stop=[stop, "never"], stream=pieces.append)
    for b, whole in enumerate(dense.texts):
        end = whole.index(stop) if stop in whole else len(whole)
        assert found.texts[b] == whole[:end] == "".join(p.text for p in pieces if p.row == b)
        assert len(found.tokens[b]) == min(end + len(stop), 20)


def test_what_may_begin_a_text_to_stop_at_waits_until_it_is_decided():
    from butler_jax.text.prompts import Writer

    tokenizer = SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))

    def pieces(text, stops):
        writer = Writer(tokenizer, stops=stops)
        return [writer.add(ord(c), last=n + 1 == len(text)) for n, c in enumerate(text)], writer.stopped

    assert pieces("ab\nc\n\n", ["\n\n"]) == (["a", "b", "", "\nc", "", ""], True)
    assert pieces("x\n", ["\n\n"]) == (["x", "\n"], False)
    assert pieces("aab", ["ab", "aac"])[0] == ["", "", "a"]


def test_a_decoder_that_strips_keeps_the_space_after_the_prompt():
    """Llama-2's decoder takes the first space off whatever it is given."""
    import tokenizers
    from tokenizers import decoders, models

    from butler_jax.text.prompts import Writer
    from butler_jax.text.tokenizer import Tokenizer

    words = ["<s>", "▁The", "▁file", "▁is", "▁open"]
    backend = tokenizers.Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<s>"))
    backend.add_special_tokens(["<s>"])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = Tokenizer(backend=backend)
    for prompt, wanted in (([0, 1, 2], [" is", " open"]), ([0], ["is", " open"]), ([], ["is", " open"])):
        writer = Writer(tokenizer, prompt)
        assert [writer.add(3, last=False), writer.add(4, last=True)] == wanted
        assert tokenizer.decode([*prompt, 3, 4]) == tokenizer.decode(prompt) + "".join(wanted)
    writer = Writer(tokenizer, [0, 1])  # a special token between words is no beginning of a text
    assert "".join(writer.add(token, last=False) for token in (2, 0, 3, 4)) == " file is open"


def test_a_character_in_two_tokens_waits_until_it_is_whole():
    from butler_jax.text.prompts import Writer

    table = {0: b"a", 1: "é".encode()[:1], 2: "é".encode()[1:], 3: b" b"}
    tokenizer = SimpleNamespace(decode=lambda ids: b"".join(table[i] for i in ids).decode(errors="replace"))
    writer = Writer(tokenizer)
    assert [writer.add(t, last=False) for t in (0, 1, 2, 3)] == ["a", "", "é", " b"]
    assert Writer(tokenizer).add(1, last=True) == ""  # the row ends in half a character


@pytest.mark.parametrize("last", ["🙂", "!"])
def test_an_emoji_in_four_byte_tokens_is_printed_whole_or_not_at_all(last):
    import tokenizers
    from tokenizers import decoders, models

    from butler_jax.text.prompts import Writer
    from butler_jax.text.tokenizer import Tokenizer

    vocab = {"▁hi": 256, "!": 257} | {f"<0x{byte:02X}>": byte for byte in range(256)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    emoji, flag = list("🙂".encode()), list("🇫🇷".encode())
    tokens = [256, *emoji, 257, *flag, *(emoji if last == "🙂" else [257])]
    for cut in range(1, len(tokens) + 1):
        writer = Writer(Tokenizer(backend=backend))
        pieces = [writer.add(token, last=n + 1 == cut) for n, token in enumerate(tokens[:cut])]
        wanted = bytes(b for t in tokens[:cut] for b in ({256: b" hi", 257: b"!"}.get(t) or bytes([t])))
        assert "".join(pieces) == wanted.decode(errors="ignore")


def test_prompts_of_a_bucket_share_one_compilation(base, dense):
    before = generation.read_prompts._cache_size(), generation.advance._cache_size()
    shorter = [PROMPTS[0][:9], PROMPTS[1] * 3, PROMPTS[2][:2]]
    butler_jax.generate(base, shorter, max_new_tokens=12, stop=())
    assert (generation.read_prompts._cache_size(), generation.advance._cache_size()) == before


def test_other_numbers_of_sampling_compile_nothing_anew(base, dense):
    programs = generation.read_prompts, generation.draw_first, generation.advance

    def sizes_after(**fields):
        sampling = SamplingConfig(**fields)
        butler_jax.generate(base, PROMPTS, max_new_tokens=3, stop=(), sampling=sampling)
        return [program._cache_size() for program in programs]

    read = programs[0]._cache_size()
    first = sizes_after(temperature=0.8, top_p=0.9, repetition_penalty=1.1)
    assert first[0] == read  # the prompts are read as for greedy tokens
    assert sizes_after(temperature=0.7, top_k=5, repetition_penalty=1.3) == first


def test_between_choices_the_chosen_stay_and_new_tokens_join(base):
    interval, recent, sinks = 3, 4, 2
    selection = SelectionConfig(budget=0.4, sinks=sinks, recent=recent, interval=interval)
    settings = dict(selection=selection, policy=make_policy("random"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 40)), jnp.int32)

    @jax.jit
    def run(tokens):
        state = prefill(base.model, tokens[:, :20], jnp.asarray([20, 14]), capacity=48, **settings)[1]

        def step(state, _):
            _, state, found = decode_step(base.model, tokens[:, 0], state, details=True, **settings)
            return state, (found.chosen, found.attended)

        return jax.lax.scan(step, state, None, length=11)[1]

    sets, counts = map(np.asarray, run(tokens))
    np.testing.assert_array_equal(sets.sum(-1), counts)
    for s, layer, b, head in np.ndindex(11, 3, 2, 2):
        if layer == 0:
            continue
        own, since = set(np.flatnonzero(sets[s, layer, b, head])), s % interval
        total = (20, 14)[b] + s + 1
        chosen = set(np.flatnonzero(sets[s - since, layer, b, head]))
        assert own == chosen | set(range(total - since, total))
        assert set(range(sinks)) | set(range(total - recent, total)) <= own
        # the budget of the row when it chose, and the tokens since
        assert len(own) == max(-(-2 * (total - since) // 5), sinks + recent) + since


@pytest.mark.parametrize("unit", [1, 4])
def test_short_rows_keep_their_sinks_between_choices_whatever_thresholds_pass(base, unit):
    """Sinks among the recent tokens of a choice are still there when the recent tokens have moved on."""
    selection = SelectionConfig(budget=1.0, sinks=4, recent=8, unit=unit, interval=8, threshold=((1e9,) * 2,) * 3)
    settings = dict(selection=selection, policy=make_policy("random"))
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 61, (2, 12)), jnp.int32)

    @jax.jit
    def run(tokens):
        state = prefill(base.model, tokens, jnp.asarray([8, 11]), capacity=48, **settings)[1]

        def step(state, _):
            _, state, found = decode_step(base.model, tokens[:, 0], state, details=True, **settings)
            return state, found.chosen

        return jax.lax.scan(step, state, None, length=20)[1]

    sets = np.asarray(run(tokens))
    for s, layer, b, head in np.ndindex(20, 3, 2, 2):
        total = (8, 11)[b] + s + 1
        own = set(np.flatnonzero(sets[s, layer, b, head]))
        assert own >= set(range(4)) | set(range(total - 8, total)), (s, layer, b, head)


def test_seeds_are_any_whole_numbers(base):
    settings = dict(sampling=SamplingConfig(temperature=1.0), max_new_tokens=8, stop=())
    drawn = [butler_jax.generate(base, [[1], [2]], seed=seed, **settings).tokens for seed in (np.int64(3), [3, 4], -1)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.slow
def test_rows_of_min_context_are_dense_alone_and_beside_longer_ones(base, predictor, dense):
    selection = SelectionConfig(budget=0.3, sinks=1, recent=3, interval=2, min_context=24)
    settings = dict(predictor=predictor, selection=selection, max_new_tokens=20, stop=(), capacity=48)
    together = butler_jax.generate(base, PROMPTS, **settings)
    assert together.attended[1] == 1.0 and together.tokens[1] == dense.tokens[1]
    assert together.attended[0] < 1.0
    for b in (0, 2):
        assert butler_jax.generate(base, PROMPTS[b], **settings).tokens[0] == together.tokens[b]


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "there is no prompt"),
        ([[]], {}, "prompt 0 is empty"),
        ([[1, 61]], {}, "token 61; the vocabulary is 0 ... 60"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens must be a whole number of at least 1, got 0"),
        ([[1]], dict(max_new_tokens=2.5), "max_new_tokens must be a whole number of at least 1, got 2.5"),
        ([[1.5, 2]], {}, r"prompt 0 must be a text or a list of token ids, got \[1.5, 2\]"),
        (None, {}, "prompts must be a text, or a list of texts or of token ids, got NoneType"),
        ([[1]], dict(score_dtype="int4"), "score_dtype must be 'int8' or None, got 'int4'"),
        ([[1]], dict(seed="a"), "the seed must be a whole number, or one for every prompt, got 'a'"),
        ([[1]], dict(seed=1.5), "the seed must be a whole number, or one for every prompt, got 1.5"),
        ([[1]], dict(seed=None), "the seed must be a whole number, or one for every prompt, got None"),
        (
            [[1]],
            dict(seed=(n for n in (1,))),
            "the seed must be a whole number, or one for every prompt",
        ),
        ([[1] * 97], {}, "a prompt of 97 tokens is beyond the model's context of 96 tokens; shorten it"),
        ([[1]], dict(chunk=2.5), "chunk must be a whole number of at least 1, got 2.5"),
        ([[1]], dict(capacity=64.0), "capacity must be a whole number of at least 1, got 64.0"),
        ([[1]], dict(cache={}), r"cache must be a PromptCache, got a dict; write cache=PromptCache\(\)"),
        ([[1]], dict(selection=0.25), "selection must be a SelectionConfig, got 0.25; write SelectionConfig"),
        ([[1]], dict(stop=1.5), "stop 1.5 is no token"),
        ([[1]], dict(stop=b"x"), "stop must be token ids and texts, got b'x'; decode it"),
        (np.asarray(5), {}, "prompts must be a text, or a list of texts or of token ids, got int"),
        ([[1]], dict(score_dtype="int8"), "score_dtype int8 is for the keys of a predictor, and there is none"),
        ([[1]], dict(stop=[99999]), "stop 99999 is no token; the vocabulary is 0 ... 60"),
        ([[1] * 90], dict(max_new_tokens=20), "model's context of 96 tokens; ask for at most 7 new tokens"),
        ([[1] * 30], dict(capacity=20), "a prompt of 30 tokens does not fit a cache of 20"),
        ([[1] * 30], dict(capacity=32, max_new_tokens=9), "full after 3 new tokens of 9"),
        ([[1]], dict(capacity=200), "beyond the model's context of 96"),
        ([[1]], dict(selection=SelectionConfig()), "needs a trained predictor"),
        ([[1], [2]], dict(seed=[1]), "1 seeds do not fit 2 prompts"),
        ([[1]], dict(stop=[""]), "a text to stop at is empty"),
        ([[1]], dict(stop=[1.5]), "stop 1.5 is no token"),
        (
            [[1]],
            dict(selection=SelectionConfig(threshold=((0.0,),) * 5), policy=make_policy("random")),
            "5 layers and 1 heads do not fit a model of 3 layers and a policy that chooses for 2 heads",
        ),
    ],
)
def test_bad_input_is_a_clear_error(base, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        butler_jax.generate_stream(base, prompts, **settings)  # before the first piece is asked for


def test_decoding_in_64_bits_is_a_clear_error(base):
    with jax.enable_x64(True), pytest.raises(ValueError, match="leave jax_enable_x64 off"):
        butler_jax.generate(base, [[1]])


@pytest.mark.parametrize("function", [butler_jax.generate, butler_jax.generate_stream])
def test_settings_are_named_in_the_signature_and_a_typo_blames_the_function(base, function):
    shown = inspect.signature(function).parameters
    assert {"predictor", "selection", "policy", "sampling", "max_new_tokens", "seed"} <= set(shown)
    assert not any(one.kind is one.VAR_KEYWORD for one in shown.values())
    with pytest.raises(TypeError, match=rf"{function.__name__}\(\) got an unexpected keyword argument 'temprature'"):
        inspect.unwrap(function)(base, [[1]], temprature=1.0)  # without the wrapper that checks annotations


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields", [long(dict()), long(dict(unit=16)), dict(interval=4, neighbours=True)], ids=lambda f: "-".join(f)
)
def test_everything_is_dense_on_stories(shared_data, fields):
    check_everything(load_base(shared_data / "data" / "stories260K"), fields, 200)


@pytest.mark.long  # as on stories
@pytest.mark.slow
def test_everything_is_dense_on_smollm2(smollm2_dir):
    check_everything(load_base(smollm2_dir), dict(), 50)


def check_everything(base, fields, count):
    prompt = "Once upon a time, there was a little girl who"
    predictor = make_predictor(base.config, PredictorConfig(rank=8))
    settings = dict(max_new_tokens=count, stop=())
    dense = butler_jax.generate(base, prompt, **settings)
    found = butler_jax.generate(
        base, prompt, predictor=predictor, selection=SelectionConfig(budget=1.0, **fields), **settings
    )
    assert len(dense.tokens[0]) == count and found.tokens == dense.tokens


@pytest.mark.parametrize("name", [*map(slow, ("h2o", "snapkv", "quest")), *map(long, ("citrus", "lowrank"))])
def test_every_policy_generates_what_it_would_have_read(base, name):
    """Policies that evict run the prompt as well; the others leave it dense, so theirs is of one token."""
    policy = make_policy(name, **{"quest": {"page": 4}, "snapkv": {"once": False}}.get(name, {}))
    prompts = PROMPTS if isinstance(policy, Evicting) else [[7]]
    text = {n: np.zeros((1, 64), np.int32) for n in ("tokens", "segments", "positions")}
    text["tokens"][0] = np.random.default_rng(0).integers(0, 61, 64)
    text["segments"][:], text["positions"][0] = 1, np.arange(64)
    policy = policy.prepare(base.model, [text])
    selection = SelectionConfig(budget=0.4, sinks=2, recent=3)
    found = butler_jax.generate(base, prompts, policy=policy, selection=selection, max_new_tokens=24, stop=())
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        whole = [*prompt, *tokens]
        batch = {n: np.zeros((1, 40), np.int32) for n in text}
        batch["tokens"][0, : len(whole)], batch["segments"][0, : len(whole)] = whole, 1
        batch["positions"][0] = np.arange(40)
        greedy = np.asarray(simulate(base.model, batch, policy, selection).greedy)[0]
        assert greedy[len(prompt) - 1 : len(whole) - 1].tolist() == tokens
    assert max(found.attended) < 1
    if isinstance(policy, Evicting):
        with pytest.raises(ValueError, match=f"{name}"):
            butler_jax.generate(base, prompts, policy=policy, selection=selection, max_new_tokens=2, offload=True)


def test_a_policy_alone_reads_the_default_budget_and_one_id_stops(base):
    found = butler_jax.generate(base, [[1] * 50], policy="streaming", max_new_tokens=3, stop=np.int64(0))
    assert all(share < 1 for share in np.ravel(found.attended))


@pytest.mark.slow
def test_a_policy_may_be_given_by_its_name(base):
    settings = dict(selection=SelectionConfig(budget=0.4, sinks=2, recent=3), max_new_tokens=8, stop=())
    policies = ("oracle", make_policy("oracle"))
    by_name, itself = (butler_jax.generate(base, PROMPTS, policy=p, **settings) for p in policies)
    assert by_name.tokens == itself.tokens
    with pytest.raises(ValueError, match="unknown policy 'fortune'"):
        butler_jax.generate(base, PROMPTS, policy="fortune", **settings)
