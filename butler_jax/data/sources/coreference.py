"""The co-reference task: a text names a place, turns to other subjects, and has to name the place again at the end.

The task is that of TokenButler, arXiv 2503.07518, section 4. All sentences and names are this project's own. A sample
has about 250 words: an introduction that names a place, sentences on philosophy, food and arithmetic, a question about
the place, and its name as the last words. The seed, the index and the split determine a sample, and there are samples
without end.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from random import Random

from butler_jax.data.sources.asked_samples import asked_tokens
from butler_jax.text import Tokenizer

WORDS = (220, 280)
"""The least and the largest number of words of a sample."""

_AIM = 250
_GENERIC_SHARE = 0.25
_ONSETS = "b br c ch d dr f g gl h j k l m n p pr qu r s sh sk st t th tr v w y z"
_VOWELS = "a a a e e e i i i o o o u u ae ea ia io ou"
_CODAS = "l m n r s t x th nd rn sk lm ss rk"
_CODA_SHARE = 0.75


@dataclass(frozen=True)
class CoreferenceSample:
    """One sample.

    Attributes:
        text: The text, with the name at its end.
        name: The place.
        name_start: The character where the name begins for the first time.
        last_start: The character where it begins for the last time; text[last_start:] is the name.
    """

    text: str
    name: str
    name_start: int
    last_start: int


@dataclass(frozen=True)
class Sentences:
    """The sentences of the task: introductions with their question, arithmetic templates with their operation."""

    introductions: tuple[tuple[str, str], ...]
    questions: tuple[str, ...]
    philosophy: tuple[str, ...]
    food: tuple[str, ...]
    arithmetic: tuple[tuple[str, str], ...]


@functools.cache
def sentences() -> Sentences:
    """All sentences, from the text files beside this module."""

    def lines(name: str) -> list[str]:
        text = (files("butler_jax.data.sources") / f"coreference_{name}.txt").read_text(encoding="utf-8")
        return [line.strip() for line in text.splitlines() if line.strip()]

    def pairs(name: str, separator: str) -> tuple[tuple[str, str], ...]:
        return tuple(tuple(line.split(separator, 1)) for line in lines(name))

    return Sentences(
        introductions=pairs("introductions", " || "),
        questions=tuple(lines("questions")),
        philosophy=tuple(lines("philosophy")),
        food=tuple(lines("food")),
        arithmetic=pairs("arithmetic", " | "),
    )


def sample(seed: int, index: int, split: str = "train", *, short: bool = False) -> CoreferenceSample:
    """Make the sample with this index.

    Args:
        seed: With `index` and `split`, determines the sample.
        split: "train" or "test", whose names are disjoint.
        short: Make an easier sample, from which a model that is trained from scratch learns first: up to five facts of
            the place, each asked back at once, and at most a few sentences before the last question.

    Raises:
        ValueError: The split is neither of the two.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown; choose train or test.")
    random = Random(f"coreference{' short' if short else ''} {seed} {split} {index}")
    aim, least = (random.randint(0, 80), 0) if short else (_AIM, 3)
    written = sentences()
    name = invented_name(random, split)
    introduction, question = random.choice(written.introductions)
    if random.random() < _GENERIC_SHARE:
        question = random.choice(written.questions)

    kinds: list[tuple[tuple, Callable]] = [
        (written.philosophy, lambda line: line),
        (written.food, lambda line: line),
        (written.arithmetic, lambda line: arithmetic_sentence(random, *line)),
    ]
    random.shuffle(kinds)
    # Sentences are taken from the three kinds in turn, so that the parts are about equally long.
    parts: list[list[str]] = [[], [], []]
    pools = [iter(random.sample(lines, 16)) for lines, _ in kinds]
    words = len(f"{introduction} {question} {name}".split())
    turn = 0
    while True:
        sentence = kinds[turn % 3][1](next(pools[turn % 3]))
        count = len(sentence.split())
        if turn >= least and words + count // 2 > aim:
            break
        parts[turn % 3].append(sentence)
        words += count
        turn += 1

    head = introduction.format(name=name)
    if short:
        facts = random.sample(written.introductions, random.randint(0, 5))
        head = " ".join([*(f"{fact.format(name=name)} {ask} {name}." for fact, ask in facts), head])
    text = " ".join([head, *(" ".join(part) for part in parts if part), question, ""])
    return CoreferenceSample(text=text + name, name=name, name_start=text.index(name), last_start=len(text))


