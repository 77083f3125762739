"""Pretraining of the embedded base model: tokenizer, weights and card from text that every machine has.

From the command to the loss: `pretrain` prepares the run, `training.fit` takes its steps, the jitted step calls
`PretrainingObjective.differentiate`, and that `next_token_loss`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import jax

from butler_jax.data import open_documents, parse_spec, read_held_out
from butler_jax.model import LOGICAL_AXES, BaseConfig, BaseModel, parameter_count
from butler_jax.parallel import gather, make_mesh, on_host, own_rows, place, place_batch
from butler_jax.pretraining.config import PretrainConfig
from butler_jax.pretraining.curriculum import Curriculum
from butler_jax.pretraining.induction import wire_induction
from butler_jax.pretraining.objective import PretrainingObjective, next_token_loss
from butler_jax.runs import claim
from butler_jax.storage import to_dict
from butler_jax.text import Tokenizer, train_bpe
from butler_jax.training import (
    Run,
    TrainState,
    check_run,
    fit,
    learning_schedule,
    make_optimiser,
    make_train_step,
    open_run,
    start_state,
)
from butler_jax.weights import save_model

LEARNING_RATE = 3e-3
TOKENIZER_DOCUMENTS = 4000
VALIDATION_BATCHES = 4


def pretrain(config: PretrainConfig | None = None) -> Path | None:
    """Train a base model, or go on where a run with the same settings stopped. The defaults are the recipe of `tiny`.

    Rows are short first and as long as the context for the last `long_steps` steps.

    Returns:
        The directory that holds the model in Hugging Face layout: model.safetensors in bfloat16, and card.json, which
        says how it was made. None where Ctrl-C or SIGTERM ended the training before its last step.

    Raises:
        ValueError: Another process trains in the run directory.
        OSError: The run directory cannot be written.
    """
    config = config or PretrainConfig()
    mesh = make_mesh(config.mesh, batch_size=config.part, what=config.part_name)
    run_dir = config.run_dir or Path("runs") / "pretrain"
    parse_spec(config.data)
    with claim(run_dir):
        check_run(run_dir, config)
        tokenizer = load_or_train_tokenizer(run_dir, config)
        with jax.set_mesh(mesh):
            run, state = prepare(config, tokenizer, mesh, run_dir)
            open_run(run_dir, config)  # only after everything else was found in order
            state = fit(run, state)
            if int(state.step) < config.steps:
                return None
            out = config.out or run_dir / "model"
            write_model(out, state.module, tokenizer, config, losses=run.validate(state.module))
    return out


def prepare(
    config: PretrainConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, run_dir: Path
) -> tuple[Run, TrainState]:
    """The pieces of a run and its state before the first step, all on the mesh, which must be set."""
    base = dataclasses.replace(config.base_config(), vocab_size=tokenizer.vocab_size)
    rate = config.learning_rate or LEARNING_RATE
    optimiser = make_optimiser(config, rate)
    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    objective = PretrainingObjective(dtype, config.attention)
    schedule = learning_schedule(config, rate)
    model = place(new_model(base, config.seed), LOGICAL_AXES, mesh)
    run = Run(
        config=config,
        directory=run_dir,
        mesh=mesh,
        step=make_train_step(objective.differentiate, config, optimiser, schedule, LOGICAL_AXES),
        model=None,
        batches=Curriculum(config, tokenizer, mesh),
        validate=HeldOutLosses(read_held_out_batches(config, tokenizer, mesh), config.attention).measure,
        about={"base": to_dict(base)},
    )
    return run, start_state(model, optimiser)


def new_model(base: BaseConfig, seed: int) -> BaseModel:
    """The model before the first step."""
    return wire_induction(BaseModel(base, jax.random.key(seed)))


def read_held_out_batches(
    config: PretrainConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh
) -> dict[str, list[dict[str, jax.Array]]]:
    """Held-out batches of each source of the data, on the mesh."""
    settings = {"length": config.length, "batch_size": config.part}
    settings |= {"data_dir": config.data_dir, "strict": config.strict_data}

    def read(source):
        batches = read_held_out(source, tokenizer, count=VALIDATION_BATCHES, **settings)
        return [place_batch(own_rows(batch, mesh), mesh) for batch in batches]

    return {part.source: read(part.source) for part in parse_spec(config.data)}


@dataclass(frozen=True)
class HeldOutLosses:
    """The held-out batches of a run by their source."""

    batches: dict[str, list[dict[str, jax.Array]]]
    implementation: str | None

    def measure(self, model: BaseModel) -> dict[str, float]:
        """The loss of a model on each source, in nats a token, and their mean as validation_loss."""
        losses = {}
        for source, batches in self.batches.items():
            found = (_next_token_loss(model, batch, self.implementation) for batch in batches)
            total, count = (sum(map(float, column)) for column in zip(*found, strict=True))
            losses[f"{source}_loss"] = total / count
        return {**losses, "validation_loss": sum(losses.values()) / len(losses)}


_next_token_loss = jax.jit(next_token_loss, static_argnames="implementation")


def load_or_train_tokenizer(run_dir: Path, config: PretrainConfig) -> Tokenizer:
    """The run's BPE; the first process trains it on the data if it is not there yet, or the run was not begun."""
    path = run_dir / "model"
    there = (path / "tokenizer.json").exists() and (run_dir / "config.json").exists()
    if jax.process_index() == 0 and not there:
        texts = []
        for part in parse_spec(config.data):
            documents = open_documents(
                part.source, seed=config.seed, data_dir=config.data_dir, strict=config.strict_data
            )
            count = min(TOKENIZER_DOCUMENTS, len(documents))
            texts += [documents[len(documents) // count * i] for i in range(count)]
        path.mkdir(parents=True, exist_ok=True)
        train_bpe(texts, config.vocab_size).save(path)
    gather("the tokenizer is there")
    return Tokenizer.load(path)


def write_model(
    out: Path, model: BaseModel, tokenizer: Tokenizer, config: PretrainConfig, *, losses: dict[str, float]
) -> None:
    """Write the model and its card. All processes call it; the model is there when it returns in any of them."""
    whole = jax.tree.map(on_host, model)
    card = {
        "parameters": parameter_count(model),
        "recipe": {k: v for k, v in to_dict(config).items() if k not in ("run_dir", "out", "data_dir", "strict_data")},
        "learning_rate": config.learning_rate or LEARNING_RATE,
        "losses": losses,
        "jax": jax.__version__,
    }
    if jax.process_index() == 0:
        save_model(out, whole, tokenizer)
        (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    gather("saved")
