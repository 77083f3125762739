"""The command `butler-jax`: it finds the function of the subcommand."""

from __future__ import annotations

import difflib
import importlib
import sys

from butler_jax.storage import default_cache, prepare_cache

OPTION = "--compilation-cache"

COMMANDS = {
    "train": ("train.main", "Distil a predictor from a frozen base model."),
    "pretrain": ("train.main_pretrain", "Train the embedded base model tiny from scratch."),
    "eval": ("eval.main", "Evaluate a base model and trained predictors under policies and budgets."),
    "generate": ("generate.main", "Continue a prompt, or answer messages (--chat)."),
    "bench": ("bench.main", "Time decoding, dense and sparse."),
    "info": ("info.main", "Show what a run directory holds and how to go on, or what is installed."),
    "publish": ("publish.main", "Hand a predictor on, as files or on the Hugging Face hub."),
    "lm-eval": ("lm_eval.main", "Run lm-evaluation-harness with the model butler."),
}
"""The function of each command, and what the overview says of it."""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand, by default that of this process's arguments.

    Returns:
        The exit status: 0, 1 after an error, 2 for a command line that cannot be read.
    """
    words, cache = take_option(sys.argv[1:] if arguments is None else arguments)
    name, *rest = words or ["--help"]
    if name in ("--help", "-h"):
        print(_overview())
        return 0
    if name == "--version":
        from butler_jax.cli.installation import own_version

        print(f"butler-jax {own_version()}")
        return 0
    if name not in COMMANDS or cache == "":
        close = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        told = f"butler-jax has no command {name!r}{meant}; commands: {', '.join(COMMANDS)}"
        print(f"error: {f'{OPTION} needs off or a directory' if cache == '' else told}", file=sys.stderr)
        return 2
    if "jax" not in sys.modules and not {"--help", "-h"} & {*rest}:  # later it would not be read
        try:
            prepare_cache(cache)
        except OSError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
    module, _, function = COMMANDS[name][0].partition(".")
    return getattr(importlib.import_module(f"butler_jax.cli.{module}"), function)(rest)


def take_option(words: list[str]) -> tuple[list[str], str | None]:
    """The words without --compilation-cache, and its value: None where it is not given, "" where it has none."""
    left, value, words = [], None, iter(words)
    for word in words:
        name, given, after = word.partition("=")
        if name != OPTION:
            left.append(word)
        else:
            value = after if given else next(words, "")
    return left, value


def _overview() -> str:
    lines = [f"  {name:<10}{words}" for name, (_, words) in COMMANDS.items()]
    head = "usage: butler-jax COMMAND [OPTIONS]"
    options = [
        "butler-jax COMMAND --help explains the options of a command. All commands take one more:",
        f"  {OPTION} off|DIRECTORY   where compiled programs are kept (default: {default_cache()})",
        "butler-jax --version shows the version; butler-jax info those of what is installed beside it.",
    ]
    return "\n".join([head, "", *lines, "", *options])
