"""Documents become batches on grain: tokenised, packed, shuffled, sharded and resumable.

Each row of the global batch is a stream of its own. Row r reads the documents r, r + B, r + 2B, ... of the shuffled,
endless sequence of documents and packs them without padding. A long document continues in the same row of the next
batch. A process reads only the documents of its own rows, and each row's place in its stream is saved separately.
Therefore neither the batches nor the saved places depend on the number of processes.

At the start, every process reads all `text:` files once for their digest, and prepares a set that is not there yet.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

import grain
import numpy as np

from butler_jax.data.sources import coreference, python_docs, text
from butler_jax.data.sources.passages import TextField, say_once
from butler_jax.data.sources.prepared_sets import open_prepared_set
from butler_jax.data.windows import Batch
from butler_jax.model import CHUNK
from butler_jax.text import Tokenizer

SPECS = (
    "python_docs, coreference, coreference_short, text:PATH[,PATH...][#FEATURE], tfds:NAME[/CONFIG][#FEATURE], "
    "or several joined by + (python_docs+coreference)"
)

_ENDLESS = 1 << 31
_RELATIVE = re.compile(r"(?!-$|~|\w+://)")  # neither standard input, nor a home, nor an address
_PROBES = 1000  # documents of a source, drawn at random, whose mean length stands for all
_BINS = 8  # rows that are packed at the same time where documents stay whole


class Documents(Protocol):
    """Random access to documents. content() is a digest of their text."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> str: ...

    def content(self) -> str: ...


@dataclass(frozen=True)
class SourceShare:
    """One source of a data specification and its share of the text; None for an equal share."""

    source: str
    weight: float | None = None


def parse_spec(spec: str) -> tuple[SourceShare, ...]:
    """Read a data specification such as "python_docs:0.7+coreference:0.3".

    Raises:
        ValueError: A part is none of SPECS, or its weight is 0, infinite, or missing beside other weights.
    """
    parts = []
    for piece in re.split(r"\s*\+\s*(?=python_docs|coreference|text:|tfds:)", spec.strip()):
        source, weight = piece.strip(), None
        if match := re.fullmatch(r"(.+):(\d+(?:\.\d*)?|\.\d+)", source):
            source, weight = match[1], float(match[2])
            if not 0 < weight < math.inf:
                raise ValueError(f"data {spec!r}: the weight of {source} must be above 0 and finite, got {match[2]}.")
        known = source in ("python_docs", "coreference", "coreference_short") or re.match(r"(text|tfds):.", source)
        if not known:
            raise ValueError(f"unknown data {source!r}; choose {SPECS}.")
        parts.append(SourceShare(source, weight))
    weighted = [part.weight is not None for part in parts]
    if any(weighted) and not all(weighted):
        raise ValueError(f"data {spec!r}: give every part a weight (a:0.7+b:0.3) or none.")
    return tuple(parts)


def anchor_spec(spec: str, directory: Path) -> str:
    """The specification with the relative paths of its files in a directory. Raises ValueError as `parse_spec`."""
    words = []
    for part in parse_spec(spec):
        kind, *rest = part.source.split(":", 1)
        if kind == "text":
            paths = map(str.strip, rest[0].split(","))
            rest = [",".join(str(directory / path) if _RELATIVE.match(path) else path for path in paths)]
        weight = [] if part.weight is None else [np.format_float_positional(part.weight)]
        words.append(":".join([kind, *rest, *weight]))
    return "+".join(words)


