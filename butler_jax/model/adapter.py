"""A decoder of another library in the place of BaseModel: distilled for, simulated, evaluated and decoded with.

A pass runs the layers of a `ModelAdapter` as it runs those of BaseModel:

    x = adapter.embed(tokens)
    for layer in adapter.layers:
        inputs = adapter.project(layer, x, positions)       q, k, v, and k before rotary
        mixed = attention of the pass                       dense, distilling, sparse or cached
        x = adapter.finish(layer, x, mixed)                 output projection, residual connections, feed-forward block
    logits = adapter.logits(x)

The parameters stay in the other library's model. They are never stacked or copied as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from butler_jax.model.config import BaseConfig
from butler_jax.model.decoder import (
    LOGICAL_AXES,
    BaseModel,
    LayerView,
    Mixer,
    embed,
    logits,
    run_apart,
    run_layers,
    weights_of,
)
from butler_jax.parallel import RULES, Rules, place


class AttentionInputs(NamedTuple):
    """What the attention of a layer reads.

    Attributes:
        q, k: Queries and keys after per-head norms and rotary. Logits are q . k / sqrt(D).
        k_pre: Keys after per-head norms and before rotary.
        v: Values.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    k_pre: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]


class LayerWeights(NamedTuple):
    """The parameters of a layer that predictors and policies read.

    Attributes:
        attention_norm: Scale of the RMS norm before the attention. Ones where the model has another norm or none: the
            predictor then reads the stream under a plain RMS norm.
        q: Projection of the queries. The lookahead predictor starts from it.
        o: Output projection. Errors in the residual stream are measured by it.
        q_bias, q_norm: Bias of the queries, and the scale of their norm per head; None where the model has none.
        sinks: Attention sinks: one more logit of every query head, without a value, in its softmax.
    """

    attention_norm: Float[Array, " E"]
    q: Float[Array, "E H D"]
    o: Float[Array, "H D E"]
    q_bias: Float[Array, "H D"] | None = None
    q_norm: Float[Array, " D"] | None = None
    sinks: Float[Array, " H"] | None = None


