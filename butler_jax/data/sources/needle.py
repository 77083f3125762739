"""A needle in a haystack: one invented statement within a long text, asked for at the end.

The test was made known by Greg Kamradt (github.com/gkamradt/LLMTest_NeedleInAHaystack, 2023) and is part of RULER,
arXiv 2404.06654. The haystack is any text; statements, questions and answers are this project's own. A sample follows
from the haystack, (seed, index) and its length and depth alone; depth and length change neither its statement nor
where the haystack begins.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass
from random import Random

from butler_jax.data.sources.asked import AskedSample, asked_tokens, largest
from butler_jax.data.sources.coreference import invented_name, invented_word, sentences
from butler_jax.text import Tokenizer

KINDS = ("place", "number", "word")
"""place: a place of two invented words, with statements and questions of the co-reference task. number: five digits.
word: one invented word."""

LEAST_HAYSTACK = 16
"""Tokens of text that a needle has around it, at least."""

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
_THINGS = (
    "green cupboard", "old lighthouse", "copper kettle", "third drawer", "glass piano", "northern gate", "paper boat",
    "clock tower", "blue suitcase", "empty aviary", "winter garden", "stone bridge", "silver bicycle", "brick oven",
)  # fmt: skip
_SENTENCE_END = re.compile(r"[.!?][\"')\]\u201d\u2019]*\s+|\n\s*\n")
_NEAR = 32  # tokens within which the border of a sentence is looked for
_STRIDE = 8  # tokens without a space after which a word may be cut
_TRIES = 1000


@dataclass(frozen=True)
class NeedleSample(AskedSample):
    """kind: one of KINDS. statement: the needle. place: tokens before it. depth: the share of the haystack's tokens
    that lies before it, as reached."""

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
    """The sample of this index: at most `length` tokens, and fewer by a word of the haystack at most.

    haystack: text, read from a sentence drawn at random, and again from its beginning where it ends too soon. depth: 0
    puts the needle first, 1 last, between them at the border of a sentence nearest to that share of the haystack's
    tokens; at that of a word where no sentence ends near. kind: one of KINDS; None takes them in turn. The answer does
    not occur in the haystack. Raises ValueError for an empty haystack, a length too short for the needle and
    LEAST_HAYSTACK tokens around it, and another depth or kind.
    """
    haystack = haystack.strip()
    if not haystack:
        raise ValueError("the haystack is empty: a needle needs text around it; give some prose")
    if not (0 <= depth <= 1):
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
    if not length >= least:
        raise ValueError(f"{length} tokens are too short for this needle and its question; give at least {least}")
    filled, at = put(largest(size, len(cuts) - 1, length))
    whole = f"{filled}\n\n{question} {answer}"
    tokens, asked = asked_tokens(tokenizer, whole, [(len(whole) - len(answer), len(whole))])
    offsets = tokenizer.encode_with_offsets(whole)[1]
    place = sum(end <= at for _, end in offsets)
    first = sum(end == 0 for _, end in offsets)  # what the tokenizer begins a text with
    after = sum(at + len(statement) <= start and end <= len(filled) for start, end in offsets)
    reached = (place - first) / max(place - first + after, 1)
    return NeedleSample(
        text=whole, spans=((len(whole) - len(answer), len(whole)),), tokens=tuple(tokens), asked=tuple(asked),
        kind=kind, statement=statement, place=place, depth=reached,
    )  # fmt: skip


def _needle(random: Random, kind: str, text: str) -> tuple[str, str, str]:
    """Statement, question up to the answer, and an answer that is not in the text."""
    if kind == "place":
        statement, question = random.choice(sentences().introductions)
        statement, question = statement.replace("{name}", "{answer}"), f"{question[: question.rindex('?')]}? "
    else:
        statement, question = random.choice(_NUMBERS if kind == "number" else _WORDS)
    # A question ends in the words that come before the answer in the statement.
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
    """Where the first sentence after a place drawn at random begins; 0 where none does."""
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
    """The haystack with the needle before its character `at`, and where the needle begins; a broken end gets dots."""
    head, tail = kept[:at], kept[at:]
    dots = "" if not kept or kept[-1] in ".!?" else " ..."
    if not tail.strip():
        head, tail, dots = head.rstrip() + dots, "", ""
    head += "" if not head or head[-1].isspace() else " "
    return f"{head}{statement}{' ' + tail + dots if tail else ''}", len(head)
