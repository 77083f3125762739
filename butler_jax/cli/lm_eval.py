"""`butler-jax lm-eval`: lm-evaluation-harness with the model `butler`.

The harness has no entry points for models, and its --include_path is for tasks alone. So its own command line runs here
after `butler` is registered. Every option is the harness's, as in `butler-jax lm-eval --model butler --model_args
run=DIR --tasks piqa`. The tasks of evaluation/tasks/harness_tasks are known by name: `--tasks piqa_local --metadata
directory=DIR`.
"""

from __future__ import annotations

import os
import sys

from butler_jax.cli.command_line import run


def main(arguments: list[str]) -> int:
    """Run the harness's command line; returns the exit status."""
    return run(lambda: _run_harness(arguments))


def _run_harness(arguments: list[str]) -> int:
    try:
        from lm_eval.__main__ import cli_evaluate

        from butler_jax.evaluation import TASKS_DIRECTORY

        if not {"--help", "-h"} & {*arguments}:
            from butler_jax.evaluation import ButlerLM  # noqa: F401  importing it registers the model
    except ImportError as error:
        raise ImportError(
            f"lm-evaluation-harness cannot be loaded ({error}); pip install 'butler-jax[harness]'"
        ) from None
    options = {argument.partition("=")[0] for argument in arguments}
    if options & {"--tasks", "-t"} and "--include_path" not in options:
        arguments = [*arguments, "--include_path", str(TASKS_DIRECTORY)]
    sys.argv = ["butler-jax lm-eval", *arguments]
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork after JAX has started threads
    cli_evaluate()
    return 0
