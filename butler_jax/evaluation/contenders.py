"""Who is judged: a policy with what it found out on text, its predictor, and the label it goes by."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from types import CodeType, MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np

from butler_jax.evaluation.config import EvalConfig
from butler_jax.policies import Policy, describe, make_policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.storage import to_dict

DEFAULT = ("dense", "oracle", "random", "streaming", "tokenbutler")
PREPARED_TOKENS = 8192  # of text that a policy is prepared on


class Contender(NamedTuple):
    """A policy under its label, with its predictor (None where it needs none).

    training: how that was trained, empty where it is not known.
    """

    label: str
    policy: Policy
    predictor: Predictor | None
    training: Mapping[str, Any] = MappingProxyType({})

    @property
    def about(self) -> dict[str, Any]:
        """The predictor's configuration, and how it was trained."""
        return {**to_dict(self.predictor.config), "training": dict(self.training)}

    def selections(self, config: EvalConfig) -> dict[float | int, SelectionConfig]:
        """The budgets it is judged under: dense has one, which is everything."""
        if self.policy.name == "dense":
            return {1: config.selection_at(1.0)}
        return {budget: config.selection_at(budget) for budget in config.budgets}

    def facts(self) -> dict[str, Any]:
        """What sets its results apart, JSON-ready: settings, digests of its code and of what was learnt or found."""
        settings = {field.name: getattr(self.policy, field.name) for field in fields(self.policy)}
        found = {name: digest(a) for name, a in settings.items() if isinstance(a, np.ndarray)}
        learnt = {} if self.predictor is None else {
            "predictor": to_dict(self.predictor.config), "parameters": digest(self.predictor),
            "predictor_code": code(type(self.predictor)),
        }  # fmt: skip
        return {**describe(self.policy), **found, **learnt, "code": code(type(self.policy))}


def contenders(
    base: Any, predictor: Predictor | None, config: EvalConfig, data: str, say: Callable[[str], None]
) -> list[Contender]:
    """The policies of a configuration, prepared; with further runs to compare, one tokenbutler for each predictor.

    predictor: None reads that of config.run; without a run, DEFAULT does without tokenbutler, and `say` is told. Raises
    ValueError for an unknown policy, and for one that was asked for and needs a predictor where there is none.
    """
    settings = {"random": {"seed": config.seed}}
    given = config.policies or DEFAULT
    policies = [p if isinstance(p, Policy) else make_policy(p, **settings.get(p, {})) for p in given]
    policies = [policy.row_by_row() for policy in policies]  # a text has no prompt
    needing = [p.name for p in policies if p.needs_predictor]
    predictors = list(_predictors(base, predictor, config)) if needing else []
    if needing and not predictors:
        if config.policies is not None:
            raise ValueError(
                f"the policy {', '.join(needing)} needs a trained predictor; give --run RUN (a run of train.py; in "
                "Python also predictor=), or leave it out of --policies"
            )
        say(f"{', '.join(needing)} is left out: there is no trained predictor (give a run)")
        policies = [p for p in policies if not p.needs_predictor]
    found, labels = [], labels_of(policies)
    policies = prepared(policies, base, data, context=config.context, data_dir=config.data_dir)
    for label, policy in zip(labels, policies, strict=True):
        if policy.needs_predictor:
            found += [Contender(label + suffix, policy, one, how) for suffix, one, how in predictors]
        else:
            found.append(Contender(label, policy, None))
    return found


def labels_of(policies: list[Policy]) -> list[str]:
    """Names of policies, and behind those that occur more than once their settings: quest:page=8 and quest:page=16.

    Raises ValueError where two are the same.
    """
    counts, labels = Counter(p.name for p in policies), []
    for policy in policies:
        words = [f"{k}={v}" for k, v in describe(policy).items() if k != "name" and counts[policy.name] > 1]
        labels.append(":".join([policy.name, *words]))
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if twice:
        raise ValueError(f"two policies are called {', '.join(twice)}; give them names of their own, or other settings")
    return labels


def _predictors(base: Any, predictor: Predictor | None, config: EvalConfig) -> Iterator[tuple[str, Predictor, dict]]:
    """(what follows the policy's name, predictor, its training): nothing for the first, :KIND for those to compare."""
    from butler_jax.evaluation.trained import load_trained

    taken, how = set(), {}
    if predictor is None and config.run is not None:
        predictor, how = load_trained(config.run, base)
    if predictor is not None:
        yield "", predictor, how
    for run in config.compare:
        other, how = load_trained(run, base)
        kind = other.config.kind
        suffix = f":{kind}" if kind not in taken else f":{kind} {Path(run).name}"
        taken.add(kind)
        yield suffix, other, how


def described(policy: Policy, data: str) -> dict[str, Any]:
    """`describe`, and for a policy that finds out something on text, which one: see `prepared`."""
    if type(policy).prepare is Policy.prepare:
        return describe(policy)
    return {**describe(policy), "found_on": f"about {PREPARED_TOKENS:,} tokens of the training part of {data}"}


def prepared(
    policies: list[Policy], base: Any, data: str, *, context: int = 1024, data_dir: str | None = None
) -> list[Policy]:
    """Policies with what they find out on text: a few rows of the training part of `data`, of `context` tokens."""
    if all(type(p).prepare is Policy.prepare for p in policies):
        return policies
    from butler_jax.data import read_batches

    length = min(context, base.config.context)
    rows = read_batches(data, base.require_tokenizer(), length=length, batch_size=1, seed=1, data_dir=data_dir)
    rows = [next(rows) for _ in range(-(-PREPARED_TOKENS // length))]
    return [policy.prepare(base.model, rows) for policy in policies]


def code(kind: type) -> str:
    """A short hash of the files that define a class and its bases; of compiled functions where there is no file."""
    found = hashlib.sha256()
    for part in kind.__mro__[:-1]:
        try:
            found.update(Path(inspect.getfile(part)).read_bytes())
        except (OSError, TypeError):  # defined in a notebook
            functions = [f.__code__ for f in vars(part).values() if inspect.isfunction(f)]
            found.update(repr([_compiled(function) for function in functions]).encode())
    return found.hexdigest()[:16]


def _compiled(function: CodeType) -> tuple:
    """What a function does, without the places of its lines."""
    inside = [_compiled(c) if isinstance(c, CodeType) else repr(c) for c in function.co_consts]
    return function.co_code, function.co_names, inside


def digest(tree: Any) -> str:
    """A short hash of all numbers of a pytree and of their types and shapes."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        values = np.asarray(leaf)
        found.update(f"{values.dtype}{values.shape}".encode())
        found.update(np.ascontiguousarray(values).tobytes())
    return found.hexdigest()[:16]
