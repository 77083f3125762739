"""Slots: a decoding state of fixed size whose rows come and go, and the programs that fill and advance it.

A prompt is read apart, as a state of one row, a part at a time. The row then takes the place of whatever was in its
slot. Every slot has a length of its own, and a free one a length of 0, so one program advances them all.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from butler_jax.decoding.cache import DecodeState, constrain_state, empty_host_store
from butler_jax.decoding.prefill_pass import run_prompts, stream_dtype
from butler_jax.decoding.sampling import Draws, draw_next
from butler_jax.decoding.settings import Decoding
from butler_jax.decoding.shares import shares_read
from butler_jax.decoding.step import take_step
from butler_jax.decoding.store import put_row
from butler_jax.model import BaseModel
from butler_jax.predictors import Predictor, zeros_of


class Slots(NamedTuple):
    """What the rows of all slots hand on.

    Attributes:
        state: The decoding state.
        token: The newest token of every row, which is not cached yet.
        keys: For the draws.
        drawn: Tokens drawn so far.
        seen: Tokens that a row holds, under a repetition penalty; else None.
    """

    state: DecodeState
    token: Int[Array, " B"]
    keys: Key[Array, " B"]
    drawn: Int[Array, " B"]
    seen: Bool[Array, "B V"] | None


class ReadRow(NamedTuple):
    """A prompt that was read: the logits after its last token, and its state, of one row."""

    logits: Float[Array, "1 V"]
    state: DecodeState


def make_slots(model: BaseModel, predictor: Predictor | None, how: Decoding, count: int, *, penalised: bool) -> Slots:
    """Free slots. With offload, keys and values lie in host memory. penalised: whether rows remember their tokens."""
    slots = _free_slots(model, predictor, how=how, count=count, penalised=penalised)
    if how.offload:
        place = slots.token.sharding  # each has one, so that the first step compiles once
        slots = jax.device_put(slots, place)
        kv = empty_host_store(model.config, count, how.capacity, stream_dtype(model), place)
        slots = slots._replace(state=dataclasses.replace(slots.state, kv=kv))
    return slots


@partial(jax.jit, static_argnames=("how", "count", "penalised"))
def _free_slots(model, predictor, *, how: Decoding, count: int, penalised: bool) -> Slots:
    def prompts():
        ones = jnp.ones((count, 1), jnp.int32)
        return run_prompts(model, ones, ones[:, 0], predictor, how.plan, **how.prompts)

    found, state = zeros_of(prompts)
    seen = jnp.zeros(found.shape, bool) if penalised else None
    nothing = jnp.zeros(count, jnp.int32)
    state = dataclasses.replace(state, kv=None) if how.offload else constrain_state(state)
    return Slots(state, nothing, jax.vmap(jax.random.key)(nothing.astype(jnp.uint32)), nothing, seen)


@partial(jax.jit, static_argnames=("how",))
def read_whole(model, predictor, tokens, length, following, *, how: Decoding) -> ReadRow:
    """A prompt [1, T] in one pass, under a policy that evicts."""
    return ReadRow(*run_prompts(model, tokens, length, predictor, how.plan, following=following, **how.prompts))


@partial(jax.jit, static_argnames=("how",), donate_argnames=("slots",))
def admit(
    slots: Slots, row: ReadRow, slot, key, seen, draws: Draws, *, how: Decoding
) -> tuple[Int[Array, " 1"], Slots]:
    """The first token of a row, and the slots with the row in one of them; seen [1, V]: as in `Slots`."""
    nothing = jnp.zeros(1, jnp.int32)
    token, seen = draw_next(row.logits, seen, key, nothing, draws)
    if seen is not None:
        seen = slots.seen.at[slot].set(seen[0])
    at = partial(jax.lax.dynamic_update_slice_in_dim, start_index=slot, axis=0)
    lengths = at(slots.state.lengths, row.state.lengths)
    state = dataclasses.replace(_with_caches(slots.state, row.state, slot, how), lengths=lengths)
    return token, Slots(
        constrain_state(state),
        at(slots.token, token),
        slots.keys.at[slot].set(key[0]),
        at(slots.drawn, nothing + 1),
        seen,
    )


@partial(jax.jit, static_argnames=("how",), donate_argnames=("slots",))
def renew(slots: Slots, row: ReadRow, slot, *, how: Decoding) -> Slots:
    """The slots with the caches of one of them read again."""
    return slots._replace(state=constrain_state(_with_caches(slots.state, row.state, slot, how)))


def _with_caches(state: DecodeState, row: DecodeState, slot: Int[Array, ""], how: Decoding) -> DecodeState:
    """The state with the caches of a row in a slot.

    What an interval remembers stays: a row joins at a step that chooses, and one that is read again keeps its choice.
    """

    def put(rows: Any, row: Any) -> Any:
        return jax.tree.map(partial(put_row, number=slot), rows, row)

    memory = put(state.memory, row.memory) if how.plan.when == "evicting" else state.memory
    return dataclasses.replace(
        state,
        kv=state.kv.put_row(row.kv, slot),
        scores=put(state.scores, row.scores),
        memory=memory,
        spans=put(state.spans, row.spans),
    )


@partial(jax.jit, static_argnames=("how",), donate_argnames=("slots",))
def advance_slots(
    model, predictor, slots: Slots, active, steps, draws: Draws, *, how: Decoding
) -> tuple[Int[Array, " B"], Float[Array, "2 B"], Slots]:
    """One more token for every active row, and what each row read for it, as `shares_read` gives it.

    active: bool [B]; the others become free. steps: counts the steps, from a step on that chooses.
    """
    lengths = jnp.where(active, slots.state.lengths, 0)
    state = dataclasses.replace(slots.state, lengths=lengths, steps=steps)
    found, state, read = take_step(model, slots.token, state, predictor, how.plan)
    share = shares_read(model.config, read.attended, state.lengths)
    token, seen = draw_next(found, slots.seen, slots.keys, slots.drawn, draws)
    return token, share, Slots(state, token, slots.keys, slots.drawn + 1, seen)
