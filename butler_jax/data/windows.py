"""Token ids as batches of padded rows: windows of a text, samples with marked tokens."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from butler_jax.data.sources.passed_over import PassedOver
from butler_jax.data.sources.pieces import read_pieces
from butler_jax.data.sources.streams import read_blocks
from butler_jax.data.sources.text_files import find_files

Batch = dict[str, np.ndarray]
"""{"tokens", "segments", "positions"}, each int32 [B, T]. Segments number the documents of a row from 1, and 0 is
padding. Positions start at 0 in each document."""

ARRAYS = ("tokens", "segments", "positions")
"""The names of a batch's arrays."""

PIECE = 200_000  # characters of a text that are tokenised at a time


def as_batch(batch: Batch) -> dict[str, Int[Array, "B T"]]:
    """The arrays of a batch that a pass takes, as jax arrays. Raises ValueError as `require_batch`."""
    require_batch(batch)
    return {name: jnp.asarray(batch[name]) for name in ARRAYS}


def require_batch(batch: Any) -> None:
    """Raise ValueError for what is no batch."""
    if not isinstance(batch, Mapping) or not {*ARRAYS} <= {*batch}:
        raise ValueError(f"a batch is a dictionary of {', '.join(ARRAYS)}, [B, T] each; got a {type(batch).__name__}")


def require_batches(batches: Sequence[Batch]) -> None:
    """Raise ValueError for one batch in the place of a list, or an iterator, which may be endless."""
    if not isinstance(batches, Sequence):
        raise ValueError(f"batches must be a list of batches such as [batch], got a {type(batches).__name__}")


def pad_rows(
    rows: Sequence[Sequence[int]], width: int, *, batch_size: int = 1, **marks: Sequence[Sequence[bool]]
) -> list[Batch]:
    """Rows of token ids as batches of one shape, the last batch filled with empty rows.

    Args:
        rows: Token ids, at most `width` in a row.
        width: Tokens of a padded row, T.
        batch_size: Rows of a batch, B; at most the number of rows.
        marks: Booleans for the tokens of each row, by the name that a batch gives them.

    Returns:
        Batches of tokens, segments (1, and 0 for padding), positions (0 for padding) and the marks, all [B, T].

    Raises:
        ValueError: There are no rows.
    """
    if not len(rows):
        raise ValueError("there are no tokens to cut into rows; give at least one")
    batch_size = min(batch_size, len(rows))
    count = -(-len(rows) // batch_size) * batch_size
    tokens, segments, positions = np.zeros((3, count, width), np.int32)
    whole = {"tokens": tokens, "segments": segments, "positions": positions}
    whole |= {name: np.zeros((count, width), bool) for name in marks}
    for place, row in enumerate(rows):
        tokens[place, : len(row)], segments[place, : len(row)] = row, 1
        positions[place, : len(row)] = np.arange(len(row))
        for name, mark in marks.items():
            whole[name][place, : len(mark[place])] = mark[place]
    return [{n: a[i : i + batch_size] for n, a in whole.items()} for i in range(0, count, batch_size)]


def cut_windows(ids: Sequence[int], *, context: int, batch_size: int = 1) -> list[Batch]:
    """Cut token ids into windows of `context` tokens that do not overlap; the last one is padded."""
    rows = [ids[start : start + context] for start in range(0, len(ids), context)]
    return pad_rows(rows, min(context, len(ids)), batch_size=batch_size)


def cut_strided_windows(ids: Sequence[int], *, context: int, stride: int, batch_size: int = 1) -> list[Batch]:
    """Cut token ids into windows of `context` tokens, each `stride` tokens after the one before.

    A token is predicted in the first window that holds it; `counted` of the batches marks the tokens whose next token
    is. From the second window on, at least context - stride tokens stand before it.

    Raises:
        ValueError: The stride is not 1 ... context - 1.
    """
    if not (0 < stride < context):
        raise ValueError(f"the stride must be 1 ... {context - 1}, below the context, got {stride}")
    rows, counted, seen = [], [], 0
    for start in range(0, max(len(ids) - context + stride, 1), stride):
        end = min(start + context, len(ids))
        rows.append(ids[start:end])
        counted.append([seen - 1 <= place < end - 1 for place in range(start, end)])
        seen = end
    return pad_rows(rows, min(context, len(ids)), batch_size=batch_size, counted=counted)


def cut_text(
    tokenizer: Any,
    text: str,
    *,
    context: int,
    tokens: int,
    batch_size: int = 1,
    stride: int | None = None,
    source: str = "the text",
) -> list[Batch]:
    """Cut the first `tokens` tokens of a text into windows.

    Args:
        tokenizer: Encodes the text, in pieces that end at line breaks and only as far as is needed.
        tokens: Tokens of the text that are used, at most.
        stride: None for windows that do not overlap, else as `cut_strided_windows` takes it.

    Raises:
        ValueError: The text has fewer than two tokens, or the stride is not below the context.
    """
    ids: list[int] = []
    for piece in _split_lines(text):
        ids.extend(tokenizer.encode(piece) if not ids else tokenizer.encode(piece, bos=False))
        if len(ids) >= tokens:
            break
    ids = ids[:tokens]
    if len(ids) < 2:
        raise ValueError(f"{source} is empty: perplexity needs at least 2 tokens, and it has {len(ids)}")
    if stride is None:
        return cut_windows(ids, context=context, batch_size=batch_size)
    return cut_strided_windows(ids, context=context, stride=stride, batch_size=batch_size)


def _split_lines(text: str) -> Iterator[str]:
    """Pieces of about PIECE characters that end at line breaks where there are any."""
    start = 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):
            border = text.rfind("\n", start, end)
            end = border if border > start else end
        yield text[start:end]
        start = end


def find_counted(batch: Batch) -> Bool[np.ndarray, "B T"]:
    """The tokens whose next token is predicted: it is of the same document, and `counted` holds where there is one."""
    segments = batch["segments"]
    counted = np.zeros(segments.shape, bool)
    counted[:, :-1] = (segments[:, :-1] > 0) & (segments[:, 1:] == segments[:, :-1])
    return counted & batch["counted"] if "counted" in batch else counted


def read_text(path: str | Path) -> str:
    """Read a text as a whole.

    Args:
        path: As `find_files` takes it: a file or several, compressed or not, #FEATURE, - for standard input. The
            documents of .jsonl and parquet files are joined by empty lines.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The text is empty, or a line or record cannot be read.
        ImportError: A package for its format is missing.
    """
    texts = []
    for file in find_files([path], lambda line: print(line, file=sys.stderr)):
        if file.kind == "text":
            raw = b"".join(block.data for block in read_blocks(file.path))
            try:
                texts.append(raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{file.path} is not UTF-8 text: {error}") from None
        else:
            texts += [text for _, (text,), _ in read_pieces(file, PassedOver(strict=True))]
    text = "\n\n".join(texts)
    if not text.strip():
        raise ValueError(f"{path} is empty; perplexity needs some text")
    return text
