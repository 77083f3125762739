"""Prompts read part by part, each part a program of its own that the host dispatches.

`serve` reads them so between its steps. With offload all prompts are read so: keys and values lie in host memory from
the first part on, and the device holds those of one layer at a time.
"""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from butler_jax.decoding.cache import DecodeState, empty_host_store
from butler_jax.decoding.plan import Plan
from butler_jax.decoding.prefill_pass import Prefilled, check_sizes, finish, nothing_read, read_chunk
from butler_jax.model import BaseModel
from butler_jax.predictors import Predictor


def begin_reading(
    model: BaseModel, predictor: Predictor | None, batch: int, capacity: int, *, offload: bool
) -> Prefilled:
    """What reading prompts in parts begins with. It is new for every prompt, so that a row holds nothing of another."""
    filled = _nothing(model, predictor, batch=batch, capacity=capacity, stored=not offload)
    if offload:
        last, _, scores = filled = jax.device_put(filled, filled[0].sharding)  # a place each: one program for all parts
        filled = last, empty_host_store(model.config, batch, capacity, last.dtype, last.sharding), scores
    return filled


@partial(jax.jit, static_argnames=("batch", "capacity", "stored"))
def _nothing(model, predictor, *, batch: int, capacity: int, stored: bool):
    last, kv, scores = nothing_read(model, predictor, batch, capacity)
    return last, kv if stored else None, scores


@partial(jax.jit, donate_argnames=("filled",))
def read_part(model, predictor, tokens, start, lengths, following, filled: Prefilled) -> Prefilled:
    """The tokens start ... start + C - 1 [B, C] of prompts of `lengths` tokens; following: as in `prefill`."""
    return read_chunk(model, predictor, tokens, start, lengths, lengths + following, filled)


@partial(jax.jit, static_argnames=("plan", "score_dtype"), donate_argnames=("kv",))
def end_reading(
    model, lengths, last, kv, scores, *, plan: Plan, score_dtype: str | None
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Logits and state, as `prefill` gives them, of prompts whose last part was read."""
    return finish(model, (last, kv, scores), lengths, plan, score_dtype)


def read_offloaded(
    model: BaseModel,
    predictor: Predictor | None,
    tokens: Int[np.ndarray, "B T"],
    lengths: Int[np.ndarray, " B"],
    plan: Plan,
    *,
    capacity: int,
    chunk: int,
    score_dtype: str | None,
) -> tuple[Float[Array, "B V"], DecodeState]:
    """Run prompts as `prefill` does, with keys and values in host memory from the first chunk on."""
    batch, length = tokens.shape
    check_sizes(model.config, tokens, lengths, capacity, chunk)
    chunk = min(chunk, length)
    filled = begin_reading(model, predictor, batch, capacity, offload=True)
    for begin in range(0, int(lengths.max()), chunk):
        start = min(begin, length - chunk)  # the last chunk may reach back
        where = np.int32(start), lengths, np.int32(0)
        filled = read_part(model, predictor, tokens[:, start : start + chunk], *where, filled)
    return end_reading(model, lengths, *filled, plan=plan, score_dtype=score_dtype)
