"""Tokenizers from the metadata of GGUF files, against those they were made from."""

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from butler_jax.weights.gguf.tokenizer import WORD_SPLITTERS, byte_level_bpe, read_tokenizer

SOURCE = Path(__file__).with_name("test_file.py").read_text(encoding="utf-8").replace("<s>", "").replace("</s>", "")

TEXT = "The cat's 3 hats cost 12345 dollars;  don't\n\n ask WHY… naïve 漢字 🎉\tend "


def bpe_fields(backend, **fields):
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    values = {"model": "gpt2", "tokens": tokens, "merges": merges, **fields}
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}


@pytest.fixture(scope="module")
def trained():
    """A byte-level BPE of 400 tokens, trained on this file's text."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT, __doc__, SOURCE], trainer)
    return backend


def test_byte_level_tokenizer_equals_the_one_it_was_made_from(trained):
    types = [3, 3] + [1] * (trained.get_vocab_size() - 2)
    numbers = {"bos_token_id": 0, "eos_token_id": 1, "eot_token_id": 7, "eom_token_id": 9}
    fields = bpe_fields(trained, token_type=types, pre="gpt-2", **numbers)
    tokenizer = read_tokenizer(fields)
    assert tokenizer.encode(TEXT) == trained.encode(TEXT).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (tokenizer.bos, tokenizer.eos, tokenizer.ends, tokenizer.add_bos) == (0, 1, {1, 7, 9}, False)
    assert tokenizer.encode("a</s>")[-1] == 1


def test_chat_templates_come_from_the_metadata(trained):
    named = {"tokenizer.chat_template": "{{ bos_token }}hi", "tokenizer.chat_template.tool_use": "tools"}
    template = read_tokenizer({**bpe_fields(trained, bos_token_id=0), **named}).chat_template
    assert (template.sources, template.tokens) == (
        {"default": "{{ bos_token }}hi", "tool_use": "tools"},
        {"bos_token": "<s>"},
    )
    assert read_tokenizer(bpe_fields(trained)).chat_template is None
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template must be a text"):
        read_tokenizer({**bpe_fields(trained), "tokenizer.chat_template": 5})


@pytest.mark.parametrize("pre", WORD_SPLITTERS)
def test_every_word_splitting_keeps_the_text(trained, pre):
    tokenizer = read_tokenizer(bpe_fields(trained, pre=pre))
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", " 12345", " up", "."]),
        ("smollm", ["I", "'m", " ", "1", "2", "3", "4", "5", " up", "."]),
        ("llama-bpe", ["I", "'m", " ", "123", "45", " up", "."]),
        ("qwen2", ["I", "'m", " ", "1", "2", "3", "4", "5", " up", "."]),
        ("dbrx", ["I", "'m", " ", "123", "45", " up", "."]),
        ("refact", ["I", "'m", " ", "1", "2", "3", "4", "5", " up", "."]),
        ("gpt-4o", ["I'm", " ", "123", "45", " up", "."]),
        ("tekken", ["I", "'m", " ", "1", "2", "3", "4", "5", " up", "."]),
    ],
)
def test_words_are_cut_as_published(trained, pre, pieces):
    splitter = WORD_SPLITTERS[pre]()
    assert [p.replace("Ġ", " ") for p, _ in splitter.pre_tokenize_str("I'm 12345 up.")] == pieces
    cased = ["camel", "Case", "/"] if pre in ("gpt-4o", "tekken") else ["camelCase", "/"]
    assert [p for p, _ in splitter.pre_tokenize_str("camelCase/")] == cased


def test_whole_words_go_before_merges_for_llama_3():
    tokens = ["a", "b", "c", "ab", "abc"]  # "abc" has no merge that makes it
    assert byte_level_bpe(tokens, ["a b"], "llama-bpe").encode("abc").ids == [4]
    assert byte_level_bpe(tokens, ["a b"], "gpt-2").encode("abc").ids == [3, 2]


def test_first_token_follows_the_metadata(trained):
    fields = bpe_fields(trained, pre="llama-bpe", bos_token_id=0)
    assert read_tokenizer(fields).add_bos
    assert not read_tokenizer({**fields, "tokenizer.ggml.add_bos_token": False}).add_bos


def test_unknown_tokenizers_are_named(trained):
    with pytest.raises(ValueError, match="unknown tokenizer 't5'"):
        read_tokenizer({"tokenizer.ggml.model": "t5"})
    with pytest.raises(ValueError, match=r"unknown word splitting 'viking'.*smollm"):
        read_tokenizer(bpe_fields(trained, pre="viking"))
    assert read_tokenizer({}) is None


def test_sentencepiece_tokenizer_equals_sentencepiece(tmp_path):
    import sentencepiece

    source = tmp_path / "text.txt"
    source.write_text(SOURCE, encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(source),
        model_prefix=str(tmp_path / "pieces"),
        model_type="bpe",
        vocab_size=500,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "pieces.model"))
    ids = range(theirs.get_piece_size())
    types = [2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1 for i in ids]
    fields = {
        "model": "llama",
        "tokens": [theirs.id_to_piece(i) for i in ids],
        "scores": [theirs.get_score(i) for i in ids],
        "token_type": types,
        "bos_token_id": theirs.bos_id(),
        "eos_token_id": theirs.eos_id(),
        "unknown_token_id": theirs.unk_id(),
    }
    tokenizer = read_tokenizer({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    for text in (TEXT, source.read_text(encoding="utf-8"), "  two  spaces", "a"):
        ours = tokenizer.encode(text, bos=False)
        assert ours == theirs.encode(text)
        assert tokenizer.decode(ours) == text
    assert tokenizer.add_bos and tokenizer.encode("a")[0] == theirs.bos_id()


def test_stories_tokenizer_survives_as_pieces_and_scores(shared_data):
    """A SentencePiece tokenizer from its merges turned to scores, as converters store it."""
    directory = shared_data / "data" / "stories260K"
    original = Backend.from_file(str(directory / "tokenizer.json"))
    vocab = original.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = json.loads(original.to_str())["model"]["merges"]
    rank = {"".join(m if isinstance(m, list) else m.split(" ")): -i for i, m in reversed(list(enumerate(merges)))}
    types = [2, 3, 3] + [6 if t.startswith("<0x") else 1 for t in tokens[3:]]
    fields = {
        "model": "llama",
        "tokens": tokens,
        "scores": [float(rank.get(t, -1e6)) for t in tokens],
        "token_type": types,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    tokenizer = read_tokenizer({f"tokenizer.ggml.{key}": value for key, value in fields.items()})
    text = (shared_data / "data" / "text" / "tinystories_valid_head.txt").read_text(encoding="utf-8")[:20000]
    assert tokenizer.encode(text, bos=False) == original.encode(text, add_special_tokens=False).ids
