"""Judge a base model and a trained predictor (`python eval.py --run DIR`)."""

from __future__ import annotations

import sys
from pathlib import Path

from butler_jax.command_line import read, run
from butler_jax.configs import EvalConfig, require


def main(arguments: list[str]) -> int:
    """Run one evaluation; returns the exit status. Errors of the user's making are one line, no traceback."""
    return run(lambda: judge(read(EvalConfig, arguments, "eval.py")))


def judge(config: EvalConfig) -> int:
    """Evaluate, show the table, write report.json."""
    require(
        config.run is not None or config.base is not None,
        "nothing to judge: give --run DIR (a run of train.py), or --base SPEC for a base model alone",
    )
    from butler_jax.evaluation import evaluate, run_config
    from butler_jax.weights import load_base

    spec = config.base or run_config(config.run)["base"]
    out = config.out or (Path("eval") if config.run is None else config.run / "eval")
    base = load_base(spec, dtype=config.dtype)
    report = evaluate(base, config=config, say=lambda line: print(line, flush=True))
    print()
    report.print()
    print(f"{report.about['seconds']:.0f} s in all; rows in {report.save(out)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
