"""Pretraining of the embedded base model: tokenizer, weights and card from text that every machine has."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors.numpy import save_file

from butler_jax.data import open_documents, parse_spec, read_batches, read_held_out
from butler_jax.model import LOGICAL_AXES, BaseConfig, BaseModel, forward, parameter_count, rope_frequencies
from butler_jax.parallel import check_batch, gather, make_mesh, on_host, own_rows, place, place_batch, rows_here
from butler_jax.pretraining.config import PretrainConfig
from butler_jax.runs import claim
from butler_jax.storage import to_dict, write_whole
from butler_jax.text import Tokenizer, train_bpe
from butler_jax.training import fit, learning_schedule, make_optimiser, make_train_step, open_run, start_state

LEARNING_RATE = 3e-3
TOKENIZER_DOCUMENTS = 4000
VALIDATION_BATCHES = 4


def next_token_loss(
    model: BaseModel, batch: dict[str, Int[Array, "B T"]], implementation: str | None = None
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed cross entropy in nats of every token after the first of its document, and their number."""
    tokens, segments = batch["tokens"], batch["segments"]
    logits = forward(
        model,
        tokens,
        positions=batch["positions"],
        segments=segments,
        implementation=implementation,
    )[:, :-1]
    counted = ((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)).astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.sum((jax.nn.logsumexp(logits, axis=-1) - chosen) * counted), counted.sum()


def wire_induction(model: BaseModel) -> BaseModel:
    """A fresh model whose first two layers hold an induction circuit: what followed this token last time?

    Head 0 of layer 0 attends to the previous token, by a constant coordinate of the embeddings turned by one step of
    the fast rotary pairs, and copies its identity to a subspace B; head 0 of layer 1 looks, by the slow pairs, for the
    current token in B, and raises what it finds there. Models of this size form the circuit late, after far more text
    than this recipe reads (Olsson et al. 2022, "In-context learning and induction heads"); wired, it only has to be
    tuned. Strengths were found by the accuracy on repeated random tokens at step 0.
    """
    config = model.config
    width, dim, half = config.width, config.head_dim, config.head_dim // 2
    frequencies, _ = rope_frequencies(config.rope, dim, context=config.context, length=0)
    fast = np.flatnonzero(frequencies > 0.1)
    slow = np.flatnonzero(frequencies < 0.008)
    random = np.random.default_rng(0)
    embedding, q, k, v, o = (
        np.array(p[...], np.float32)
        for p in (model.embedding, model.layers.q, model.layers.k, model.layers.v, model.layers.o)
    )
    unit = width**-0.5
    embedding[:, 0] = 4 * unit
    constant = 4 / np.sqrt(1 + 15 / width)  # coordinate 0 after the norm

    def subspace(columns: int) -> np.ndarray:
        basis = random.normal(size=(width, columns))
        basis[0] = 0
        return np.linalg.qr(basis)[0].astype(np.float32)

    both = subspace(2 * dim)
    identity, previous, copied = both[:, :dim], both[:, dim:], subspace(dim)
    q[:2, :, 0], k[:2, :, 0] = 0, 0
    k[0, 0, 0, fast] = q[0, 0, 0, fast] = np.sqrt(60) / constant
    q[0, 0, 0, half + fast] = -q[0, 0, 0, fast] * np.sin(frequencies[fast])
    q[0, 0, 0, fast] *= np.cos(frequencies[fast])
    v[0, :, 0], o[0, 0] = identity, 3 * unit * previous.T
    dims = np.concatenate([slow, half + slow])
    q[1][:, 0, dims], k[1][:, 0, dims] = 2 * identity[:, : len(dims)], 2 * previous[:, : len(dims)]
    v[1, :, 0], o[1, 0] = copied, 12 * unit * copied.T
    model.embedding = nnx.Param(jnp.asarray(embedding))
    for name, value in (("q", q), ("k", k), ("v", v), ("o", o)):
        setattr(model.layers, name, nnx.Param(jnp.asarray(value)))
    return model


