"""The texts that tasks read: windows for perplexity and attention, and a haystack for needles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from butler_jax.data import Batch, cut_text, read_text
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.progress import Say
from butler_jax.weights import Base


def name_windows(config: EvalConfig) -> str:
    """The unit of standard errors over text."""
    return "windows" if config.stride is None else "overlapping windows"


def read_windows(base: Base, config: EvalConfig, data: str, say: Say) -> list[Batch]:
    """Read windows of config.text, or of the held-out part of `data`.

    `say` receives a line where there are fewer tokens than were asked for.

    Raises:
        ValueError, FileNotFoundError: The text is empty or missing.
    """
    if config.text is not None:
        source = str(config.text)
        batches = cut_text(
            base.tokenizer,
            read_text(Path(config.text)),
            context=config.context,
            tokens=config.tokens,
            batch_size=config.batch_size,
            stride=config.stride,
            source=source,
        )
    else:
        count = -(-config.tokens // config.context)
        batches = _read_held_out(base, config, data, config.context, min(config.batch_size, count), count)
        source = f"the held-out part of {data}"
    found = sum(int((b["segments"] > 0).sum()) for b in batches)
    if found < config.tokens:
        say(f"{source} has {found:,} tokens, fewer than the {config.tokens:,} asked for: all of them are used")
    return batches


def read_haystack(base: Base, config: EvalConfig, data: str, say: Say) -> str:
    """Read the text that needles are hidden in: config.text, or concatenated held-out documents of `data`.

    `say` receives a line where it has fewer tokens than a sample, which then repeats it.

    Raises:
        ValueError, FileNotFoundError: The text is empty or missing.
    """
    longest = max(config.lengths)
    if config.text is not None:
        text, source = read_text(Path(config.text)), str(config.text)
    else:
        rows = _read_held_out(base, config, data, longest, 1, 4)
        text = "\n\n".join(base.tokenizer.decode(b["tokens"][b["segments"] > 0].tolist()) for b in rows)
        source = f"the held-out part of {data}"
    found = len(base.tokenizer.encode(text[: 64 * longest], bos=False))  # no tokenizer has 64 characters per token
    if over := [length for length in config.lengths if length > found]:
        lengths = ", ".join(f"{length:,}" for length in over)
        say(f"{source} has {found:,} tokens: for needles of {lengths} tokens it is repeated; give a longer text")
    return text


def _read_held_out(
    base: Base, config: EvalConfig, data: str, length: int, batch_size: int, rows: int
) -> Sequence[Batch]:
    """Rows of held-out text, at least as many as asked for."""
    from butler_jax.data import read_held_out  # imports grain, and takes seconds

    return read_held_out(
        data,
        base.tokenizer,
        length=length,
        count=-(-rows // batch_size),
        batch_size=batch_size,
        data_dir=config.data_dir,
    )
