"""What is said of a text that tasks read."""

from __future__ import annotations

from butler_jax import EvalConfig, load_base
from butler_jax.evaluation.tasks.registry import make_tasks


def test_prompts_that_take_most_of_a_text_are_told():
    base = load_base("tiny")
    for prompt_tokens, told in ((256, True), (0, False)):
        lines: list[str] = []
        config = EvalConfig(tasks="perplexity", tokens=2048, context=1024, prompt_tokens=prompt_tokens)
        make_tasks(base, config, "coreference_short", lines.append)
        assert any(line.startswith("after prompts of 256 tokens of each document, ") for line in lines) == told
