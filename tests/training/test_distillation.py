"""A run that starts from another run's predictor, and the second stage."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from butler_jax import distil, init_predictor, load_base, load_predictor, read_batches
from butler_jax.model import BaseConfig, BaseModel
from butler_jax.predictors import PredictorConfig, make_predictor
from butler_jax.training.config import TrainConfig
from butler_jax.weights import Base
from tests import tiny_runs


@pytest.mark.slow
def test_a_run_starts_from_the_predictor_of_another(tmp_path):
    place = tiny_runs.make_place(tmp_path)
    base = load_base(str(place["base"]))
    distil(base, tiny_runs.settings(place, tmp_path / "first"))
    first = _leaves(load_predictor(tmp_path / "first", base))
    again = dict(start=str(tmp_path / "first"), chosen="1/2", steps=1, weight_decay=0.0)
    still = distil(base, tiny_runs.settings(place, tmp_path / "still", learning_rate=1e-12, **again))
    for own, other in zip(_leaves(still), first, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-9)
    moved = distil(base, tiny_runs.settings(place, tmp_path / "moved", **again))
    assert any(np.abs(own - other).max() > 1e-4 for own, other in zip(_leaves(moved), first, strict=True))
    (tmp_path / "first").rename(tmp_path / "elsewhere")
    more = dict(again, steps=2)
    distil(base, tiny_runs.settings(place, tmp_path / "moved", **more))  # it goes on from a checkpoint of its own
    again["start"] = more["start"] = str(tmp_path / "elsewhere")
    wider = PredictorConfig(rank=8, stride=2, hidden=16)
    with pytest.raises(ValueError, match=r"the predictor in .*elsewhere has rank 4 and not 8; give its own settings"):
        distil(base, tiny_runs.settings(place, tmp_path / "wider", predictor=wider, **again))
    assert not (tmp_path / "wider").exists() or not list((tmp_path / "wider").glob("*.json"))


@pytest.mark.slow
def test_a_predictor_that_is_given_stays_as_it_was_and_has_the_settings(tmp_path):
    place = tiny_runs.make_place(tmp_path)
    base = load_base(str(place["base"]))
    settings = tiny_runs.settings(place, tmp_path / "own", steps=1)
    given = make_predictor(base.config, settings.predictor)
    before = [np.array(leaf) for leaf in _leaves(given)]
    distil(base, settings, predictor=given)
    for own, other in zip(_leaves(given), before, strict=True):
        np.testing.assert_array_equal(own, other)
    with pytest.warns(UserWarning, match="has checkpoints: it goes on from them, not from the given predictor"):
        distil(base, settings, predictor=given)
    other = make_predictor(base.config, PredictorConfig(kind="producer", rank=4))
    with pytest.raises(ValueError, match="the predictor has kind 'producer' and not"):
        distil(base, tiny_runs.settings(place, tmp_path / "other", steps=1), predictor=other)


@pytest.mark.slow
def test_checkpoints_of_a_predictor_with_other_settings_are_refused_before_settings_are_written(tmp_path):
    place = tiny_runs.make_place(tmp_path)
    base = load_base(str(place["base"]))
    distil(base, tiny_runs.settings(place, tmp_path / "own", steps=1))
    (tmp_path / "own" / "config.json").unlink()
    wider = PredictorConfig(rank=8, stride=2, hidden=16)
    with pytest.raises(ValueError, match=r"the predictor of step 1 in .*own has rank 4 and not 8; give its own"):
        distil(base, tiny_runs.settings(place, tmp_path / "own", predictor=wider))
    assert not (tmp_path / "own" / "config.json").exists()
    distil(base, tiny_runs.settings(place, tmp_path / "own", steps=2))
    with pytest.raises(ValueError, match="unknown predictor 'linear'; known: lookahead, producer, contextual"):
        distil(base, tiny_runs.settings(place, tmp_path / "odd", predictor=PredictorConfig(kind="linear")))


@pytest.mark.slow
def test_text_with_nothing_to_choose_is_refused(tmp_path):
    place = tiny_runs.make_place(tmp_path)
    place["text"].write_text("<|endoftext|>".join(["the old river"] * 400))
    with pytest.raises(ValueError, match=r"held out of .* are always read as sinks and recent tokens; give longer"):
        distil(load_base(str(place["base"])), tiny_runs.settings(place, tmp_path / "own", steps=1))


def test_a_loss_that_the_base_does_not_allow_is_refused_before_the_run_is_made(tmp_path):
    tiny = load_base("tiny")
    sizes = dict(vocab_size=tiny.config.vocab_size, width=16, hidden=16, layers=2, heads=2, kv_heads=1, head_dim=8)
    model = BaseModel(BaseConfig(family="gemma2", context=128, attention_softcap=50.0, **sizes), jax.random.key(0))
    config = TrainConfig(predictor=PredictorConfig(kind="contextual", hidden=16), length=64, run_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=r"with a soft cap \(50.0\).* train with --objective cross_entropy"):
        distil(Base("capped", model, tiny.tokenizer, "f" * 16), config)
    assert not (tmp_path / "run" / "config.json").exists()


def _leaves(predictor):
    return jax.tree.leaves(nnx.state(predictor))


def test_what_is_not_known_is_refused_before_the_base_is_loaded(tmp_path):
    for settings in (dict(objective="mse"), dict(attention="flash"), dict(dtype="float16")):
        with pytest.raises(ValueError, match=r"unknown (objective|attention|dtype) '.*'; known: "):
            TrainConfig(**settings)
    with pytest.raises(ValueError, match="pyton_docs"):
        distil(config=TrainConfig(base=str(tmp_path / "none"), data="pyton_docs", run_dir=tmp_path / "run"))


def test_a_second_stage_is_about_the_cross_entropy_and_a_possible_budget():
    assert TrainConfig(chosen="1/8").chosen == 0.125
    for config in (PredictorConfig(kind="contextual"), PredictorConfig(target="attention")):
        with pytest.raises(ValueError, match="--chosen is about the cross entropy"):
            TrainConfig(chosen=0.5, objective="squared_error", predictor=config)
    with pytest.raises(ValueError, match="--chosen runs with --attention xla, not splash"):
        TrainConfig(chosen=0.5, attention="splash")
    with pytest.raises(ValueError, match="a budget of 5 tokens is below 4 sinks"):
        TrainConfig(chosen=5)


def test_what_does_not_fit_the_base_is_told_before_anything_is_read(tmp_path):
    base = load_base("tiny")
    with pytest.raises(ValueError, match="dtype is bfloat16, and the base is in float32; load it so"):
        distil(base, TrainConfig(dtype="bfloat16", run_dir=tmp_path / "run"))
    with pytest.raises(
        ValueError, match=r"the base that is given is 'tiny', and config.base is '.*none'; leave it out"
    ):
        distil(base, TrainConfig(base=str(tmp_path / "none"), run_dir=tmp_path / "run"))
    sliding = dataclasses.replace(base.config, sliding_window=600)
    base = dataclasses.replace(base, model=BaseModel(sliding, jax.random.key(0)))
    with pytest.raises(ValueError, match="--reach 1024 is beyond the window of all layers of the base, 600 tokens"):
        distil(base, TrainConfig(reach=1024, run_dir=tmp_path / "run"))
    batches = read_batches("coreference", base.tokenizer, length=32, batch_size=1)
    with pytest.raises(ValueError, match=r"batches must be a list of batches such as \[batch\], got a BatchIterator"):
        init_predictor(base, batches=batches)
    assert not (tmp_path / "run").exists()
