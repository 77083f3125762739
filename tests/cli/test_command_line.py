"""Configurations from command lines."""

from __future__ import annotations

import pytest

from butler_jax.cli.command_line import read
from butler_jax.evaluation.config import EvalConfig
from butler_jax.training.config import TrainConfig


@pytest.mark.parametrize(
    ("arguments", "target", "offset"),
    [
        ([], "centred", "share"),
        (["--predictor", "producer"], "attention", "none"),
        (["--target", "attention"], "attention", "none"),
        (["--offset", "self_normalised"], "centred", "self_normalised"),
    ],
)
def test_what_a_nested_configuration_chooses_itself_follows_the_given_options(arguments, target, offset):
    predictor = read(TrainConfig, arguments, "butler-jax train").predictor
    assert (predictor.target, predictor.offset) == (target, offset)


def test_lists_of_numbers_are_words_with_commas():
    config = read(EvalConfig, ["--tails", "0,64", "--lengths", "256,512", "--budgets", "1/4,64"], "butler-jax eval")
    assert (config.tails, config.lengths, config.budgets) == ((0, 64), (256, 512), (0.25, 64))
