"""Text after prompts, dense or sparse: ragged batches, streaming, and one compilation for all lengths of a bucket.

A row's tokens depend on its prompt, its seed and the settings alone, not on the rows beside it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.decoding.capacity import bucket, room_for_all
from butler_jax.decoding.config import SamplingConfig, settle_sampling
from butler_jax.decoding.eviction import Eviction, row_axes
from butler_jax.decoding.generated import Generated, Piece
from butler_jax.decoding.plan import Plan, plan_step
from butler_jax.decoding.prefill_pass import CHUNK, Kept, run_prompts
from butler_jax.decoding.prompt_cache import PromptCache
from butler_jax.decoding.prompt_parts import read_offloaded
from butler_jax.decoding.sampling import Draws, draw_next
from butler_jax.decoding.settings import Decoding, settle_decoding
from butler_jax.decoding.shares import shares_read
from butler_jax.decoding.step import take_step
from butler_jax.model import BaseConfig, require_loaded
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.storage import whole
from butler_jax.text import Prompts, Stop, Writer, encode, read_stops

if TYPE_CHECKING:
    from butler_jax.weights import Base


def generate(
    base: Base,
    prompts: Prompts,
    *,
    predictor: Predictor | None = None,
    selection: SelectionConfig | None = None,
    policy: Policy | str | None = None,
    max_new_tokens: int = 64,
    sampling: SamplingConfig | None = None,
    stop: Stop = None,
    seed: int | Sequence[int] = 0,
    capacity: int | None = None,
    chunk: int = CHUNK,
    offload: bool = False,
    score_dtype: str | None = None,
    implementation: str | None = None,
    cache: PromptCache | None = None,
    stream: Callable[[Piece], Any] | None = None,
) -> Generated:
    """Continue prompts.

    A base with longrope takes its short factors for rows up to the original context and its long ones beyond. The token
    that makes a row longer than the original context has the row's tokens so far read again densely with the long
    factors, as transformers does. With offload such a row is refused.

    Args:
        prompts: A text, several texts, token ids, or several lists of token ids.
        predictor: A trained predictor for this base. With a predictor and no selection, SelectionConfig() is taken.
        selection: How many cached tokens a step reads. With neither predictor nor selection, decoding is dense.
        policy: What ranks the cached tokens, as in `decode_step`; its name, where it needs no preparation on text.
            Default: tokenbutler.
        sampling: How tokens are drawn. Default: as the model's generation_config.json says; greedy where it does not.
        stop: Token ids and texts that end a row beside the tokenizer's ends. An empty list: nothing ends a row. A text
            may come across tokens, and the row's text ends before it. Default: these ends alone.
        seed: The seed of row 0, from which the other rows count on; or one seed a row.
        capacity: Tokens a row has room for. Default: the next of a few sizes, so that lengths up to it share a
            compilation.
        chunk: Prompt tokens processed together, see `prefill`.
        offload: Whether keys and values lie in host memory, from the first chunk of a prompt on. To the device comes
            what a step reads, and for a chunk of a prompt one layer after another.
        score_dtype: "int8" stores k_imp in int8. Default: the precision of the base.
        implementation: Of the kernels of pallas_kernels. Default: what suits the device.
        cache: Holds what it can of the caches for the next call with one prompt, and gives what an earlier call left.
        stream: Called with every new `Piece` as it comes, rows interleaved.

    Returns:
        The new tokens and texts of every row, with timings.

    Raises:
        ValueError: A prompt is empty, an id is out of range, prompt and new tokens fit neither the capacity nor the
            context, there is a cache for several prompts, or stream is no function.
    """
    if not (stream is None or callable(stream)):
        raise ValueError(f"stream is a function of each piece, got {stream!r}; generate_stream gives the pieces")
    result = Generated()
    pieces = generate_stream(
        base,
        prompts,
        predictor=predictor,
        selection=selection,
        policy=policy,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=stop,
        seed=seed,
        capacity=capacity,
        chunk=chunk,
        offload=offload,
        score_dtype=score_dtype,
        implementation=implementation,
        cache=cache,
        result=result,
    )
    for piece in pieces:
        if stream is not None:
            stream(piece)
    return result


def generate_stream(
    base: Base,
    prompts: Prompts,
    *,
    predictor: Predictor | None = None,
    selection: SelectionConfig | None = None,
    policy: Policy | str | None = None,
    max_new_tokens: int = 64,
    sampling: SamplingConfig | None = None,
    stop: Stop = None,
    seed: int | Sequence[int] = 0,
    capacity: int | None = None,
    chunk: int = CHUNK,
    offload: bool = False,
    score_dtype: str | None = None,
    implementation: str | None = None,
    cache: PromptCache | None = None,
    result: Generated | None = None,
) -> Iterator[Piece]:
    """Continue prompts, yielding every new `Piece` as it comes, the rows interleaved.

    The settings are those of `generate`, without `stream`. They are checked before the first piece is asked for.

    Args:
        result: Filled while the pieces come.

    Raises:
        ValueError: As `generate`.
    """
    require_loaded(base, predictor)
    max_new_tokens = whole(max_new_tokens, "max_new_tokens")
    capacity = None if capacity is None else whole(capacity, "capacity")
    known = base.tokenizer, base.config.vocab_size
    rows = encode(*known, prompts)
    lengths = np.asarray([len(row) for row in rows], np.int32)
    capacity = room_for_all(lengths, max_new_tokens, capacity, base.config.context)
    options = dict(chunk=chunk, offload=offload, score_dtype=score_dtype, implementation=implementation)
    how = settle_decoding(base, predictor, selection, policy, capacity, **options)
    sampling = settle_sampling(sampling, base.generation)
    if offload and _crossing(base.config, lengths, max_new_tokens - 1).any():
        raise ValueError(
            "a row would grow beyond the original context of longrope, where its cache is computed again, which "
            "offload does not do; leave offload out, or ask for fewer new tokens"
        )
    keys, (ends, stops) = row_keys(seed, len(rows)), read_stops(*known, stop)
    if cache is not None:
        if not isinstance(cache, PromptCache):
            raise ValueError(f"cache must be a PromptCache, got a {type(cache).__name__}; write cache=PromptCache()")
        cache.check(rows)
        if not how.resumes(predictor):
            cache.clear()
            cache = None
    result = Generated() if result is None else result
    result.tokens, result.texts = [[] for _ in rows], ["" for _ in rows]
    result.prompt_tokens = lengths.tolist()
    result.sampling, result.kept_tokens = sampling, 0
    writers = [Writer(base.tokenizer, row, stops) for row in rows]
    steps = _steps(base.model, predictor, (rows, lengths, keys), how, Draws.of(sampling), max_new_tokens, cache, result)
    return _pieces(steps, writers, ends, max_new_tokens, result)


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """A random key for every row. Raises ValueError for seeds that are no whole numbers, or not as many as rows."""
    if isinstance(seed, (int, np.integer)):
        seed = [int(seed) + b for b in range(rows)]
    several = isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str)
    if not several or not all(isinstance(one, (int, np.integer)) for one in seed):
        raise ValueError(f"the seed must be a whole number, or one for every prompt, got {seed!r}")
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds do not fit {rows} prompts; give one each, or one number")
    return jax.vmap(jax.random.key)(jnp.asarray([int(one) & 0xFFFFFFFF for one in seed], jnp.uint32))


def _pieces(
    steps: Iterator[_Step], writers: list[Writer], ends: set[int], most: int, result: Generated
) -> Iterator[Piece]:
    """The tokens of every step as pieces; `result` is filled on the way."""
    rows = len(writers)
    done, read = np.zeros(rows, bool), np.zeros((2, rows))
    began = time.perf_counter()
    for step, (token, fraction) in enumerate(steps):
        values = np.asarray(token)
        if step == 0:
            result.prefill_seconds = time.perf_counter() - began
        else:
            read += np.where(done[None], 0.0, np.asarray(fraction))
        if step == 1:
            began = time.perf_counter()
        result.seconds = time.perf_counter() - began if step > 1 else 0.0
        for b in np.flatnonzero(~done):
            value = int(values[b])
            result.tokens[b].append(value)
            text = writers[b].add(value, last=value in ends or step + 1 == most)
            result.texts[b] += text
            done[b] = value in ends or writers[b].stopped
            yield Piece(int(b), value, text)
        result.attended, result.attended_of_dense = (
            [
                float(total / max(len(row) - 1, 1)) if len(row) > 1 else 1.0
                for total, row in zip(totals, result.tokens, strict=True)
            ]
            for totals in read
        )
        if done.all():
            return


def _steps(
    model, predictor, prompts, how: Decoding, draws: Draws, count: int, cache, result: Generated
) -> Iterator[_Step]:
    """The steps of a batch. Each step is yielded after the following one was dispatched.

    prompts: the tokens of every row, lengths [B], and a key a row. cache: taken when the first step is asked for, since
    the steps of another generator may free what it holds; it then holds the state.
    """
    rows, lengths, keys = prompts
    kept = None if cache is None else cache.take(model, predictor, rows[0])
    if kept is not None:
        result.kept_tokens = int(kept.tokens)
    width = min(bucket(int(lengths.max()), 16), how.capacity) if kept is None else how.capacity
    tokens = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    if how.offload:
        found = read_offloaded(model, predictor, tokens, lengths, how.plan, **how.prompts)
    else:
        first = how.after(kept, int(lengths.max()))
        found = read_prompts(model, predictor, jnp.asarray(tokens), jnp.asarray(lengths), kept, how=first)
    made, held = draw_first(*found, tokens, lengths, keys, draws)
    del prompts, kept
    if cache is not None:
        prompt = tokens[0, : lengths[0]].tolist()
        ticket = cache.hold(model, predictor, held.state, prompt, dense=how.plan.selection is None)
    crosses, so_far = _crossing(model.config, lengths, count - 1).any(), []
    for step in range(count):
        ready = made
        if step + 1 < count:
            if crosses:
                crossing = _crossing(model.config, lengths + step, 1)
                if crossing.any():
                    whole = np.zeros((len(lengths), model.config.rope.border), np.int32)
                    for row in np.flatnonzero(crossing):
                        whole[row] = [*tokens[row, : lengths[row]], *(token[row] for token in so_far)]
                    held = read_again(model, predictor, jnp.asarray(whole), jnp.asarray(crossing), held, how=how)
                so_far.append(np.asarray(ready.token))
            plan = plan_step(how.plan, model.config, how.capacity, lengths, step)
            made, held = advance(model, predictor, ready.token, keys, held, draws, plan=plan)
            if cache is not None:
                cache.add(ticket, held.state, ready.token)
        yield ready


def _crossing(config: BaseConfig, lengths: np.ndarray, new: int) -> np.ndarray:
    """Which rows of these lengths grow beyond longrope's original context with `new` tokens more, bool [B]."""
    border = config.rope.border
    if border is None:
        return np.zeros(lengths.shape, bool)
    return (lengths <= border) & (lengths + new > border)


