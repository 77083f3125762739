"""A trained predictor on disk: the best checkpoint of a run, saved alone, or in the files that are handed on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.model import compare_leaves, name_leaves, place_leaves, require_loaded
from butler_jax.predictors import CONFIG, FORMAT, WEIGHTS, Predictor, PredictorConfig, make_predictor
from butler_jax.runs.checkpoints import Checkpoints
from butler_jax.runs.finished_checkpoints import steps
from butler_jax.runs.settings import find_run, is_pretrained, pin, read_settings, run_base, with_former_defaults
from butler_jax.storage import file_in, from_dict, shown, to_dict, whole
from butler_jax.weights import load_base, open_safetensors

if TYPE_CHECKING:
    from butler_jax.weights import Base

TYPES = ("F32", "F16", "BF16", "I32")  # the lookahead predictor has a table of integers


def save_predictor(path: str | Path, predictor: Predictor, base: Base) -> None:
    """Write a predictor alone to a directory, with the name and fingerprint of its base.

    Raises:
        FileExistsError: The directory holds a predictor already.
    """
    require_loaded(base, predictor)
    path = Path(path).expanduser()
    if (path / "checkpoints").exists() or is_pretrained(path):
        raise FileExistsError(f"{path} already holds a predictor; choose another directory")
    with Checkpoints(path / "checkpoints", keep=1, about=about(base, predictor.config)) as checkpoints:
        checkpoints.save(0, {"module": predictor}, None, 0.0)


def about(base: Base, config: PredictorConfig) -> dict:
    """The facts that a checkpoint stores about its predictor and its base."""
    pinned = {} if base.revision is None else {"revision": base.revision}
    return {"base": base.name, **pinned, "fingerprint": base.fingerprint, "predictor": to_dict(config)}


def load_predictor(run: str | Path, base: Base | None = None, *, step: int | None = None) -> Predictor:
    """Load the predictor of a run directory, of `save_predictor`, of `save_pretrained`, or from the hub.

    Args:
        run: A directory, or a hub id "organisation/name" or "organisation/name@revision".
        base: The base that it was trained for. None loads the one that the files name, at its recorded revision, to
            check it.
        step: The step of the checkpoint; None takes the one with the lowest loss.

    Raises:
        FileNotFoundError: There is no such predictor or checkpoint.
        ValueError: The predictor was trained for another base, or a file is damaged.
        DamagedCheckpoint: A file is not what was written. No other checkpoint is loaded in its place.
    """
    place = find_run(run)
    require_loaded(base)
    base = load_run_base(place) if base is None else base
    if is_pretrained(place):
        if step is not None:
            raise ValueError(f"{run} has one predictor and no checkpoints; leave step out")
        return _load_pretrained(place, base)
    directory = place / "checkpoints"
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{run} has no checkpoints; give the directory of a run of butler-jax train, or of save_pretrained"
        )
    while True:
        there = steps(directory)
        try:
            return _load_predictor(directory, base, step)
        except (OSError, ValueError):
            if steps(directory) == there:  # otherwise a training removed what was being read
                raise


def load_run_base(run: str | Path | None, base: str | None = None, **options: Any) -> Base:
    """Load a base, or without one that which the files of a run or a predictor name, with options of `load_base`.

    Raises:
        FileNotFoundError: It is not there. Files of `save_predictor` and `save_pretrained` name the last part of a
            local path alone.
    """
    if base:
        return load_base(base, **options)
    name = run_base(run)
    try:
        return load_base(name, **options)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{run} was trained for the base {name!r}; give it as base= (--base): {error}"
        ) from error


def _load_pretrained(directory: Path, base: Base) -> Predictor:
    """The predictor in the files of `save_pretrained`. Sizes are compared before memory is taken for it."""
    facts = read_settings(directory)
    check_base(facts, base, directory)
    if facts.get("format") != FORMAT:
        raise ValueError(
            f"{directory} has the format {shown(facts.get('format'))} of butler-jax {shown(facts.get('version'))}, and "
            f"this version reads {FORMAT}; install that version"
        )
    try:
        config = from_dict(PredictorConfig, facts["predictor"])
        shapes = jax.eval_shape(lambda: make_predictor(base.config, config))
    except ValueError as error:
        raise ValueError(f"{directory / CONFIG}: {error}") from error
    path = file_in(directory, WEIGHTS)
    stored, wanted = open_safetensors(path, TYPES), name_leaves(shapes)
    compare_leaves(stored, wanted, path)
    arrays = {name: stored[name].read(0, leaf.shape[0]) for name, leaf in wanted.items()}
    broken = [name for name, values in arrays.items() if not np.isfinite(values.astype(np.float32)).all()]
    if broken:
        raise ValueError(f"{path}: {broken[0]} has values that are not finite; get the predictor again")
    return place_leaves(shapes, {name: jnp.asarray(arrays[name], leaf.dtype) for name, leaf in wanted.items()})


def _load_predictor(directory: Path, base: Base, step: int | None) -> Predictor:
    with Checkpoints(directory) as checkpoints:
        if not checkpoints.steps():
            raise FileNotFoundError(f"{directory} holds no finished checkpoint yet")
        step = checkpoints.best() if step is None else whole(step, "step", least=0)
        if step not in checkpoints.steps():
            there = ", ".join(map(str, checkpoints.steps()))
            raise FileNotFoundError(f"{directory} has no checkpoint of step {step}; steps: {there}")
        checkpoints.check(step)
        facts = checkpoints.facts(step)
        check_base(facts, base, directory.parent)
        config = stored_config(facts)
        return checkpoints.restore_module(step, jax.eval_shape(lambda: make_predictor(base.config, config)))


def stored_config(facts: dict) -> PredictorConfig:
    """The settings of the predictor of a checkpoint. Raises ValueError where its facts do not tell them."""
    return from_dict(PredictorConfig, with_former_defaults(facts.get("predictor")))


def check_base(facts: dict, base: Base, path: str | Path) -> None:
    """Raise ValueError, with the names of both, where a predictor belongs to another base."""
    if not isinstance(facts, dict) or {"fingerprint", "base", "predictor"} - facts.keys():
        raise ValueError(
            f"the files in {path} do not say which base and predictor they are of; give a run of butler-jax train, or "
            "a directory of save_pretrained"
        )
    if facts["fingerprint"] != base.fingerprint:
        name, own = pin(facts["base"], facts.get("revision")), pin(base.name, base.revision)
        that = "it with the weights and the context= of then" if name == own else "that base"
        raise ValueError(
            f"the predictor in {path} was trained for base {name!r} (fingerprint {facts['fingerprint']}), "
            f"not for {own!r} ({base.fingerprint}); load {that}, or train a predictor for this one"
        )
