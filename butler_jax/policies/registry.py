"""Policies by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from butler_jax.policies.base import Policy
from butler_jax.policies.citrus import CItruS
from butler_jax.policies.dense import Dense
from butler_jax.policies.h2o import H2O
from butler_jax.policies.lowrank import LowRank
from butler_jax.policies.oracle import Oracle, OracleHead
from butler_jax.policies.quest import Quest
from butler_jax.policies.random import Random
from butler_jax.policies.residual import OracleResidual
from butler_jax.policies.snapkv import SnapKV
from butler_jax.policies.streaming import Streaming
from butler_jax.policies.tokenbutler import TokenButler

POLICIES: dict[str, type[Policy]] = {
    p.name: p
    for p in (
        *(Dense, Oracle, OracleHead, OracleResidual, Random, Streaming),
        *(H2O, SnapKV, CItruS, Quest, LowRank, TokenButler),
    )
}


def make_policy(name: str, defaults: Mapping[str, Any] = MappingProxyType({}), **fields: Any) -> Policy:
    """The policy of a name in POLICIES with these hyper-parameters, which may also follow the name.

    quest:page=8 is quest with pages of 8 tokens. The values of fields that are numbers are read as numbers.

    Args:
        name: The name.
        defaults: Hyper-parameters for those policies that have them.
        **fields: Hyper-parameters of this policy.

    Raises:
        ValueError: The name or a hyper-parameter is unknown. The message lists the known ones.
    """
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is neither a policy nor a name of one; make it one, as in Norm()")
    name, *settings = name.split(":")
    for setting in settings:
        field, _, value = setting.partition("=")
        fields[field] = int(value) if value.isdigit() else value
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    known = [field.name for field in dataclasses.fields(POLICIES[name])]
    unknown = sorted(set(fields) - set(known))
    if unknown:
        raise ValueError(f"policy {name} has no {', '.join(unknown)}; it has {', '.join(known) or 'no settings'}")
    return POLICIES[name](**{f: value for f, value in defaults.items() if f in known} | fields)
