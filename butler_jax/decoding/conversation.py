"""Answers to messages: the model's chat template makes the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from butler_jax.decoding.generation import Generated, generate
from butler_jax.model import require_loaded

if TYPE_CHECKING:
    from butler_jax.text import Messages
    from butler_jax.weights import Base


def chat(
    base: Base,
    messages: str | Messages,
    *,
    template: str | None = None,
    tools: list[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Generated:
    """Answer the last of several messages. `.text` of the result is the answer.

    The model's chat template makes a prompt of the messages. It is a program of others, which runs in a sandbox and in
    a process of its own, with limits on its time and memory (docs/guides/security.md). To go on, append the answer as a
    message of the role assistant, and the next question. With the same `PromptCache` as `cache` at every turn, a turn
    reads only what is new.

    Args:
        messages: Objects with a "role" (system, user, assistant) and a "content". A text is one message of the user.
        template: The name of the template, where the model has several.
        tools: JSON schemas of functions that the template tells the model of.
        variables: What else the template reads, such as {"enable_thinking": False}; of any name but those of messages,
            tools, documents and add_generation_prompt.
        settings: As of `generate`.

    Raises:
        ValueError: The model has no chat template, or its template refuses the messages; or as `generate`.
    """
    require_loaded(base)
    messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    tokenizer = base.require_tokenizer()
    template_of = tokenizer.require_chat_template()
    text = template_of.render(messages, name=template, tools=tools, variables=variables)
    return generate(base, tokenizer.encode(text, bos=False), **settings)
