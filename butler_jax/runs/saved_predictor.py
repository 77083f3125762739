"""A trained predictor on disk: saved alone, or as the best checkpoint of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax

from butler_jax.predictors import Predictor, PredictorConfig, make_predictor
from butler_jax.runs.checkpoints import Checkpoints
from butler_jax.runs.finished_checkpoints import steps
from butler_jax.storage import from_dict, to_dict

if TYPE_CHECKING:
    from butler_jax.weights import Base


def save_predictor(path: str | Path, predictor: Predictor, base: Base) -> None:
    """Write a predictor alone to a directory, with the name and fingerprint of its base.

    Raises:
        FileExistsError: The directory holds a predictor already.
    """
    path = Path(path)
    if (path / "checkpoints").exists():
        raise FileExistsError(f"{path} already holds checkpoints; choose another directory")
    with Checkpoints(path / "checkpoints", keep=1, about=about(base, predictor.config)) as checkpoints:
        checkpoints.save(0, {"module": predictor}, None, {"loss": 0.0})


def about(base: Base, config: PredictorConfig) -> dict:
    """The facts that a checkpoint stores about its predictor and its base."""
    return {"base": base.name, "fingerprint": base.fingerprint, "predictor": to_dict(config)}


def load_predictor(path: str | Path, base: Base, *, step: int | None = None) -> Predictor:
    """Load the predictor of a run directory, or of `save_predictor`.

    Args:
        step: The step of the checkpoint; None takes the one with the lowest loss.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ValueError: The predictor was trained for another base.
        DamagedCheckpoint: A file is not what was written. No other checkpoint is loaded in its place.
    """
    directory = Path(path) / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(f"{path} has no checkpoints; give the directory of a run of butler-jax train")
    while True:
        there = steps(directory)
        try:
            return _load_predictor(directory, base, step)
        except (OSError, ValueError):
            if steps(directory) == there:  # otherwise a training removed what was being read
                raise


def _load_predictor(directory: Path, base: Base, step: int | None) -> Predictor:
    with Checkpoints(directory) as checkpoints:
        if not checkpoints.steps():
            raise FileNotFoundError(f"{directory} holds no finished checkpoint yet")
        step = checkpoints.best() if step is None else step
        if step not in checkpoints.steps():
            there = ", ".join(map(str, checkpoints.steps()))
            raise FileNotFoundError(f"{directory} has no checkpoint of step {step}; steps: {there}")
        checkpoints.check(step)
        facts = checkpoints.facts(step)
        check_base(facts, base, directory.parent)
        config = from_dict(PredictorConfig, facts["predictor"])
        return checkpoints.restore_module(step, jax.eval_shape(lambda: make_predictor(base.config, config)))


def check_base(facts: dict, base: Base, path: str | Path) -> None:
    """Raise ValueError, with the names of both, where a checkpoint's predictor belongs to another base."""
    if not isinstance(facts, dict) or {"fingerprint", "base", "predictor"} - facts.keys():
        raise ValueError(
            f"the checkpoint in {path} does not say which base and predictor it is of; give a run of butler-jax train"
        )
    if facts["fingerprint"] != base.fingerprint:
        raise ValueError(
            f"the predictor in {path} was trained for base {facts['base']!r} (fingerprint {facts['fingerprint']}), "
            f"not for {base.name!r} ({base.fingerprint}); load that base, or train a predictor for this one"
        )