class _Held(NamedTuple):
    """What steps hand on: the decoding state, and the tokens seen [B, V] under a penalty."""

    state: Any
    seen: jax.Array | None


class _Step(NamedTuple):
    """A step's tokens [B], and the fractions [2, B] that each row read for them, as `shares_read` gives them."""

    token: jax.Array
    attended: jax.Array


@partial(jax.jit, static_argnames=("how",))
def read_prompts(model, predictor, tokens, lengths, kept: Kept | None = None, *, how: Decoding) -> tuple[Any, Any]:
    """The logits after the last token of every prompt, and the state."""
    return run_prompts(model, tokens, lengths, predictor, how.plan, kept=kept, **how.prompts)


@partial(jax.jit, donate_argnames=("state",))
def draw_first(logits, state, tokens, lengths, keys, draws: Draws) -> tuple[_Step, _Held]:
    """The first token of every row after prompts that were read."""
    seen = None
    if draws.penalised:
        batch, width = tokens.shape
        inside = jnp.arange(width)[None] < lengths[:, None]
        place = jnp.where(inside, tokens, logits.shape[-1])
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], place].set(True, mode="drop")
    return _next(logits, state, jnp.ones((2, *lengths.shape)), seen, keys, draws)


@partial(jax.jit, static_argnames=("how",), donate_argnames=("held",))
def read_again(model, predictor, tokens, rows, held: _Held, *, how: Decoding) -> _Held:
    """The caches of the chosen rows [B] anew from all their tokens [B, T], before one more; the others as they are."""
    lengths = jnp.where(rows, tokens.shape[1], 1)
    fresh = run_prompts(model, tokens, lengths, predictor, how.plan, following=1, **how.prompts)[1]

    def take(new, old, axis=1):
        others = [n for n in range(old.ndim) if n != axis]
        return jnp.where(jnp.expand_dims(rows, others), new, old)

    state = held.state
    caches = {
        name: jax.tree.map(take, getattr(fresh, name), getattr(state, name)) for name in ("kv", "scores", "spans")
    }
    if how.plan.when == "evicting":
        new, old = fresh.memory, state.memory
        after_layers = jax.tree.map(lambda axis: axis + 1, row_axes(how.plan.policy))
        memory = jax.tree.map(take, new.memory, old.memory, after_layers)
        caches["memory"] = Eviction(take(new.kept, old.kept), memory)
    return held._replace(state=dataclasses.replace(state, **caches))


@partial(jax.jit, static_argnames=("plan",), donate_argnames=("held",))
def advance(model, predictor, token, keys, held: _Held, draws: Draws, *, plan: Plan) -> tuple[_Step, _Held]:
    """One more token for every row."""
    logits, state, found = take_step(model, token, held.state, predictor, plan)
    share = shares_read(model.config, found.attended, state.lengths)
    return _next(logits, state, share, held.seen, keys, draws)


def _next(logits, state, attended, seen, keys, draws: Draws) -> tuple[_Step, _Held]:
    """The tokens drawn from logits."""
    token, seen = draw_next(logits, seen, keys, state.steps, draws)
    return _Step(token, attended), _Held(state, seen)
