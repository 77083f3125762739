"""The needle in a haystack: one invented statement within a long text is asked for at the end.

The test was made known by Greg Kamradt (github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023) and is part of RULER,
arXiv 2404.06654. The haystack is any text. Statements, questions and answers are this project's own.

The haystack, the seed, the index, the length and the depth determine a sample. Its statement and the place where the
haystack begins depend on neither length nor depth.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from random import Random

from butler_jax.data.sources.asked_samples import AskedSample, TooShortError, asked_tokens, find_largest
from butler_jax.data.sources.coreference import invented_name, invented_word, sentences
from butler_jax.text import Tokenizer

KINDS = ("place", "number", "word")
"""The answer is a place (two invented words, with statements and questions of the co-reference task), a number of five
digits, or one invented word."""

LEAST_HAYSTACK = 16
"""The least number of tokens around a needle."""

_NUMBERS = (
    ("The secret number of the {thing} is {answer}.", "What is the secret number of the {thing}? "),
    ("The code of the {thing} is {answer}.", "What is the code of the {thing}? "),
    ("The ticket for the {thing} has the number {answer}.", "Which number does the ticket for the {thing} have? "),
    ("The weight of the {thing} in grams is {answer}.", "What is the weight of the {thing} in grams? "),
)
_WORDS = (
    ("The secret word of the {thing} is {answer}.", "What is the secret word of the {thing}? "),
    ("The dog that sleeps beside the {thing} is called {answer}.", "What is the dog beside the {thing} called? "),
    ("The first owner of the {thing} was {answer}.", "Who was the first owner of the {thing}? "),
    ("The only visitor who asked about the {thing} was {answer}.", "Who was the visitor who asked about the {thing}? "),
)
_THINGS = tuple(
    "green cupboard,old lighthouse,copper kettle,third drawer,glass piano,northern gate,paper boat,"
    "clock tower,blue suitcase,empty aviary,winter garden,stone bridge,silver bicycle,brick oven".split(",")
)
_SENTENCE_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+|\n\s*\n")
_NEAR = 32  # greatest distance in tokens from the wanted depth to the end of a sentence
_STRIDE = 8  # tokens without a space after which a word may be cut
_TRIES = 1000  # answers that are drawn before the haystack is refused


@dataclass(frozen=True)
class NeedleSample(AskedSample):
    """A sample with its needle.

    Attributes:
        kind: One of KINDS.
        statement: The needle.
        place: Tokens before the needle.
        depth: The share of the haystack's tokens before the needle, as reached.
    """

    kind: str
    statement: str
    place: int
    depth: float


def sample(
    tokenizer: Tokenizer,
    haystack: str,
    length: int,
    depth: float,
    *,
    seed: int | str = 0,
    index: int = 0,
    kind: str | None = None,
) -> NeedleSample:
    """Make the sample of this index. It is at most `length` tokens long, and shorter by at most one word.

    Args:
        haystack: Text. It is read from a random sentence on, and from its beginning again where it ends.
        depth: Share of the haystack's tokens before the needle, from 0 to 1. The needle goes between the two sentences
            nearest to it, or between two words where no sentence ends near.
        seed: With `index`, determines the sample.
        kind: One of KINDS; None takes them in turn.

    Returns:
        The sample. Its answer does not occur in the haystack.

    Raises:
        ValueError: The haystack is empty, the length is too short for the needle and LEAST_HAYSTACK tokens around it,
            or the depth or kind is invalid.
    """
    haystack = haystack.strip()
    if not haystack:
        raise ValueError("the haystack is empty: a needle needs text around it; give some prose")
    if not 0 <= depth <= 1:
        raise ValueError(f"the depth of a needle is a share of the haystack from 0 to 1, got {depth}")
    kind = KINDS[index % len(KINDS)] if kind is None else kind
    if kind not in KINDS:
        raise ValueError(f"unknown kind of needle {kind!r}; known: {', '.join(KINDS)}")
    random = Random(f"needle {seed} {index} {kind}")
    start = _sentence_start(haystack, random)
    text, ends = _passage(tokenizer, haystack, start, length)
    statement, question, answer = _needle(random, kind, text)
    cuts = _cuts(text, ends)

    def put(number: int) -> tuple[str, int]:
        kept = text[: cuts[number]]
        return _with_needle(kept, _border(kept, ends, depth), statement)

    def size(number: int) -> int:
        return len(tokenizer.encode(f"{put(number)[0]}\n\n{question} {answer}"))

    least = size(0) + LEAST_HAYSTACK
    if length < least:
        raise TooShortError(length, least)
    filled, at = put(find_largest(size, len(cuts) - 1, length))
    whole = f"{filled}\n\n{question} {answer}"
    answer_span = (len(whole) - len(answer), len(whole))
    tokens, asked = asked_tokens(tokenizer, whole, [answer_span])
    offsets = tokenizer.encode_with_offsets(whole)[1]
    place = sum(end <= at for _, end in offsets)
    first = sum(end == 0 for _, end in offsets)  # the token bos, where there is one
    after = sum(at + len(statement) <= start and end <= len(filled) for start, end in offsets)
    return NeedleSample(
        text=whole,
        spans=(answer_span,),
        tokens=tuple(tokens),
        asked=tuple(asked),
        kind=kind,
        statement=statement,
        place=place,
        depth=(place - first) / max(place - first + after, 1),
    )


def _needle(random: Random, kind: str, text: str) -> tuple[str, str, str]:
    """A statement, its question up to the answer, and an answer that is not in the text."""
    if kind == "place":
        statement, question = random.choice(sentences().introductions)
        statement, question = statement.replace("{name}", "{answer}"), f"{question[: question.rindex('?')]}? "
    else:
        statement, question = random.choice(_NUMBERS if kind == "number" else _WORDS)
    # The question ends with the words before the answer in the statement.
    question += statement[: statement.index(" {answer}")]
    thing, lower = random.choice(_THINGS), text.lower()
    for _ in range(_TRIES):
        answer = _answer(random, kind)
        if answer not in lower:
            return statement.format(thing=thing, answer=answer), question.format(thing=thing), answer
    raise ValueError(f"the haystack holds all of {_TRIES} answers that were drawn; give another text")


def _answer(random: Random, kind: str) -> str:
    if kind == "number":
        return str(random.randint(10_000, 99_999))
    return invented_name(random, "test") if kind == "place" else invented_word(random, 2)


def _sentence_start(haystack: str, random: Random) -> int:
    """Where the first sentence after a random place begins; 0 where none does."""
    found = _SENTENCE_END.search(haystack, int(random.random() * len(haystack)))
    return found.end() if found and found.end() < len(haystack) else 0


def _passage(tokenizer: Tokenizer, haystack: str, start: int, length: int) -> tuple[str, list[int]]:
    """Text of at least `length` tokens from `start` on, and the character where each token ends."""
    characters = 6 * length
    while True:
        text = haystack[start : start + characters]
        while len(text) < characters:
            text = f"{text}\n\n{haystack[:characters]}"
        ends = [end for _, end in tokenizer.encode_with_offsets(text, bos=False)[1]]
        if len(ends) >= length:
            return text, ends
        characters *= 2


def _cuts(text: str, ends: list[int]) -> list[int]:
    """Where the haystack may stop: after a word, or within one that is longer than _STRIDE tokens."""
    cuts, last = [0], -1
    for number, end in enumerate(ends):
        word = end == len(text) or (text[end].isspace() and not text[end - 1].isspace())
        if end > cuts[-1] and (word or number - last >= _STRIDE):
            cuts.append(end)
            last = number
    return cuts


def _border(kept: str, ends: list[int], depth: float) -> int:
    """The character of `kept` before which the needle goes."""
    count = bisect_right(ends, len(kept))
    wanted = depth * count

    def distance(character: int) -> float:
        return abs(bisect_right(ends, character) - wanted)

    borders = [0, len(kept), *(found.end() for found in _SENTENCE_END.finditer(kept))]
    best = min(borders, key=distance)
    if distance(best) > _NEAR:
        best = min((found.end() for found in re.finditer(r"\s+", kept)), key=distance, default=best)
    return best


def _with_needle(kept: str, at: int, statement: str) -> tuple[str, int]:
    """The haystack with the needle before its character `at`, and where the needle begins. A cut end gets dots."""
    head, tail = kept[:at], kept[at:]
    dots = "" if not kept or kept[-1] in ".!?" else " ..."
    if not tail.strip():
        head, tail, dots = head.rstrip() + dots, "", ""
    head += "" if not head or head[-1].isspace() else " "
    return f"{head}{statement}{' ' + tail + dots if tail else ''}", len(head)
