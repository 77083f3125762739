"""Command lines made from configurations, and their errors said in one line."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import tyro
from jax.errors import JaxRuntimeError

from butler_jax.parallel import leave, lost


def read(kind: type, arguments: list[str], program: str) -> Any:
    """A configuration of dataclass `kind` from command-line arguments; its docstrings are the help.

    Raises ValueError as the configuration's own checks do; unknown options and values of the wrong type end the
    program with a message.
    """
    # The checks run here and not inside tyro, which would draw a box around their messages.
    unchecked = type(kind.__name__, (kind,), {"__post_init__": lambda self: None, "__doc__": kind.__doc__})
    values = tyro.cli(unchecked, args=arguments, prog=program)
    return kind(**{field.name: getattr(values, field.name) for field in dataclasses.fields(kind)})


def run(command: Callable[[], int]) -> int:
    """Exit status of `command`; an error of the user's making becomes one line on stderr and status 1.

    So does the loss of another process of the run. Where there are several, an error ends this one at once.
    """
    try:
        return command()
    except (ValueError, OSError, FloatingPointError, ImportError, JaxRuntimeError) as error:
        if isinstance(error, JaxRuntimeError) and not lost(error):
            raise
        if jax.distributed.is_initialized():
            leave(error)
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def interrupts_end(said: str) -> Iterator[None]:
    """Ctrl-C ends the program inside, at once, with a line on stderr and status 130.

    A KeyboardInterrupt is lost where it meets a callback of the garbage collection, and after one JAX 0.10 crashes
    where the interpreter ends by itself.
    """

    def end(number, frame):
        with contextlib.suppress(OSError, RuntimeError):  # nobody reads any more, or it was being written to
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{said}\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # a shell's background job
        signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
