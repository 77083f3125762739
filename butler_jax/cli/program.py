"""The command `butler-jax`: it finds the subcommand, and each subcommand is a module of its own."""

from __future__ import annotations

import difflib
import importlib
import sys

COMMANDS = {
    "train": "Distil a predictor from a frozen base model.",
    "pretrain": "Train the embedded base model tiny from nothing.",
    "eval": "Evaluate a base model and trained predictors under policies and budgets.",
    "generate": "Continue a prompt.",
    "bench": "Time decoding, dense and sparse.",
    "info": "Show what a run directory holds, and how to go on.",
    "lm-eval": "Run lm-evaluation-harness with the model butler.",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand.

    Args:
      arguments: the subcommand and its options. Default: those of this process.

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
    return importlib.import_module(f"butler_jax.cli.{name.replace('-', '_')}").main(rest)


def _overview() -> str:
    lines = [f"  {name:<10}{words}" for name, words in COMMANDS.items()]
    head = "usage: butler-jax COMMAND [OPTIONS]"
    return "\n".join([head, "", *lines, "", "butler-jax COMMAND --help explains the options of a command."])
