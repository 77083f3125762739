"""Batches of the long-context tasks: needles over a grid of depths and lengths, lists of keys, chains of variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from butler_jax.data import AskedSample
from butler_jax.data.sources import needle, retrieval
from butler_jax.evaluation.tasks.teacher_forcing import Batch, answer_batches
from butler_jax.text import Tokenizer


class Labelled(NamedTuple):
    """Batches for teacher_forced.answers, and what each of their samples is: {"length": ...}, needles with "depth"."""

    batches: list[Batch]
    labels: list[dict[str, float | int]]


def needle_batches(
    tokenizer: Tokenizer,
    haystack: str,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    kind: str | None = None,
    batch_size: int = 4,
    seed: int = 0,
    context: int | None = None,
) -> Labelled:
    """`samples` needles for every length in tokens and depth in 0 ... 1; see datasets/needle.py.

    Every sample is drawn by its seed, length, depth and number: no two share a needle, so they are independent but for
    the text they lie in, and a cell is the same whatever other cells there are. A batch holds one length. Raises
    ValueError for a length beyond `context`, the model's, or too short, and where there is nothing to do.
    """
    if not depths:
        raise ValueError("a needle needs a depth; give some, such as 0, 0.5 and 1")

    make = partial(needle.sample, tokenizer, haystack, kind=kind)
    places = [{"depth": depth} for depth in depths]
    return _batches("needle", make, seed, lengths, samples, batch_size, context, places)


def key_value_batches(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    samples: int,
    value: str = "number",
    queries: int = 1,
    batch_size: int = 4,
    seed: int = 0,
    context: int | None = None,
) -> Labelled:
    """`samples` lists of keys and values for every length in tokens, all drawn anew; see datasets/retrieval.py.

    Errors as above.
    """

    make = partial(retrieval.key_value, tokenizer, value=value, queries=queries)
    return _batches("key_value", make, seed, lengths, samples, batch_size, context)


def variables_batches(
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    samples: int,
    hops: int = 2,
    question: str = "value",
    batch_size: int = 4,
    seed: int = 0,
    context: int | None = None,
) -> Labelled:
    """`samples` texts of assignments for every length in tokens, all drawn anew; see datasets/retrieval.py.

    Errors as above.
    """

    make = partial(retrieval.variables, tokenizer, hops=hops, question=question)
    return _batches("variables", make, seed, lengths, samples, batch_size, context)


def _batches(
    task: str,
    make: Callable[..., AskedSample],
    seed: int,
    lengths: Sequence[int],
    samples: int,
    batch_size: int,
    context: int | None,
    places: Sequence[dict[str, float]] = ({},),
) -> Labelled:
    """`samples` of make(length=, seed=, index=, **place) for every length and place, each cell under its own seed."""
    if not lengths:
        raise ValueError(f"the task {task} needs a length in tokens; give some, such as 512")
    if not samples >= 1:
        raise ValueError(f"the task {task} needs at least 1 sample, got {samples}")
    over = [length for length in lengths if context is not None and length > context]
    if over:
        raise ValueError(
            f"the task {task} is asked for at {', '.join(map(str, over))} tokens, beyond the model's context of "
            f"{context}; leave these lengths out"
        )
    batches, labels = [], []
    for length in lengths:
        wanted = [{**place, "length": length} for place in places for _ in range(samples)]
        made = [make(**cell, seed=_seed(seed, cell), index=n % samples) for n, cell in enumerate(wanted)]
        labels += wanted
        rows = [(sample.tokens, sample.asked) for sample in made]
        batches += answer_batches(rows, batch_size=batch_size, context=context)
    return Labelled(batches, labels)


def _seed(seed: int, cell: dict[str, float | int]) -> str:
    """The seed of one cell of a grid."""
    return " ".join([str(seed), *(f"{name} {float(value)}" for name, value in cell.items())])
