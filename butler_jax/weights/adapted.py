"""A decoder of another library as a base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from butler_jax.model import AttentionInputs, LayerWeights, ModelAdapter, split_layers
from butler_jax.weights.loading import Base, check_tokenizer, fingerprint

if TYPE_CHECKING:
    from butler_jax.text import Tokenizer

ROWS, TOKENS = 2, 3  # of the shapes that are tried


def adapt_model(model: ModelAdapter, name: str, tokenizer: Tokenizer | None = None) -> Base:
    """Make a base of an adapter, which `distil`, `evaluate` and `generate` take as one of `load_base`.

    The shapes that the adapter returns are checked against its configuration before anything is computed.

    Args:
        model: The adapter with the other library's model.
        name: What reports and checkpoints call the base.
        tokenizer: As `Tokenizer.load(directory)` reads it. Training on text and evaluation need it.

    Raises:
        TypeError: The model is no adapter, the adapter lacks a method, or a method returns another type.
        ValueError: An array has another shape than the configuration says, or the tokenizer has ids that the model has
            no embedding for.
    """
    if not isinstance(model, ModelAdapter):
        raise TypeError(f"model must be a ModelAdapter around the other library's model, got {type(model).__name__}")
    check_shapes(model)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model.config, name)
    return Base(name, model, tokenizer, fingerprint(model))


def check_shapes(model: ModelAdapter) -> None:
    """Raise ValueError where an adapter's arrays do not have the shapes of its configuration."""
    config, who = model.config, type(model).__name__
    sizes = dict(B=ROWS, T=TOKENS, E=config.width, H=config.heads, K=config.kv_heads, D=config.head_dim)
    sizes["V"] = config.vocab_size

    def check(what: str, array: Any, letters: str) -> None:
        wanted = tuple(sizes[letter] for letter in letters)
        if getattr(array, "shape", None) != wanted:
            raise ValueError(
                f"{who}.{what} is of shape {getattr(array, 'shape', None)}, but by the adapter's config it is "
                f"[{', '.join(letters)}] = {wanted}; correct the one or the other"
            )

    def of_type(what: str, kind: type, found: Any) -> Any:
        if not isinstance(found, kind):
            raise TypeError(f"{who}.{what} must return {kind.__name__}, got {type(found).__name__}")
        return found

    layers = split_layers(model)
    if len(layers) != config.layers:
        raise ValueError(f"{who}.layers has {len(layers)} layers, but the adapter's config says {config.layers}")
    positions = jax.ShapeDtypeStruct((ROWS, TOKENS), jnp.int32)
    x = jax.eval_shape(model.embed, positions)
    check("embed(tokens)", x, "BTE")
    for number, layer in enumerate(layers):
        inputs = of_type("project", AttentionInputs, jax.eval_shape(model.project, layer, x, positions))
        for name, letters in zip(AttentionInputs._fields, ("BTHD", "BTKD", "BTKD", "BTKD"), strict=True):
            check(f"project(layers[{number}], ...).{name}", getattr(inputs, name), letters)
        weights = of_type("weights", LayerWeights, jax.eval_shape(model.weights, layer))
        for name, letters in zip(LayerWeights._fields, ("E", "EHD", "HDE", "HD", "D", "H"), strict=True):
            if getattr(weights, name) is not None or name in ("attention_norm", "q", "o"):
                check(f"weights(layers[{number}]).{name}", getattr(weights, name), letters)
        y = jax.eval_shape(model.finish, layer, x, inputs.q)
        check(f"finish(layers[{number}], ...)", y, "BTE")
        if y.dtype != x.dtype:
            raise ValueError(
                f"{who}.finish(layers[{number}], ...) is {y.dtype}, but the residual stream that enters the layer is "
                f"{x.dtype}; cast it"
            )
    found = jax.eval_shape(model.logits, x)
    check("logits(x)", found, "BTV")
    if found.dtype != jnp.float32:
        raise ValueError(f"{who}.logits(x) is {found.dtype}; cast it to float32, in which likelihoods are computed")
