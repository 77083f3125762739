"""Answers are counted token by token and sample by sample."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from butler_jax.evaluation.tasks.answers import batch_answers, count_answers, group_by_distance
from butler_jax.evaluation.tasks.passes import Passes
from butler_jax.evaluation.tasks.retrieval import (
    SampleGrid,
    make_key_value_batches,
)
from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import BaseModel, forward
from butler_jax.policies import make_policy
from butler_jax.selection.config import SelectionConfig
from butler_jax.simulation import simulate
from butler_jax.text.tokenizer import Tokenizer
from tests.tiny_haystack import train_tokenizer
from tests.tiny_models import make_batch, make_model


@pytest.fixture(scope="module")
def model():
    return make_model()


def test_answers_count_tokens_and_whole_samples(model):
    batch = make_batch([[40], [33], []], 48)
    greedy = np.asarray(simulate(model, batch, make_policy("dense"), SelectionConfig(budget=1.0)).greedy)
    asked = np.zeros((3, 48), bool)
    asked[0, 37:40] = asked[1, 30:33] = True
    batch["asked"] = asked
    batch["tokens"][0, 39] = greedy[0, 38]  # the last token of a row changes no prediction before it
    found = count_answers(Passes(model), [batch], make_policy("dense"), SelectionConfig(budget=1.0))
    right = [int(greedy[r, i - 1] == batch["tokens"][r, i]) for r in (0, 1) for i in np.flatnonzero(asked[r])]
    assert found.token_inaccuracy.value == pytest.approx(1 - sum(right) / 6) and right[2] == 1
    assert found.miss_rate.value == 1 - found.accuracy.value == 1 - (all(right[:3]) + all(right[3:])) / 2
    assert (found.token_inaccuracy.n, found.miss_rate.n) == (6, 2) and found.share_read == 1
    np.testing.assert_array_equal(found.take(np.asarray([1])).right, [sum(right[3:])])


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


def test_distances_are_grouped_into_parts_of_like_size():
    distances = np.random.default_rng(1).permutation(np.arange(100, 190))
    parts = group_by_distance(distances, 3)
    assert [label["distance"] for label, _ in parts] == ["100-129", "130-159", "160-189"]
    for (label, members), least in zip(parts, (100, 130, 160), strict=True):
        assert sorted(distances[members]) == list(range(least, least + 30)), label
    assert [(label["distance"], list(members)) for label, members in group_by_distance([7, 7, 7, 7])] == [
        ("7-7", [0, 1, 2, 3])
    ]
    assert [(label["distance"], list(members)) for label, members in group_by_distance([5, 1])] == [
        ("1-1", [1]),
        ("5-5", [0]),
    ]
    assert group_by_distance([]) == []


def test_answers_are_counted_as_a_search_position_by_position_does(tokenizer):
    base = BaseConfig(
        family="llama",
        vocab_size=tokenizer.vocab_size,
        width=32,
        hidden=48,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        context=256,
    )
    model = BaseModel(base, jax.random.key(0))
    made = make_key_value_batches(tokenizer, SampleGrid(lengths=(120,), samples=5, batch_size=2, context=256))
    rows = []
    for batch in made.batches:
        for tokens, asked, real in zip(batch["tokens"], batch["asked"], batch["segments"] > 0, strict=True):
            rows += [(tokens[real].copy(), asked[real])] if real.any() else []
    run = jax.jit(forward)

    def greedy(tokens, at):
        """The most likely token after tokens[:at]; what is beyond cannot be seen, and the shape stays."""
        return int(np.argmax(run(model, np.pad(tokens[:at], (0, 128 - at))[None])[0, at - 1]))

    # A random model is never right: some of the tokens asked for become its own choice, left to right.
    random = np.random.default_rng(0)
    for number, (tokens, asked) in enumerate(rows):
        for at in np.flatnonzero(asked):
            if number == 0 or (number < 4 and random.random() < 0.5):
                tokens[at] = greedy(tokens, at)
    expected = [sum(greedy(tokens, at) == tokens[at] for at in np.flatnonzero(asked)) for tokens, asked in rows]
    batches = batch_answers(rows, batch_size=2, context=256)
    for policy in ("dense", "streaming"):
        found = count_answers(Passes(model), batches, make_policy(policy), SelectionConfig(budget=1.0))
        assert found.right.tolist() == expected
        assert found.asked.tolist() == [int(asked.sum()) for _, asked in rows]
        assert found.tokens.tolist() == [len(tokens) for tokens, _ in rows]
        np.testing.assert_allclose(found.attended, found.tokens, rtol=1e-6)
    assert found.whole[0] and not found.whole[4]
    sparse = count_answers(Passes(model), batches, make_policy("streaming"), SelectionConfig(budget=16))
    expected = [sum(min(1, 16 / (t + 1)) for t in range(len(tokens))) for tokens, _ in rows]
    np.testing.assert_allclose(sparse.attended, expected, rtol=1e-5)
