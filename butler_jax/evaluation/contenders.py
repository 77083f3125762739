"""The policies of an evaluation: each prepared on text, with its predictor and the label that reports show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.hashes import hash_code
from butler_jax.parallel import EVALUATION_RULES, hash_arrays, place
from butler_jax.policies import POLICIES, Policy, Scoring, describe, make_policy, settle_policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.storage import to_dict
from butler_jax.weights import Base

DEFAULT = ("dense", "oracle", "streaming", "tokenbutler")
PREPARED_TOKENS = 8192  # of text that a policy is prepared on
TRIED_TOKENS = 128  # on which a policy of one's own is tried


class EvaluatedPolicy(NamedTuple):
    """A policy under its label.

    Attributes:
        label: The name in reports.
        policy: The policy, prepared.
        predictor: None where the policy needs none.
        training: How the predictor was trained; empty where that is not known.
        arrays: A hash of the predictor's arrays.
        allocation: How heads share reads.
        tail: Tokens of the spans by which keys that are not read are estimated; 0 where they are not.
        calibrated: Under a tolerance or top-p, the selections by budget.
    """

    label: str
    policy: Policy
    predictor: Predictor | None = None
    training: Mapping[str, Any] = MappingProxyType({})
    arrays: str = ""
    allocation: str = "per_head"
    tail: int = 0
    calibrated: Mapping[float | int, SelectionConfig] = MappingProxyType({})

    @property
    def about(self) -> dict[str, Any]:
        """The predictor's configuration, a hash of its arrays, and how it was trained."""
        return {**to_dict(self.predictor.config), "arrays": self.arrays, "training": dict(self.training)}

    @property
    def dense(self) -> bool:
        """Whether the policy reads everything."""
        return self.policy.reads_everything

    def on(self, mesh: Mesh) -> EvaluatedPolicy:
        """The policy with its predictor on a mesh."""
        if self.predictor is None:
            return self
        return self._replace(predictor=place(self.predictor, self.predictor.logical_axes, mesh, EVALUATION_RULES))

    def selections(self, config: EvalConfig) -> dict[float | int, SelectionConfig]:
        """The selections by budget; a policy that reads everything has the one budget 1."""
        if self.dense:
            return {1: config.selection_at(1.0)}
        if self.calibrated:
            return dict(self.calibrated)
        selections = {budget: config.selection_at(budget, self.tail) for budget in config.budgets}
        return {budget: replace(s, allocation=self.allocation) for budget, s in selections.items()}

    def facts(self) -> dict[str, Any]:
        """What its results depend on, JSON-ready: settings, and hashes of code, of parameters and of what was found."""
        settings = {field.name: getattr(self.policy, field.name) for field in fields(self.policy)}
        found = {name: hash_arrays(a) for name, a in settings.items() if isinstance(a, np.ndarray)}
        facts = {**describe(self.policy), **found, "code": hash_code(type(self.policy))}
        if self.predictor is not None:
            facts["predictor"] = to_dict(self.predictor.config)
            facts["predictor_code"] = hash_code(type(self.predictor))
            facts["parameters"] = self.arrays
        return facts


def collect_policies(
    base: Base, predictor: Predictor | None, config: EvalConfig, data: str, say: Callable[[str], None]
) -> list[EvaluatedPolicy]:
    """Make and prepare the policies of a configuration.

    A policy that needs a predictor appears once for each: that of the run, and those of the runs to compare.

    Args:
        predictor: None reads that of config.run. Without a run, the default policies leave out those that need one.
        data: The text that policies are prepared on, as `read_batches` takes it.
        say: Receives a line where something is left out.

    Raises:
        ValueError: A policy is unknown, has the label of another, or was asked for and lacks its predictor. Or runs are
            compared, and no policy needs a predictor. Or all scores of a policy of one's own are NaN.
    """
    given, defaults = config.policies or DEFAULT, {"seed": config.seed}
    policies = [settle_policy(p) if isinstance(p, Policy) else make_policy(p, defaults) for p in given]
    policies = [policy.row_by_row() for policy in policies]  # rows after a prompt, or all rows, are limited one by one
    needing = [p for p in policies if p.needs_predictor]
    if config.compare and not needing:
        raise ValueError("--compare is about predictors, and no policy of --policies needs one; add tokenbutler")
    predictors = list(_read_predictors(base, predictor, config)) if needing else []
    hashes = [hash_arrays(one) for _, one, _ in predictors]
    if needing and not predictors:
        if config.policies is not None:
            needing[0].require_predictor(None)
        say(f"{', '.join(p.name for p in needing)} is left out: there is no trained predictor (give a run)")
        policies = [p for p in policies if not p.needs_predictor]
    found, labels = [], label_policies(policies)
    policies = prepare_policies(policies, base, data, context=config.context, data_dir=config.data_dir)
    for label, policy in zip(labels, policies, strict=True):
        if policy.needs_predictor:
            found += [
                EvaluatedPolicy(label + suffix, policy.for_predictor(one), one, training, arrays)
                for (suffix, one, training), arrays in zip(predictors, hashes, strict=True)
            ]
        else:
            found.append(EvaluatedPolicy(label, policy))
    for one in found:
        _check_scores(one, base, say)
    return found


