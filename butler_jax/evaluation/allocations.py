"""The policies of an evaluation under each allocation of reads between heads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.contenders import PREPARED_TOKENS, EvaluatedPolicy
from butler_jax.evaluation.tasks.texts import read_windows
from butler_jax.selection import LIMITED
from butler_jax.simulation import calibrate_tolerance


def allocate_policies(
    policies: Sequence[EvaluatedPolicy], base: Any, config: EvalConfig, data: str, say: Callable[[str], None]
) -> Iterator[EvaluatedPolicy]:
    """Each policy under the allocations of a configuration that its scores allow.

    A policy that allows none of them reads per head. A label names the allocation where it is not per_head. The
    tolerance of a budget, and p under top_p, are found on about PREPARED_TOKENS tokens of the text that perplexity
    reads, so that all allocations read as many tokens on average.
    """
    windows = None
    for policy in policies:
        for name in [n for n in config.allocations if policy.policy.allows(n)] or ["per_head"]:
            if name == "per_head":
                yield policy
                continue
            one = policy._replace(label=f"{policy.label}:{name}", allocation=name)
            if name in LIMITED:
                if windows is None:
                    windows = read_windows(base, replace(config, tokens=min(config.tokens, PREPARED_TOKENS)), data, say)
                how = dict(policy=policy.policy, prompt_tokens=config.prompt_tokens)
                most = replace(config.selection_at(1.0), allocation=name)
                given = (base.model, policy.predictor, windows, most, config.budgets)
                one = one._replace(
                    calibrated=dict(zip(config.budgets, calibrate_tolerance(*given, **how), strict=True))
                )
            yield one
