"""The co-reference task: is the last mention of an invented name still predicted under sparse attention?

TokenButler, arXiv 2503.07518, section 4. The greedy prediction of the last mention's tokens is compared with them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from butler_jax.data import Batch, last_mention_mask, mention_distance, sample
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.tasks.answers import AnsweringTask, batch_answers, group_by_distance
from butler_jax.weights import Base


def make_coreference_batches(
    tokenizer: Any, *, samples: int, batch_size: int = 4, seed: int = 0, context: int | None = None
) -> list[Batch]:
    """Make batches of unseen samples: tokens, segments, positions, and `asked` for the last mention, all [B, T].

    Raises:
        ValueError: A sample is longer than the context.
    """
    rows = [last_mention_mask(tokenizer, sample(seed, index, "test")) for index in range(samples)]
    longest = max(len(tokens) for tokens, _ in rows)
    if context is not None and longest > context:
        raise ValueError(
            f"co-reference samples are up to {longest} tokens long, beyond the model's context of {context}; "
            "leave the task out with --tasks perplexity"
        )
    return batch_answers(rows, batch_size=batch_size, context=context)


def measure_distances(tokenizer: Any, *, samples: int, seed: int = 0) -> Int[np.ndarray, " samples"]:
    """Tokens between the first and the last mention in each sample of `make_coreference_batches`."""
    return np.asarray([mention_distance(tokenizer, sample(seed, index, "test")) for index in range(samples)])


class CoreferenceTask(AnsweringTask):
    """The paper's co-reference task, in groups by the distance between the first and the last mention."""

    name = "coreference"
    metrics = ("miss_rate", "token_inaccuracy")

    def __init__(self, base: Base, config: EvalConfig):
        drawn = dict(samples=config.samples, seed=config.seed)
        batches = make_coreference_batches(
            base.tokenizer, batch_size=config.batch_size, context=base.config.context, **drawn
        )
        super().__init__(base, config, batches, group_by_distance(measure_distances(base.tokenizer, **drawn)))