def _check_scores(policy: EvaluatedPolicy, base: Base, say: Callable[[str], None]) -> None:
    """Say it where scores of a policy of one's own are NaN. Raises ValueError where all are."""
    if not isinstance(policy.policy, Scoring) or type(policy.policy) in POLICIES.values() or policy.dense:
        return
    from butler_jax.simulation import measure_nan_scores

    length = min(TRIED_TOKENS, base.config.context)
    tokens = np.arange(length, dtype=np.int32)[None] % base.config.vocab_size
    batch = dict(tokens=tokens, segments=np.ones_like(tokens), positions=np.arange(length, dtype=np.int32)[None])
    share = measure_nan_scores(base.model, policy.predictor, batch, policy.policy)
    if share == 1:
        raise ValueError(f"the scores of the policy {policy.label} are NaN for every key; see what divides by 0")
    if share:
        say(f"{policy.label}: {100 * share:.0f} % of its scores are NaN; these keys are read last")


def label_policies(policies: list[Policy]) -> list[str]:
    """The names of policies, followed by their settings where a name occurs twice: quest:page=8 and quest:page=16.

    Raises:
        ValueError: Two labels are the same, or a name cannot begin a label.
    """
    for name in (getattr(p, "name", "") for p in policies):
        if not name or ":" in name or name.startswith("_"):
            raise ValueError(f"a policy is called {name!r}; give it a name without a colon and a leading underscore")
    counts, labels = Counter(p.name for p in policies), []
    for policy in policies:
        words = [f"{k}={v}" for k, v in describe(policy).items() if k != "name" and counts[policy.name] > 1]
        labels.append(":".join([policy.name, *words]))
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if twice:
        raise ValueError(f"two policies are called {', '.join(twice)}; give them names of their own, or other settings")
    return labels


def prepare_policies(
    policies: list[Policy], base: Any, data: str, *, context: int = 1024, data_dir: str | None = None
) -> list[Policy]:
    """Prepare policies on about PREPARED_TOKENS tokens of text.

    Args:
        policies: The policies; no text is read where none overrides `prepare`.
        data: The text, of which the training part is read.
        context: Tokens in a row of text.
        data_dir: Where prepared data sets lie.
    """
    if not any(_needs_text(policy) for policy in policies):
        return policies
    from butler_jax.data import read_batches

    length = min(context, base.config.context)
    rows = read_batches(data, base.require_tokenizer(), length=length, batch_size=1, seed=1, data_dir=data_dir)
    rows = [next(rows) for _ in range(-(-PREPARED_TOKENS // length))]
    return [policy.prepare(base.model, rows) for policy in policies]


def describe_prepared(policy: Policy, data: str) -> dict[str, Any]:
    """Describe a policy, with the text that it was prepared on, if any."""
    if not _needs_text(policy):
        return describe(policy)
    return {**describe(policy), "found_on": f"about {PREPARED_TOKENS:,} tokens of the training part of {data}"}


def _needs_text(policy: Policy) -> bool:
    return type(policy).prepare is not Policy.prepare


def _read_predictors(
    base: Base, predictor: Predictor | None, config: EvalConfig
) -> Iterator[tuple[str, Predictor, dict]]:
    """(suffix of the label, predictor, its training): no suffix for the first, :KIND for those to compare.

    Where a kind is taken, the run's name follows, and where that is taken too, its path.

    Raises:
        ValueError: A run is compared twice.
    """
    from butler_jax.evaluation.training_facts import load_trained

    taken, training = set(), {}
    if predictor is None and config.run is not None:
        predictor, training = load_trained(config.run, base)
    if predictor is not None:
        yield "", predictor, training
    for run in config.compare:
        other, training = load_trained(run, base)
        kind = f":{other.config.kind}"
        suffix = next((s for s in (kind, f"{kind} {run.name}", f"{kind} {run}") if s not in taken), None)
        if suffix is None:
            raise ValueError(f"--compare names {run} more than once")
        taken.add(suffix)
        yield suffix, other, training
