"""Text after prompts, dense or sparse: ragged batches, streaming, and one compilation for all lengths of a bucket.

A row's tokens depend on its prompt, its seed and the settings alone, not on the rows beside it.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from butler_jax.decoding.capacity import bucket, room_for_all
from butler_jax.decoding.config import SamplingConfig
from butler_jax.decoding.plan import Plan, check_offload, make_plan
from butler_jax.decoding.prefill_pass import CHUNK, run_prompts
from butler_jax.decoding.sampling import draw, penalise
from butler_jax.decoding.score_cache import check_score_dtype
from butler_jax.decoding.step import take_step
from butler_jax.decoding.store import offload as move_to_host
from butler_jax.model import BaseConfig
from butler_jax.policies import Policy, TokenButler, make_policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig, budget_table, room_for
from butler_jax.text import Prompts, Writer, encode, read_stops

if TYPE_CHECKING:
    from butler_jax.weights import Base


class Piece(NamedTuple):
    """One new token: its row, its id, and the text it completes.

    The text is "" without a tokenizer, in the middle of a character, and while a text to stop at may have begun.
    """

    row: int
    token: int
    text: str


@dataclass
class Generated:
    """What was generated.

    tokens: new ids of each row, those at which it stopped included. texts: what they say, up to a text to stop at; ""
    without a tokenizer. attended: per row, the mean over steps, heads and layers 1 ... of the fraction of its tokens
    that was read. prompt_tokens: per row. prefill_seconds: until the first token, compilation included; seconds: from
    the second token to the last.
    """

    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    attended: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def text(self) -> str:
        """The first row's text."""
        return self.texts[0]

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all rows, beyond the first two, which bear the prefill and compilation, over `seconds`."""
        return sum(max(len(t) - 2, 0) for t in self.tokens) / self.seconds if self.seconds else 0.0


def generate(
    base: Base,
    prompts: Prompts,
    *,
    predictor: Predictor | None = None,
    selection: SelectionConfig | None = None,
    policy: Policy | str | None = None,
    max_new_tokens: int = 64,
    sampling: SamplingConfig | None = None,
    stop: Sequence[int | str] | None = None,
    seed: int | Sequence[int] = 0,
    capacity: int | None = None,
    chunk: int = CHUNK,
    offload: bool = False,
    score_dtype: str | None = None,
    implementation: str | None = None,
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
        sampling: How tokens are drawn. Default: greedy.
        stop: Token ids and texts that end a row. A text may come across tokens, and the row's text ends before it.
            Default: the tokenizer's ends.
        seed: The seed of row 0, from which the other rows count on; or one seed a row.
        capacity: Tokens a row has room for. Default: the next of a few sizes, so that lengths up to it share a
            compilation.
        chunk: Prompt tokens processed together, see `prefill`.
        offload: Whether keys and values move to host memory after the prefill; only what a step reads comes back.
        score_dtype: "int8" stores k_imp in int8. Default: the precision of the base.
        implementation: Of the kernels of pallas_kernels. Default: what suits the device.
        stream: Called with every new `Piece` as it comes, rows interleaved.

    Returns:
        The new tokens and texts of every row, with timings.

    Raises:
        ValueError: A prompt is empty, an id is out of range, or prompt and new tokens fit neither the capacity nor the
            context.
    """
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
    stop: Sequence[int | str] | None = None,
    seed: int | Sequence[int] = 0,
    capacity: int | None = None,
    chunk: int = CHUNK,
    offload: bool = False,
    score_dtype: str | None = None,
    implementation: str | None = None,
    result: Generated | None = None,
) -> Iterator[Piece]:
    """Continue prompts, yielding every new `Piece` as it comes, the rows interleaved.

    The settings are those of `generate`, without `stream`. They are checked before the first piece is asked for.

    Args:
        result: Filled while the pieces come.

    Raises:
        ValueError: As `generate`.
    """
    if predictor is not None and selection is None:
        selection = SelectionConfig()
    policy = make_policy(policy) if isinstance(policy, str) else policy or TokenButler()
    if not (isinstance(max_new_tokens, (int, np.integer)) and max_new_tokens >= 1):
        raise ValueError(f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}")
    check_score_dtype(score_dtype)
    known = base.tokenizer, base.config.vocab_size
    rows = encode(*known, prompts)
    lengths = np.asarray([len(row) for row in rows], np.int32)
    capacity = room_for_all(lengths, max_new_tokens, capacity, base.config.context)
    plan = make_plan(base.config, capacity, selection, policy, predictor=predictor, implementation=implementation)
    if selection is not None:
        policy.require_predictor(predictor)
    if offload:
        check_offload(plan, capacity)
        if _crossing(base.config, lengths, max_new_tokens - 1).any():
            raise ValueError(
                "a row would grow beyond the original context of longrope, where its cache is computed again, which "
                "offload does not do; leave offload out, or ask for fewer new tokens"
            )
    width = min(bucket(int(lengths.max()), 16), capacity)
    tokens = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    result = Generated() if result is None else result
    result.tokens, result.texts = [[] for _ in rows], ["" for _ in rows]
    result.prompt_tokens = lengths.tolist()
    how = Decoding(plan, sampling or SamplingConfig(), capacity, chunk, score_dtype)
    keys, (ends, stops) = row_keys(seed, len(rows)), read_stops(*known, stop)
    writers = [Writer(base.tokenizer, row, stops) for row in rows]
    steps = _steps(base.model, predictor, (tokens, lengths, keys), how, max_new_tokens, offload)
    return _pieces(steps, writers, ends, max_new_tokens, result)


