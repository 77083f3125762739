"""The long-context tasks: needles over a grid of depths and lengths, lists of keys, chains of variables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from butler_jax.data import AskedSample, Batch, TooShortError
from butler_jax.data.sources import needle, retrieval
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.tasks.answers import AnsweringTask, batch_answers, group_by_label
from butler_jax.text import Tokenizer
from butler_jax.weights import Base


@dataclass(frozen=True, kw_only=True)
class SampleGrid:
    """How many samples of which lengths are drawn.

    Attributes:
        lengths: Tokens of a sample.
        samples: Samples of each length (needles: of each length and depth).
        batch_size: Samples of a batch.
        seed: Of the samples.
        context: The model's, in tokens.
    """

    lengths: Sequence[int]
    samples: int
    batch_size: int = 4
    seed: int = 0
    context: int | None = None


class LabelledBatches(NamedTuple):
    """Batches of `batch_answers`, and the label of each sample: {"length": ...}, and "depth" of needles."""

    batches: list[Batch]
    labels: list[dict[str, float | int]]


def make_needle_batches(
    tokenizer: Tokenizer, haystack: str, grid: SampleGrid, *, depths: Sequence[float], kind: str | None = None
) -> LabelledBatches:
    """Make needle samples for every length and depth; see data/sources/needle.py.

    A sample is drawn by its seed, length, depth and number. So no two share a needle, they depend on each other only
    through the haystack, and the samples of one place do not depend on the others. A batch holds one length.

    Args:
        grid: Lengths and numbers of samples.
        depths: Where needles lie: 0 is the beginning of the haystack, 1 its end.
        kind: What a needle says; None draws it.

    Raises:
        ValueError: The grid is empty, or a length is too short or beyond the context.
    """
    if not depths:
        raise ValueError("a needle needs a depth; give some, such as 0, 0.5 and 1")
    make = partial(needle.sample, tokenizer, haystack, kind=kind)
    return _make_batches("needle", make, grid, [{"depth": depth} for depth in depths])


def make_key_value_batches(
    tokenizer: Tokenizer, grid: SampleGrid, *, value: str = "number", queries: int = 1
) -> LabelledBatches:
    """Make lists of keys and values; see data/sources/retrieval.py for `value` and `queries`.

    Raises:
        ValueError: As `make_needle_batches` does.
    """
    return _make_batches("key_value", partial(retrieval.key_value, tokenizer, value=value, queries=queries), grid)


def make_variables_batches(
    tokenizer: Tokenizer, grid: SampleGrid, *, hops: int = 2, question: str = "value"
) -> LabelledBatches:
    """Make texts of assignments; see data/sources/retrieval.py for `hops` and `question`.

    Raises:
        ValueError: As `make_needle_batches` does.
    """
    return _make_batches("variables", partial(retrieval.variables, tokenizer, hops=hops, question=question), grid)


def _make_batches(
    task: str, make: Callable[..., AskedSample], grid: SampleGrid, places: Sequence[dict[str, float]] = ({},)
) -> LabelledBatches:
    """Samples of make(length=, seed=, index=, **place) for every length and place, each place under its own seed."""
    if not grid.lengths:
        raise ValueError(f"the task {task} needs a length in tokens; give some, such as 512")
    if grid.samples < 1:
        raise ValueError(f"the task {task} needs at least 1 sample, got {grid.samples}")
    over = [length for length in grid.lengths if grid.context is not None and length > grid.context]
    if over:
        raise ValueError(
            f"the task {task} is asked for at {', '.join(map(str, over))} tokens, beyond the model's context of "
            f"{grid.context}; leave these lengths out"
        )
    batches, labels = [], []
    for length in grid.lengths:
        wanted = [{**place, "length": length} for place in places for _ in range(grid.samples)]
        made, least = _draw(make, wanted, grid)
        if least:
            while more := _draw(make, [{**place, "length": least} for place in wanted], grid)[1]:
                least = more  # samples of another length are others
            raise ValueError(f"{length} tokens are too short for the samples of the task {task}; give at least {least}")
        labels += wanted
        rows = [(sample.tokens, sample.asked) for sample in made]
        batches += batch_answers(rows, batch_size=grid.batch_size, context=grid.context)
    return LabelledBatches(batches, labels)


def _draw(
    make: Callable[..., AskedSample], wanted: Sequence[dict[str, Any]], grid: SampleGrid
) -> tuple[list[AskedSample], int]:
    """The samples of these places and lengths that have room, and the length that the others need at least, or 0."""
    made, least = [], 0
    for n, place in enumerate(wanted):
        seed = " ".join([str(grid.seed), *(f"{k} {float(v)}" for k, v in place.items())])
        try:
            made.append(make(**place, seed=seed, index=n % grid.samples))
        except TooShortError as error:
            least = max(least, error.least)
    return made, least


class RetrievalTask(AnsweringTask):
    """Base class of needle, key_value and variables, in groups by length and depth."""

    def __init__(self, base: Base, config: EvalConfig, made: LabelledBatches):
        super().__init__(base, config, made.batches, group_by_label(made.labels))


class NeedleTask(RetrievalTask):
    """Needles in a haystack, over lengths and depths."""

    name = "needle"

    def __init__(self, base: Base, config: EvalConfig, haystack: str):
        grid = _make_grid(base, config, config.needles)
        super().__init__(base, config, make_needle_batches(base.tokenizer, haystack, grid, depths=config.depths))


class KeyValueTask(RetrievalTask):
    """Lists of keys and values; the value of one key is asked for."""

    name = "key_value"

    def __init__(self, base: Base, config: EvalConfig):
        super().__init__(base, config, make_key_value_batches(base.tokenizer, _make_grid(base, config, config.samples)))


class VariablesTask(RetrievalTask):
    """Chains of assignments; the value at the end of a chain is asked for."""

    name = "variables"

    def __init__(self, base: Base, config: EvalConfig):
        super().__init__(base, config, make_variables_batches(base.tokenizer, _make_grid(base, config, config.samples)))


def _make_grid(base: Base, config: EvalConfig, samples: int) -> SampleGrid:
    return SampleGrid(
        lengths=config.lengths,
        samples=samples,
        batch_size=config.batch_size,
        seed=config.seed,
        context=base.config.context,
    )
