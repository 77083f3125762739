"""lm-evaluation-harness with the model `butler`: `python -m butler_jax.lm_eval --model butler --model_args ...`.

The harness has no entry points for models and its --include_path is for tasks alone, so its own command line runs here
after `butler` is registered; every other option is the harness's. The tasks of evaluation/harness_tasks are known by
name: `--tasks piqa_local --metadata directory=DIR`. Nothing imports this file.
"""

from __future__ import annotations

import os
import sys

from butler_jax.cli.command_line import run


def main() -> int:
    """Run the harness's command line; returns the exit status. Errors of the user's making are one line."""
    return run(_harness)


def _harness() -> int:
    try:
        from lm_eval.__main__ import cli_evaluate

        from butler_jax.evaluation import TASKS_DIRECTORY, ButlerLM  # noqa: F401  importing ButlerLM registers it
    except ImportError as error:
        raise ImportError(
            f"lm-evaluation-harness cannot be loaded ({error}); pip install butler-jax[harness]"
        ) from None
    if "--tasks" in sys.argv and "--include_path" not in sys.argv:
        sys.argv += ["--include_path", str(TASKS_DIRECTORY)]
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # its bootstrap would fork after JAX has started threads
    cli_evaluate()
    return 0


if __name__ == "__main__":
    sys.exit(main())
