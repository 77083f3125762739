"""Perplexity of held-out text, with recalled attention mass and hit rate on the same windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from butler_jax.base_model import BaseModel, check_length
from butler_jax.configs import SelectionConfig, require
from butler_jax.evaluation.simulate import simulate
from butler_jax.policies import Policy
from butler_jax.predictors import Predictor

Batch = dict[str, np.ndarray]


def text_windows(
    tokenizer: Any, text: str, *, context: int, tokens: int, batch_size: int = 1, source: str = "the text"
) -> list[Batch]:
    """Batches [batch_size, context] of the first `tokens` tokens of a text, in windows that do not overlap.

    Each window starts anew; in it every token but the first is predicted. The last window is padded. Raises
    ValueError where the text has fewer than two tokens.
    """
    # Tokenised in pieces that end at line breaks, and only as far as is needed.
    ids: list[int] = []
    for piece in _pieces(text):
        ids.extend(tokenizer.encode(piece) if not ids else tokenizer.encode(piece, bos=False))
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    require(len(ids) > 1, f"{source} is empty: perplexity needs at least 2 tokens, and it has {len(ids)}")
    return windows(ids, context=context, batch_size=batch_size)


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
    require(bool(text.strip()), f"{path} is empty; perplexity needs some text")
    return text


def predicted_tokens(batches: Sequence[Batch]) -> int:
    """How many tokens of the batches are predicted: those whose predecessor is of the same document."""
    return sum(
        int(((b["segments"][:, 1:] > 0) & (b["segments"][:, 1:] == b["segments"][:, :-1])).sum()) for b in batches
    )


def perplexity(
    model: BaseModel,
    batches: Sequence[Batch],
    policy: Policy,
    config: SelectionConfig,
    predictor: Predictor | None = None,
    *,
    score_dtype: str | None = None,
    implementation: str | None = None,
) -> tuple[float, float]:
    """exp of the mean negative log-likelihood, and the mean attended fraction over all rows.

    Raises ValueError where there is nothing to predict or a window is longer than the model's context.
    """
    count = predicted_tokens(batches)
    require(count > 0, "there is no token to predict: the text is empty or too short")
    check_length(model.config, batches[0]["tokens"].shape[1])
    nll, attended, rows = 0.0, 0.0, 0
    for batch in batches:
        result = simulate(
            model, batch, policy, config, predictor, score_dtype=score_dtype, implementation=implementation
        )
        real = batch["segments"] > 0
        nll += float(np.asarray(result.nll, np.float64).sum())
        attended += float(np.asarray(result.attended, np.float64)[real].sum())
        rows += int(real.sum())
    return float(np.exp(nll / count)), attended / rows
