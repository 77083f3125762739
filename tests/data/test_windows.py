"""Windows of text: every token is in its place and is predicted once."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.data.windows import cut_strided_windows, cut_text, cut_windows, find_counted
from tests.tiny_models import Letters


def test_windows_do_not_overlap_and_last_is_padded():
    batches = cut_windows(range(25), context=10, batch_size=2)
    assert [b["tokens"].shape for b in batches] == [(2, 10), (2, 10)]
    np.testing.assert_array_equal(np.concatenate([b["tokens"] for b in batches])[:3].ravel()[:25], range(25))
    assert batches[1]["segments"].sum() == 5


def test_text_is_tokenised_as_far_as_needed():
    text = "line of text\n" * 40_000
    batches = cut_text(Letters(), text, context=64, tokens=200, batch_size=4)
    assert sum(int(b["segments"].sum()) for b in batches) == 200
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        cut_text(Letters(), "", context=64, tokens=200, source="a.txt")


@pytest.mark.parametrize(("size", "context", "stride"), [(25, 10, 5), (23, 10, 4), (8, 10, 3), (30, 10, 9), (9, 9, 1)])
def test_strided_windows_predict_every_token_but_the_first_once(size, context, stride):
    seen = []
    for batch in cut_strided_windows(range(size), context=context, stride=stride, batch_size=2):
        counted = find_counted(batch)
        for row, place in zip(*np.nonzero(counted), strict=True):
            token = batch["tokens"][row, place + 1]
            assert token == batch["tokens"][row, place] + 1
            assert place + 1 >= min(token, context - stride)  # tokens before it
            seen.append(int(token))
    assert sorted(seen) == list(range(1, size))


def test_windows_of_text_have_no_rows_left_out():
    batch = cut_windows(range(12), context=6)[0]
    np.testing.assert_array_equal(find_counted(batch)[0], [1, 1, 1, 1, 1, 0])
