"""What a queue is asked, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from butler_jax.decoding.generated import Piece
from butler_jax.text import Stop


@dataclass(eq=False)
class Request:
    """One prompt of a queue, and what holds for it alone.

    Attributes:
        prompt: A text or token ids.
        max_new_tokens: New tokens at most.
        seed: Of its draws. Default: its place in the queue, from 0.
        stop: Token ids and texts that end it beside the tokenizer's ends, as in `generate`.
        stream: Called with every new `Piece` as it comes; `row` is the request's place in the queue. It may cancel the
            request. If it raises an exception, this request fails and no other.
        cancelled: Whether `cancel` was called.
    """

    prompt: str | Sequence[int]
    max_new_tokens: int = 64
    seed: int | None = None
    stop: Stop = None
    stream: Callable[[Piece], Any] | None = None
    cancelled: bool = field(default=False, init=False)

    def cancel(self) -> None:
        """End the request before its next token. It may be waiting, and another thread may call this."""
        self.cancelled = True


def request_of(one: Any) -> Request:
    """A request, or one for a prompt that was given alone."""
    return one if isinstance(one, Request) else Request(one)


@dataclass
class Completion:
    """The end of a request.

    Attributes:
        number: The request's place in the queue, from 0.
        request: What was asked. A prompt that was given alone has become a `Request`.
        tokens: New ids, those at which it stopped included.
        text: What they say, up to a text to stop at; "" without a tokenizer. Of a request that was cancelled or failed
            it has the text too that was held back, since a text to stop at may have begun.
        reason: "stop": a token or a text ended it. "length": max_new_tokens did. "cancelled", or "error".
        error: Why the request failed; None where it did not.
        prompt_tokens: Tokens of the prompt.
        attended: As in `Generated`, of this row.
        attended_of_dense: As in `Generated`, of this row.
        seconds_to_first: From the moment it left the queue until its first token.
        seconds: From the moment it left the queue until its end.
    """

    number: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    reason: Literal["stop", "length", "cancelled", "error"] | None = None
    error: Exception | None = None
    prompt_tokens: int = 0
    attended: float = 1.0
    attended_of_dense: float = 1.0
    seconds_to_first: float = 0.0
    seconds: float = 0.0
