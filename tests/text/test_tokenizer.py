"""Tokenizer: the first token is added once, decoding restores the text, errors say what to do."""

from __future__ import annotations

import dataclasses
import json
import threading
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors

from butler_jax.text.tokenizer import Tokenizer, train_bpe

TEXTS = ["The quick brown fox jumps over the lazy dog. 1234 Foxes!\n", "velmora quithas lies far away"] * 20


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TEXTS, 300)


def write(directory, *, template: bool, **config) -> None:
    """A word-level tokenizer.json whose post-processor adds <s>, if `template`, and its configuration."""
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="b"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<s>", "</s>"])
    if template:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("flag", [None, False, True])
def test_first_token_is_added_once_or_not_at_all(tmp_path, template, flag):
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}}
    write(tmp_path, template=template, **config, **({} if flag is None else {"add_bos_token": flag}))
    tokenizer = Tokenizer.load(tmp_path)
    expected = template if flag is None else flag
    assert (tokenizer.bos, tokenizer.eos, tokenizer.vocab_size) == (0, 1, 4)
    assert tokenizer.encode("a b") == ([0, 2, 3] if expected else [2, 3])
    assert tokenizer.encode("a b", bos=True) == [0, 2, 3]
    assert tokenizer.encode("a b", bos=False) == [2, 3]


@pytest.mark.parametrize("config", [{}, {"bos_token": "</s>"}])
def test_the_token_that_the_file_puts_first_comes_first(tmp_path, config):
    write(tmp_path, template=True, **config)
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos, tokenizer.encode("a b")) == (0, [0, 2, 3])


@pytest.mark.parametrize("dropout", [0.5, 1.0, 0.0, None])
def test_a_text_has_one_encoding_whatever_dropout_the_file_asks_for(tmp_path, bpe, dropout):
    bpe.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["dropout"] = dropout
    path.write_text(json.dumps(raw))
    loaded = Tokenizer.load(tmp_path)
    text = "the river bird sings under the old hill " * 4
    assert {tuple(loaded.encode(text)) for _ in range(20)} == {tuple(bpe.encode(text))}


def test_border_ids_come_from_generation_config_when_no_name_is_given(tmp_path):
    write(tmp_path, template=False)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 3, "eos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.ends) == (0, 1, {1, 2})


@pytest.mark.parametrize(
    ("named", "generation", "config", "ends"),
    [
        ("</s>", [0, 2], 3, {0, 1, 2}),  # the union with the tokenizer's own
        ("</s>", 2, 3, {1, 2}),
        ("</s>", None, [3], {1, 3}),
        (None, None, None, set()),
        (None, [2, 3], None, {2, 3}),
    ],
)
def test_generation_ends_at_every_token_that_the_files_name(tmp_path, named, generation, config, ends):
    write(tmp_path, template=False, eos_token=named)
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        (tmp_path / name).write_text(json.dumps({"eos_token_id": value}))
    assert Tokenizer.load(tmp_path).ends == ends


def test_saved_tokenizer_loads_as_itself(tmp_path, bpe):
    bpe.save(tmp_path / "out")
    again = Tokenizer.load(tmp_path / "out")
    assert again.encode(TEXTS[0]) == bpe.encode(TEXTS[0])
    assert (again.bos, again.eos, again.add_bos, again.vocab_size) == (
        bpe.bos,
        bpe.eos,
        bpe.add_bos,
        bpe.vocab_size,
    )
    assert again.ends == bpe.ends and not (tmp_path / "out" / "generation_config.json").exists()
    several = dataclasses.replace(bpe, ends=frozenset({bpe.eos, 5, 6}))
    several.save(tmp_path / "several")
    assert Tokenizer.load(tmp_path / "several").ends == {bpe.eos, 5, 6}


@given(text=st.text())
@settings(deadline=None, max_examples=60)
def test_any_text_survives_the_byte_level_bpe(bpe, text):
    if "<|endoftext|>" in text:
        return
    assert bpe.decode(bpe.encode(text)) == text


def test_trained_bpe_has_the_size_asked_and_single_digits(bpe):
    assert bpe.vocab_size == 300
    assert [bpe.decode([i]) for i in bpe.encode("1234")] == ["1", "2", "3", "4"]
    assert bpe.eos == 0 and bpe.decode([0]) == ""


def test_offsets_cover_the_text(bpe):
    text = "velmora quithas lies"
    ids, offsets = bpe.encode_with_offsets(text, bos=True)
    assert ids == bpe.encode(text, bos=True) and offsets[0] == (0, 0)
    assert "".join(text[start:end] for start, end in offsets) == text


def test_missing_and_broken_files_are_named(tmp_path, bpe):
    with pytest.raises(FileNotFoundError, match="no such directory"):
        Tokenizer.load(tmp_path / "nowhere")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r"has no tokenizer.json \(found: model.safetensors\)"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{]")
    with pytest.raises(ValueError, match=r"tokenizer.json is not valid JSON"):
        Tokenizer.load(tmp_path)
    write(tmp_path, template=False, bos_token="<other>")
    with pytest.raises(ValueError, match="bos_token '<other>' is not in"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="vocab_size=100 is too small"):
        train_bpe(TEXTS, 100)
    write(tmp_path, template=False)
    with pytest.raises(ValueError, match="needs a token that begins a text"):
        Tokenizer.load(tmp_path).encode("a", bos=True)


def test_other_threads_run_while_a_text_is_encoded():
    """Batches are tokenised in a thread, beside the one that starts training steps."""
    text = "some words of a long text " * 40_000
    tokenizer = train_bpe([text[:1000]], 300)
    thread = threading.Thread(target=tokenizer.encode, args=(text,))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 20  # one or two where the encoder lets nobody else run
