"""Chat templates: messages become the text that a model made for chat continues.

A template is a program of others. `template_process` runs it, with limits on time and memory, and only where a chat is
asked for.
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from butler_jax.storage import fits, shown

LONGEST_TEMPLATE = 256 << 10
"""The longest template that is used, in characters."""

TAG = "CONTINUE_FROM_HERE "
"""Marks the end of the last message where a text is to go on from it."""

Messages = Sequence[Mapping[str, Any]]


class ChatTemplateError(ValueError):
    """A chat template cannot be used, or refuses the messages."""


@dataclass(frozen=True)
class ChatTemplate:
    """The chat templates of a model.

    Attributes:
        sources: The templates by name; "default" is the one that is used unasked.
        tokens: The names of special tokens that templates write, such as {"bos_token": "<s>"}.
    """

    sources: Mapping[str, str]
    tokens: Mapping[str, str] = field(default_factory=dict)

    def source(self, name: str | None = None, *, tools: bool = False) -> str:
        """The template of this name. Default: "tool_use" where there are tools and such a template, else "default".

        Raises:
            ChatTemplateError: There is none of this name, or it is too long.
        """
        if name is None:
            name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise ChatTemplateError(f"there is no chat template {name!r}; there are: {', '.join(self.sources)}")
        if len(self.sources[name]) > LONGEST_TEMPLATE:
            raise ChatTemplateError(
                f"the chat template has {len(self.sources[name])} characters; at most {LONGEST_TEMPLATE} are taken"
            )
        return self.sources[name]

    def render(
        self,
        messages: Messages,
        *,
        name: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, str]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The text of a conversation. It spells its special tokens, the first one too.

        Args:
            messages: Objects with a "role" (system, user, assistant) and a "content".
            name: Of the template, where the model has several.
            add_generation_prompt: Whether the text ends with the words that begin an answer.
            continue_final_message: Whether the text ends with the last message, for the model to go on with it.
            tools: JSON schemas of functions.
            documents: Objects with "title" and "text".
            variables: What else the template reads, such as {"enable_thinking": False}. They may rename special tokens.

        Raises:
            ChatTemplateError: The template is invalid, refuses the messages, or takes too much time or memory.
            ValueError: The messages are no list of JSON objects with a role, or a variable has the name of an argument
                that templates read.
        """
        messages = _checked(messages)
        source = self.source(name, tools=tools is not None)
        if continue_final_message:
            _tag_last_text(messages[-1])
        given = {
            "messages": messages,
            "tools": tools,
            "documents": documents,
            "add_generation_prompt": add_generation_prompt,
        }
        variables = {} if variables is None else variables
        taken = ", ".join(name for name in given if name in variables)
        if taken:
            raise ValueError(f"variables of a chat template cannot be called {taken}; give the argument of that name")
        text = _PROCESS.render(source, {**self.tokens, **variables, **given})
        if not continue_final_message:
            return text
        place = text.rfind(TAG.strip())
        if place < 0:
            raise ChatTemplateError("the chat template does not show the last message, so it cannot be continued")
        kept = text[place : place + len(TAG)] == TAG  # otherwise the template strips messages
        return text[:place] if kept else text[:place].rstrip()


def _checked(messages: Any) -> list[dict[str, Any]]:
    """A copy of the messages that may be changed."""
    listed = isinstance(messages, Sequence) and not isinstance(messages, (str, bytes))
    if not listed or not messages:
        raise ValueError(
            f"messages must be a list of at least one object with role and content, got {shown(messages)}; for a "
            'single question give [{"role": "user", "content": QUESTION}]'
        )
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f"message {number} must be an object with role and content, got {shown(message)}")
    return [copy.deepcopy(dict(message)) for message in messages]


def _tag_last_text(message: dict[str, Any]) -> None:
    """Add TAG to the text of a message, or to its last part of text."""
    content = message.get("content")
    holder, key = message, "content"
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        holder, key = content[-1], "text"
    if not isinstance(holder.get(key), str):
        raise ValueError(f"the last message has no text to continue; its content is {shown(content)}")
    holder[key] += TAG


class _Process:
    """The process that renders, started at the first request and again after it was ended."""

    def __init__(self):
        self.lock, self.started, self.owner = threading.Lock(), None, 0

    def render(self, template: str, variables: dict[str, Any]) -> str:
        """The text that a template makes of variables. Raises as `ChatTemplate.render`."""
        try:
            request = json.dumps({"template": template, "variables": variables})
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"messages, tools and variables must be JSON values: {error}") from None
        with self.lock:
            process = self._running()
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # interrupted: the answer would be taken for that of the next request
                process.kill()
                self.close()
                raise
            if not line:
                self.close()
                raise ChatTemplateError(f"the chat template {_describe_end(process.returncode)}")
        found = json.loads(line)
        if "error" in found:
            raise ChatTemplateError(f"the chat template cannot be applied: {found['error']}")
        return found["text"]

    def _running(self) -> subprocess.Popen:
        if self.started is None or self.owner != os.getpid() or self.started.poll() is not None:
            self.started = subprocess.Popen(
                [sys.executable, "-P", "-m", "butler_jax.text.template_process"],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                encoding="utf-8",
            )
            self.owner = os.getpid()
        return self.started

    def close(self) -> None:
        """End the process, if it is this one's."""
        process, self.started = self.started, None
        if process is not None and self.owner == os.getpid():
            process.communicate()


def _describe_end(status: int) -> str:
    if status == -signal.SIGPROF:
        from butler_jax.text.template_process import MOST_SECONDS

        return f"did not end within {MOST_SECONDS:g} s of computing; use another one, or write the prompt without it"
    return f"ended its process (status {status}); use another one, or write the prompt without it"


_PROCESS = _Process()
atexit.register(_PROCESS.close)


def read_templates(value: Any, where: str) -> dict[str, str]:
    """Templates by name from a `chat_template`: a text, or a list of objects with name and template.

    Raises:
        ValueError: It is neither.
    """
    if isinstance(value, str):
        return {"default": value}
    named = isinstance(value, list) and all(
        isinstance(one, dict) and fits([one.get("name"), one.get("template")], list[str]) for one in value
    )
    if not named:
        raise ValueError(
            f"{where}: chat_template must be a text or a list of objects with name and template, got {shown(value)}"
        )
    return {one["name"]: one["template"] for one in value}
