"""A text whose tokens are coloured by how often they are read, for notebooks and terminals."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Real

from butler_jax.text import Writer
from butler_jax.weights import Base

HUE = "240, 120, 0"  # orange, visible on white and on black
STRONGEST = 0.65  # opacity of a token that every set reads; the page's own text stays readable on it
SHADES = (230, 223, 216, 209, 208)  # of a terminal's 256 colours, light to strong; the text on them is black


@dataclass(frozen=True)
class ColouredText:
    """Pieces of a text, each with a number. Notebooks show it in colour, and print() does in a terminal.

    Attributes:
        pieces: The text of one token, or of the few tokens that make up a character together.
        counts: For each piece the mean of its tokens' numbers.
        tokens: How many tokens a piece has.
        most: The number of the strongest colour.
        title: A line above.
    """

    pieces: tuple[str, ...]
    counts: tuple[float, ...]
    tokens: tuple[int, ...]
    most: float
    title: str = ""

    @property
    def html(self) -> str:
        """The pieces as spans in a block, each with a tooltip: its tokens' columns and how often they are read."""
        spans, first = [], 0
        for piece, count, share, size in self._shown():
            last = first + size - 1
            which = f"token {first}" if size == 1 else f"tokens {first} to {last}"
            tip = f"{which}: {count:.4g} of {self.most:.4g}"
            style = f' style="background: rgba({HUE}, {STRONGEST * share:.3f})"' if share > 0 else ""
            spans.append(f'<span title="{html.escape(tip)}"{style}>{html.escape(piece)}</span>')
            first += size
        return f'<div style="white-space: pre-wrap; line-height: 1.6">{"".join(spans)}</div>'

    def ansi(self) -> str:
        """The text for a terminal of 256 colours, in five shades; rarely read pieces are not coloured."""
        out = []
        for piece, _, share, _ in self._shown():
            shade = round(share * len(SHADES))
            lines = piece.split("\n")  # a colour ends with its line
            out.append(
                "\n".join(f"\x1b[48;5;{SHADES[shade - 1]};38;5;16m{x}\x1b[0m" if x and shade else x for x in lines)
            )
        return "".join(out)

    def plain(self, least: float = 0.5) -> str:
        """The text without colours; pieces whose share of `most` is at least `least` stand in brackets."""
        return "".join(f"[{piece}]" if piece and share >= least else piece for piece, _, share, _ in self._shown())

    def _shown(self):
        for piece, count, size in zip(self.pieces, self.counts, self.tokens, strict=True):
            yield piece, count, float(np.clip(count / self.most, 0, 1)), size

    def _repr_html_(self) -> str:
        title = f"<p>{html.escape(self.title)}</p>" if self.title else ""
        scale = "".join(
            f'<span style="background: rgba({HUE}, {STRONGEST * i / 4:.3f}); padding: 0 0.6em">{i * 25} %</span>'
            for i in range(5)
        )
        return f"{title}<p>share of the sets that read a token: {scale}</p>{self.html}"

    def __str__(self) -> str:
        return f"{self.title}\n{self.ansi()}" if self.title else self.ansi()


def colour_tokens(
    base: Base, tokens: Sequence[int], counts: Real[np.ndarray, " T"], *, most: float | None = None, title: str = ""
) -> ColouredText:
    """Colour a text by a number of 0 or more for each token.

    Args:
        base: Has the tokenizer. Special tokens have no text.
        most: The number of the strongest colour; default: the largest one.
        title: A line above.

    Raises:
        ValueError: There are not as many numbers as tokens, or one is below 0.
    """
    tokens, counts = [int(t) for t in np.ravel(tokens)], np.ravel(counts).astype(np.float64)
    if not (len(tokens) == counts.size > 0):
        raise ValueError(f"{len(tokens)} tokens and {counts.size} numbers: give one for each token")
    if not np.all(counts >= 0):
        raise ValueError("the numbers must be 0 or more, and one is not")
    most = float(counts.max() if most is None else most) or 1.0
    pieces = _split_pieces(base.require_tokenizer(), tokens)
    ends = np.cumsum([size for _, size in pieces])
    means = [float(counts[end - size : end].mean()) for end, (_, size) in zip(ends, pieces, strict=True)]
    return ColouredText(tuple(p for p, _ in pieces), tuple(means), tuple(n for _, n in pieces), most, title)


def _split_pieces(tokenizer: Any, tokens: list[int]) -> list[tuple[str, int]]:
    """(text, number of tokens) of each piece; tokens that share a character stay together."""
    writer, found, size = Writer(tokenizer), [], 0
    for number, token in enumerate(tokens):
        piece, size = writer.add(token, last=number + 1 == len(tokens)), size + 1
        if writer.shown == number + 1:  # nothing is held back
            found.append((piece, size))
            size = 0
    return found