def open_documents(
    spec: str, *, split: str = "train", seed: int = 0, data_dir: str | None = None, strict: bool = False
) -> Documents:
    """Open the documents of one source. A source that TFDS stores is prepared on first use.

    Args:
        spec: One of SPECS, without "+".
        split: "train" or "test". No document is in both.
        seed: Of `coreference`; the other sources do not depend on it.
        data_dir: Where prepared sets are kept, also `gs://`; None is TFDS_DATA_DIR or TFDS's default.
        strict: Refuse a line or record of a `text:` source that cannot be read; otherwise they are passed over, and a
            line says how many there are.

    Raises:
        ValueError, FileNotFoundError, ImportError: Says what is wrong with the source, or which package is missing.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split={split!r} is unknown; choose train or test.")
    parts = parse_spec(spec)
    if len(parts) > 1:
        raise ValueError(f"{spec!r} names {len(parts)} sources; documents are opened one source at a time.")
    source = parts[0].source
    if source.startswith("coreference"):
        return _Coreference(seed, split, short=source == "coreference_short")
    if source.startswith("tfds:"):
        return open_prepared_set(source.removeprefix("tfds:"), split, data_dir)
    if source == "python_docs":
        builder = python_docs.open_builder(data_dir)
    else:
        paths = [path.strip() for path in source.removeprefix("text:").split(",") if path.strip()]
        builder = text.open_builder(paths, data_dir, strict=strict)
    if split not in builder.info.splits:
        raise ValueError(f"data {source!r} is too small: it has no documents for the split {split!r}.")
    return TextField(builder, split)


class _Coreference:
    """The co-reference task as a source without end."""

    def __init__(self, seed: int, split: str, short: bool):
        self._seed, self._split, self._short = seed, split, short

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> str:
        return coreference.sample(self._seed, int(index), self._split, short=self._short).text

    def content(self) -> str:
        return f"made from seed {self._seed}"

    def __repr__(self) -> str:
        return f"coreference(seed={self._seed}, split={self._split}, short={self._short})"


class BatchIterator:
    """An endless iterator of batches. Its place can be saved and restored to the exact batch."""

    def __init__(self, dataset: grain.IterDataset, identity: dict[str, Any], rows: Sequence[int]):
        self._identity, self._rows = identity, rows
        # The prefetching thread has to end with this object, and before the interpreter exits.
        self._held = [iter(dataset)]
        weakref.finalize(self, self._held.clear)

    @property
    def _iterator(self) -> grain.DatasetIterator:
        return self._held[0]

    def __iter__(self) -> BatchIterator:
        return self

    def __next__(self) -> Batch:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """The place after the batches read so far, as a dictionary that JSON can hold."""
        places = self._iterator.get_state()["parents"]
        rows = {str(row): place for row, place in zip(self._rows, places, strict=True)}
        return json.loads(json.dumps({**self._identity, "rows": rows}))

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place that `get_state` returned in this or another process. It may hold more rows than are read here.

        Raises:
            ValueError: The state is of other data or settings, or lacks a row; the difference is named.
        """
        was = state.get("content", self._identity["content"])  # older states do not have it
        if was != self._identity["content"]:
            raise ValueError(
                f"the data are not what the run was trained on: {self._identity['spec']} has the digest "
                f"{', '.join(self._identity['content'])} and had {', '.join(was)} when the run was saved. Put the "
                "former text back to continue, or start another run with another --run-dir."
            )
        for key, value in self._identity.items():
            if key != "content" and state.get(key) != value:
                raise ValueError(
                    f"cannot continue the data: {key} was {state.get(key)!r} when the state was saved "
                    f"and is {value!r} now."
                )
        missing = [str(row) for row in self._rows if str(row) not in state["rows"]]
        if missing:
            raise ValueError(f"cannot continue the data: the state is of other rows and lacks {', '.join(missing)}.")
        self._iterator.set_state({"parents": [_with_tuples(state["rows"][str(row)]) for row in self._rows]})


