"""Mixtures of experts: the router of a feed-forward block, and the experts that it chooses for every token.

A token's experts are computed and no others. The pairs of token and expert are sorted by expert and cut into blocks of
one expert each, and a scan multiplies each block by that expert's weights. A decode step of one row therefore reads the
weights of its experts alone. `jax.lax.ragged_dot` computes the same, but on CPU it multiplies every row by all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from butler_jax.model.config import BaseConfig
from butler_jax.model.layers import gated
from butler_jax.parallel import map_shards, shard_index, splitting_axes, sum_shards

BLOCK = 128  # rows of a block: enough for a matrix unit, and few are padding


def route(
    h: Float[Array, "T E"],
    router: Float[Array, "E X"],
    bias: Float[Array, " X"] | None,
    *,
    count: int,
    normalise: bool,
) -> tuple[Float[Array, "T Y"], Int[Array, "T Y"]]:
    """The `count` experts of the largest probability for every token, and their weights.

    The softmax goes over all experts, in float32. Softmax over the logits of the chosen alone is the same as
    `normalise`.

    Args:
        normalise: Whether the weights of a token are divided by their sum.

    Returns:
        The weights, and the experts' indices; Y = count.
    """
    logits = jnp.einsum("te,ex->tx", h, router, preferred_element_type=jnp.promote_types(h.dtype, jnp.float32))
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)[None]
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return (weights / weights.sum(-1, keepdims=True) if normalise else weights), chosen


def limited_swiglu(
    gate: Float[Array, "*B I"], up: Float[Array, "*B I"], limit: float, alpha: float
) -> Float[Array, "*B I"]:
    """The gate of gpt-oss: g sigmoid(alpha g) (u + 1) of g = min(gate, limit) and u = up within +-limit."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return gate * jax.nn.sigmoid(gate * alpha) * (up + 1)


class Blocks(NamedTuple):
    """Pairs of token and expert, sorted by expert and cut into J blocks of W pairs.

    Attributes:
        expert: Of each block.
        tokens: The token of each pair of a block; any token where the block has fewer pairs.
        filled: Whether the block has a pair.
        place: Where each pair of token and choice is, block * W + place in the block.
    """

    expert: Int[Array, " J"]
    tokens: Int[Array, "J W"]
    filled: Array
    place: Int[Array, "T Y"]


