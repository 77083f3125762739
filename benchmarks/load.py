"""A queue of ragged prompts: `serve` beside `generate`, one batch after another, and beside transformers.

    python -m benchmarks.load --base tiny --requests 200 --json benchmarks/load.json

Lengths of prompts and of new tokens are drawn log-uniformly. Everything is greedy, and nobody stops early. All have the
same weights and read the same prompts, in turns. A batch of `generate` and of transformers ends with its longest row.
Only the tokens that were asked for count. A round before the first compiles, on a batch of every width.
Speeds are of the clock and of processor time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import butler_jax
from benchmarks.about import about
from butler_jax import Request
from butler_jax.data.sources.python_docs import read_documents
from butler_jax.decoding import bucket

Prompts = list[tuple[list[int], int]]
"""Token ids, and how many are to follow."""


def draw_queue(tokenizer: Any, count: int, most: int, new: tuple[int, int], seed: int) -> Prompts:
    """A queue of pieces of the Python documentation."""
    rng = np.random.default_rng(seed)
    text: list[int] = []
    documents = iter(read_documents())
    while len(text) < 40 * most:
        text += tokenizer.encode(next(documents)[1])
    lengths = np.exp(rng.uniform(0, np.log(most + 1), count)).astype(int).clip(1, most)
    counts = np.exp(rng.uniform(np.log(new[0]), np.log(new[1] + 1), count)).astype(int).clip(*new)
    starts = rng.integers(0, len(text) - most, count)
    return [(text[s : s + n], int(c)) for s, n, c in zip(starts, lengths, counts, strict=True)]


def by_serve(base: Any, slots: int, capacity: int) -> Callable[[Prompts], list[list[int]]]:
    """Rows join and leave."""

    def run(queue):
        requests = [Request(tokens, new, stop=()) for tokens, new in queue]
        found = butler_jax.serve(base, requests, slots=slots, capacity=capacity)
        return [one.tokens for one in sorted(found, key=lambda one: one.number)]

    return run


def by_generate(base: Any, size: int, capacity: int) -> Callable[[Prompts], list[list[int]]]:
    """One batch after another, in the order of the queue."""

    def run(queue):
        found = []
        for at in range(0, len(queue), size):
            batch = queue[at : at + size]
            rows, counts = zip(*batch, strict=True)
            rows = [*rows, *[[1]] * (size - len(rows))]  # one shape for all batches
            made = butler_jax.generate(base, rows, max_new_tokens=max(counts), stop=(), capacity=capacity)
            found += [row[:new] for row, new in zip(made.tokens, counts, strict=False)]
        return found

    return run


def by_transformers(directory: str, size: int) -> Callable[[Prompts], list[list[int]]]:
    """Batches of `size` rows, padded on the left, by transformers on torch in float32."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None)

    def run(queue):
        found = []
        for at in range(0, len(queue), size):
            rows, counts = zip(*queue[at : at + size], strict=True)
            width = max(map(len, rows))
            mask = np.stack([np.arange(width) >= width - len(row) for row in rows])
            tokens = np.zeros(mask.shape, np.int64)
            tokens[mask] = np.concatenate(rows)
            with torch.inference_mode():
                given = dict(attention_mask=torch.asarray(mask.astype(np.int64)), max_new_tokens=max(counts))
                made = model.generate(torch.asarray(tokens), **given)[:, width:].tolist()
            found += [row[:new] for row, new in zip(made, counts, strict=True)]
        return found

    return run


class Contender(NamedTuple):
    """Somebody who answers a queue: how, which requests compile everything for it, and which are timed."""

    run: Callable[[Prompts], list[list[int]]]
    warm: Prompts
    timed: Prompts


