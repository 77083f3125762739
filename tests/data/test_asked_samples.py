"""Needles, key-value lists and variable chains: the samples, and the places of their answers."""

from __future__ import annotations

import re
from random import Random

import numpy as np
import pytest

from butler_jax.data.sources import coreference, needle, retrieval
from butler_jax.data.sources.asked_samples import asked_tokens, find_largest
from butler_jax.text.tokenizer import Tokenizer
from tests.tiny_haystack import HAYSTACK, train_tokenizer


def answers_of(sample):
    return tuple(sample.text[start:end] for start, end in sample.spans)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "bos"])
def either(request, tokenizer) -> Tokenizer:
    """The tokenizer, and the same with a first token before every text."""
    return Tokenizer(backend=tokenizer.backend, bos=tokenizer.bos, eos=tokenizer.eos, add_bos=request.param)


def cases(number: int):
    """(index, length, depth, kind) of needles, drawn at random."""
    random = Random(number)
    for index in range(number):
        depth = random.choice((0.0, 1.0, random.random(), random.random()))
        yield index, random.randint(150, 900), depth, random.choice((None, *needle.KINDS))


def decoded(tokenizer, sample) -> str:
    return tokenizer.decode([token for token, asked in zip(sample.tokens, sample.asked, strict=True) if asked])


def test_a_needle_sample_is_as_long_as_asked_or_a_word_less(either):
    for index, length, depth, kind in cases(24):
        found = needle.sample(either, HAYSTACK, length, depth, index=index, kind=kind)
        assert list(found.tokens) == either.encode(found.text)
        assert length - 8 <= len(found.tokens) <= length


def test_a_text_without_spaces_or_sentences_is_cut_anywhere(tokenizer):
    for length in (300, 433):
        found = needle.sample(tokenizer, "abcdefgh" * 500, length, 0.5)
        assert length - 8 <= len(found.tokens) <= length
        assert found.depth in (0.0, 1.0), "there is no border but the two ends"
        found = needle.sample(tokenizer, "abc defg h " * 500, length, 0.5)
        assert abs(found.depth - 0.5) < 0.05, "words do where no sentence ends"


def test_a_needle_stands_between_sentences_at_the_depth_asked(either):
    for index, length, depth, kind in cases(24):
        found = needle.sample(either, HAYSTACK, length, depth, index=index, kind=kind)
        before, after = found.text.split(found.statement)
        assert not before or re.search(r"[.?!]\s+$|\.\.\. $", before)
        haystack = after.rsplit("\n\n", 1)[0]
        # Counted by encoding the two sides alone: a border of tokens may move by one at either end.
        sides = [len(either.encode(side.strip(), bos=False)) for side in (before, haystack)]
        assert abs(found.place - either.add_bos - sides[0]) <= 1
        assert abs(found.depth - sides[0] / max(sum(sides), 1)) <= 2 / max(sum(sides), 1)
        assert abs(found.depth - depth) * sum(sides) <= 45, "half a sentence of 14 words of up to 7 letters"
        if depth in (0.0, 1.0):
            assert found.depth == depth


def test_the_answer_is_in_the_needle_and_at_the_end_and_nowhere_else(either):
    for index, length, depth, kind in cases(24):
        found = needle.sample(either, HAYSTACK, length, depth, index=index, kind=kind)
        (answer,) = answers_of(found)
        assert found.text.count(answer) == 2 and answer in found.statement and found.text.endswith(answer)
        assert decoded(either, found).strip() == answer
        # What stands before the answer is the same both times.
        stem = found.statement[: found.statement.index(answer)]
        assert found.text.endswith(stem + answer)


def test_an_answer_that_the_haystack_holds_is_drawn_again(tokenizer):
    first = answers_of(needle.sample(tokenizer, HAYSTACK, 300, 0.5, kind="number"))[0]
    again = needle.sample(tokenizer, HAYSTACK[:300] + f" {first}. " + HAYSTACK[300:500], 300, 0.5, kind="number")
    assert answers_of(again)[0] != first


def test_depth_and_length_move_a_needle_and_change_nothing_else(tokenizer):
    cells = [needle.sample(tokenizer, HAYSTACK, length, depth, index=5) for length in (200, 400) for depth in (0.2, 1)]
    assert len({cell.statement for cell in cells}) == 1
    texts = [cell.text.replace(cell.statement, "").split() for cell in cells]
    assert all(text[:40] == texts[0][:40] for text in texts)


def test_samples_follow_from_seed_and_index_alone(tokenizer):
    makers = [
        lambda seed, index: needle.sample(tokenizer, HAYSTACK, 300, 0.3, seed=seed, index=index),
        lambda seed, index: retrieval.key_value(tokenizer, 300, seed=seed, index=index),
        lambda seed, index: retrieval.variables(tokenizer, 300, seed=seed, index=index),
    ]
    for make in makers:
        texts = {make(seed, index).text for seed in range(3) for index in range(4)}
        assert len(texts) == 12
        assert make(1, 2) == make(1, 2)


