"""How a predictor was trained, as its run's directory tells it: what a report copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from butler_jax.predictors import Predictor
from butler_jax.runs import facts, load_predictor, records, steps
from butler_jax.storage import read_object
from butler_jax.weights import Base

SETTINGS = ("data", "steps", "length", "batch_size", "learning_rate", "objective", "seed", "dtype")


def load_trained(run: str | Path, base: Base) -> tuple[Predictor, dict[str, Any]]:
    """The predictor of a run's best checkpoint, and how it was trained (`training`). Raises as load_predictor does."""
    while True:
        step, predictor = _best(run), load_predictor(run, base)
        if _best(run) == step:  # or else a training that goes on has just saved a better one
            facts = training(run, step)
            if "tokens_a_step" in facts:
                facts.setdefault("learning_rate", predictor.learning_rate)  # the default of its kind
            return predictor, facts


def training(run: str | Path, step: int | None) -> dict[str, Any]:
    """Facts about a run, JSON-ready, what is not known left out.

    run: its directory. step: the checkpoint's. SETTINGS are config.json's, tokens_a_step is length times batch_size;
    command, directory and git are those of the last start in run.json. A directory of save_predictor has none of these.
    """
    try:
        config = read_object(Path(run) / "config.json")
    except (OSError, ValueError):
        config = {}
    last = (records(Path(run)) or [{}])[-1]
    found = {"run": str(run), "step": step, **{name: config.get(name) for name in SETTINGS}}
    length, rows = config.get("length"), config.get("batch_size")
    if isinstance(length, int) and isinstance(rows, int):
        found["tokens_a_step"] = length * rows
    found |= {name: last.get(name) for name in ("command", "directory", "git")}
    return {name: value for name, value in found.items() if value is not None}


def _best(run: str | Path) -> int | None:
    """The step that load_predictor takes; None where it cannot be told."""
    directory = Path(run) / "checkpoints"
    try:
        return min(steps(directory), key=lambda n: facts(directory / str(n))["metrics"]["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
