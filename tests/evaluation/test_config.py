"""Settings of an evaluation: invalid ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from butler_jax.evaluation.config import EvalConfig
from butler_jax.selection import SelectionConfig
from butler_jax.training.config import TrainConfig


def test_a_bucket_stays_a_bucket():
    assert EvalConfig(data_dir="gs://bucket/data").data_dir == TrainConfig(data_dir="gs://bucket/data").data_dir
    assert EvalConfig(data_dir=Path("/data")).data_dir == "/data"


def test_the_tilde_is_the_home_directory():
    assert EvalConfig(out="~/out").out == Path("~/out").expanduser()


@pytest.mark.parametrize(
    ("given", "prompt"),
    [
        ({}, 256),
        (dict(context=100), 25),
        (dict(context=100, selection=SelectionConfig(interval=8)), 24),
        (dict(context=100, stride=50, text="a.txt"), 0),
        (dict(prompt_tokens=0), 0),
    ],
)
def test_a_quarter_of_a_window_is_its_prompt(given, prompt):
    assert EvalConfig(**given).prompt_tokens == prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(stride=5), "--stride must be 1 ... 1023, below the context, and needs --text"),
        (dict(tasks="lambada"), "the task lambada reads local files: give their directory with --downstream"),
        (dict(depths="1.5"), "--depths are 0 ... 1"),
        (dict(lengths="short"), "--lengths must be numbers separated by commas, got short"),
        (dict(lengths=(256.7,)), "--lengths must be numbers separated by commas, got 256.7"),
        (dict(lengths=(None,)), "--lengths must be numbers separated by commas, got None"),
        (dict(context=0), "--context must be at least 1, got 0"),
        (dict(score_dtype="int4"), "unknown score_dtype 'int4'; known: int8, None"),
        (dict(budgets="0"), "budget"),
        (dict(attention_rows=0), "--attention-rows must be at least 1, got 0"),
        (dict(prompt_tokens=1024), "--prompt-tokens must be 0 ... 1023"),
        (dict(allocations="by_luck"), "unknown allocation by_luck"),
        (dict(selection=SelectionConfig(allocation="per_layer")), "are given as allocations="),
        (
            dict(selection=SelectionConfig(floor=0.2)),
            "a floor goes with the allocation per_layer, and this is per_head",
        ),
        (dict(selection=SelectionConfig(threshold=((0.0,),))), "thresholds go with the allocation per_head alone"),
        (dict(selection=SelectionConfig(interval=3)), "chooses every 1, 2, 4, ... 128 rows"),
        (dict(selection=SelectionConfig(interval=4), prompt_tokens=6), "must be a multiple of --interval 4"),
    ],
)
def test_settings_that_mean_nothing_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**changes)
