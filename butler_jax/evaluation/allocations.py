"""The policies of an evaluation under each allocation of reads between heads, with each tail."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from butler_jax.evaluation.config import OF_LENGTHS, EvalConfig
from butler_jax.evaluation.contenders import PREPARED_TOKENS, EvaluatedPolicy
from butler_jax.evaluation.tasks.texts import read_windows
from butler_jax.policies import Evicting
from butler_jax.selection import LIMITED, SelectionConfig
from butler_jax.simulation import calibrate_tolerance
from butler_jax.weights import Base


def allocate_policies(
    policies: Sequence[EvaluatedPolicy],
    base: Base,
    config: EvalConfig,
    data: str,
    note: Callable[[str], None],
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[EvaluatedPolicy]:
    """Each policy under the allocations of a configuration that its scores allow, with each of its tails.

    A policy that allows none of them reads per head, and one that evicts or reads everything has no tail. A label names
    the allocation where it is not per_head, and the tail where there is one. The tolerance of a budget, and p under
    top_p, are found on about PREPARED_TOKENS tokens of the text that perplexity reads, so that all allocations read as
    many tokens on average. Where all tasks have samples of given lengths, that text is read in windows of the longest
    length.

    Args:
        note: Receives what the report should say.
        say: Receives a line of progress before a search, which takes minutes on a large base.
    """
    planned = [one for policy in policies for one in _plan(policy, config, note)]
    windows, calibration = None, _calibration(config)
    for one in planned:
        if one.allocation in LIMITED:
            if windows is None:
                windows = read_windows(base, calibration, data, note)
            how = dict(policy=one.policy, prompt_tokens=calibration.prompt_tokens)
            if calibration.stride is not None:  # the rows that count are the last of each window
                how["rows"] = None
            found = "p" if one.allocation == "top_p" else "the tolerance"
            say(f"finding {found} of each budget for {one.label}")
            given = (base.model, one.predictor, windows, _most(one, config), config.budgets)
            one = one._replace(calibrated=dict(zip(config.budgets, calibrate_tolerance(*given, **how), strict=True)))
        yield one


def _plan(policy: EvaluatedPolicy, config: EvalConfig, note: Callable[[str], None]) -> Iterator[EvaluatedPolicy]:
    """A policy under its allocations with its tails, without tolerances. Raises ValueError for one it cannot take."""
    names = [n for n in config.allocations if policy.policy.allows(n)] or ["per_head"]
    left_out = [n for n in names if n in LIMITED] if config.selection.neighbours else []
    if left_out and left_out != names:  # a tolerance has no place for neighbours
        names = [n for n in names if n not in left_out]
        note(f"{policy.label}: with neighbours, {' and '.join(left_out)} is left out")
    tails = (0,) if policy.dense or isinstance(policy.policy, Evicting) else config.tails
    longest = max(config.context, *config.lengths)
    for name, tail in itertools.product(names, tails):
        if tail > longest:
            note(f"a tail of {tail} tokens does nothing in rows of at most {longest}: no span is ever whole")
        words = [policy.label, *([] if name == "per_head" else [name]), *([f"tail={tail}"] if tail else [])]
        one = policy._replace(label=":".join(words), allocation=name, tail=tail)
        try:
            for selection in [_most(one, config)] if name in LIMITED else one.selections(config).values():
                policy.policy.selection(selection)
        except ValueError as error:  # such as a tail that pages do not fit
            raise ValueError(f"{policy.label}: {error}") from None
        yield one


def _most(policy: EvaluatedPolicy, config: EvalConfig) -> SelectionConfig:
    """The selection with which the tolerances of a policy are found."""
    return replace(config.selection_at(1.0, policy.tail), allocation=policy.allocation)


def _calibration(config: EvalConfig) -> EvalConfig:
    """The settings by which text is read to find tolerances."""
    tokens = min(config.tokens, PREPARED_TOKENS)
    if not set(config.tasks) <= set(OF_LENGTHS):
        return replace(config, tokens=tokens)
    context, prompt = max(config.lengths), 0
    if config.prompt_tokens:  # what reads a choice are the answers, which stand at the end
        prompt = 3 * context // 4 // config.selection.interval * config.selection.interval
    return replace(config, tokens=max(tokens, context), context=context, prompt_tokens=prompt, stride=None)
