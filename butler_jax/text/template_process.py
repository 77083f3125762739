"""The process that renders chat templates: `python -m butler_jax.text.template_process`.

A chat template is a program that came with a model. It runs in Jinja2's ImmutableSandboxedEnvironment, which gives it
neither files nor Python's internals. The sandbox does not keep a program from looping or from taking memory, so it has
a process of its own, with limits that the operating system keeps: MOST_MEMORY for the process, and MOST_SECONDS of
computing for a text, after which a signal ends the process. That works for loops inside of C code too, and whatever
thread of the parent waits.

A line of standard input is a request, a line of standard output its answer, both JSON.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_SECONDS = 2.0
"""Seconds of computing for one text."""

MOST_MEMORY = 512 << 20
"""Bytes of address space of the process."""

LONGEST_TEXT = 4 << 20
"""The longest text that a template may make, in characters."""


class _Generation(Extension):
    """`{% generation %}`: marks the assistant's text for training; nothing changes where a text is made."""

    tags = {"generation"}

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        next(parser.stream)
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON without the escapes for HTML that Jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=4)
def _compile(source: str) -> jinja2.Template:
    """The template, in the environment that templates of models are written for."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source)


def answer(request: dict[str, Any]) -> dict[str, str]:
    """{"text"} of a request {"template", "variables"}, or {"error"} with what the template did."""
    pieces, length = [], 0
    try:
        for piece in _compile(request["template"]).generate(request["variables"]):
            pieces.append(piece)
            length += len(piece)
            if length > LONGEST_TEXT:
                return {"error": f"it makes a text of more than {LONGEST_TEXT} characters"}
    except MemoryError:
        return {"error": f"it takes more than {MOST_MEMORY >> 20} MiB of memory"}
    except jinja2.TemplateSyntaxError as error:
        return {"error": f"line {error.lineno}: {error.message}"}
    except jinja2.TemplateError as error:
        return {"error": f"it says: {error.message}"}
    except Exception as error:  # whatever a program may do wrong
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": "".join(pieces)}


def main() -> None:
    """Answer requests until standard input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    # libtpu ignores SIGPROF, and a new process inherits what its parent ignores and blocks.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        found = json.dumps(answer(request))
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(found, flush=True)


if __name__ == "__main__":
    main()
