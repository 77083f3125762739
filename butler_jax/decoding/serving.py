"""A queue of prompts in a fixed number of slots: rows join where a slot is free, and leave where they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from butler_jax.decoding.capacity import bucket
from butler_jax.decoding.config import SamplingConfig, settle_sampling
from butler_jax.decoding.prefill_pass import CHUNK
from butler_jax.decoding.requests import Completion, Request, request_of
from butler_jax.decoding.sampling import Draws
from butler_jax.decoding.server import Server
from butler_jax.decoding.settings import settle_decoding
from butler_jax.model import require_loaded
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.storage import whole
from butler_jax.text import encode_prompt

if TYPE_CHECKING:
    from butler_jax.weights import Base


def serve(
    base: Base,
    requests: Iterable[Request | str | Sequence[int] | None],
    *,
    slots: int = 8,
    capacity: int | None = None,
    predictor: Predictor | None = None,
    selection: SelectionConfig | None = None,
    policy: Policy | str | None = None,
    sampling: SamplingConfig | None = None,
    chunk: int = CHUNK,
    offload: bool = False,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> Iterator[Completion]:
    """Continue the prompts of a queue, in batches that rows join and leave (continuous batching).

    A request takes the next free slot and leaves it when it ends, so that short and long ones run beside each other.
    Its tokens are those of `generate` with its prompt and its seed alone, up to the order of sums. Prompts are read in
    parts between the steps of the others, and a step of all slots is compiled once.

    A request that fails is a `Completion` with its error, and so is one that was cancelled. Neither changes another.

    Args:
        requests: A `Request`, a text or token ids each. The iterable is asked for the next one when a slot is free, so
            that it may go on for ever. It may give None where it has nothing at the moment. If it raises an exception,
            those that are running end first.
        slots: Rows that decode together.
        capacity: Tokens that a slot has room for, of the prompt and the new ones. Default: what the longest request
            needs that fits the context, where requests is a list or a tuple; else the context of the base.
        sampling: How tokens are drawn, for all requests. Default: as in `generate`.
        chunk: The most tokens of a prompt that run together. Other parts have a quarter and a sixteenth of it. Under a
            policy that evicts, a prompt runs at once.
        offload: Whether keys and values of the slots lie in host memory.

    The other settings are those of `generate`.

    Yields:
        The completions, as they end.

    Raises:
        ValueError: A setting is wrong. Settings are checked before the first completion is asked for.
    """
    if isinstance(requests, (str, Request)) or not isinstance(requests, Iterable):
        raise ValueError(f"requests must be a list or another iterable of them, got one {type(requests).__name__}")
    require_loaded(base, predictor)
    slots, context = whole(slots, "slots"), base.config.context
    if capacity is None:
        capacity = _room(base, requests) if isinstance(requests, (list, tuple)) else context
    capacity = whole(capacity, "capacity")
    if capacity > context:
        raise ValueError(f"the capacity must be 1 ... {context}, the model's context, got {capacity}")
    options = dict(chunk=chunk, offload=offload, score_dtype=score_dtype, implementation=implementation)
    how = settle_decoding(base, predictor, selection, policy, capacity, **options)
    draws = Draws.of(settle_sampling(sampling, base.generation))
    return Server(base, predictor, how, draws, slots).run(iter(requests))


def _room(base: Base, requests: Sequence[Any]) -> int:
    """Tokens that the longest request needs which fits the context."""
    needed = [1]
    for number, one in enumerate(requests):
        try:
            request = request_of(one)
            row = encode_prompt(base.tokenizer, base.config.vocab_size, request.prompt, f"request {number}")
            needed.append(len(row) + int(request.max_new_tokens) - 1)
        except (TypeError, ValueError, OverflowError):  # it fails when its turn comes
            continue
    context = base.config.context
    return min(bucket(max(n for n in needed if n <= context), 64), context)