@pytest.mark.parametrize("value", retrieval.VALUES)
@pytest.mark.parametrize("queries", [1, 3])
def test_a_key_leads_to_its_value_once(either, value, queries):
    for index in range(8):
        length = 260 + 97 * index
        found = retrieval.key_value(either, length, index=index, value=value, queries=queries)
        assert list(found.tokens) == either.encode(found.text)
        assert length - 40 <= len(found.tokens) <= length
        listed, asked = found.text.split("\n\n")
        pairs = re.findall(rf"^The {value} of (\w+) is (\w+)\.$", listed, re.MULTILINE)
        assert len(pairs) == len(dict(pairs)) == len(set(dict(pairs).values())) > queries
        questions = re.findall(rf"What is the {value} of (\w+)\? The {value} of (\w+) is (\w+)", asked)
        assert len({key for key, _, _ in questions}) == queries
        assert all(key == again and dict(pairs)[key] == answer for key, again, answer in questions)
        assert answers_of(found) == tuple(answer for _, _, answer in questions)
        assert decoded(either, found).split() == list(answers_of(found))


def test_asked_pairs_are_anywhere_in_the_list(tokenizer):
    places = []
    for index in range(60):
        found = retrieval.key_value(tokenizer, 500, index=index)
        places.append(found.text.index(answers_of(found)[0]) / len(found.text))
    # Means of 60 uniform draws lie within 0.5 +- 4 * 0.29 / sqrt(60); the question at the end takes some.
    assert 0.3 < np.mean(places) < 0.6 and np.min(places) < 0.2 and np.max(places) > 0.75


@pytest.mark.parametrize("question", retrieval.QUESTIONS)
@pytest.mark.parametrize("hops", [0, 1, 3])
def test_variables_hold_what_a_walk_through_the_assignments_finds(either, question, hops):
    for index in range(8):
        length = 200 + 83 * index
        found = retrieval.variables(either, length, index=index, hops=hops, question=question)
        assert length - 40 <= len(found.tokens) <= length
        listed, asked = found.text.split("\n\n")
        held: dict[str, str] = {}
        for line in listed.splitlines()[1:]:
            name, source = line.rstrip(".").split(" = ")
            assert name not in held
            held[name] = source if source.isdigit() else held[source]  # a KeyError: assigned before its source
        if question == "value":
            name, again, answer = re.fullmatch(r"Which number does (\w+) hold\? (\w+) = (\d+)", asked).groups()
            assert name == again and held[name] == answer and answers_of(found) == (answer,)
        else:
            number, names = re.fullmatch(r"Which variables hold (\d+)\? They are (.+)", asked).groups()
            # In the order in which they were assigned, dictionaries keep that.
            assert names.split(", ") == [name for name, value in held.items() if value == number]
            assert answers_of(found) == (names,) and len(names.split(", ")) == hops + 1
        assert len(set(held.values())) > 1
        assert decoded(either, found).strip() == answers_of(found)[0]


def test_a_longer_list_holds_the_shorter_one(tokenizer):
    for make in (retrieval.key_value, retrieval.variables):
        short, long = (make(tokenizer, length).text.splitlines() for length in (200, 500))
        assert len(long) > len(short) and set(short) <= set(long)
        assert [line for line in long if line in set(short)] == short


def test_marked_tokens_cover_their_spans(tokenizer):
    text = "One is 12345. Two is velmora quithas"
    first, second = text.index("12345"), text.index("velmora")
    tokens, asked = asked_tokens(tokenizer, text, [(first, first + 5), (second, len(text))])
    assert tokens == tokenizer.encode(text)
    assert tokenizer.decode([t for t, a in zip(tokens, asked, strict=True) if a]) == " 12345 velmora quithas"


def test_the_largest_number_that_fits_is_found():
    random = np.random.default_rng(0)
    for _ in range(50):
        sizes = np.cumsum(random.integers(1, 9, 60))
        for length in (0, *random.integers(1, sizes[-1] + 5, 6)):
            assert find_largest(lambda n, sizes=sizes: int(sizes[n]), 59, length) == int((sizes <= length).sum()) - 1


def test_co_reference_distances_count_the_tokens_between_the_mentions(tokenizer):
    for index in range(10):
        sample = coreference.sample(0, index, "test")
        between = sample.text[sample.name_start + len(sample.name) : sample.last_start - 1]
        # What lies between begins at a word and ends before the name's space, so alone it has the same tokens.
        assert coreference.mention_distance(tokenizer, sample) == len(tokenizer.encode(between))


def test_bad_input_is_answered_with_what_to_do(tokenizer):
    def raises(text, make, *args, **more):
        with pytest.raises(ValueError, match=text):
            make(*args, **more)

    raises("haystack is empty", needle.sample, tokenizer, " \n", 300, 0.5)
    raises("share of the haystack from 0 to 1, got 1.5", needle.sample, tokenizer, HAYSTACK, 300, 1.5)
    raises("known: place, number, word", needle.sample, tokenizer, HAYSTACK, 300, 0.5, kind="song")
    raises("known: number, word", retrieval.key_value, tokenizer, 300, value="song")
    raises("known: value, variables", retrieval.variables, tokenizer, 300, question="why")
    raises("hops must be 0 or more", retrieval.variables, tokenizer, 300, hops=-1)
    raises("queries must be at least 1", retrieval.key_value, tokenizer, 300, queries=0)
    raises("give fewer", retrieval.key_value, tokenizer, 3_000_000)
    for make in (
        lambda length: needle.sample(tokenizer, HAYSTACK, length, 0.5),
        lambda length: retrieval.key_value(tokenizer, length),
        lambda length: retrieval.variables(tokenizer, length),
    ):
        with pytest.raises(ValueError, match="give at least") as raised:
            make(20)
        least = int(re.search(r"give at least (\d+)", str(raised.value)).group(1))
        assert len(make(least).tokens) <= least, "the length that the message names does"
        raises("give at least", make, least - 1)