def pretrain(config: PretrainConfig | None = None) -> Path:
    """Train a base model and return the directory that holds it in Hugging Face layout.

    Rows are short first and as long as the context for the last `long_steps` steps. Goes on where a run with the same
    settings stopped. model.safetensors is bfloat16; card.json beside it says what it was made of. Raises ValueError
    where another process trains in that directory, OSError where it cannot be written.
    """
    config = config or PretrainConfig()
    mesh = make_mesh(config.mesh, batch_size=config.batch_size // config.accumulate)
    run_dir = config.run_dir or Path("runs") / "pretrain"
    parse_spec(config.data)
    with claim(run_dir):
        open_run(run_dir, config)
        return _pretrain(config, mesh, run_dir)


def _pretrain(config: PretrainConfig, mesh: jax.sharding.Mesh, run_dir: Path) -> Path:
    tokenizer = _tokenizer(run_dir, config)
    base = dataclasses.replace(config.base_config(), vocab_size=tokenizer.vocab_size)
    rate = config.learning_rate or LEARNING_RATE
    optimiser = make_optimiser(config, rate)
    dtype = config.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")

    def gradient_pass(model, _, batch, key):
        graph, parameters, rest = nnx.split(model, nnx.Param, ...)

        def loss(parameters):
            computed = jax.tree.map(lambda a: a.astype(dtype), parameters)
            return next_token_loss(nnx.merge(graph, computed, rest), batch, config.attention)

        (total, count), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        return total, count, gradients

    step = make_train_step(gradient_pass, config, optimiser, learning_schedule(config, rate), LOGICAL_AXES)
    evaluate = jax.jit(partial(next_token_loss, implementation=config.attention))
    with jax.set_mesh(mesh):
        model = wire_induction(BaseModel(base, jax.random.key(config.seed)))
        model = place(model, LOGICAL_AXES, mesh)
        state = start_state(model, optimiser)
        batches = Curriculum(config, tokenizer, mesh)
        rows = {"length": config.length, "batch_size": config.batch_size, "data_dir": config.data_dir}
        held_out = {
            part.source: [
                place_batch(own_rows(b, mesh), mesh)
                for b in read_held_out(part.source, tokenizer, count=VALIDATION_BATCHES, **rows)
            ]
            for part in parse_spec(config.data)
        }

        def validate(model):
            losses = {}
            for source, batches in held_out.items():
                total, count = (sum(map(float, x)) for x in zip(*(evaluate(model, b) for b in batches), strict=True))
                losses[f"{source}_loss"] = total / count
            return {**losses, "validation_loss": sum(losses.values()) / len(losses)}

        about = {"base": to_dict(base)}
        state = fit(step, state, None, batches, config, mesh=mesh, run_dir=run_dir, about=about, validate=validate)
        out = config.out or run_dir / "model"
        whole = jax.tree.map(on_host, state.module)
        card = {
            "parameters": parameter_count(state.module),
            "recipe": {k: v for k, v in to_dict(config).items() if k not in ("run_dir", "out", "data_dir")},
            "learning_rate": rate,
            "losses": validate(state.module),
            "jax": jax.__version__,
        }
        if jax.process_index() == 0:
            save_model(out, whole, tokenizer)
            (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
        gather("saved")  # the model is there when any process returns
    return out


class Curriculum:
    """Rows of --length, then rows of the whole context for the last --long-steps, with as many tokens a step."""

    def __init__(self, config: PretrainConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh):
        rows = max(1, config.batch_size * config.length // config.context)
        sizes = [(config.length, config.batch_size)]
        if config.long_steps:
            check_batch(rows, mesh, what=f"--long-steps have rows of {config.context} tokens: their batch size")
            sizes.append((config.context, rows))
        self._switch = config.steps - config.long_steps
        self._taken = 0
        self._streams = [
            read_batches(
                config.data,
                tokenizer,
                length=length,
                batch_size=batch_size,
                seed=config.seed + phase,
                data_dir=config.data_dir,
                whole=True,
                rows=rows_here(batch_size, mesh),
            )
            for phase, (length, batch_size) in enumerate(sizes)
        ]

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._streams[self._taken >= self._switch])
        self._taken += 1
        return batch

    def get_state(self) -> dict:
        """Where both streams stand; JSON."""
        return {"taken": self._taken, "streams": [s.get_state() for s in self._streams]}

    def set_state(self, state: dict) -> None:
        """Go on from get_state."""
        self._taken = state["taken"]
        for stream, where in zip(self._streams, state["streams"], strict=True):
            stream.set_state(where)


def _tokenizer(run_dir: Path, config: PretrainConfig) -> Tokenizer:
    """The run's BPE, trained on its data the first time, by the first process."""
    path = run_dir / "model"
    if jax.process_index() == 0 and not (path / "tokenizer.json").exists():
        texts = []
        for part in parse_spec(config.data):
            documents = open_documents(part.source, seed=config.seed, data_dir=config.data_dir)
            count = min(TOKENIZER_DOCUMENTS, len(documents))
            texts += [documents[len(documents) // count * i] for i in range(count)]
        path.mkdir(parents=True, exist_ok=True)
        train_bpe(texts, config.vocab_size).save(path)
    gather("the tokenizer is there")
    return Tokenizer.load(path)


def save_model(directory: Path, model: BaseModel, tokenizer: Tokenizer) -> None:
    """Write a Llama-family model as a Hugging Face directory: bfloat16 safetensors, config.json, tokenizer.json."""
    config = model.config
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {"model.embed_tokens.weight": model.embedding, "model.norm.weight": model.final_norm}
    if model.unembedding is not None:
        tensors["lm_head.weight"] = model.unembedding
    layers, width = model.layers, config.width
    for name, stacked, inputs in (
        ("input_layernorm", layers.attention_norm, None),
        ("self_attn.q_proj", layers.q, width),
        ("self_attn.k_proj", layers.k, width),
        ("self_attn.v_proj", layers.v, width),
        ("self_attn.o_proj", layers.o, config.heads * config.head_dim),
        ("post_attention_layernorm", layers.mlp_norm, None),
        ("mlp.gate_proj", layers.gate, width),
        ("mlp.up_proj", layers.up, width),
        ("mlp.down_proj", layers.down, config.hidden),
    ):
        for index in range(config.layers):
            weight = stacked[index]
            tensors[f"model.layers.{index}.{name}.weight"] = weight if inputs is None else weight.reshape(inputs, -1).T
    host = {n: np.ascontiguousarray(jnp.asarray(t[...], jnp.bfloat16)) for n, t in tensors.items()}
    write_whole(directory / "model.safetensors", lambda path: save_file(host, path, metadata={"format": "pt"}))
    tokenizer.save(directory)
    write_whole(directory / "config.json", json.dumps(_hugging_face_config(config, tokenizer), indent=2) + "\n")


def _hugging_face_config(config: BaseConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "torch_dtype": "bfloat16",
    }
