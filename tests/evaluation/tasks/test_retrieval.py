"""Grids of needles, key-value lists and variable chains: which samples there are, and how batches hold them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from butler_jax.evaluation.tasks.answers import group_by_label
from butler_jax.evaluation.tasks.retrieval import (
    SampleGrid,
    make_key_value_batches,
    make_needle_batches,
    make_variables_batches,
)
from butler_jax.text.tokenizer import Tokenizer
from tests.tiny_haystack import HAYSTACK, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def test_a_grid_has_every_cell_and_one_length_a_batch(tokenizer):
    grid = SampleGrid(lengths=(200, 300), samples=3, batch_size=4, context=512)
    batches, labels = make_needle_batches(tokenizer, HAYSTACK, grid, depths=(0, 0.5, 1))
    cells = group_by_label(labels)
    assert [label for label, _ in cells] == [
        {"depth": depth, "length": length} for length in (200, 300) for depth in (0, 0.5, 1)
    ]
    assert sorted(np.concatenate([members for _, members in cells])) == list(range(18))
    assert {batch["tokens"].shape for batch in batches} == {(4, 224), (4, 320)}
    rows = [row for batch in batches for row in batch["segments"].sum(1) if row]
    assert len(rows) == 18 and all(
        label["length"] - 8 <= n <= label["length"] for label, n in zip(labels, rows, strict=True)
    )


def test_the_length_that_is_told_is_enough_for_every_sample(tokenizer):
    grid = SampleGrid(lengths=(12,), samples=20, context=512)
    with pytest.raises(ValueError, match=r"12 tokens are too short for the samples of the task variables") as told:
        make_variables_batches(tokenizer, grid)
    least = int(str(told.value).rsplit(" ", 1)[1])
    assert len(make_variables_batches(tokenizer, dataclasses.replace(grid, lengths=(least,))).labels) == 20


def test_no_two_samples_of_a_grid_share_what_is_asked_and_other_cells_change_none(tokenizer):
    def questions(made):
        """What is said of each sample in a cell, by cell: its text from the last blank line on."""
        rows = [row[real > 0] for b in made.batches for row, real in zip(b["tokens"], b["segments"], strict=True)]
        texts = [tokenizer.decode(row.tolist()) for row in rows if len(row)]
        return {
            tuple(label.items()): [texts[m].rsplit("\n\n", 1)[1] for m in members]
            for label, members in group_by_label(made.labels)
        }

    def grids(lengths, depths):
        grid = SampleGrid(lengths=lengths, samples=4, context=512, seed=3)
        yield questions(make_needle_batches(tokenizer, HAYSTACK, grid, depths=depths, kind="word"))
        yield questions(make_key_value_batches(tokenizer, grid))
        yield questions(make_variables_batches(tokenizer, grid))

    for whole, part in zip(grids((200, 300), (0.0, 0.5, 1.0)), grids((300,), (1, 0.5)), strict=True):
        asked = [question for cell in whole.values() for question in cell]
        assert len(set(asked)) == len(asked) == 4 * len(whole)
        assert part and all(whole[cell] == found for cell, found in part.items())


def test_an_impossible_grid_is_answered_with_what_to_do(tokenizer):
    def raises(text, make, *args, **more):
        with pytest.raises(ValueError, match=text):
            make(*args, **more)

    long = SampleGrid(lengths=(200, 600), samples=1, context=512)
    beyond = "600 tokens, beyond the model's context of 512"
    raises(beyond, make_needle_batches, tokenizer, HAYSTACK, long, depths=(0.5,))
    one, none = SampleGrid(lengths=(200,), samples=1), SampleGrid(lengths=(200,), samples=0)
    raises("needs a depth", make_needle_batches, tokenizer, HAYSTACK, one, depths=())
    raises("needs a length", make_key_value_batches, tokenizer, SampleGrid(lengths=(), samples=1))
    raises("at least 1 sample, got 0", make_variables_batches, tokenizer, none)