def measure(contenders: dict[str, Contender], rounds: int) -> Iterator[list[dict[str, Any]]]:
    """Time the contenders in turns. After each turn: a row each, also with how many answers are those of `serve`."""
    times: dict[str, list[tuple[float, float]]] = {}
    answers: dict[str, list[list[int]]] = {}
    for turn in range(rounds + 1):
        for name, contender in contenders.items():
            began, worked = time.perf_counter(), time.process_time()
            found = contender.run(contender.timed if turn else contender.warm)
            took = time.perf_counter() - began, time.process_time() - worked
            print(f"round {turn}  {name:28} {took[0]:8.1f} s  {took[1]:8.1f} s of processors", flush=True)
            if turn == 0:
                continue
            times.setdefault(name, []).append(took)
            answers[name] = found
            yield [_row(name, contenders[name].timed, taken, answers) for name, taken in times.items()]


def _row(name: str, queue: Prompts, taken: list[tuple[float, float]], answers: dict[str, Any]) -> dict[str, Any]:
    tokens = sum(new for _, new in queue)
    seconds, processor = (statistics.median(column) for column in zip(*taken, strict=True))
    return {
        "name": name,
        "requests": len(queue),
        "tokens": tokens,
        "seconds": [round(t[0], 2) for t in taken],
        "processor_seconds": [round(t[1], 2) for t in taken],
        "tokens_a_second": round(tokens / seconds, 2),
        "tokens_a_processor_second": round(tokens / processor, 2),
        "answers_as_serve": sum(map(operator.eq, answers[name], answers["serve"])),
    }


def main() -> None:
    """Draw the queue, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="tiny", help="tiny, or a Hugging Face directory")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--most", type=int, default=8000, help="tokens of the longest prompt, as the context allows")
    parser.add_argument("--new", type=int, nargs=2, default=(8, 128), help="the fewest and the most new tokens")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peer-requests", type=int, help="all but serve get so many of them, the first ones")
    parser.add_argument("--no-peer", action="store_true", help="leave transformers out")
    parser.add_argument("--json")
    given = parser.parse_args()
    base = butler_jax.load_base(given.base, dtype="float32")
    most = min(given.most, base.config.context - given.new[1])
    queue = draw_queue(base.require_tokenizer(), given.requests, most, tuple(given.new), given.seed)
    longest = max(len(tokens) for tokens, _ in queue)
    capacity = min(base.config.context, -(-(longest + given.new[1]) // 64) * 64)
    part = queue[: given.peer_requests]
    batches = [part[at : at + given.slots] for at in range(0, len(part), given.slots)]
    of_width = {bucket(max(len(tokens) for tokens, _ in batch), 16): batch for batch in batches}
    every_width = [(tokens, 2) for batch in of_width.values() for tokens, _ in batch]
    every_part = [([1] * n, 2) for n in (20, 100, 600) if n <= most]
    contenders = {
        "serve": Contender(by_serve(base, given.slots, capacity), every_part, queue),
        f"generate, batches of {given.slots}": Contender(by_generate(base, given.slots, capacity), every_width, part),
    }
    if not given.no_peer:
        directory = pathlib.Path(butler_jax.__file__).parent / "tiny" if given.base == "tiny" else given.base
        for size in (given.slots, 1):
            run = by_transformers(str(directory), size)
            contenders[f"transformers, batches of {size}"] = Contender(run, [([1], 2)], part)
    lengths = [len(tokens) for tokens, _ in queue]
    facts = dict(requests=len(queue), prompt_tokens=sum(lengths), longest=longest, capacity=capacity)
    print(facts)
    load = [os.getloadavg()[0]]
    peers = () if given.no_peer else ("torch", "transformers")
    for rows in measure(contenders, given.rounds):
        load.append(os.getloadavg()[0])
        if given.json:
            found = about("load", *peers) | facts | dict(load_average=load, cores=os.cpu_count(), rows=rows)
            pathlib.Path(given.json).write_text(json.dumps(found, indent=1) + "\n")
    for row in rows:
        print(
            f"{row['name']:28} {row['tokens_a_second']:8.1f} tokens/s {row['tokens_a_processor_second']:8.1f} of "
            f"processors, {row['answers_as_serve']} as serve"
        )


if __name__ == "__main__":
    main()