def make_blocks(chosen: Int[Array, "T Y"], experts: int) -> Blocks:
    """Sort pairs by expert into blocks. An index outside 0 ... experts-1 belongs to no block."""
    rows, each = chosen.shape
    pairs, hit = rows * each, min(experts, rows * each)
    size = min(rows, BLOCK)
    # An expert has at most one pair of a token, so with blocks of all tokens it has one block.
    most = hit if size == rows else (pairs + hit * (size - 1)) // size
    flat = jnp.where((chosen < 0) | (chosen >= experts), experts, chosen).reshape(-1)
    order = jnp.argsort(flat, stable=True)
    rank = jnp.zeros(pairs, jnp.int32).at[order].set(jnp.arange(pairs, dtype=jnp.int32))
    counts = jnp.zeros(experts + 1, jnp.int32).at[flat].add(1)
    first_pair = jnp.cumsum(counts) - counts
    blocks = -(-counts[:experts] // size)
    last_block = jnp.cumsum(blocks)
    first_block = jnp.append(last_block - blocks, 0)
    number = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.minimum(jnp.searchsorted(last_block, number, side="right"), experts - 1).astype(jnp.int32)
    start = first_pair[expert] + (number - first_block[expert]) * size
    at = jnp.minimum(start[:, None] + jnp.arange(size, dtype=jnp.int32)[None], pairs - 1)
    offset = rank - first_pair[flat]
    place = jnp.where(flat < experts, first_block[flat] * size + offset, 0)
    return Blocks(expert, order[at] // each, number < last_block[-1], place.reshape(rows, each))


def scan_blocks(
    blocks: Blocks, compute: Callable[[Int[Array, ""], Array], Array], rows: Array, *, all_filled: bool
) -> Array:
    """compute(expert, its rows) of every block, stacked [J, W, ...]; 0 in a block without pairs, which is skipped."""

    @jax.checkpoint  # otherwise a backward pass would keep a copy of the weights for every block
    def body(_, scanned):
        expert, filled, mine = scanned
        if all_filled:
            return None, compute(expert, mine)
        shape = jax.eval_shape(compute, expert, mine)
        return None, jax.lax.cond(filled, compute, lambda *_: jnp.zeros(shape.shape, shape.dtype), expert, mine)

    return jax.lax.scan(body, None, (blocks.expert, blocks.filled, rows), unroll=len(rows) if len(rows) <= 8 else 1)[1]


def mix_experts(
    config: BaseConfig, layer: Any, h: Float[Array, "T E"], stacked: tuple[Any, Int[Array, ""]] | None = None
) -> Float[Array, "T E"]:
    """The feed-forward block of a model with experts, without its residual connection.

    On a mesh every device computes its own experts and hidden units, and the devices' sums are added.

    Args:
        layer: The parameters of a layer, as in decoder.Layers.
        h: The normed residual stream.
        stacked: All layers and the index of this one, where rows have one token. The chosen experts are then read in
            place, while a layer's own arrays would be copied first. On a mesh the width is split instead of the tokens,
            as in decoder.few_tokens.
    """
    bias = None if layer.router_bias is None else layer.router_bias[...]
    weights, chosen = route(
        h, layer.router[...], bias, count=config.experts_per_token, normalise=config.normalised_experts
    )
    few = stacked is not None
    source, *at = stacked if few else (layer,)
    matrices = tuple(w[...] for w in (source.expert_gate, source.expert_up, source.expert_down))
    above = ("layers",) * len(at)
    biases = (layer.expert_gate_bias, layer.expert_up_bias, layer.expert_down_bias)
    experts, width, hidden = matrices[0].shape[-3:]
    tokens_axis, width_axis = ("whole", "width") if few else ("batch", "whole")
    into, out = (*above, "experts", width_axis, "hidden"), (*above, "experts", "hidden", width_axis)
    inner_axes = splitting_axes("hidden", hidden)
    expert_axes = splitting_axes("experts", experts)
    width_axes = splitting_axes("width", width) if few else ()

    def own(h, weights, chosen, gate, up, down, *rest):
        at, inner_biases = rest[: len(above)], rest[len(above) :]
        count = gate.shape[-3]
        here = chosen - shard_index(expert_axes) * count
        blocks = make_blocks(here, count)
        all_filled = len(h) == 1 and not expert_axes

        def into_hidden(expert, tokens):
            x = h[tokens]
            return jnp.stack([x @ gate[*at, expert], x @ up[*at, expert]])

        found = scan_blocks(blocks, into_hidden, blocks.tokens, all_filled=all_filled)
        gates, ups = (sum_shards(part, width_axes) for part in (found[:, 0], found[:, 1]))
        if inner_biases:
            gates, ups = (
                part + bias[blocks.expert][:, None] for part, bias in zip((gates, ups), inner_biases, strict=True)
            )
        inner = activate(config, gates, ups)
        found = scan_blocks(blocks, lambda expert, z: z @ down[*at, expert], inner, all_filled=all_filled)
        mine = found.reshape(-1, found.shape[-1])[blocks.place].astype(jnp.promote_types(h.dtype, jnp.float32))
        weights = jnp.where((here >= 0) & (here < count), weights, 0.0)
        return sum_shards(jnp.einsum("ty,tye->te", weights, mine), (*expert_axes, *inner_axes))

    operands = [
        (h, (tokens_axis, width_axis)),
        (weights, (tokens_axis, "whole")),
        (chosen, (tokens_axis, "whole")),
        *zip(matrices, (into, into, out), strict=True),
        *((index, ()) for index in at),
    ]
    if biases[0] is not None:
        operands += [(bias[...], ("experts", "hidden")) for bias in biases[:2]]
    y = map_shards(
        own, operands, (tokens_axis, width_axis), jax.ShapeDtypeStruct(h.shape, jnp.promote_types(h.dtype, jnp.float32))
    )
    if biases[2] is not None:
        y = y + jnp.einsum("ty,tye->te", weights, biases[2][...][chosen].astype(y.dtype))
    return y.astype(h.dtype)


def activate(config: BaseConfig, gate: Float[Array, "*B I"], up: Float[Array, "*B I"]) -> Float[Array, "*B I"]:
    """The gated hidden units of an expert."""
    if config.swiglu_limit is not None:
        return limited_swiglu(gate, up, config.swiglu_limit, config.swiglu_alpha)
    return gated(gate, up, config.activation)