class ModelAdapter(nnx.Module):
    """Base class of adapters. A subclass holds the other library's model and defines the six parts below.

    The methods are pure functions of their arrays and run under jit. The model is any pytree that may be an attribute
    of an NNX module: an NNX module, or parameters in dictionaries as `nnx.data(parameters)`.

    Head dimensions are in half layout: rotary pairs dimension f with f + D/2. A model that pairs neighbours permutes q,
    k, k_pre and the columns of `LayerWeights.q`, which leaves q . k as it is. A model that scales logits otherwise
    multiplies q by the quotient. `config.attention_softcap` caps the logits of its attention.

    Attributes:
        config: The sizes of the model. `family` may be any name.
    """

    config: BaseConfig

    @property
    def layers(self) -> Sequence[Any] | Any:
        """The layers in order: a sequence of pytrees, or one pytree whose arrays have a leading axis L.

        Layers of one structure are scanned, and the time to compile does not grow with their number. Layers of
        different structures run one after the other.
        """
        raise TypeError(f"{type(self).__name__} must define layers")

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
        """Token embeddings as they enter the first layer."""
        raise TypeError(f"{type(self).__name__} must define embed")

    def project(self, layer: Any, x: Float[Array, "B T E"], positions: Int[Array, "B T"]) -> AttentionInputs:
        """Norm, projections and rotary of a layer, from the residual stream that enters it."""
        raise TypeError(f"{type(self).__name__} must define project")

    def finish(self, layer: Any, x: Float[Array, "B T E"], mixed: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """The residual stream after a layer, from the one that entered it and the attention's output per head."""
        raise TypeError(f"{type(self).__name__} must define finish")

    def logits(self, x: Float[Array, "B T E"]) -> Float[Array, "B T V"]:
        """Final norm and unembedding of the residual stream, float32."""
        raise TypeError(f"{type(self).__name__} must define logits")

    def weights(self, layer: Any) -> LayerWeights:
        """The parameters of a layer that predictors and policies read."""
        raise TypeError(f"{type(self).__name__} must define weights")


embed.register(ModelAdapter, lambda model, tokens: model.embed(tokens))


@logits.register(ModelAdapter)
def _logits(model: ModelAdapter, x: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
    return model.logits(x) if x.ndim == 3 else model.logits(x[:, None])[:, 0]


@weights_of.register(ModelAdapter)
def _weights_of(model: ModelAdapter, layers: Int[Array, "*P"] | int) -> LayerWeights:
    own = model.layers
    if isinstance(layers, int):
        return model.weights(own[layers] if _is_sequence(own) else jax.tree.map(lambda a: a[layers], own))
    every = jax.tree.map(lambda *a: jnp.stack(a), *map(model.weights, own)) if _is_sequence(own) else None
    every = jax.vmap(model.weights)(own) if every is None else every
    return jax.tree.map(lambda a: a[layers], every)  # under jit only the fields that are read are stacked


@run_layers.register(ModelAdapter)
def _run_layers(
    model: ModelAdapter,
    x: Float[Array, "B T E"],
    positions: Int[Array, "B T"],
    mixer: Mixer,
    carry: Any,
    *,
    length: Int[Array, " B"] | None = None,
    near: Int[Array, "B T"] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "B T E"], Any, Any]:
    config = model.config
    apart = np.asarray(config.near_layers) if near is not None and any(config.near_layers) else None

    def body(state, scanned):
        (x, carry), (layer, index) = state, scanned
        places = positions if apart is None else jnp.where(jnp.asarray(apart)[index], near, positions)
        inputs, cap = model.project(layer, x, places), config.attention_softcap
        view = LayerView(index, model.weights(layer), x, inputs.q, inputs.k, inputs.k_pre, inputs.v, cap)
        mixed, carry, out = mixer(carry, view)
        return (model.finish(layer, x, mixed.astype(x.dtype)), carry), out

    layers, count = model.layers, config.layers
    if not _is_sequence(layers):
        state, outs = jax.lax.scan(body, (x, carry), (layers, jnp.arange(count)))
        return *state, outs
    if _alike(layers) and not unroll and x.shape[1] > 1:  # one token a row would spend its time on fetching
        structure, fetch = jax.tree.structure(layers[0]), [partial(jax.tree.leaves, layer) for layer in layers]

        def fetched(state, index):
            return body(state, (jax.tree.unflatten(structure, jax.lax.switch(index, fetch)), index))

        state, outs = jax.lax.scan(fetched, (x, carry), jnp.arange(count))
        return *state, outs
    state, outs = run_apart(body, (x, carry), layers)
    return *state, outs


def _is_sequence(layers: Any) -> bool:
    return isinstance(layers, (Sequence, nnx.List))


def _alike(layers: Sequence[Any]) -> bool:
    """Whether all layers have one structure and arrays of the same shapes and dtypes."""
    return len({(jax.tree.structure(layer), *map(jax.typeof, jax.tree.leaves(layer))) for layer in layers}) == 1


def split_layers(model: ModelAdapter) -> list[Any]:
    """The layers of an adapter one by one; of stacked layers the shapes, as jax.eval_shape takes them."""
    if _is_sequence(model.layers):
        return list(model.layers)
    one = jax.eval_shape(lambda layers: jax.tree.map(lambda a: a[0], layers), model.layers)
    return [one] * jax.tree.leaves(model.layers)[0].shape[0]


def place_model(model: BaseModel | ModelAdapter, mesh: Mesh, rules: Rules = RULES) -> BaseModel | ModelAdapter:
    """Move a model to a mesh. BaseModel is split by its logical axes and these rules.

    A model of another library stays where it is if it lies on all devices of the mesh, as its library split it.
    Otherwise every device gets the whole of it.
    """
    if not isinstance(model, ModelAdapter):
        return place(model, LOGICAL_AXES, mesh, rules)
    everywhere, devices = NamedSharding(mesh, PartitionSpec()), set(mesh.devices.flat)
    return jax.tree.map(lambda a: a if a.sharding.device_set == devices else jax.device_put(a, everywhere), model)
