"""Distillation of a predictor from a frozen base: what a run needs is prepared here, and handed to the loop.

From the command to the loss:

    cli.train                                  reads the settings
    distil                                     claims the run directory, loads the base and prepares the run
    loop.fit                                   restores the newest checkpoint
    Loop.train                                 counts the steps, validates and saves
    Loop.take_step                             reads a batch and dispatches the step
    step                                       jitted, made by step.make_train_step: divides, clips and updates
    accumulate                                 only with --accumulate: the parts of the batch
    DistillationObjective.differentiate        the pass; objective.py names its hops down to the loss
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from butler_jax.data import Batch, parse_spec, read_batches, read_held_out, require_batches
from butler_jax.model import BaseModel, check_length, forward, place_model, require_loaded
from butler_jax.parallel import agree, gather, make_mesh, own_rows, place, place_batch, rows_here, shardings_for
from butler_jax.predictors import Predictor, PredictorConfig, make_predictor, predictor_class
from butler_jax.runs import about, claim, load_predictor, read_facts, steps, stored_config
from butler_jax.training.config import TrainConfig
from butler_jax.training.loop import Run, check_run, fit, open_run
from butler_jax.training.losses import require_products
from butler_jax.training.objective import DistillationObjective
from butler_jax.training.step import TrainState, learning_schedule, make_optimiser, make_train_step, start_state
from butler_jax.training.stretching import StretchedBatches, default_reach
from butler_jax.training.validation import Validation
from butler_jax.weights import Base, is_spec_of, load_base

VALIDATION_ROWS = 8
"""About how many held-out rows of text a validation reads."""


def distil(
    base: Base | None = None, config: TrainConfig | None = None, *, predictor: Predictor | None = None
) -> Predictor:
    """Train a predictor for a base, or go on from the newest checkpoint of the same settings.

    A run that would be refused is refused before anything slow.

    Args:
        base: The frozen model with its tokenizer; default: it is loaded as the settings say.
        config: The settings; default: TrainConfig().
        predictor: Where to start, with the settings of config.predictor; it is copied. Default: config.start, else
            `init_predictor`. A run that has checkpoints goes on from them.

    Returns:
        The predictor after the last step. The run's directory holds its checkpoints and metrics; `load_predictor` takes
        the checkpoint with the lowest loss of a validation.

    Raises:
        ValueError: For settings that do not fit the base, the data or the devices, and where another process trains in
            the run directory.
        OSError: Where the run directory cannot be written.
    """
    require_loaded(base, predictor)
    config = config or TrainConfig()
    if not isinstance(config, TrainConfig):
        raise ValueError(f"config must be a TrainConfig, got a {type(config).__name__}")
    predictor_class(config.predictor.kind)  # raises where it is not known
    parse_spec(config.data)
    if base is not None and config.base == "tiny":  # the configuration was not told which base it is for
        config = dataclasses.replace(config, base=base.source or base.name)
    elif base is not None and not is_spec_of(config.base, base):
        raise ValueError(
            f"the base that is given is {base.name!r}, and config.base is {config.base!r}; leave it out there"
        )
    if predictor is not None and config.start is not None:
        raise ValueError(f"a predictor is given, and the settings start from {config.start}; give one of them")
    mesh = make_mesh(config.mesh, batch_size=config.part, what=config.part_name)
    run_dir = config.run_dir or default_run_dir(config)
    with claim(run_dir):
        check_run(run_dir, config)
        _check_checkpoints(run_dir, config)
        if base is None:
            shardings = shardings_for(mesh) if mesh.size > 1 else None  # every device holds its own part from the start
            base = load_base(config.base, dtype=config.dtype, shardings=shardings)
        base.require_tokenizer()
        check_length(base.config, config.length)
        if config.dtype not in (None, str(base.dtype)):
            raise ValueError(
                f"dtype is {config.dtype}, and the base is in {base.dtype}; load it so, or leave dtype out"
            )
        farthest = default_reach(base.config)
        if (config.reach or 0) > farthest:
            what = "the window of all layers of the base," if base.config.serves_windows else "the base's context of"
            raise ValueError(f"--reach {config.reach} is beyond {what} {farthest} tokens")
        with jax.set_mesh(mesh):
            agree({"base": base.fingerprint})
            if predictor is None:
                predictor = _load_start(base, config, run_dir)
            else:
                if steps(run_dir / "checkpoints"):
                    unused = f"{run_dir} has checkpoints: it goes on from them, not from the given predictor"
                    warnings.warn(unused, stacklevel=2)
                _check_settings(predictor.config, config, "the predictor")
                predictor = jax.tree.map(jnp.copy, predictor)  # the steps of a training reuse its memory
            run, state = prepare(base, config, mesh, run_dir, predictor)
            open_run(run_dir, config)  # only after everything else was found in order
            return fit(run, state).module


def _load_start(base: Base, config: TrainConfig, run_dir: Path) -> Predictor | None:
    """The predictor that the settings start from; None where they name none, or the run has a checkpoint of its own.

    Raises:
        ValueError: It has other settings.
    """
    if config.start is None or steps(run_dir / "checkpoints"):
        return None
    predictor = load_predictor(config.start, base)
    _check_settings(predictor.config, config, f"the predictor in {config.start}")
    return predictor


def _check_checkpoints(run_dir: Path, config: TrainConfig) -> None:
    """Raise ValueError where the newest checkpoint of a run that tells it is of a predictor with other settings."""
    place = run_dir / "checkpoints"
    for step in reversed(steps(place)):
        try:
            found = stored_config(read_facts(place / str(step)))
        except (OSError, ValueError, KeyError):  # damaged, and set aside later
            continue
        return _check_settings(found, config, f"the predictor of step {step} in {run_dir}")


def _check_settings(given: PredictorConfig, config: TrainConfig, what: str) -> None:
    """Raise ValueError unless a predictor to go on from has the settings of a training."""
    differ = [
        f"{name} {theirs!r} and not {getattr(config.predictor, name)!r}"
        for name, theirs in dataclasses.asdict(given).items()
        if theirs != getattr(config.predictor, name)
    ]
    if differ:
        raise ValueError(f"{what} has {', '.join(differ)}; give its own settings")


def prepare(
    base: Base, config: TrainConfig, mesh: jax.sharding.Mesh, run_dir: Path, predictor: Predictor | None = None
) -> tuple[Run, TrainState]:
    """The pieces of a run and its state before the first step, all on the mesh, which must be set."""
    if DistillationObjective.from_config(config).loss == "squared_error":
        require_products(base.config.attention_softcap)
    model = place_model(base.model, mesh)
    source = {"length": config.length, "batch_size": config.batch_size}
    source |= {"data_dir": config.data_dir, "strict": config.strict_data}
    rows = rows_here(config.batch_size, mesh)
    reach = default_reach(base.config) if config.reach is None else config.reach

    def read(seed):
        batches = read_batches(config.data, base.tokenizer, seed=seed, rows=rows, **source)
        return StretchedBatches(batches, reach) if reach else batches

    count = max(1, VALIDATION_ROWS // config.part)
    held_out = read_held_out(config.data, base.tokenizer, count=count, **source | {"batch_size": config.part})
    always = config.selection.sinks + config.selection.recent
    longest = max(int(batch["positions"].max()) + 1 for batch in held_out)
    if longest <= always:
        raise ValueError(
            f"the documents held out of {config.data} have {longest} tokens at most, and {always} are always read as "
            "sinks and recent tokens; give longer documents, or lower --sinks or --recent"
        )
    held_out = [place_batch(own_rows(batch, mesh), mesh) for batch in held_out]
    goes_on = gather(bool(steps(run_dir / "checkpoints")))[0]  # a file system may show them to others later
    if predictor is None and goes_on:
        predictor = make_predictor(base.config, config.predictor)  # what a checkpoint is restored into
    elif predictor is None:
        calibration = read(config.seed + 1)
        predictor = init_predictor(
            Base(base.name, model, base.tokenizer, base.fingerprint),
            config.predictor,
            batches=[place_batch(next(calibration), mesh) for _ in range(config.calibration)],
            seed=config.seed,
        )
    predictor = place(predictor, predictor_class(config.predictor.kind).logical_axes, mesh)
    step, optimiser = distil_step(config)
    # Losses among chosen keys do not compare: a predictor that chooses keys of little weight has a lower one.
    objective = dataclasses.replace(DistillationObjective.from_config(config), chosen=None)
    run = Run(
        config=config,
        directory=run_dir,
        mesh=mesh,
        step=step,
        model=model,
        batches=read(config.seed),
        validate=Validation(objective, model, held_out).measure,
        about=about(base, predictor.config),
        forward_seconds=config.accumulate * time_forward(model, held_out[0], config),
    )
    return run, start_state(predictor, optimiser)


def distil_step(config: TrainConfig) -> tuple[Callable[..., Any], optax.GradientTransformation]:
    """The jitted step of these settings, as `make_train_step` describes it, and its optimiser."""
    kind = predictor_class(config.predictor.kind)
    rate = config.learning_rate or kind.learning_rate
    optimiser = make_optimiser(config, rate)
    differentiate = DistillationObjective.from_config(config).differentiate
    schedule = learning_schedule(config, rate)
    return make_train_step(differentiate, config, optimiser, schedule, kind.logical_axes), optimiser


def init_predictor(
    base: Base, config: PredictorConfig | None = None, *, batches: Sequence[Batch] = (), seed: int = 0
) -> Predictor:
    """The predictor that a training run starts from.

    Args:
        base: The model whose tokens it scores.
        config: Its kind and sizes; default: PredictorConfig().
        batches: as `read_batches` gives them. The lookahead predictor chooses its rotary pairs on them.
        seed: Of the random parameters of the other kinds.

    Raises:
        ValueError: The config is no PredictorConfig, batches is no sequence, or the lookahead predictor has no batches.
    """
    require_loaded(base)
    require_batches(batches)
    if not isinstance(config, PredictorConfig | None):
        raise ValueError(f"config must be a PredictorConfig, got {type(config).__name__}; a TrainConfig has .predictor")
    return make_predictor(base.config, config or PredictorConfig(), seed).initialise(base.model, list(batches))


def default_run_dir(config: TrainConfig) -> Path:
    """runs/BASE-PREDICTOR-DATA; a data specification of more than one word is named by a digest of it."""
    source, *more = re.split(r"[:+]", config.data)
    if more:
        source += "-" + hashlib.sha256(config.data.encode()).hexdigest()[:6]
    name = Path(config.base).name.removesuffix(".gguf")
    return Path("runs") / f"{name}-{config.predictor.kind}-{source}"


def time_forward(model: BaseModel, batch: dict, config: TrainConfig) -> float:
    """Seconds of the base's own forward pass to logits on a batch of `config.length` tokens a row: the best of three
    after compiling."""

    @jax.jit
    def run(model, batch):
        logits = forward(
            model,
            batch["tokens"],
            positions=batch["positions"],
            segments=batch["segments"],
            implementation=config.attention,
        )
        return logits.max(-1)

    short = config.length - batch["tokens"].shape[1]  # where all that is held out is shorter than a row
    batch = {name: jnp.pad(array, ((0, 0), (0, short))) for name, array in batch.items()}
    times = []
    for _ in range(4):
        began = time.perf_counter()
        jax.block_until_ready(run(model, batch))
        times.append(time.perf_counter() - began)
    return min(times[1:])
