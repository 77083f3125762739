"""Which rows and texts the analyses take."""

from __future__ import annotations

import numpy as np
import pytest

import butler_jax
from butler_jax.evaluation.analysis.rows import batch_text, last_rows
from tests.tiny_models import make_batch

SIZES = (60, 50)  # two rows of one document each


@pytest.fixture(scope="module")
def batch():
    return make_batch([[n] for n in SIZES], 64)


def test_rows_are_the_last_of_the_last_document():
    batch = make_batch([[20, 44], [50]], 64)
    np.testing.assert_array_equal(last_rows(batch, 3), [[61, 62, 63], [47, 48, 49]])
    with pytest.raises(ValueError, match=r"14 rows need a document of at least 45 tokens, .* one has 44"):
        last_rows(batch, 14)


@pytest.fixture(scope="module")
def tiny():
    return butler_jax.load_base("tiny")


def test_a_text_becomes_a_batch_of_one_row(tiny):
    batch = batch_text(tiny, "The file is opened for reading.", 5)
    assert batch["tokens"].tolist() == [tiny.tokenizer.encode("The file is opened for reading.")[:5]]
    assert batch["segments"].tolist() == [[1] * 5] and batch["positions"].tolist() == [[0, 1, 2, 3, 4]]
    with pytest.raises(ValueError, match="at least 2"):
        batch_text(tiny, "")
