"""Perplexity of text under a policy: in windows that do not overlap, or strided, each with text before it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float

from butler_jax.model import BaseModel, check_length
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor
from butler_jax.selection import SelectionConfig
from butler_jax.simulation import Estimate, count_keys, ratio, simulate

Batch = dict[str, np.ndarray]


def text_windows(
    tokenizer: Any,
    text: str,
    *,
    context: int,
    tokens: int,
    batch_size: int = 1,
    stride: int | None = None,
    source: str = "the text",
) -> list[Batch]:
    """Batches [batch_size, context] of the first `tokens` tokens of a text.

    stride None: windows that do not overlap, each starting anew; every token but a window's first is predicted. Else
    see `strided`. The last window is padded. Raises ValueError where the text has fewer than two tokens.
    """
    # Tokenised in pieces that end at line breaks, and only as far as is needed.
    ids: list[int] = []
    for piece in _pieces(text):
        ids.extend(tokenizer.encode(piece) if not ids else tokenizer.encode(piece, bos=False))
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    if not len(ids) > 1:
        raise ValueError(f"{source} is empty: perplexity needs at least 2 tokens, and it has {len(ids)}")
    if stride is None:
        return windows(ids, context=context, batch_size=batch_size)
    return strided(ids, context=context, stride=stride, batch_size=batch_size)


def strided(ids: Sequence[int], *, context: int, stride: int, batch_size: int = 1) -> list[Batch]:
    """Windows of `context` tokens, each `stride` after the one before; every token but the first is predicted once.

    A token is predicted in the first window that holds it, so with at least context - stride tokens before it from the
    second window on. `counted` marks the rows that predict. Raises ValueError for a stride outside 1 ... context - 1.
    """
    if not (0 < stride < context):
        raise ValueError(f"the stride must be 1 ... {context - 1}, below the context, got {stride}")
    starts = range(0, max(len(ids) - context + stride, 1), stride)
    pieces = [list(ids[start : start + context]) for start in starts]
    whole = windows([t for p in pieces for t in p], context=min(context, len(ids)), batch_size=batch_size)
    seen = 0
    for row, start in enumerate(starts):
        batch, place = whole[row // len(whole[0]["tokens"])], row % len(whole[0]["tokens"])
        counted = batch.setdefault("counted", np.zeros(batch["tokens"].shape, bool))
        end = min(start + context, len(ids))
        counted[place, max(seen - 1 - start, 0) : end - start - 1] = True
        seen = end
    return whole


def _pieces(text: str, size: int = 200_000) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            border = text.rfind("\n", start, end)
            end = border if border > start else end
        yield text[start:end]
        start = end


def windows(ids: Sequence[int], *, context: int, batch_size: int = 1) -> list[Batch]:
    """Token ids cut into windows of `context`, padded with segment 0, batch_size windows a batch."""
    count = -(-len(ids) // context)
    batch_size = min(batch_size, count)
    width = min(context, len(ids))
    rows = -(-count // batch_size) * batch_size
    tokens, segments = np.zeros((2, rows, width), np.int32)
    for row in range(count):
        window = ids[row * context : (row + 1) * context]
        tokens[row, : len(window)], segments[row, : len(window)] = window, 1
    positions = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
    whole = {"tokens": tokens, "segments": segments, "positions": positions}
    return [{n: a[i : i + batch_size] for n, a in whole.items()} for i in range(0, rows, batch_size)]


def read_text(path: Path) -> str:
    """A text file. Raises FileNotFoundError, and ValueError where it is empty or not UTF-8, saying so."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such text file: {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    if not text.strip():
        raise ValueError(f"{path} is empty; perplexity needs some text")
    return text


@dataclass(frozen=True)
class TextResult:
    """What a policy did to some text: sums over the counted rows of each of N sequences, and how many those are.

    A row counts where its next token is predicted. nll: in nats. attended: fraction of the causal keys read in layers
    1 .... read, held: keys read, and keys there were, in all layers and KV heads. divergence, agrees: against a
    reference (see `Simulated`), None without.
    """

    rows: Float[np.ndarray, " N"]
    nll: Float[np.ndarray, " N"]
    attended: Float[np.ndarray, " N"]
    read: Float[np.ndarray, " N"]
    held: Float[np.ndarray, " N"]
    divergence: Float[np.ndarray, " N"] | None = None
    agrees: Float[np.ndarray, " N"] | None = None

    @property
    def perplexity(self) -> Estimate:
        """exp of the mean negative log-likelihood."""
        return ratio(self.nll, self.rows).exp()

    def over(self, other: TextResult) -> Estimate:
        """By what fraction the perplexity is above that of another pass over the same text; paired by sequence."""
        log = ratio(self.nll - other.nll, self.rows)
        return log.through(math.expm1, math.exp(log.value))

    def mean(self, name: str) -> Estimate:
        """The mean over rows of one of the sums."""
        return ratio(getattr(self, name), self.rows)


def counted_rows(batch: Batch) -> Bool[np.ndarray, "B T"]:
    """Rows whose next token is predicted: of the same document, and inside `counted` where a batch has that."""
    segments = batch["segments"]
    counted = np.zeros(segments.shape, bool)
    counted[:, :-1] = (segments[:, :-1] > 0) & (segments[:, 1:] == segments[:, :-1])
    return counted & batch["counted"] if "counted" in batch else counted


def predicted_tokens(batches: Sequence[Batch]) -> int:
    """How many tokens of the batches are predicted."""
    return sum(int(counted_rows(b).sum()) for b in batches)


def measure_perplexity(
    model: BaseModel,
    batches: Sequence[Batch],
    policy: Policy,
    config: SelectionConfig,
    predictor: Predictor | None = None,
    *,
    references: Sequence[Float[np.ndarray, "B T E"]] | None = None,
    keep: list | None = None,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> TextResult:
    """Run batches (tokens, segments, positions, and perhaps counted) under a policy and a budget.

    references: the last residual streams of another pass over the batches, to compare predictions with; keep: a list
    that receives this pass's.

    Raises ValueError where there is nothing to predict or a window is longer than the model's context.
    """
    if not predicted_tokens(batches) > 0:
        raise ValueError("there is no token to predict: the text is empty or too short")
    check_length(model.config, batches[0]["tokens"].shape[1])
    found: dict[str, list] = {f.name: [] for f in dataclasses.fields(TextResult)}
    for number, batch in enumerate(batches):
        counted = counted_rows(batch)
        result = simulate(
            model, batch, policy, config, predictor, wanted=jnp.asarray(counted) if "counted" in batch else None,
            reference=None if references is None else references[number], score_dtype=score_dtype,
            implementation=implementation,
        )  # fmt: skip
        held = count_keys(model.config, jnp.asarray(batch["segments"]), jnp.ones((model.config.layers, *counted.shape)),
                         model.config.kv_heads)  # fmt: skip
        parts = {"rows": counted, "held": held, **{n: getattr(result, n) for n in found if hasattr(result, n)}}
        for name, values in parts.items():
            if values is not None:
                found[name].extend(np.where(counted, np.asarray(values, np.float64), 0).sum(axis=1))
        if keep is not None:
            keep.append(np.asarray(result.hidden))
    return TextResult(**{name: np.asarray(values) if values else None for name, values in found.items()})
