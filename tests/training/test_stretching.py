"""Positions of a training that reach beyond its rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from butler_jax import distil, init_predictor, load_base
from butler_jax.predictors import make_predictor
from butler_jax.predictors.config import PredictorConfig
from butler_jax.predictors.lookahead import _pair_moments
from butler_jax.training import distillation
from butler_jax.training.config import TrainConfig
from butler_jax.training.objective import DistillationObjective
from butler_jax.training.stretching import StretchedBatches, default_reach, find_far_keys, stretch_positions
from tests import tiny_runs
from tests.tiny_models import BASE, make_batch, make_model


def test_the_second_part_of_every_document_is_moved_on():
    batch = make_batch([[40, 1, 20], [64], [10]], 64)
    found = stretch_positions(batch, 500)
    assert found["tokens"] is batch["tokens"] and found["positions"].dtype == np.int32
    moved, furthest = found["positions"] - batch["positions"], []
    for row, segments in zip(moved, batch["segments"], strict=True):
        for document in np.unique(segments):
            own = row[segments == document]
            if document == 0 or len(own) == 1:
                assert not own.any()
                continue
            furthest.append(own[-1])
            assert own[0] == 0 and set(own) == {0, own[-1]} and (np.diff(own) >= 0).all()
    assert max(furthest) > 100 and len(set(furthest)) > 1 and found["positions"].max() < 500
    again = stretch_positions({name: array[1:2] for name, array in batch.items()}, 500)
    np.testing.assert_array_equal(again["positions"], found["positions"][1:2])  # whatever other rows there are
    np.testing.assert_array_equal(stretch_positions(batch, 64)["positions"][1], batch["positions"][1])


def test_the_place_is_that_of_the_batches():
    class Inside:
        place = 0

        def __next__(self):
            return make_batch([[20]], 20)

        def get_state(self):
            return {"place": self.place}

        def set_state(self, state):
            self.place = state["place"]

    batches = StretchedBatches(Inside(), 100)
    batches.set_state({"place": 7})
    assert batches.get_state() == {"place": 7} and next(iter(batches))["positions"].shape == (1, 20)


def test_keys_of_first_parts_stand_for_the_positions_before_the_second():
    plain = make_batch([[40, 1, 20], [64], [64]], 64)
    batch = stretch_positions(plain, 500)
    batch["positions"][2] = 7 + plain["positions"][2]  # a text that goes on: nothing is skipped between its tokens
    end, log_count = find_far_keys(batch["positions"], batch["segments"])
    for row, column in np.ndindex(batch["positions"].shape):
        own = batch["segments"][row] == batch["segments"][row, column]
        begin = np.flatnonzero(own)[0]
        first = np.flatnonzero(own & (batch["positions"][row] == plain["positions"][row]))
        if row == 2 or column in first:
            assert end[row, column] == log_count[row, column] == 0
        else:
            assert end[row, column] == begin + len(first)
            seen = len(first) * np.exp(log_count[row, column]) + column + 1 - end[row, column]
            assert seen == pytest.approx(batch["positions"][row, column] + 1, rel=1e-5)  # a key for every position


def test_layers_that_slide_keep_the_places_of_the_tokens():
    """Where the layers that see everything are not rotated, moved positions change nothing."""
    base = replace(BASE, sliding_window=16, sliding_layers=(True, False, True), rotated_layers=(True, False, True))
    predictor = make_predictor(base, PredictorConfig(rank=4, target="attention", offset="none"), seed=0)
    batch = make_batch([[40, 1, 20], [64]], 64)
    losses = [
        float(DistillationObjective("cross_entropy").differentiate(predictor, make_model(base), given)[0])
        for given in (batch, stretch_positions(batch, 500))
    ]
    assert losses[0] == losses[1] > 0
    moments = [_pair_moments(make_model(base), given) for given in (batch, stretch_positions(batch, 500))]
    for plain, moved in zip(*moments, strict=True):  # of the layer that is served
        np.testing.assert_array_equal(plain[1], moved[1])


def test_the_default_is_the_context_or_the_window_of_the_served_layers():
    assert default_reach(BASE) == 512
    assert default_reach(replace(BASE, sliding_window=64)) == 64
    assert default_reach(replace(BASE, sliding_window=64, sliding_layers=(True, False, True))) == 512


@pytest.mark.slow
def test_a_training_reaches_beyond_its_rows_and_not_beyond_the_model(tmp_path, monkeypatch):
    place = tiny_runs.make_place(tmp_path)
    base = load_base(str(place["base"]))
    furthest = []

    def spy(*given, batches, **named):  # the rotary pairs are chosen on moved positions too
        furthest.append(max(int(batch["positions"].max()) for batch in batches))
        return init_predictor(*given, batches=batches, **named)

    monkeypatch.setattr(distillation, "init_predictor", spy)
    for name, reach in (("default", None), ("own", base.config.context), ("none", 0)):
        settings = tiny_runs.settings(place, tmp_path / name, steps=2, reach=reach)
        distil(base, settings)
    assert furthest[0] == furthest[1] >= settings.length > furthest[2]
    with pytest.raises(ValueError, match="context"):
        distil(base, tiny_runs.settings(place, tmp_path / "far", steps=1, reach=2 * base.config.context))
    with pytest.raises(ValueError, match="--reach must be 0, or at least --length 512, got 100"):
        TrainConfig(reach=100)
