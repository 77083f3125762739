"""The squared error and its gradients against a float64 form that builds the whole square."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from butler_jax.training.losses.squared_error import attend_with_squared_error, sum_squared_errors
from tests.tiny_models import random_documents
from tests.training.losses.naive import HEADS, assert_equals_naive, random_inputs


@settings(max_examples=6, deadline=None)
@given(
    length=st.sampled_from([1, 5, 32, 70, 200]),
    heads=st.sampled_from(HEADS),
    chunk=st.sampled_from([1, 16, 33, 128]),
    documents=st.booleans(),
)
def test_squared_error_equals_naive_form_in_float64(length, heads, chunk, documents):
    inputs = q, k, *_ = random_inputs(length, 2, length, *heads)
    segments = random_documents(length, 2, length) if documents else None

    def loss(q_imp, k_imp):
        return sum_squared_errors(q, k, q_imp, k_imp, segments=segments, chunk=chunk)

    assert_equals_naive("squared error", loss, inputs, segments=segments)


def test_documents_shorter_and_longer_than_a_chunk():
    # Borders at chunk edges (16, 64) and inside (21, 23), a document over three chunks, padding between.
    inputs = q, k, *_ = random_inputs(1, 1, 90, 4, 2, 2)
    lengths, names = (16, 5, 2, 41, 6, 20), (1, 2, 3, 4, 0, 5)
    segments = np.repeat(names, lengths)[None].astype(np.int32)

    def loss(q_imp, k_imp):
        return sum_squared_errors(q, k, q_imp, k_imp, segments=segments, chunk=16)

    assert_equals_naive("squared error", loss, inputs, segments=segments)


def test_an_empty_chunk_is_refused():
    q, k, _, q_imp, k_imp = random_inputs(0, 1, 8, 4, 2, 2)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        sum_squared_errors(q, k, q_imp, k_imp, chunk=0)


def test_a_soft_cap_is_refused():
    q, k, v, q_imp, k_imp = random_inputs(0, 1, 5, 2, 2, 2)
    with pytest.raises(ValueError, match=r"with a soft cap \(50.0\).* train with --objective cross_entropy"):
        attend_with_squared_error(q, k, v, q_imp, k_imp, softcap=50.0)
