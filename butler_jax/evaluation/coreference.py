"""The co-reference task: does the last mention of an invented name survive a sparse reading of the sample?

TokenButler, arXiv 2503.07518, section 4. The model is teacher-forced through the whole sample; the greedy
prediction of the tokens of the last mention is compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from butler_jax.base_model import BaseModel
from butler_jax.configs import SelectionConfig, require
from butler_jax.datasets.coreference import last_mention_mask, sample
from butler_jax.evaluation.simulate import simulate
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor

MULTIPLE = 32  # lengths are padded to a multiple, so that other samples rarely compile anew


class Coreference(NamedTuple):
    """Shares of tokens right and of samples all right, their numbers, the mean attended fraction."""

    token_accuracy: float
    sample_accuracy: float
    tokens: int
    samples: int
    attended: float


def coreference_batches(
    tokenizer: Any, *, samples: int, batch_size: int = 4, seed: int = 0, context: int | None = None
) -> list[dict[str, np.ndarray]]:
    """Unseen samples as batches of one length: tokens, segments, positions, and `asked`: the last mention.

    Raises ValueError where a sample is longer than `context` tokens.
    """
    rows = [last_mention_mask(tokenizer, sample(seed, index, "test")) for index in range(samples)]
    longest = max(len(tokens) for tokens, _ in rows)
    require(
        context is None or longest <= context,
        f"co-reference samples are up to {longest} tokens long, beyond the model's context of {context}; "
        "leave the task out with --tasks perplexity",
    )
    length = -(-longest // MULTIPLE) * MULTIPLE
    length = length if context is None else min(length, context)
    batch_size = min(batch_size, samples)
    count = -(-samples // batch_size) * batch_size
    whole = {name: np.zeros((count, length), np.int32) for name in ("tokens", "segments", "positions")}
    whole["asked"] = np.zeros((count, length), bool)
    whole["positions"][:] = np.arange(length, dtype=np.int32)
    for row, (tokens, asked) in enumerate(rows):
        whole["tokens"][row, : len(tokens)] = tokens
        whole["segments"][row, : len(tokens)] = 1
        whole["asked"][row, : len(tokens)] = asked
    return [{n: a[i : i + batch_size] for n, a in whole.items()} for i in range(0, count, batch_size)]


def coreference(
    model: BaseModel,
    batches: Sequence[dict[str, np.ndarray]],
    policy: Policy,
    config: SelectionConfig,
    predictor: Predictor | None = None,
    *,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> Coreference:
    """Accuracy on batches of coreference_batches under a policy and a budget."""
    right, asked, perfect, samples, attended, rows = 0, 0, 0, 0, 0.0, 0
    for batch in batches:
        result = simulate(
            model, batch, policy, config, predictor, score_dtype=score_dtype, implementation=implementation
        )
        wanted, real = batch["asked"], batch["segments"] > 0
        guessed = np.zeros_like(batch["tokens"])
        guessed[:, 1:] = np.asarray(result.greedy)[:, :-1]
        good = (guessed == batch["tokens"]) & wanted
        used = wanted.any(axis=1)
        right, asked = right + int(good.sum()), asked + int(wanted.sum())
        perfect += int((good.sum(axis=1) == wanted.sum(axis=1))[used].sum())
        samples += int(used.sum())
        attended += float(np.asarray(result.attended, np.float64)[real].sum())
        rows += int(real.sum())
    return Coreference(right / asked, perfect / samples, asked, samples, attended / rows)
