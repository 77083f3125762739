"""The command `butler-jax`: it finds the function of the subcommand."""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "train": ("train.main", "Distil a predictor from a frozen base model."),
    "pretrain": ("train.main_pretrain", "Train the embedded base model tiny from scratch."),
    "eval": ("eval.main", "Evaluate a base model and trained predictors under policies and budgets."),
    "generate": ("generate.main", "Continue a prompt."),
    "bench": ("bench.main", "Time decoding, dense and sparse."),
    "info": ("info.main", "Show what a run directory holds, and how to go on."),
    "lm-eval": ("lm_eval.main", "Run lm-evaluation-harness with the model butler."),
}
"""The function of each command, and what the overview says of it."""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand, by default that of this process's arguments.

    Returns:
        The exit status: 0, 1 after an error, 2 for a command line that cannot be read.
    """
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("--help", "-h"):
        print(_overview())
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, 1)
        meant = f" (did you mean {close[0]}?)" if close else ""
        print(f"error: butler-jax has no command {name!r}{meant}; commands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[name][0].partition(".")
    return getattr(importlib.import_module(f"butler_jax.cli.{module}"), function)(rest)


def _overview() -> str:
    lines = [f"  {name:<10}{words}" for name, (_, words) in COMMANDS.items()]
    head = "usage: butler-jax COMMAND [OPTIONS]"
    return "\n".join([head, "", *lines, "", "butler-jax COMMAND --help explains the options of a command."])
