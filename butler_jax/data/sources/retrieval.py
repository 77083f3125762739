"""Two tasks on made-up lists: look up a key among many, and follow variables through their assignments.

In the manner of RULER, arXiv 2404.06654 (its multi-key needles and its variable tracking), with a wording of our own
and with other pairs and other chains in place of a haystack. A sample follows from (seed, index) and its settings
alone; a longer one holds the lines of a shorter one, in the same order, and more between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random

from butler_jax.data.sources.asked import AskedSample, Span, asked_tokens, largest
from butler_jax.data.sources.coreference import invented_word
from butler_jax.text import Tokenizer

VALUES = ("number", "word")
"""What a key leads to: six digits, or an invented word."""

QUESTIONS = ("value", "variables")
"""What is asked of a chain: the number its last variable holds, or all variables that hold its number."""

MOST = 2_000_000
"""The longest sample, in tokens."""

_LEAST_LINE = 4  # tokens, of the shortest line

Line = tuple[float, str]  # its place in the text, from 0 to 1, and what it says
Asked = Sequence[tuple[str, str]]  # questions up to their answers, and these


def key_value(
    tokenizer: Tokenizer, length: int, *, seed: int | str = 0, index: int = 0, value: str = "number", queries: int = 1
) -> AskedSample:
    """A list of keys with a value each; the values of `queries` keys are asked for, one after the other.

    At most `length` tokens, and fewer by a line at most. value: one of VALUES. Every line is of the same form, so all
    that tells the asked pair from the others is its key. Raises ValueError for a length without room for the asked
    pairs and one other, and for another value.
    """
    if value not in VALUES:
        raise ValueError(f"unknown value {value!r}; known: {', '.join(VALUES)}")
    if not queries >= 1:
        raise ValueError(f"at least 1 key is asked for, got {queries}")
    random, line = Random(f"key_value {seed} {index} {value} {queries}"), "The {value} of {key} is {answer}."
    used: set[str] = set()

    def pair() -> tuple[str, str]:
        key = _new(used, lambda: invented_word(random, 2))
        return key, _new(used, lambda: _number(random) if value == "number" else invented_word(random, 3))

    def said(key: str, answer: str) -> Line:
        return random.random(), line.format(value=value, key=key, answer=answer)

    pairs = [pair() for _ in range(queries)]
    lines = [said(*each) for each in pairs]
    questions = []
    for key, answer in random.sample(pairs, len(pairs)):
        # A question ends in the words that come before the answer in the pair's line.
        stem = line[: line.index(" {answer}")].format(value=value, key=key)
        questions.append((f"What is the {value} of {key}? {stem}", answer))
    others = (said(*pair()) for _ in iter(int, 1))
    return _fill(tokenizer, f"Every name has a {value}.", lines, others, questions, length, least=1)


def variables(
    tokenizer: Tokenizer, length: int, *, seed: int | str = 0, index: int = 0, hops: int = 2, question: str = "value"
) -> AskedSample:
    """Assignments in chains: a variable holds a number, the next one holds what that one holds, and so on.

    One chain of `hops` + 1 variables is asked about, the others are of the same length; the lines of all chains are
    mixed, each chain's in order. question: one of QUESTIONS. At most `length` tokens, and fewer by a line at most; the
    last of the other chains may be cut. Raises ValueError for a length without room for the chain and one other line,
    and for another question.
    """
    if question not in QUESTIONS:
        raise ValueError(f"unknown question {question!r}; known: {', '.join(QUESTIONS)}")
    if not hops >= 0:
        raise ValueError(f"a chain has 0 hops or more, got {hops}")
    random = Random(f"variables {seed} {index} {hops}")
    used: set[str] = set()

    def chain() -> tuple[list[str], str, list[Line]]:
        names = [_new(used, lambda: invented_word(random, 2)) for _ in range(hops + 1)]
        number = _new(used, lambda: _number(random))
        places = sorted(random.random() for _ in names)
        said = [f"{name} = {source}." for name, source in zip(names, [number, *names], strict=False)]
        return names, number, list(zip(places, said, strict=True))

    names, number, lines = chain()
    others = (line for _ in iter(int, 1) for line in chain()[2])
    if question == "value":
        asked = [(f"Which number does {names[-1]} hold? {names[-1]} =", number)]
    else:
        asked = [(f"Which variables hold {number}? They are", ", ".join(names))]
    return _fill(tokenizer, "Every variable holds a number.", lines, others, asked, length, least=1)


def _fill(
    tokenizer: Tokenizer,
    head: str,
    lines: Sequence[Line],
    others: Iterator[Line],
    asked: Asked,
    length: int,
    least: int,
) -> AskedSample:
    """The sample with as many of the other lines as there is room for."""
    if not length <= MOST:
        raise ValueError(f"{length} tokens are beyond {MOST}, where numbers of six digits run out; give fewer")
    others = list(islice(others, max(length // _LEAST_LINE, least)))

    def put(number: int) -> tuple[str, list[Span]]:
        body = "\n".join(line for _, line in sorted([*lines, *others[:number]]))
        text, spans = f"{head}\n{body}\n\n", []
        for number, (question, answer) in enumerate(asked):
            text += f"{chr(10) if number else ''}{question} "
            spans.append((len(text), len(text) + len(answer)))
            text += answer + ("." if number + 1 < len(asked) else "")
        return text, spans

    def size(number: int) -> int:
        return len(tokenizer.encode(put(number)[0]))

    shortest = size(least)
    if not length >= shortest:
        raise ValueError(f"{length} tokens are too short for this sample; give at least {shortest}")
    text, spans = put(max(largest(size, len(others), length), least))
    tokens, mask = asked_tokens(tokenizer, text, spans)
    return AskedSample(text=text, spans=tuple(spans), tokens=tuple(tokens), asked=tuple(mask))


def _number(random: Random) -> str:
    return str(random.randint(100_000, 999_999))


def _new(used: set[str], draw: Callable[[], str]) -> str:
    """A draw that was not there before."""
    found = draw()
    while found in used:
        found = draw()
    used.add(found)
    return found
