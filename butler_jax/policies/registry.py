"""Policies by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

import numpy as np

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
WORDS = {"true": True, "1": True, "false": False, "0": False}
"""Truth values as a setting names them."""


def make_policy(name: str, defaults: Mapping[str, Any] = MappingProxyType({}), **fields: Any) -> Policy:
    """The policy of a name in POLICIES with these hyper-parameters, which may also follow the name.

    quest:page=8 is quest with pages of 8 tokens, and snapkv:once=false cuts at every row.

    Args:
        name: The name.
        defaults: Hyper-parameters for those policies that have them.
        **fields: Hyper-parameters of this policy.

    Raises:
        ValueError: The name or a hyper-parameter is unknown; the message lists the known ones. Or a value is of another
            type than its field.
    """
    if not isinstance(name, str):
        raise ValueError(f"{name!r} is neither a policy nor a name of one; make it one, as in Norm()")
    name, *settings = name.split(":")
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}; known: {', '.join(POLICIES)}")
    known = get_type_hints(POLICIES[name])
    known = {field.name: known[field.name] for field in dataclasses.fields(POLICIES[name])}
    read = dict(_read_setting(name, setting, known) for setting in settings)
    if "offset" in read and name == TokenButler.name:
        raise ValueError("the offset of tokenbutler is its predictor's: leave it out, and train with --offset")
    if unknown := sorted({*fields, *read} - {*known}):
        raise ValueError(f"policy {name} has no {', '.join(unknown)}; it has {', '.join(known) or 'no settings'}")
    return POLICIES[name](**{f: value for f, value in defaults.items() if f in known} | fields | read)


def settle_policy(policy: Policy | str | None) -> Policy:
    """A policy, which may be given by its name; None is `TokenButler()`.

    Raises:
        ValueError: It is none of these, no policy has the name, or compiled programs could not tell the policy from
            others of its class.
    """
    if not isinstance(policy, Policy | str | None):
        raise ValueError(f"policy must be a policy or its name, got {policy!r}; make_policy makes one of a name")
    if isinstance(policy, str):
        return make_policy(policy)
    policy = policy or TokenButler()
    if more := sorted(vars(policy).keys() - {field.name for field in dataclasses.fields(policy)}):
        raise ValueError(
            f"the policy {policy.name} has {', '.join(more)}, which are no fields of a dataclass, so policies that "
            "differ in them would count as one; put @dataclass(frozen=True, kw_only=True) before the class"
        )
    try:
        hash(policy)
    except TypeError as error:
        raise ValueError(
            f"the policy {policy.name} cannot be hashed ({error}), as compiled programs need it; give tuples for "
            "lists, or write eq=False where its dataclass has arrays"
        ) from None
    return policy


def _read_setting(policy: str, setting: str, known: Mapping[str, Any]) -> tuple[str, Any]:
    """The field and the value of a setting, FIELD=VALUE. The field may be unknown.

    Raises:
        ValueError: It is no such text, or the field has values of another type.
    """
    field, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"a setting of policy {policy} is FIELD=VALUE, got {setting!r}")
    kinds = get_args(known.get(field)) or (known.get(field),)
    if bool in kinds and text.lower() in WORDS:
        return field, WORDS[text.lower()]
    if type(None) in kinds and text == "None":
        return field, None
    if int in kinds and text.removeprefix("-").isdecimal():
        return field, int(text)
    if {int, bool} & {*kinds}:
        wanted = "a whole number" if int in kinds else "true or false"
        raise ValueError(f"{field} of policy {policy} is {wanted}, got {text!r}")
    if field in known and np.ndarray in kinds:
        raise ValueError(f"{field} of policy {policy} is given in Python alone, not as a text")
    return field, text
