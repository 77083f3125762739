"""The frozen decoder: one Flax NNX module tree for every family, and one scan over its layers.

Modules only hold parameters, which are stacked over the layers. Every pass through the decoder is a call of
`run_layers`. The caller passes the attention (dense, distilling, sparse or cached) as a mixer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from butler_jax.model.attention import causal_attention
from butler_jax.model.config import BaseConfig
from butler_jax.model.layers import rms_norm, rope_frequencies, rotary, rotary_angles, swiglu
from butler_jax.parallel import constrain

# Logical axes of every parameter by name; parallel.mesh maps them to mesh axes.
LOGICAL_AXES: dict[str, tuple[str, ...]] = {
    "embedding": ("vocab", "width"),
    "unembedding": ("vocab", "width"),
    "final_norm": ("norm",),
    "attention_norm": ("layers", "norm"),
    "mlp_norm": ("layers", "norm"),
    "q": ("layers", "width", "heads", "head_dim"),
    "k": ("layers", "width", "kv_heads", "head_dim"),
    "v": ("layers", "width", "kv_heads", "head_dim"),
    "o": ("layers", "heads", "head_dim", "width"),
    "q_bias": ("layers", "heads", "head_dim"),
    "k_bias": ("layers", "kv_heads", "head_dim"),
    "v_bias": ("layers", "kv_heads", "head_dim"),
    "o_bias": ("layers", "norm"),
    "q_norm": ("layers", "head_dim"),
    "k_norm": ("layers", "head_dim"),
    "gate": ("layers", "width", "hidden"),
    "up": ("layers", "width", "hidden"),
    "down": ("layers", "hidden", "width"),
    "gate_bias": ("layers", "hidden"),
    "up_bias": ("layers", "hidden"),
    "down_bias": ("layers", "norm"),
}


class Layers(nnx.Module):
    """Parameters of all decoder layers, each array with a leading axis L. Those that the family lacks are None."""

    def __init__(self, config: BaseConfig, key: Key[Array, ""], dtype: Any = jnp.float32):
        c = config
        L, E, H, K, D, hidden = c.layers, c.width, c.heads, c.kv_heads, c.head_dim, c.hidden
        keys = iter(jax.random.split(key, 7))

        def dense(*shape: int, inputs: int, gain: float = 1.0) -> nnx.Param:
            return nnx.Param((jax.random.normal(next(keys), (L, *shape)) * gain * inputs**-0.5).astype(dtype))

        quiet = (2 * L * E) ** -0.5  # the sum of all blocks starts at the scale of the embeddings

        def vector(*shape: int, fill: float, when: bool = True) -> nnx.Param | None:
            return nnx.Param(jnp.full((L, *shape), fill, dtype)) if when else None

        self.attention_norm = vector(E, fill=1.0)
        self.q, self.k, self.v = dense(E, H, D, inputs=E), dense(E, K, D, inputs=E), dense(E, K, D, inputs=E)
        self.o = dense(H, D, E, inputs=H * D, gain=quiet)
        self.q_bias, self.k_bias, self.v_bias = (vector(n, D, fill=0.0, when=c.qkv_bias) for n in (H, K, K))
        self.o_bias = vector(E, fill=0.0, when=c.output_bias)
        self.q_norm, self.k_norm = (vector(D, fill=1.0, when=c.qk_norm) for _ in range(2))
        self.mlp_norm = vector(E, fill=1.0)
        self.gate, self.up = dense(E, hidden, inputs=E), dense(E, hidden, inputs=E)
        self.down = dense(hidden, E, inputs=hidden, gain=quiet)
        self.gate_bias, self.up_bias = (vector(hidden, fill=0.0, when=c.mlp_bias) for _ in range(2))
        self.down_bias = vector(E, fill=0.0, when=c.mlp_bias)


class BaseModel(nnx.Module):
    """A decoder-only language model: embedding [V, E], stacked layers, final norm, unembedding [V, E] (None: tied)."""

    def __init__(self, config: BaseConfig, key: Key[Array, ""], dtype: Any = jnp.float32):
        first, second, third = jax.random.split(key, 3)
        self.config = config

        def table(k: Key[Array, ""]) -> nnx.Param:
            values = jax.random.normal(k, (config.vocab_size, config.width)) * config.width**-0.5
            return nnx.Param(values.astype(dtype))

        self.embedding = table(first)
        self.layers = Layers(config, second, dtype)
        self.final_norm = nnx.Param(jnp.ones((config.width,), dtype))
        self.unembedding = None if config.tied else table(third)


class LayerView(NamedTuple):
    """A layer as its mixer sees it.

    Attributes:
        index: The layer, from 0.
        weights: The layer's parameters, without the layer axis.
        x: The residual stream that enters the layer.
        q, k: Queries and keys after per-head norm and rotary.
        k_pre: Keys after per-head norm and before rotary.
        v: Values.
    """

    index: Int[Array, ""]
    weights: Layers
    x: Float[Array, "B T E"]
    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    k_pre: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]


FAR = 2**30  # the sliding window of a layer that sees everything

Mixer = Callable[[Any, LayerView], tuple[Float[Array, "B T H D"], Any, Any]]
"""(carry, view) -> (attention output, new carry, a pytree to stack over the layers or None)."""


def embed(model: BaseModel, tokens: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """Token embeddings, which enter layer 0."""
    return jnp.take(model.embedding[...], tokens, axis=0)


def logits(model: BaseModel, x: Float[Array, "*B E"]) -> Float[Array, "*B V"]:
    """Final norm and unembedding of the residual stream; float32."""
    table = model.embedding if model.unembedding is None else model.unembedding
    y = rms_norm(few_tokens(x), model.final_norm[...], model.config.norm_eps)
    found = jnp.einsum("...e,ve->...v", y, table[...], preferred_element_type=jnp.float32)
    return constrain(found, ("batch", "vocab")) if found.ndim == 2 else found


def few_tokens(x: Float[Array, "B *T E"]) -> Float[Array, "B *T E"]:
    """Split the width of x over the mesh where it holds one token a row; return x itself for more tokens.

    x is then split as the weights' rows are: the weights stay where they are, and only small partial sums are
    communicated. With many tokens a row it is cheaper to communicate the weights.
    """
    if x.ndim == 3 and x.shape[1] > 1:
        return x
    return constrain(x, ("whole",) * (x.ndim - 1) + ("width",))


def project(layer: Layers, x: Float[Array, "B T E"], eps: float) -> tuple[Array, Array, Array]:
    """Queries [B, T, H, D], keys and values [B, T, K, D], after bias and per-head norm and before rotary."""
    h = rms_norm(x, layer.attention_norm[...], eps)
    q, k, v = (jnp.einsum("bte,ehd->bthd", h, w[...]) for w in (layer.q, layer.k, layer.v))
    if layer.q_bias is not None:
        q, k, v = (a + b[...][None, None] for a, b in ((q, layer.q_bias), (k, layer.k_bias), (v, layer.v_bias)))
    if layer.q_norm is not None:
        q, k = rms_norm(q, layer.q_norm[...], eps), rms_norm(k, layer.k_norm[...], eps)
    return q, k, v


def mlp(layer: Layers, x: Float[Array, "B T E"], eps: float) -> Float[Array, "B T E"]:
    """The gated feed-forward block, without its residual connection."""
    h = rms_norm(x, layer.mlp_norm[...], eps)
    h = h.reshape(-1, x.shape[-1])  # in two dimensions XLA's CPU backward is twice as fast
    gate, up = h @ layer.gate[...], h @ layer.up[...]
    if layer.gate_bias is not None:
        gate, up = gate + layer.gate_bias[...][None], up + layer.up_bias[...][None]
    y = (swiglu(gate, up) @ layer.down[...]).reshape(x.shape)
    return y if layer.down_bias is None else y + layer.down_bias[...][None, None]


def rope_angles(
    config: BaseConfig, positions: Int[Array, "B T"], length: Int[Array, " B"] | int | None = None
) -> tuple[Float[Array, "B T F"], Float[Array, "B T F"]]:
    """Rotary cosine and sine of a model at these positions (F = rotary_dim/2).

    Args:
        length: Tokens of each row, by which longrope takes its short or its long factors; default those up to the
            row's last position.
    """
    border = config.rope.border

    def angles(length):
        found = rope_frequencies(config.rope, config.rotary_dim, context=config.context, length=length)
        return rotary_angles(positions, *found)

    if border is None:
        return angles(0)
    length = jnp.max(positions, axis=1) + 1 if length is None else jnp.asarray(length)
    beyond = jnp.broadcast_to(length > border, positions.shape[:1])[:, None, None]
    (short_cos, short_sin), (long_cos, long_sin) = angles(border), angles(border + 1)
    return jnp.where(beyond, long_cos, short_cos), jnp.where(beyond, long_sin, short_sin)


def run_layers(
    model: BaseModel,
    x: Float[Array, "B T E"],
    positions: Int[Array, "B T"],
    mixer: Mixer,
    carry: Any,
    *,
    length: Int[Array, " B"] | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, "B T E"], Any, Any]:
    """Scan x through all layers; `mixer` computes the attention of each.

    Args:
        positions: Of the tokens in their documents.
        mixer: (carry, view) -> (attention output, carry, value).
        length: Tokens of each row, as in `rope_angles`. In decoding, those that the cache holds too.
        unroll: Whether the program has every layer apart. It compiles longer. The GPU compiler copies the weights of a
            layer out of the stacked arrays in a loop, and reads them in place without one.

    Returns:
        The residual stream after the last layer, the mixer's last carry, and its values stacked over the layers.
    """
    config = model.config
    cos, sin = (a[:, :, None] for a in rope_angles(config, positions, length))

    def body(state, scanned):
        x, carry = state
        x = few_tokens(x)
        layer, index = scanned
        q, k_pre, v = project(layer, x, config.norm_eps)
        view = LayerView(index, layer, x, rotary(q, cos, sin), rotary(k_pre, cos, sin), k_pre, v)
        mixed, carry, out = mixer(carry, view)
        y = jnp.einsum("bthd,hde->bte", mixed.astype(x.dtype), layer.o[...])
        if layer.o_bias is not None:
            y = y + layer.o_bias[...][None, None]
        x = x + y
        x = x + mlp(layer, x, config.norm_eps)
        return (x, carry), out

    if not unroll:
        (x, carry), outs = jax.lax.scan(body, (x, carry), (model.layers, jnp.arange(config.layers)))
        return x, carry, outs
    state, found = (x, carry), []
    for index in range(config.layers):  # an index that is a constant decides the conditions on it while compiling
        layer = jax.tree.map(operator.itemgetter(index), model.layers)
        state, out = body(state, (layer, jnp.asarray(index, jnp.int32)))
        found.append(out)
    return *state, jax.tree.map(lambda *parts: jnp.stack(parts), *found)


def sliding_windows(config: BaseConfig) -> tuple[int, ...] | None:
    """How many tokens each layer sees, FAR where it does not slide; None where no layer slides."""
    return tuple(config.sliding_window if s else FAR for s in config.sliding) if any(config.sliding) else None


def by_sliding_window(config: BaseConfig, index: Int[Array, ""], attend: Callable[[int | None], Any]) -> Any:
    """Call `attend` with the static sliding window of layer `index` (None where the layer does not slide).

    Where layers differ, `attend` compiles for both and one of the two runs.
    """
    sliding = config.sliding
    if all(sliding) or not any(sliding):
        return attend(config.sliding_window if all(sliding) else None)
    return jax.lax.cond(jnp.asarray(sliding)[index], partial(attend, config.sliding_window), partial(attend, None))


def dense_mixer(config: BaseConfig, segments: Int[Array, "B T"] | None, implementation: str | None = None) -> Mixer:
    """The mixer of full causal attention within each document."""

    def mixer(carry, view):
        def attend(sliding_window):
            return causal_attention(
                view.q, view.k, view.v, segments=segments, sliding_window=sliding_window, implementation=implementation
            )

        return by_sliding_window(config, view.index, attend), carry, None

    return mixer


def forward(
    model: BaseModel,
    tokens: Int[Array, "B T"],
    *,
    positions: Int[Array, "B T"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits of a dense causal pass, float32.

    Args:
        positions: Of the tokens in their documents; default 0 ... T-1.
        segments: The document of each token, 0 for padding; None where each row is one document.
        implementation: As in causal_attention.

    Raises:
        ValueError: T exceeds the model's context.
    """
    check_length(model.config, tokens.shape[1])
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)
    mixer = dense_mixer(model.config, segments, implementation)
    x, _, _ = run_layers(model, embed(model, tokens), positions, mixer, None)
    return logits(model, x)


def check_length(config: BaseConfig, length: int) -> None:
    """Raise ValueError where a length in tokens exceeds the model's context."""
    if length > config.context:
        raise ValueError(
            f"length {length} is beyond the model's context of {config.context} tokens; use at most {config.context}"
        )


def parameter_count(tree: Any) -> int:
    """The number of trained parameters of a module or of its shapes from jax.eval_shape."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tree, nnx.Param)))
