"""What a generation returns: its pieces as they come, and the whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from butler_jax.decoding.config import SamplingConfig


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

    Attributes:
        tokens: New ids of each row, those at which it stopped included.
        texts: What they say, up to a text to stop at; "" without a tokenizer.
        attended: Per row, the mean over steps, heads and served layers of the fraction of its tokens that was read.
        attended_of_dense: Per row, the mean over steps of the keys read in all layers, as a share of those that dense
            decoding reads. Where layers slide beside served ones, it reads their windows.
        prompt_tokens: Per row.
        kept_tokens: Tokens of the prompt that a `PromptCache` held, so that they were not read again.
        sampling: How the tokens were drawn.
        prefill_seconds: Until the first token, compilation included.
        seconds: From the second token to the last.
    """

    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    attended: list[float] = field(default_factory=list)
    attended_of_dense: list[float] = field(default_factory=list)
    prompt_tokens: list[int] = field(default_factory=list)
    kept_tokens: int = 0
    sampling: SamplingConfig = field(default=SamplingConfig())
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