@dataclass(frozen=True)
class Decoding:
    """What a compiled prefill or step depends on, beside shapes; the fields are as in `generate`."""

    plan: Plan
    sampling: SamplingConfig
    capacity: int
    chunk: int
    score_dtype: str | None

    @property
    def prompts(self) -> dict[str, Any]:
        """The settings of `run_prompts`."""
        return dict(capacity=self.capacity, chunk=self.chunk, score_dtype=self.score_dtype)


def row_keys(seed: int | Sequence[int], rows: int) -> jax.Array:
    """A random key for every row. Raises ValueError for seeds that are no whole numbers, or not as many as rows."""
    if isinstance(seed, (int, np.integer)):
        seed = [int(seed) + b for b in range(rows)]
    whole = not isinstance(seed, str) and all(isinstance(one, (int, np.integer)) for one in seed)
    if not whole:
        raise ValueError(f"the seed must be a whole number, or one for every prompt, got {seed!r}")
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds do not fit {rows} prompts; give one each, or one number")
    return jax.vmap(jax.random.key)(jnp.asarray([int(one) & 0xFFFFFFFF for one in seed], jnp.uint32))


def _pieces(
    steps: Iterator[_Step], writers: list[Writer], ends: set[int], most: int, result: Generated
) -> Iterator[Piece]:
    """The tokens of every step as pieces; `result` is filled on the way."""
    rows = len(writers)
    done, read = np.zeros(rows, bool), np.zeros(rows)
    began = time.perf_counter()
    for step, (token, fraction) in enumerate(steps):
        values = np.asarray(token)
        if step == 0:
            result.prefill_seconds = time.perf_counter() - began
        else:
            read += np.where(done, 0.0, np.asarray(fraction))
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
        result.attended = [
            float(total / max(len(row) - 1, 1)) if len(row) > 1 else 1.0
            for total, row in zip(read, result.tokens, strict=True)
        ]
        if done.all():
            return


