"""The tasks of a configuration by name."""

from __future__ import annotations

from collections.abc import Sequence

from butler_jax.data import Batch
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.progress import Say
from butler_jax.evaluation.tasks.attention import AttentionTask
from butler_jax.evaluation.tasks.base import Task
from butler_jax.evaluation.tasks.coreference import CoreferenceTask
from butler_jax.evaluation.tasks.downstream import DownstreamTask
from butler_jax.evaluation.tasks.perplexity import PerplexityTask
from butler_jax.evaluation.tasks.retrieval import KeyValueTask, NeedleTask, VariablesTask
from butler_jax.evaluation.tasks.texts import read_haystack, read_windows
from butler_jax.model import check_length
from butler_jax.weights import Base


def make_tasks(base: Base, config: EvalConfig, data: str, say: Say) -> list[Task]:
    """Make the tasks of a configuration, in its order.

    Args:
        data: The data set whose held-out part is read where config.text is None.
        say: Receives a line where a text is shorter than asked for, and where prompts take most of it.

    Raises:
        ValueError, FileNotFoundError: A text is missing, empty or beyond the model's context.
    """
    windows = None
    if {"perplexity", "attention"} & set(config.tasks):
        check_length(base.config, config.context)
        windows = read_windows(base, config, data, say)
        _tell_of_prompts(windows, config.prompt_tokens, say)
    make = {
        "perplexity": lambda: PerplexityTask(base, config, windows),
        "attention": lambda: AttentionTask(base, config, windows),
        "coreference": lambda: CoreferenceTask(base, config),
        "needle": lambda: NeedleTask(base, config, read_haystack(base, config, data, say)),
        "key_value": lambda: KeyValueTask(base, config),
        "variables": lambda: VariablesTask(base, config),
    }
    return [make[name]() if name in make else DownstreamTask(base, config, name) for name in config.tasks]


def _tell_of_prompts(windows: Sequence[Batch], prompt_tokens: int, say: Say) -> None:
    """Say it where less than half of the tokens come after the prompts."""
    real = [batch["segments"] > 0 for batch in windows]
    found = sum(int(mask.sum()) for mask in real)
    left = sum(int((m & (b["positions"] >= prompt_tokens)).sum()) for m, b in zip(real, windows, strict=True))
    if 0 < 2 * left < found:
        say(
            f"after prompts of {prompt_tokens} tokens of each document, {left:,} of {found:,} tokens are left; a "
            "smaller --prompt-tokens leaves more, and 0 all"
        )
