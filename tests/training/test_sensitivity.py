"""Errors weighed by how much they change the next tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from butler_jax.data import as_batch
from butler_jax.model import BaseConfig, dense_mixer, document_places, embed, logits, run_layers
from butler_jax.predictors import PredictorConfig, at, make_predictor
from butler_jax.training import weigh_errors
from butler_jax.training.sensitivity import measure_sensitivity
from butler_jax.weights import Base
from tests.tiny_models import make_model

BASE = BaseConfig(
    family="llama", vocab_size=13, width=16, hidden=24, layers=3, heads=2, kv_heads=1, head_dim=8, context=32
)


def text(rows: int, length: int) -> dict[str, np.ndarray]:
    """Rows of two documents, and two columns of padding."""
    tokens = np.random.default_rng(0).integers(BASE.vocab_size, size=(rows, length)).astype(np.int32)
    segments = np.where(np.arange(length) < 3, 1, 2) * (np.arange(length) < length - 2)
    segments = np.broadcast_to(segments.astype(np.int32), tokens.shape)
    positions = np.where(segments == 2, np.arange(length) - 3, np.arange(length)).astype(np.int32)
    return dict(tokens=tokens, segments=segments, positions=positions)


def exact_sensitivity(model, batch) -> np.ndarray:
    """The trace of the Fisher information by its definition: J^T (diag p - p p^T) J of every row's logits."""
    segments = jnp.asarray(batch["segments"])
    dense = dense_mixer(BASE, segments)

    def run(changes):
        def mixer(carry, view):
            norm = jnp.sum(jnp.square(view.x), axis=-1)
            return dense(None, view)[0] + changes[view.index], carry, norm

        x = embed(model, jnp.asarray(batch["tokens"]))
        x, _, norms = run_layers(model, x, jnp.asarray(batch["positions"]), mixer, None, near=document_places(segments))
        return logits(model, x), norms

    shape = (BASE.layers, *segments.shape, BASE.heads, BASE.head_dim)
    (found, norms), slopes = run(jnp.zeros(shape)), jax.jacrev(lambda c: run(c)[0])(jnp.zeros(shape))
    p = np.asarray(jax.nn.softmax(found), np.float64)
    slopes = np.asarray(slopes, np.float64).reshape(*p.shape, -1)
    mean = np.einsum("btv,btvn->btn", p, slopes)
    real = np.asarray(segments > 0)[..., None]
    diagonal = ((np.einsum("btv,btvn->btn", p, slopes**2) - mean**2) * real).sum((0, 1)).reshape(shape)
    of_rows = diagonal.sum((-2, -1)) * np.asarray(norms) * real[..., 0]
    return of_rows.sum((1, 2)) / np.square(np.asarray(model.layers.o[...], np.float64)).sum((1, 2, 3))


def test_sensitivity_is_the_trace_of_the_fisher_information():
    model, batch = make_model(BASE), text(2, 9)
    keys = [jax.random.key(seed) for seed in range(500)]
    found = [measure_sensitivity(model, as_batch(batch), key) for key in keys]
    rows = [{name: array[row : row + 1] for name, array in batch.items()} for row in range(2)]
    wanted = sum(exact_sensitivity(model, row) for row in rows)
    error = np.std(found, axis=0) / len(keys) ** 0.5
    assert np.all(np.abs(np.mean(found, axis=0) - wanted) < 4 * error) and np.all(error < 0.05 * wanted)


def test_scores_of_a_layer_move_by_the_root_of_its_sensitivity():
    base, predictor = Base("own", make_model(BASE), None, "none"), make_predictor(BASE, PredictorConfig(rank=4))
    batches = [text(2, 9), text(1, 9)]
    weighed = weigh_errors(base, predictor, batches, seed=5)
    sums = [
        measure_sensitivity(base.model, as_batch(b), jax.random.fold_in(jax.random.key(5), n))
        for n, b in enumerate(batches)
    ]
    logs = np.log(np.sum(sums, axis=0, dtype=np.float64)[1:]) / 2
    features, context = jnp.ones((1, 4, BASE.width)), predictor.context(jnp.arange(4)[None])
    for layer, moved in enumerate(logs - logs.mean()):
        before, after = (p.offset(at(p.heads, layer), features, None, context) for p in (predictor, weighed))
        np.testing.assert_allclose(after - before, moved, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "batches", "message"),
    [
        (PredictorConfig(rank=4, target="attention"), [text(1, 9)], "scores attention, not errors"),
        (PredictorConfig(rank=4), [], "at least one batch"),
        (PredictorConfig(rank=4), text(1, 9), "batches"),
        (PredictorConfig(rank=4), [text(1, 9) | {"segments": np.zeros((1, 9), np.int32)}], "hold text"),
    ],
)
def test_what_cannot_be_weighed_is_told(config, batches, message):
    base = Base("own", make_model(BASE), None, "none")
    with pytest.raises(ValueError, match=message):
        weigh_errors(base, make_predictor(BASE, config), batches)
