"""Errors beside weights: a naive float64 form, and the keys that are read by each."""

from __future__ import annotations

import numpy as np
import pytest

from butler_jax.evaluation import measure_errors
from butler_jax.evaluation.analysis import pictures
from butler_jax.evaluation.analysis.errors import Errors
from tests.tiny_models import naive

ROWS = 6


@pytest.fixture(scope="module")
def found(model, batch) -> Errors:
    return measure_errors(model, batch, rows=ROWS)


class Streams:
    """Scores for `naive`, which shows it the residual stream and the attention input of every layer."""

    def __init__(self):
        self.seen = []

    def see(self, layer, x, h, *keys):
        self.seen.append((np.array(x), np.array(h)))

    def __call__(self, layer, head, t, true):
        return true


def test_an_error_is_the_change_of_the_stream_without_the_token(model, batch, found):
    """The output of a head without a token is (o - a v) / (1 - a); the error leaves out the factor 1 / (1 - a)."""
    values, output = (np.float64(getattr(model.layers, name)[...]) for name in ("v", "o"))
    for row, size in enumerate((60, 50)):
        streams = Streams()
        weights = naive(model, batch["tokens"][row, :size], streams, 1.0)[2]
        for layer, (x, h) in enumerate(streams.seen):
            v = np.einsum("te,ekd->tkd", h, values[layer])
            for head, c in np.ndindex(model.config.heads, ROWS):
                t = size - ROWS + c
                a, own = weights[layer][head, t], v[: t + 1, head // model.config.group]
                out = a @ own
                without = (out - a[:, None] * own) / (1 - a)[:, None]
                change = np.linalg.norm((without - out) @ output[layer, head], axis=-1) / np.linalg.norm(x[t])
                np.testing.assert_allclose(found.weights[row, layer, head, c, : t + 1], a, atol=2e-5)
                # The error is the root of a difference of squares: it loses half of its digits where v is close to o.
                lost = 1e-3 * a * np.linalg.norm(own @ output[layer, head], axis=-1) / np.linalg.norm(x[t])
                miss = np.abs(found.errors[row, layer, head, c, : t + 1] - change * (1 - a))
                np.testing.assert_array_less(miss, 2e-5 + lost)
                assert not found.weights[row, layer, head, c, t + 1 :].any()
                assert not found.errors[row, layer, head, c, t + 1 :].any()


def test_each_way_reads_as_many_keys_and_leaves_what_it_does_not_read():
    random = np.random.default_rng(0)
    seen = np.broadcast_to(np.arange(12) < np.asarray([8, 11])[:, None], (2, 4, 3, 2, 12))  # [B, L, H, C, T]
    weights = np.where(seen, random.random(seen.shape), 0.0)
    errors = np.where(seen, random.random(weights.shape), 0.0)
    found, share = Errors(weights, errors, seen), 1 / 3
    count = np.asarray([3, 4])  # a third of 8 and of 11, rounded up
    for by, ranks in (("weight", weights), ("error", errors)):
        read = found.read(share, by)
        assert (read.sum(axis=-1) == count).all()
        for place in np.ndindex(2, 3, 3, 2):
            b, layer, h, c = place
            values = ranks[b, layer + 1, h, c]
            assert set(np.flatnonzero(read[place])) == set(np.argsort(-values)[: count[c]])
    read = found.read(share, "tolerance")
    for b, c in np.ndindex(2, 2):
        taken, values = read[b, :, :, c], errors[b, 1:, :, c]
        assert taken.sum() == 9 * count[c] and values[taken].min() > values[~taken].max()
    for by in ("weight", "error", "tolerance"):
        left = np.where(found.read(share, by), 0, errors[:, 1:]).sum(-1).mean(axis=(0, 3))
        np.testing.assert_allclose(found.left(share, by), left)
    totals = [found.left(share, by).sum() for by in ("tolerance", "error", "weight")]
    assert totals == sorted(totals) and totals[0] < totals[1] < totals[2]
    assert found.left(1.0, "error").max() == 0
    np.testing.assert_allclose(found.share_read(share, "error"), (3 / 8 + 4 / 11) / 2)
    served = np.arange(4)[:, None, None, None] != 2
    apart = Errors(weights, np.where(served, errors, np.nan), seen)
    read = apart.read(share, "tolerance")
    assert not read[:, 1].any() and (read[:, :, :, 0].sum(axis=(1, 2, 3)) == 6 * count[0]).all()


def test_the_picture_shows_what_is_left(found):
    figure = pictures.draw_errors(found, 0.25)
    points, matrix, line = figure.axes[:3]
    np.testing.assert_allclose(np.asarray(matrix.get_images()[0].get_array()), found.left(0.25, "weight"))
    for drawn, by in zip(line.get_lines(), ("weight", "error", "tolerance"), strict=True):
        np.testing.assert_allclose(drawn.get_ydata(), found.left(0.25, by).sum(axis=1))
    shown = points.collections[0].get_offsets()
    assert len(shown) == np.count_nonzero(found.weights[0, 1:, :, -1] > 1e-4)


def test_bad_rows_are_a_clear_error(model, batch):
    with pytest.raises(ValueError, match="give a longer text or fewer rows"):
        measure_errors(model, batch, rows=60)
