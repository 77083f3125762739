"""Which fields of a policy are settings."""

from __future__ import annotations

from butler_jax.policies import make_policy
from butler_jax.policies.base import describe


def test_what_all_policies_of_a_kind_have_is_no_setting():
    assert describe(make_policy("dense")) == {"name": "dense"}
    assert describe(make_policy("quest")) == {"name": "quest", "page": 16}
    assert describe(make_policy("h2o")) == {"name": "h2o"}
