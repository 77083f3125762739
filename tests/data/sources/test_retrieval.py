"""Lists of pairs and chains of variables: what is asked, and the answers."""

from __future__ import annotations

import re

import numpy as np
import pytest

from butler_jax.data.sources import retrieval
from tests.tiny_haystack import answers_of, decode_asked


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
        assert decode_asked(either, found).split() == list(answers_of(found))


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
        assert decode_asked(either, found).strip() == answers_of(found)[0]


def test_a_longer_list_holds_the_shorter_one(tokenizer):
    for make in (retrieval.key_value, retrieval.variables):
        short, long = (make(tokenizer, length).text.splitlines() for length in (200, 500))
        assert len(long) > len(short) and set(short) <= set(long)
        assert [line for line in long if line in set(short)] == short