def read_batches(
    spec: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    batch_size: int,
    seed: int = 0,
    split: str = "train",
    data_dir: str | None = None,
    whole: bool = False,
    rows: Sequence[int] | None = None,
    start_state: dict[str, Any] | None = None,
    strict: bool = False,
) -> BatchIterator:
    """Read endless batches of packed documents, in another order in each epoch.

    Args:
        spec: One of SPECS. Weights are shares of the text in characters.
        tokenizer: A document begins with its `bos` where `add_bos` is set, and ends with its `eos` where it has one.
        length: T, tokens in a row. A document that does not fit is cut. The rest is a segment of its own in the same
            row of the next batch.
        seed: Determines the order of the documents and the samples of `coreference`.
        split: "train" or "test".
        data_dir: Where prepared sets are kept, also `gs://`; None is TFDS_DATA_DIR or TFDS's default.
        whole: Keep each document that fits into a row in one piece. Rows then have some padding.
        rows: The rows of the global batch to read, where several processes share it; None is all. The content of a row
            does not depend on them.
        start_state: The place to start from, as `get_state` returns it, with these rows or more.
        strict: As `open_documents` takes it.

    Returns:
        An iterator of batches with the given rows.

    Raises:
        ValueError, FileNotFoundError: Says what is wrong with the data or the sizes.
    """
    length, batch_size, seed = _check(spec, tokenizer, length=length, batch_size=batch_size, seed=seed)
    rows = range(batch_size) if rows is None else [int(row) for row in rows]
    if not rows or not set(rows) <= set(range(batch_size)):
        raise ValueError(f"rows={list(rows)} must be one or more of 0 ... {batch_size - 1}, the rows of a batch.")
    parts = parse_spec(spec)
    sources = [open_documents(part.source, split=split, seed=seed, data_dir=data_dir, strict=strict) for part in parts]
    weights = _document_weights(parts, sources)
    ordered = []
    for number, source in enumerate(sources):
        dataset = grain.MapDataset.source(source)
        if not isinstance(source, _Coreference):  # its samples are independent of each other
            dataset = dataset.shuffle(seed=(seed * 1_000_003 + number) % (1 << 32))
            if len(source) < batch_size:
                say_once(
                    f"{parts[number].source} has fewer passages ({len(source)}) than a batch has rows ({batch_size}), "
                    "so rows repeat each other; give more text, or a smaller batch"
                )
        ordered.append(dataset.repeat())
    streams = []
    for row in rows:
        # Sources are sliced before they are mixed, so that the mixture's pattern is independent of the rows.
        own = [dataset[row::batch_size] for dataset in ordered]
        mixed = own[0] if len(own) == 1 else grain.MapDataset.mix(own, weights)
        streams.append(_packed(mixed, tokenizer, length, whole))
    dataset = grain.experimental.ZipIterDataset(streams).map(_stack)
    dataset = grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=2)
    identity = {
        "spec": spec,
        "split": split,
        "length": length,
        "batch_size": batch_size,
        "seed": seed,
        "whole": whole,
        "documents": [len(source) for source in sources],
        "content": [source.content() for source in sources],
        "vocabulary": tokenizer.vocab_size,
    }
    iterator = BatchIterator(dataset, identity, rows)
    if start_state is not None:
        iterator.set_state(start_state)
    return iterator


