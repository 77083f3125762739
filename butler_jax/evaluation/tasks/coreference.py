"""The co-reference task: does the last mention of an invented name survive a sparse reading of the sample?

TokenButler, arXiv 2503.07518, section 4. What is compared is the greedy prediction of the last mention's tokens
(teacher_forced.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Int

from butler_jax.data import last_mention_mask, mention_distance, sample
from butler_jax.evaluation.tasks.teacher_forcing import answer_batches


def coreference_batches(
    tokenizer: Any, *, samples: int, batch_size: int = 4, seed: int = 0, context: int | None = None
) -> list[dict[str, np.ndarray]]:
    """Unseen samples as batches of one length: tokens, segments, positions, and `asked`: the last mention.

    Raises ValueError where a sample is longer than `context` tokens.
    """
    rows = [last_mention_mask(tokenizer, sample(seed, index, "test")) for index in range(samples)]
    longest = max(len(tokens) for tokens, _ in rows)
    if context is not None and not longest <= context:
        raise ValueError(
            f"co-reference samples are up to {longest} tokens long, beyond the model's context of {context}; "
            "leave the task out with --tasks perplexity"
        )
    return answer_batches(rows, batch_size=batch_size, context=context)


def coreference_distances(tokenizer: Any, *, samples: int, seed: int = 0) -> Int[np.ndarray, " N"]:
    """Tokens between the first and the last mention in each of the samples of `coreference_batches`."""
    return np.asarray([mention_distance(tokenizer, sample(seed, index, "test")) for index in range(samples)])
