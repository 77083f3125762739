"""How a predictor was trained, read from its run's directory for reports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from butler_jax.predictors import Predictor
from butler_jax.runs import load_predictor, pick_best, read_facts, records, steps
from butler_jax.storage import read_object
from butler_jax.weights import Base

SETTINGS = ("data", "steps", "length", "reach", "batch_size", "learning_rate", "objective", "seed", "dtype")


def load_trained(run: str | Path, base: Base) -> tuple[Predictor, dict[str, Any]]:
    """Load the predictor of a run's best checkpoint, and what `read_training` says of it.

    Raises:
        ValueError, FileNotFoundError: As `load_predictor` does.
    """
    while True:
        step, predictor = _find_best(run), load_predictor(run, base)
        if _find_best(run) == step:  # otherwise a training under way has just saved a better one
            training = read_training(run, step)
            if "tokens_a_step" in training:
                training.setdefault("learning_rate", predictor.learning_rate)  # the default of its kind
            return predictor, training


def read_training(run: str | Path, step: int | None) -> dict[str, Any]:
    """Facts about a run, JSON-ready; unknown ones are left out.

    Args:
        run: Its directory. One that `save_predictor` wrote has no settings and no command.
        step: The step of the checkpoint.

    Returns:
        Run, step, SETTINGS as config.json has them, tokens_a_step (length times batch_size); command, directory and git
        of the last start in run.json that took a step.
    """
    try:
        config = read_object(Path(run) / "config.json")
    except (OSError, ValueError):
        config = {}
    starts = [start for start in records(Path(run)) if (start.get("to") or 0) > (start.get("from") or 0)]
    last = starts[-1] if starts else {}
    found = {"run": str(run), "step": step, **{name: config.get(name) for name in SETTINGS}}
    length, rows = config.get("length"), config.get("batch_size")
    if isinstance(length, int) and isinstance(rows, int):
        found["tokens_a_step"] = length * rows
    found |= {name: last.get(name) for name in ("command", "directory", "git")}
    return {name: value for name, value in found.items() if value is not None}


def _find_best(run: str | Path) -> int | None:
    """The step that load_predictor takes; None where the checkpoints do not say."""
    directory = Path(run) / "checkpoints"
    try:
        return pick_best({step: read_facts(directory / str(step))["metrics"]["loss"] for step in steps(directory)})
    except (OSError, ValueError, KeyError, TypeError):
        return None
