"""`butler-jax eval`: evaluate a base model and trained predictors."""

from __future__ import annotations

from pathlib import Path

from butler_jax.cli.command_line import interrupts_end, options_of, read, run
from butler_jax.evaluation import EvalConfig


def main(arguments: list[str]) -> int:
    """Run one evaluation; returns the exit status."""
    return run(lambda: _evaluate(read(EvalConfig, arguments, "butler-jax eval"), options_of(arguments)))


def _evaluate(config: EvalConfig, given: set[str]) -> int:
    """Evaluate, show the tables, write the report. Ctrl-C loses only the cells under way. The first host prints.

    given: the names of the options on the command line.
    """
    config.check_given(given)
    if config.run is None and config.base is None:
        raise ValueError(
            "nothing to evaluate: give --run DIR (a run of butler-jax train), or --base SPEC for a base model alone"
        )
    out = config.out or (config.run / "eval" if config.run is not None and config.run.is_dir() else Path("eval"))
    with interrupts_end(f"stopped; the same command goes on from what is finished in {out}"):
        import jax

        from butler_jax.evaluation import check_directory, evaluate
        from butler_jax.parallel import EVALUATION_RULES, join_hosts, make_mesh, shardings_for
        from butler_jax.runs import load_run_base

        join_hosts(config)
        check_directory(out)
        shardings = shardings_for(make_mesh(config.mesh), EVALUATION_RULES) if config.mesh else None
        base = load_run_base(config.run, config.base, dtype=config.dtype, shardings=shardings)
        report = evaluate(base, config=config, keep=out, say=lambda line: print(line, flush=True))
    if jax.process_index() != 0:
        return 0
    place = report.save(out).parent  # before it is shown, since a console may refuse to
    print()
    report.print()
    print(f"{report.about['seconds']:.0f} s in all; the report is in {place}")
    return 0
