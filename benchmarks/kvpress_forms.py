"""Policies that evict as kvpress does: the cache is cut once, at the end of a dense prompt.

The functions of our own policies do the work. `SnapKVLike` and `H2OLike` have a switch for each difference between our
definition and kvpress's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from butler_jax import decode_step, prefill
from butler_jax.model import BaseModel, dense_mixer, embed, run_layers
from butler_jax.policies import H2O, Evicting, Place, SnapKV, evict
from butler_jax.selection import Limits, Rows, SelectionConfig, always_chosen
from butler_jax.simulation.eviction import evicting_attention
from butler_jax.simulation.predictions import predict_next


class Counting:
    """The memory of a policy that evicts, with the number of rows so far."""

    def begin(self, shape):
        return super().begin(shape), jnp.zeros(shape[:1], jnp.int32)

    def observe(self, memory, weights, place, budget):
        return super().observe(memory[0], weights, place, budget), place.own + 1


@dataclass(frozen=True, kw_only=True)
class SnapKVLike(Counting, SnapKV):
    """SnapKV with switches for kvpress's definition.

    whole: all observed rows are kept, even where they take the whole budget. outside: attention to the observed rows is
    not pooled into the tokens before them. mean: attention is pooled by the mean.
    """

    whole: bool = False
    outside: bool = False
    mean: bool = False

    def worth(self, memory):
        rows, length = memory
        if self.outside:
            before = jnp.arange(rows.total.shape[-1], dtype=jnp.int32)[None] < (length - self.observed)[:, None]
            rows = rows._replace(total=jnp.where(before[:, None], rows.total, 0.0))
        if not self.mean:
            return super().worth(rows)
        side = self.pool // 2
        padding = ((0, 0), (0, 0), (side, side))
        total = jax.lax.reduce_window(rows.total, 0.0, jax.lax.add, (1, 1, self.pool), (1, 1, 1), padding)
        return total / self.pool

    def recent(self, budget):
        return jnp.minimum(self.observed, budget) if self.whole else super().recent(budget)


@dataclass(frozen=True, kw_only=True)
class H2OLike(Counting, H2O):
    """H2O with switches for kvpress's observed attention.

    free: recent tokens have no preference. mean: the attention of a token is divided by the number of rows that see it.
    """

    free: bool = False
    mean: bool = False

    def worth(self, memory):
        total, length = memory
        rows = jnp.maximum(length[:, None] - jnp.arange(total.shape[-1], dtype=jnp.int32)[None], 1)
        return total / rows[:, None].astype(jnp.float32) if self.mean else total

    def recent(self, budget):
        return jnp.zeros_like(budget) if self.free else super().recent(budget)


def once(
    policy: Evicting, weights: Float[Array, "B T K S"], budget: Int[Array, " B"], sinks: int, recent: int
) -> Bool[Array, "B K S"]:
    """The tokens that a policy keeps where it observes all rows of a dense prompt and then evicts down to the budget.

    weights: dense attention, summed over the group; T = S rows.
    """
    batch, length, kv_heads, _ = weights.shape
    columns = jnp.arange(length, dtype=jnp.int32)
    start = jnp.zeros((batch,), jnp.int32)
    memory, _ = jax.lax.scan(
        lambda memory, row: (policy.observe(memory, row[0], Place(start + row[1], start), budget), None),
        policy.begin((batch, kv_heads, length)),
        (jnp.swapaxes(weights, 0, 1), columns),
    )
    worth, last = policy.worth(memory), jnp.full((batch, 1), length - 1, jnp.int32)
    protected = columns[None] > (last - policy.recent(budget)[:, None])
    protected |= always_chosen(Rows(last, jnp.zeros_like(last)), columns, sinks, recent)[:, 0]
    kept = jnp.ones((batch, kv_heads, length), bool)
    return jax.lax.fori_loop(0, length - jnp.min(budget), lambda _, kept: evict(kept, worth, protected, budget), kept)


class Prompt(NamedTuple):
    """A dense pass over prompts. k, v: as cached. weights: attention summed over the group."""

    k: Float[Array, "L B T K D"]
    v: Float[Array, "L B T K D"]
    weights: Float[Array, "L B K T T"]


@jax.jit
def dense_prompt(model: BaseModel, tokens: Int[Array, "B T"]) -> Prompt:
    """Read the prompts densely."""
    length = tokens.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))[None, None, None]

    def mixer(carry, view):
        weights = attention_weights(view.q, view.k, causal)
        shown = Prompt(view.k, view.v, jnp.sum(weights, axis=2).transpose(0, 2, 1, 3))
        return attend(weights, view.v), carry, shown

    return run_layers(model, embed(model, tokens), places(tokens), mixer, None)[2]


@partial(jax.jit, static_argnames=("policy", "sinks", "recent"))
def kept_once(prompt: Prompt, budget: int, *, policy: Evicting, sinks: int, recent: int) -> Bool[Array, "L B K S"]:
    """`once` in every layer, layer 0 included; budget: tokens kept of the prompt."""
    budget = jnp.full(prompt.k.shape[1], budget, jnp.int32)
    return jax.lax.map(lambda weights: once(policy, weights, budget, sinks, recent), prompt.weights)


@jax.jit
def follow(
    model: BaseModel, prompt: Prompt, kept: Bool[Array, "L B K S"], tokens: Int[Array, "B T"]
) -> Float[Array, "B _"]:
    """nll in nats of the new tokens but the first. Each attends to the kept tokens and to the new ones up to itself."""
    length, new = kept.shape[-1], tokens.shape[1]
    causal = jnp.tril(jnp.ones((new, new), bool))[None, None]

    def mixer(carry, view):
        mine = kept[view.index][:, :, None]
        mask = [jnp.broadcast_to(a, (*mine.shape[:2], new, a.shape[-1])) for a in (mine, causal)]
        k, v = (jnp.concatenate([a[view.index], b], axis=1) for a, b in ((prompt.k, view.k), (prompt.v, view.v)))
        return attend(attention_weights(view.q, k, jnp.concatenate(mask, axis=-1)[:, :, None]), v), carry, None

    whole = jnp.full(tokens.shape[:1], length + new, jnp.int32)
    x = run_layers(model, embed(model, tokens), length + places(tokens), mixer, None, length=whole)[0]
    return predict_next(model, x, tokens, jnp.ones_like(tokens))[0][:, :-1]


def attention_weights(
    q: Float[Array, "B T H D"], k: Float[Array, "B S K D"], mask: Bool[Array, "B K G T S"]
) -> Float[Array, "B K G T S"]:
    """Softmax over the keys of the mask, written out."""
    q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1]) * q.shape[-1] ** -0.5
    return jax.nn.softmax(jnp.where(mask, jnp.einsum("btkgd,bskd->bkgts", q, k), -1e30), axis=-1)


def attend(weights: Float[Array, "B K G T S"], v: Float[Array, "B S K D"]) -> Float[Array, "B T H D"]:
    """Weights times values, heads side by side."""
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v)
    return out.reshape(*out.shape[:2], -1, out.shape[-1])


def places(tokens: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """0 ... T-1 in every row."""
    return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None], tokens.shape)


@partial(jax.jit, static_argnames=("policy", "rule", "dense"))
def kept_row_by_row(
    model: BaseModel, tokens: Int[Array, "B T"], limits: Limits, *, policy: Evicting, rule: SelectionConfig, dense: bool
) -> Bool[Array, "L B K S"]:
    """The tokens that a policy keeps for the last row, itself left out, where it evicts at every row.

    dense: layers see a dense pass. Otherwise they see a pass that attends only to the kept tokens.
    """
    segments = jnp.ones_like(tokens)
    full = dense_mixer(model.config, segments)

    def mixer(carry, view):
        found = evicting_attention(view, segments, None, policy, limits, rule)
        return full(carry, view)[0] if dense else found.output, carry, found.kept[..., :-1]

    return run_layers(model, embed(model, tokens), places(tokens), mixer, None)[2]


@partial(jax.jit, static_argnames=("selection", "length"))
def decoded(
    model: BaseModel, predictor: Any, tokens: Int[Array, "B T"], *, selection: SelectionConfig, length: int
) -> tuple[Float[Array, "B _"], Float[Array, ""]]:
    """Decode the text after a dense prompt of `length` tokens: nll as in `follow`, and the tokens that a row reads.

    The mean is over rows, KV heads and layers 1 ...
    """
    lengths = jnp.full(tokens.shape[:1], length, jnp.int32)
    _, state = prefill(model, tokens[:, :length], lengths, capacity=tokens.shape[1], predictor=predictor)

    def step(state, pair):
        logits, state, found = decode_step(model, pair[0], state, predictor=predictor, selection=selection)
        right = jnp.take_along_axis(logits, pair[1][:, None], axis=1)[:, 0]
        return state, (jax.nn.logsumexp(logits, axis=-1) - right, jnp.mean(found.attended[1:].astype(jnp.float32)))

    _, (nll, read) = jax.lax.scan(step, state, (tokens[:, length:-1].T, tokens[:, length + 1 :].T))
    return nll.T, jnp.mean(read)
