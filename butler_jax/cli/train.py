"""`butler-jax train` and `butler-jax pretrain`: distil a predictor, or train the embedded base model."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from collections.abc import Callable
from typing import Any

STOPPED = "stopped; run the same command again to go on"


def main(arguments: list[str]) -> int:
    """Train a predictor; returns the exit status."""

    def read_config() -> Any:
        from butler_jax.cli.command_line import read
        from butler_jax.training import TrainConfig

        return read(TrainConfig, arguments, "butler-jax train")

    return _run(read_config, _train)


def main_pretrain(arguments: list[str]) -> int:
    """Train a base model; returns the exit status."""

    def read_config() -> Any:
        from butler_jax.cli.command_line import read
        from butler_jax.pretraining import PretrainConfig

        return read(PretrainConfig, arguments, "butler-jax pretrain")

    return _run(read_config, _pretrain)


def _train(config: Any) -> str:
    """Train a predictor; returns the last line to print."""
    from butler_jax.training import default_run_dir, distil

    distil(None, config)
    run_dir = config.run_dir or default_run_dir(config)
    command = shlex.join(["butler-jax", "eval", "--run", str(run_dir)])
    return f"the best predictor so far is in {run_dir}; evaluate it with: {command}"


def _pretrain(config: Any) -> str:
    """Train a base model; returns the last line to print."""
    from butler_jax.pretraining import pretrain

    out = pretrain(config)
    return "the model is not written yet" if out is None else f"the model is in {out}"


def _run(read_config: Callable[[], Any], train: Callable[[Any], str]) -> int:
    """Run one training; returns the exit status. SIGTERM and Ctrl-C end it at once, except in its loop."""
    from butler_jax.cli.command_line import interrupts_end, run

    def command() -> int:
        config = read_config()
        import jax

        from butler_jax.parallel import join_hosts

        join_hosts(config)
        last = train(config)
        if jax.process_index() == 0:
            print(last)
        return 0

    try:
        with interrupts_end(STOPPED, {signal.SIGTERM: 0, signal.SIGINT: 130}):
            return run(command)
    except KeyboardInterrupt:  # the second one while it trains
        sys.stdout.flush()
        print(STOPPED, file=sys.stderr, flush=True)
        os._exit(130)  # JAX 0.10 crashes where the interpreter ends by itself after one
