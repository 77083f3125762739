"""What a kept cell of an evaluation depends on, and what is refused before one is measured."""

from __future__ import annotations

import dataclasses
import types

import jax
import jax.numpy as jnp
import pytest

from butler_jax.evaluation import evaluate
from butler_jax.evaluation.contenders import EvaluatedPolicy
from butler_jax.evaluation.evaluator import plan_cells
from butler_jax.evaluation.hashes import hash_code
from butler_jax.policies import make_policy
from tests.tiny_evaluations import make_perplexity_evaluation
from tests.tiny_models import make_model


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_perplexity_evaluation(make_model(), tmp_path_factory.mktemp("place"))


def test_a_policy_of_a_notebook_is_hashed_with_its_attributes_defaults_and_properties():
    text = """
import functools

SCALE = 2

def helper(values):
    return values * SCALE

@functools.cache
def kept(name):
    return name in {"one", "two"}

class Newest:
    sign = 1
    def scores(self, chunk, by=1):
        return by
    @property
    def name(self):
        return "newest"
    @staticmethod
    def two():
        return 2
    def scaled(self, values):
        return [helper(value) for value in values if kept(value)]
"""

    def hash_of(text):
        space = {"__name__": "a notebook"}
        exec(text, space)
        return hash_code(space["Newest"])

    edits = [("sign = 1", "sign = -1"), ("by=1", "by=2"), ('"newest"', '"oldest"'), ("return 2", "return 3")]
    edits += [("SCALE = 2", "SCALE = 3"), ("values * SCALE", "values + SCALE"), ('"two"', '"three"')]
    assert hash_of(text) == hash_of("\n" + text)
    assert len({hash_of(text), *(hash_of(text.replace(*edit)) for edit in edits)}) == 8


def test_classes_of_a_function_are_hashed_with_what_they_close_over():
    def make(alpha):
        class Scaled:
            sign = 1

            def scores(self, chunk):
                return alpha * chunk

        return Scaled

    one, other = make(1.0), make(-1.0)
    assert hash_code(one) == hash_code(make(1.0)) != hash_code(other)
    other = make(1.0)
    other.sign = -1
    assert hash_code(other) != hash_code(one)


def test_cells_of_another_precision_are_others(place):
    base, _, config = place
    half = dataclasses.replace(base, model=jax.tree.map(lambda a: a.astype(jnp.bfloat16), base.model))
    assert half.fingerprint == base.fingerprint
    task = types.SimpleNamespace(name="perplexity", at_once=False, facts={}, takes=lambda policy: True)
    policies = [EvaluatedPolicy("dense", make_policy("dense"))]
    keys = {plan_cells(one, [task], policies, config)[0].key for one in (base, half)}
    assert len(keys) == 2


def test_a_selection_that_a_policy_cannot_take_is_told_before_anything_is_measured(place):
    base, _, config = place
    config = dataclasses.replace(config, policies=("dense", "quest"), budgets=(0.5, 20))
    said = []
    with pytest.raises(ValueError, match="in pages of 16 = 39"):
        evaluate(base, None, config, say=said.append)
    assert not any("perplexity" in line for line in said)
