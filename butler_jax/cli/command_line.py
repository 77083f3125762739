"""Command lines made from configurations, and errors printed in one line."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, get_type_hints

import tyro

from butler_jax.parallel import answered


def read(kind: type, arguments: list[str], program: str) -> Any:
    """Read a configuration of class `kind` from command-line arguments; `program` is the name that the help shows.

    Nested configurations have flat flags. The docstrings of classes and fields are the help. The metadata of a field
    may say more: "flag" is the name of its flag where that is not the field's (None: it has no flag), and "flags" names
    the fields of a nested configuration that have flags (default: all).

    Raises:
        ValueError: A list is given by two options of the same name, or the configuration's own checks refuse a value.
        SystemExit: An option is unknown, or its value has the wrong type; a message is printed.
    """
    hints, given = get_type_hints(kind), _flags_in(arguments)
    for flag in (flag_of(one) for one in dataclasses.fields(kind) if "tuple" in str(hints[one.name])):
        if given.count(flag) > 1:
            raise ValueError(f"{flag} is given twice, and only the last would count; give one list, as in {flag} A B")
    values = tyro.cli(_unchecked(kind), args=arguments, prog=program, config=(tyro.conf.OmitArgPrefixes,))
    return _checked(kind, values)


def options_of(arguments: list[str]) -> set[str]:
    """The names of the options on a command line, as fields are named."""
    return {flag.removeprefix("--").replace("-", "_") for flag in _flags_in(arguments)}


def _flags_in(arguments: list[str]) -> list[str]:
    """The flags on a command line, as `flag_of` writes them."""
    return [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]


def flag_of(field: dataclasses.Field) -> str | None:
    """The flag of a configuration's field; None where it has none."""
    name = field.metadata.get("flag", field.name)
    return None if name is None else f"--{name.replace('_', '-')}"


def _unchecked(kind: type, flags: tuple[str, ...] | None = None) -> type:
    """A configuration without its checks, for tyro, which would draw a box around their messages."""
    hints, changed = get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        hint, default = hints[field.name], field.default
        if flag_of(field) is None or (flags is not None and field.name not in flags):
            hint = tyro.conf.Suppress[tyro.conf.Fixed[hint]]
        elif "flag" in field.metadata:
            hint = Annotated[hint, tyro.conf.arg(name=field.metadata["flag"])]
        elif dataclasses.is_dataclass(hint):
            hint = _unchecked(hint, field.metadata.get("flags"))
            default = hint(**_left_out(default))
        elif default is None:  # the docstring says what is taken then
            hint = Annotated[hint, tyro.conf.arg(help_behavior_hint="")]
        else:
            continue
        changed.append((field.name, hint, dataclasses.field(default=default)))
    namespace = {"__post_init__": lambda self: None, "__doc__": kind.__doc__, "__module__": kind.__module__}
    return dataclasses.make_dataclass(
        kind.__name__, changed, bases=(kind,), namespace=namespace, frozen=True, kw_only=True
    )


def _left_out(config: Any) -> dict[str, Any]:
    """The values of a nested configuration, with None where it chose a value itself, so that it chooses again."""
    chosen, values = type(config)(), {}
    for one in dataclasses.fields(config):
        value = getattr(config, one.name)
        values[one.name] = None if one.default is None and value == getattr(chosen, one.name) else value
    return values


def _checked(kind: type, values: Any) -> Any:
    """The configuration, with its checks, of the values that tyro read."""
    hints, given = get_type_hints(kind), {}
    for field in dataclasses.fields(kind):
        value = getattr(values, field.name)
        given[field.name] = _checked(hints[field.name], value) if dataclasses.is_dataclass(value) else value
    return kind(**given)


def run(command: Callable[[], int]) -> int:
    """Run a command and return its exit status; an error that a user can mend is one line on stderr and status 1.

    So is the loss of another process of the run. In a run of several processes, an error ends this one at once. An
    output that nobody reads any more ends the command without a line, with the status of SIGPIPE.
    """
    try:
        return command()
    except Exception as error:
        error = _without_backend(error)
        if not isinstance(error, (ValueError, OSError, FloatingPointError, ImportError)) and not _lost(error):
            raise
        if "jax" in sys.modules:
            import jax

            from butler_jax.parallel import leave

            if jax.distributed.is_initialized():
                leave(error)
        if isinstance(error, BrokenPipeError):  # as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter writes what it still holds
            return 128 + signal.SIGPIPE
        print(f"error: {error}", file=sys.stderr)
        return 1


def _without_backend(error: Exception) -> Exception:
    """The error, as a ValueError that names JAX_PLATFORMS where JAX has no such backend."""
    if str(error).startswith("Unable to initialize backend"):
        return ValueError(str(error).splitlines()[0])  # it names JAX_PLATFORMS
    found = traceback.extract_tb(error.__traceback__)[-1:]
    if isinstance(error, AssertionError) and found and found[0].name == "backends":  # JAX 0.10 says nothing more
        asked = os.environ.get("JAX_PLATFORMS", "")
        return ValueError(f"JAX has no backend for JAX_PLATFORMS={asked}: install butler-jax[cuda], or leave it out")
    return error


def _lost(error: Exception) -> bool:
    """Whether an error says that another process of the run is gone."""
    if "jax" not in sys.modules:
        return False
    from jax.errors import JaxRuntimeError

    from butler_jax.parallel import lost

    return isinstance(error, JaxRuntimeError) and lost(error)


PATIENCE = 0.5  # seconds in which the main thread, where it does not compute, flushes and ends by itself


@contextlib.contextmanager
def interrupts_end(said: str, statuses: Mapping[int, int] = {signal.SIGINT: 130}) -> Iterator[None]:
    """Inside, Ctrl-C ends the program at once, with a line on stderr and status 130, also while it compiles.

    A KeyboardInterrupt waits for what is computed, is lost where it meets a callback of the garbage collection, and
    after one JAX 0.10 crashes where the interpreter ends by itself. Afterwards these signals do not disturb the
    callbacks with which the interpreter ends.

    Args:
        said: The line.
        statuses: The signals that end the program, and the exit status of each. One that is ignored stays so.
    """

    def end(number, frame=None):
        with contextlib.suppress(OSError, RuntimeError):  # no reader is left, or the signal came during a write
            sys.stdout.flush()
        with contextlib.suppress(OSError):
            os.write(sys.stderr.fileno(), f"{said}\n".encode())
        os._exit(statuses[number])

    def end_soon(number):
        time.sleep(PATIENCE)
        end(number)

    taken = [one for one in statuses if signal.getsignal(one) is not signal.SIG_IGN]  # as a shell's background job does
    with answered(taken, end, end_soon):
        yield
    for one in taken:
        atexit.register(signal.signal, one, signal.SIG_IGN)  # the last to be registered is the first to be called
