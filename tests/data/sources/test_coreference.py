"""The co-reference task: its sentences, its samples and its arithmetic."""

from __future__ import annotations

import re

import pytest

from butler_jax.data.sources import coreference
from butler_jax.text.tokenizer import train_bpe


def test_every_kind_has_a_hundred_sentences_and_none_is_repeated():
    written = coreference.sentences()
    introductions = [introduction for introduction, _ in written.introductions]
    questions = [question for _, question in written.introductions] + list(written.questions)
    arithmetic = [template for _, template in written.arithmetic]
    for kind in (introductions, questions, written.philosophy, written.food, arithmetic):
        assert len(kind) >= 100
    everything = [*introductions, *questions, *written.philosophy, *written.food, *arithmetic]
    assert len(set(everything)) == len(everything)
    assert all(introduction.count("{name}") == 1 for introduction in introductions)
    assert all("?" in question or "name" in question or question.count(".") for question in questions)


def test_samples_hold_about_250_words_and_end_with_the_name():
    for index in range(400):
        sample = coreference.sample(7, index, "test")
        least, most = coreference.WORDS
        assert least <= len(sample.text.split()) <= most
        assert sample.text[sample.last_start :] == sample.name == sample.name.lower()
        assert sample.text[sample.name_start :].startswith(sample.name)
        assert sample.text.count(sample.name) == 2
        assert "{" not in sample.text and "  " not in sample.text


def test_samples_follow_from_seed_index_and_split_alone():
    assert coreference.sample(3, 5) == coreference.sample(3, 5)
    texts = {
        coreference.sample(seed, i, split).text for seed in (0, 1) for i in range(40) for split in ("train", "test")
    }
    assert len(texts) == 160


def test_names_of_train_and_test_are_disjoint_and_endless():
    train = {coreference.sample(0, i, "train").name for i in range(1500)}
    test = {coreference.sample(0, i, "test").name for i in range(1500)}
    assert not train & test
    assert len(train) == len(test) == 1500
    assert {coreference.name_split(name) for name in train} == {"train"}


def test_last_mention_tokens_decode_to_the_name():
    tokenizer = train_bpe((coreference.sample(0, i).text for i in range(60)), 600)
    for index in range(50):
        sample = coreference.sample(1, index, "test")
        tokens, mask = coreference.last_mention_mask(tokenizer, sample)
        assert tokens == tokenizer.encode(sample.text)
        marked = [token for token, last in zip(tokens, mask, strict=True) if last]
        assert tokenizer.decode(marked) == " " + sample.name
        assert mask == sorted(mask) and len(marked) >= 2


def test_arithmetic_is_true():
    from random import Random

    # The text is read back: its numbers, in the order of the template's fields, must satisfy the operation.
    holds = {
        "add": lambda n: n["a"] + n["b"] == n["c"],
        "sub": lambda n: n["a"] - n["b"] == n["c"],
        "mul": lambda n: n["a"] * n["b"] == n["c"],
        "div": lambda n: n["a"] == n["b"] * n["c"],
        "rest": lambda n: divmod(n["a"], n["b"]) == (n["c"], n["d"]) and n["d"] > 0,
        "three": lambda n: n["a"] + n["b"] + n["c"] == n["d"],
        "net": lambda n: n["a"] + n["b"] - n["c"] == n["d"],
        "double": lambda n: 2 * n["a"] == n["b"],
        "square": lambda n: n["a"] ** 2 == n["b"],
        "percent": lambda n: n["a"] * n["b"] == 100 * n["c"],
    }
    for number, (operation, template) in enumerate(coreference.sentences().arithmetic):
        sentence = coreference.arithmetic_sentence(Random(number), operation, template)
        fields = re.findall(r"{(\w)}", template)
        values = dict(zip(fields, map(int, re.findall(r"\d+", sentence)), strict=True))
        assert holds[operation](values), sentence
        assert min(values.values()) > 0


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split='dev' is unknown"):
        coreference.sample(0, 0, "dev")


def test_co_reference_distances_count_the_tokens_between_the_mentions(tokenizer):
    for index in range(10):
        sample = coreference.sample(0, index, "test")
        between = sample.text[sample.name_start + len(sample.name) : sample.last_start - 1]
        # What lies between begins at a word and ends before the name's space, so alone it has the same tokens.
        assert coreference.mention_distance(tokenizer, sample) == len(tokenizer.encode(between))