def _steps(model, predictor, prompts, how: Decoding, count: int, offload: bool) -> Iterator[_Step]:
    """The steps of a batch. Each step is yielded after the following one was dispatched.

    prompts: tokens [B, T], lengths [B] and a key for every row.
    """
    tokens, lengths, keys = prompts
    made, held = start(model, predictor, jnp.asarray(tokens), jnp.asarray(lengths), keys, how=how)
    crosses, so_far = _crossing(model.config, lengths, count - 1).any(), []
    if offload:
        near = made.token.sharding  # everything is given a place, so that the first step compiles for all of them
        made, held = jax.device_put((made, held), near)
        held = held._replace(state=dataclasses.replace(held.state, kv=move_to_host(held.state.kv)))
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
            plan = _plan_step(model.config, how, lengths, step)
            made, held = advance(model, predictor, ready.token, keys, held, plan=plan, sampling=how.sampling)
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
    """A step's tokens [B], and the fraction [B] of its tokens that each row read for them."""

    token: jax.Array
    attended: jax.Array


@partial(jax.jit, static_argnames=("how",))
def start(model, predictor, tokens, lengths, keys, *, how: Decoding) -> tuple[_Step, _Held]:
    """The first token of every row and the caches of the prompts."""
    logits, state = run_prompts(model, tokens, lengths, predictor, how.plan, **how.prompts)
    seen = None
    if how.sampling.repetition_penalty != 1:
        batch, width = tokens.shape
        inside = jnp.arange(width)[None] < lengths[:, None]
        place = jnp.where(inside, tokens, logits.shape[-1])
        seen = jnp.zeros(logits.shape, bool).at[jnp.arange(batch)[:, None], place].set(True, mode="drop")
    return _next(logits, state, jnp.ones(lengths.shape), seen, keys, how.sampling)


@partial(jax.jit, static_argnames=("how",), donate_argnames=("held",))
def read_again(model, predictor, tokens, rows, held: _Held, *, how: Decoding) -> _Held:
    """The caches of the chosen rows [B] anew from all their tokens [B, T], before one more; the others as they are."""
    lengths = jnp.where(rows, tokens.shape[1], 1)
    fresh = run_prompts(model, tokens, lengths, predictor, how.plan, following=1, **how.prompts)[1]

    def take(new, old):
        return jnp.where(jnp.expand_dims(rows, (0, *range(2, old.ndim))), new, old)

    state = held.state
    renewed = ("kv", "scores", "memory") if how.plan.when == "evicting" else ("kv", "scores")
    caches = {name: jax.tree.map(take, getattr(fresh, name), getattr(state, name)) for name in renewed}
    return held._replace(state=dataclasses.replace(state, **caches))


@partial(jax.jit, static_argnames=("plan", "sampling"), donate_argnames=("held",))
def advance(model, predictor, token, keys, held: _Held, *, plan: Plan, sampling: SamplingConfig) -> tuple[_Step, _Held]:
    """One more token for every row."""
    logits, state, found = take_step(model, token, held.state, predictor, plan)
    share = jnp.mean(found.attended[1:].astype(jnp.float32), axis=(0, 2)) / state.lengths.astype(jnp.float32)
    return _next(logits, state, share, held.seen, keys, sampling)


def _next(logits, state, attended, seen, keys, sampling) -> tuple[_Step, _Held]:
    """The tokens drawn from logits."""
    if seen is not None:
        logits = penalise(logits, seen, sampling.repetition_penalty)
    token = draw(logits, keys, state.steps, sampling)
    if seen is not None:
        seen = seen.at[jnp.arange(token.shape[0]), token].set(True)
    return _Step(token, attended), _Held(state, seen)


def _plan_step(config: BaseConfig, how: Decoding, lengths: np.ndarray, step: int) -> Plan:
    """The plan of one step: dense while no row is beyond min_context, with less room where no row needs more.

    A policy that evicts keeps from the first token on.
    """
    plan, selection = how.plan, how.plan.selection
    if selection is None or selection.min_context == 0 or plan.when == "evicting":
        return plan
    chosen_at = lengths + step + 1 - step % selection.interval
    if (chosen_at <= selection.min_context).all():
        return make_plan(config, how.capacity, None, plan.policy, implementation=plan.implementation)
    if (chosen_at <= selection.min_context).any():
        return plan
    most = int(budget_table(selection, how.capacity)[selection.min_context + 1 :].max())
    return dataclasses.replace(plan, room=room_for(selection, how.capacity, most, heads=plan.heads))
