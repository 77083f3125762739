"""Needles: how long the samples are, and where needles and answers lie."""

from __future__ import annotations

import re
from random import Random

from butler_jax.data.sources import needle
from tests.tiny_haystack import HAYSTACK, answers_of, decode_asked


def cases(number: int):
    """(index, length, depth, kind) of needles, drawn at random."""
    random = Random(number)
    for index in range(number):
        depth = random.choice((0.0, 1.0, random.random(), random.random()))
        yield index, random.randint(150, 900), depth, random.choice((None, *needle.KINDS))


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
        assert decode_asked(either, found).strip() == answer
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
