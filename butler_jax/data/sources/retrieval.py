"""Two tasks on generated lists: look up a key among many, and follow variables through their assignments.

They follow RULER, arXiv 2404.06654 (multi-key needles and variable tracking). The wording is this project's own, and
other pairs and chains take the place of a haystack. The seed, the index and the settings determine a sample. A longer
sample has the lines of a shorter one in the same order, and more lines between them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from random import Random

from butler_jax.data.sources.asked_samples import AskedSample, Span, TooShortError, asked_tokens, find_largest
from butler_jax.data.sources.coreference import invented_word
from butler_jax.text import Tokenizer

VALUES = ("number", "word")
"""The value of a key: a number of six digits, or an invented word."""

QUESTIONS = ("value", "variables")
"""The question about a chain: the number that its last variable holds, or all variables that hold its number."""

MOST = 2_000_000
"""The longest sample, in tokens."""

_LEAST_LINE = 4  # tokens of the shortest line

Line = tuple[float, str]  # its place in the text, from 0 to 1, and its words
Asked = Sequence[tuple[str, str]]  # questions up to their answers, and the answers


def key_value(
    tokenizer: Tokenizer, length: int, *, seed: int | str = 0, index: int = 0, value: str = "number", queries: int = 1
) -> AskedSample:
    """Make a list of keys with a value each; it asks for the values of `queries` keys, one after the other.

    All lines have the same form, so only its key distinguishes an asked pair from the others.

    Args:
        length: Of the sample in tokens. The sample is shorter by at most one line.
        seed: With `index` and the settings, determines the sample.

    Raises:
        ValueError: The length has no room for the asked pairs and one other, or a setting is invalid.
    """
    if value not in VALUES:
        raise ValueError(f"unknown value {value!r}; known: {', '.join(VALUES)}")
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
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
        # The question ends with the words before the answer in the pair's line.
        stem = line[: line.index(" {answer}")].format(value=value, key=key)
        questions.append((f"What is the {value} of {key}? {stem}", answer))
    others = (said(*pair()) for _ in iter(int, 1))
    return _fill(tokenizer, f"Every name has a {value}.", lines, others, questions, length)


def variables(
    tokenizer: Tokenizer, length: int, *, seed: int | str = 0, index: int = 0, hops: int = 2, question: str = "value"
) -> AskedSample:
    """Make chains of assignments: a variable holds a number, the next one is assigned the first one, and so on.

    The sample asks about one chain of `hops` + 1 variables. The others have the same length, but the last of them may
    be cut. The lines of all chains are mixed, and those of one chain stay in order.

    Args:
        length: Of the sample in tokens. The sample is shorter by at most one line.
        seed: With `index` and `hops`, determines the sample.

    Raises:
        ValueError: The length has no room for the chain and one other line, or a setting is invalid.
    """
    if question not in QUESTIONS:
        raise ValueError(f"unknown question {question!r}; known: {', '.join(QUESTIONS)}")
    if hops < 0:
        raise ValueError(f"hops must be 0 or more, got {hops}")
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
    return _fill(tokenizer, "Every variable holds a number.", lines, others, asked, length)


def _fill(
    tokenizer: Tokenizer,
    head: str,
    lines: Sequence[Line],
    others: Iterator[Line],
    asked: Asked,
    length: int,
) -> AskedSample:
    """The sample with as many of the other lines as fit, at least one."""
    if length > MOST:
        raise ValueError(f"{length} tokens are beyond {MOST}, where numbers of six digits run out; give fewer")
    others = list(islice(others, max(length // _LEAST_LINE, 1)))

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

    shortest = size(1)
    if length < shortest:
        raise TooShortError(length, shortest)
    text, spans = put(max(find_largest(size, len(others), length), 1))
    tokens, mask = asked_tokens(tokenizer, text, spans)
    return AskedSample(text=text, spans=tuple(spans), tokens=tuple(tokens), asked=tuple(mask))


def _number(random: Random) -> str:
    return str(random.randint(100_000, 999_999))


def _new(used: set[str], draw: Callable[[], str]) -> str:
    """A draw that is not in `used` yet; it is added there."""
    found = draw()
    while found in used:
        found = draw()
    used.add(found)
    return found
