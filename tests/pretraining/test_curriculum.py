"""The batches of pretraining: their shapes, and that they continue from a saved place."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.parallel.mesh import make_mesh
from butler_jax.pretraining.config import PretrainConfig
from butler_jax.pretraining.curriculum import Curriculum
from butler_jax.text.tokenizer import train_bpe
from tests import tiny_runs


@pytest.fixture
def curriculum(tmp_path):
    (tmp_path / "book.txt").write_text(tiny_runs.text())
    config = PretrainConfig(
        steps=5,
        long_steps=2,
        batch_size=4,
        length=32,
        context=64,
        data=f"text:{tmp_path / 'book.txt'}",
        data_dir=str(tmp_path / "data"),
    )
    tokenizer = train_bpe([tiny_runs.text()], 280)
    return lambda: Curriculum(config, tokenizer, make_mesh("data=1"))


def test_the_last_rows_are_as_long_as_the_context_with_as_many_tokens(curriculum):
    batches = curriculum()
    shapes = [next(batches)["tokens"].shape for _ in range(5)]
    assert shapes == [(4, 32)] * 3 + [(2, 64)] * 2


@pytest.mark.parametrize("taken", [0, 2, 4])
def test_a_saved_place_is_gone_on_from(curriculum, taken):
    first, second = curriculum(), curriculum()
    for _ in range(taken):
        next(first)
    second.set_state(first.get_state())
    np.testing.assert_array_equal(next(first)["tokens"], next(second)["tokens"])