def name_split(name: str) -> str:
    """The split of a place's name by the parity of a hash; each split has half of all names."""
    return "test" if hashlib.sha256(name.encode()).digest()[0] % 2 else "train"


def invented_name(random: Random, split: str) -> str:
    """A name of the split "train" or "test": two invented words of two or three syllables, as in "velmora quithas"."""
    while True:
        counts = (random.choice((2, 2, 3)), random.choice((2, 2, 3)))
        name = " ".join(invented_word(random, count) for count in counts)
        if name_split(name) == split:
            return name


def invented_word(random: Random, syllables: int) -> str:
    """An invented word in lower case."""
    onsets, vowels, codas = _ONSETS.split(), _VOWELS.split(), _CODAS.split()
    word = "".join(random.choice(onsets) + random.choice(vowels) for _ in range(syllables))
    return word + (random.choice(codas) if random.random() < _CODA_SHARE else "")


def arithmetic_sentence(random: Random, operation: str, template: str) -> str:
    """Fill a template with random numbers that make it true.

    Operations: add (a+b=c), sub (a-b=c), mul (a*b=c), div (a/b=c), rest (a = b*c + d with 0 < d < b), three (a+b+c=d),
    net (a+b-c=d), double (2a=b), square (a*a=b), percent (b per cent of a is c).
    """
    between = random.randint
    if operation == "add":
        a, b = between(3, 480), between(3, 480)
        numbers = {"a": a, "b": b, "c": a + b}
    elif operation == "sub":
        b, c = between(3, 400), between(3, 400)
        numbers = {"a": b + c, "b": b, "c": c}
    elif operation == "mul":
        a, b = between(3, 30), between(3, 30)
        numbers = {"a": a, "b": b, "c": a * b}
    elif operation == "div":
        b, c = between(3, 20), between(3, 40)
        numbers = {"a": b * c, "b": b, "c": c}
    elif operation == "rest":
        b, c = between(5, 15), between(3, 30)
        d = between(2, b - 1)
        numbers = {"a": b * c + d, "b": b, "c": c, "d": d}
    elif operation == "three":
        a, b, c = between(12, 150), between(12, 150), between(12, 150)
        numbers = {"a": a, "b": b, "c": c, "d": a + b + c}
    elif operation == "net":
        a, b = between(50, 400), between(10, 90)
        c = between(5, 45)
        numbers = {"a": a, "b": b, "c": c, "d": a + b - c}
    elif operation == "double":
        a = between(3, 400)
        numbers = {"a": a, "b": 2 * a}
    elif operation == "square":
        a = between(3, 40)
        numbers = {"a": a, "b": a * a}
    elif operation == "percent":
        b, hundreds = between(5, 60), between(2, 9)
        numbers = {"a": 100 * hundreds, "b": b, "c": b * hundreds}
    else:
        raise ValueError(f"unknown operation {operation!r} of the arithmetic template {template!r}")
    return template.format(**numbers)


def last_mention_mask(tokenizer: Tokenizer, sample: CoreferenceSample) -> tuple[list[int], list[bool]]:
    """The token ids of a sample and, for each, whether it belongs to the last mention of the name.

    A model has to predict these tokens. The space before the name counts as part of it, also as a token of its own.
    """
    return asked_tokens(tokenizer, sample.text, [(sample.last_start, len(sample.text))])


def mention_distance(tokenizer: Tokenizer, sample: CoreferenceSample) -> int:
    """The number of tokens between the first and the last mention of the name."""
    _, offsets = tokenizer.encode_with_offsets(sample.text)
    first_end = sample.name_start + len(sample.name)
    return sum(first_end <= start and end < sample.last_start for start, end in offsets)
