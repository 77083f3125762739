"""What `train` and `pretrain` share: signals, hosts, and errors told in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

STOPPED = "stopped; run the same command again to go on"


def run_training(read_config: Callable[[], Any], train: Callable[[Any], str]) -> int:
    """Run one training.

    Args:
      read_config: reads the configuration from the command line.
      train: trains with it and returns what to print at the end.

    Returns:
      The exit status. Errors of the user's making are one line, without a traceback.
    """

    def stop_at_once(number, frame):
        """On SIGTERM before and after the training; during the training, its loop saves first."""
        with contextlib.suppress(RuntimeError):  # the signal came while it was being written to
            sys.stdout.flush()
        os.write(sys.stderr.fileno(), f"{STOPPED}\n".encode())
        os._exit(0)  # an exception would be lost where the signal meets a callback of the garbage collection

    def command() -> int:
        config = read_config()
        from butler_jax.parallel import join_hosts

        join_hosts(config)
        last = train(config)
        import jax

        if jax.process_index() == 0:
            print(last)
        return 0

    before = signal.signal(signal.SIGTERM, stop_at_once)
    try:
        from butler_jax.cli.command_line import interrupts_end, run

        with interrupts_end(STOPPED):
            return run(command)
    except KeyboardInterrupt:  # the second one while it trains
        sys.stdout.flush()
        print(STOPPED, file=sys.stderr, flush=True)
        os._exit(130)  # JAX 0.10 crashes where the interpreter ends by itself after one
    finally:
        signal.signal(signal.SIGTERM, before)