def read_held_out(
    spec: str,
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    batch_size: int = 1,
    seed: int = 0,
    data_dir: str | None = None,
    strict: bool = False,
) -> list[Batch]:
    """Read the first `count` batches [batch_size, length] of the split "test"; every call returns the same ones.

    The sources of a mixture have their shares of the rows, one after the other, and at least one each. There are fewer
    where the held-out text ends, and the last may have rows of padding. Where all of it is shorter than a row, the rows
    end with the chunk of a simulation in which it ends. Arguments are those of `read_batches`.

    Raises:
        ValueError, FileNotFoundError: Says what is wrong with the data or the sizes.
    """
    sizes = _check(spec, tokenizer, length=length, batch_size=batch_size, seed=seed, count=count)
    length, batch_size, seed, count = sizes
    parts = parse_spec(spec)
    sources = [open_documents(part.source, split="test", seed=seed, data_dir=data_dir, strict=strict) for part in parts]
    rows: list[dict[str, np.ndarray]] = []
    for source, share in zip(sources, _share_rows(parts, count * batch_size), strict=True):
        dataset = grain.MapDataset.source(source)
        ordered = dataset if isinstance(source, _Coreference) else dataset.shuffle(seed=seed % (1 << 32))
        rows += itertools.islice(_packed(ordered, tokenizer, length), share)
    longest = max(int(np.flatnonzero(row["tokens_segment_ids"])[-1]) + 1 for row in rows)
    width = min(length, -(-longest // CHUNK) * CHUNK)
    rows = [{key: value[:width] for key, value in row.items()} for row in rows]
    empty = {key: np.zeros_like(value) for key, value in rows[0].items()}
    rows += [empty] * (-len(rows) % batch_size)
    return [_stack(rows[start : start + batch_size]) for start in range(0, len(rows), batch_size)]


def _share_rows(parts: Sequence[SourceShare], rows: int) -> list[int]:
    """How many rows each source has: by its weight, as many as `rows` in all or one each."""
    weights = [part.weight or 1.0 for part in parts]
    shares = [weight / sum(weights) * rows for weight in weights]
    found = [1] * len(parts)
    for _ in range(rows - len(parts)):
        found[max(range(len(parts)), key=lambda n: shares[n] - found[n])] += 1
    return found


def _check(spec: str, tokenizer: Tokenizer, **sizes: int) -> list[int]:
    """The sizes as Python's numbers. Raises ValueError for data, a tokenizer or a size that is none."""
    if not isinstance(spec, str):
        raise ValueError(f"the data must be a text such as 'text:FILE', got {spec!r}; choose {SPECS}.")
    if not hasattr(tokenizer, "encode"):
        raise ValueError(f"the tokenizer of a base is needed, base.tokenizer; got a {type(tokenizer).__name__}.")
    for name, value in sizes.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name}={value!r} must be a whole number.")
        least = {"length": 2, "seed": -math.inf}.get(name, 1)
        if value < least:
            raise ValueError(f"{name}={value} must be at least {least}.")
    return [int(value) for value in sizes.values()]


class _Pieces(grain.experimental.FlatMapTransform):
    """A document as pieces of at most `length` tokens."""

    def __init__(self, length: int):
        self.length = length
        self.max_fan_out = 1 << 20

    def flat_map(self, element: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
        tokens = element["tokens"]
        return [{"tokens": tokens[i : i + self.length]} for i in range(0, len(tokens), self.length)]


def _packed(documents: grain.MapDataset, tokenizer: Tokenizer, length: int, whole: bool = False) -> grain.IterDataset:
    """Tokenise documents in order and pack them into rows of `length` tokens."""
    end = [] if tokenizer.eos is None else [tokenizer.eos]

    def tokenise(text: str) -> dict[str, np.ndarray]:
        return {"tokens": np.asarray([*tokenizer.encode(text), *end], dtype=np.int32)}

    tokens = documents.filter(lambda text: not text.isspace() and text != "").map(tokenise)
    # No threads here, since another thread prefetches whole batches.
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    stream, shape = tokens.to_iter_dataset(one_by_one), {"tokens": length}
    if whole:
        pieces = grain.experimental.FlatMapIterDataset(stream, _Pieces(length))
        return grain.experimental.FirstFitPackIterDataset(
            pieces, length_struct=shape, num_packing_bins=_BINS, shuffle_bins=False
        )
    return grain.experimental.ConcatThenSplitIterDataset(stream, length_struct=shape)


def _stack(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    names = {"tokens": "tokens", "segments": "tokens_segment_ids", "positions": "tokens_positions"}
    return {name: np.stack([row[key] for row in rows]) for name, key in names.items()}


def _document_weights(parts: Sequence[SourceShare], sources: Sequence[Documents]) -> list[float]:
    """How often a document of each source is drawn, so that its text has its share."""
    weights = []
    for part, source in zip(parts, sources, strict=True):
        drawn = random.Random(0).sample(range(len(source)), min(len(source), _PROBES))
        probes = [len(source[index]) for index in drawn]
        weights.append((part.weight or 1.0) / max(sum(probes) / len(probes), 1.0))
    return [weight / sum(weights) for weight in weights]


def _with_tuples(state: Any) -> Any:
    """A state of grain's packer with its slices as tuples again; JSON turns them into lists."""
    if isinstance(state, dict):
        restored = {key: _with_tuples(value) for key, value in state.items()}
        if slices := restored.get("remainder_slices"):
            restored["remainder_slices"] = {name: tuple(pair) for name, pair in slices.items()}
        return restored
    return [_with_tuples(value) for value in state] if isinstance(state, list) else state
