"""Long greedy continuations at several budgets beside the dense one: do they repeat themselves, end, and diverge?

    python -m benchmarks.greedy --base DIR --run RUN --text FILE --json benchmarks/quality/greedy.json

The prompts are spread evenly over the text. End tokens do not stop a continuation; they are counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
from itertools import takewhile
from typing import Any

import numpy as np

from benchmarks.about import about
from butler_jax import SamplingConfig, SelectionConfig, generate, load_base, load_predictor, simulation
from butler_jax.data import cut_windows
from butler_jax.policies import TokenButler


def repeated(tokens: list[int], size: int = 4) -> float:
    """The share of the runs of `size` tokens that have occurred before."""
    grams = [tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def first_difference(one: list[int], other: list[int]) -> int:
    """How many tokens two continuations share from their start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def row(name: str, found: list[list[int]], dense: list[list[int]], ends: frozenset[int]) -> dict[str, Any]:
    """The statistics of the continuations of all prompts under a setting."""
    shared = [first_difference(a, b) for a, b in zip(found, dense, strict=True)]
    return {
        "setting": name,
        "repeated_4_grams": [round(repeated(tokens), 4) for tokens in found],
        "end_tokens_per_1000": 1000 * float(np.mean([np.mean(np.isin(tokens, list(ends))) for tokens in found])),
        "same_as_dense": shared,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="as for butler-jax train")
    parser.add_argument("--run", required=True, help="a run of butler-jax train")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="where the prompts come from")
    parser.add_argument("--prompts", type=int, default=4, help="how many prompts")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=2000, help="tokens of a continuation")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1 / 4, 1 / 8, 1 / 16])
    parser.add_argument("--allocations", nargs="+", default=["per_head"], choices=["per_head", "tolerance"])
    parser.add_argument("--tails", type=int, nargs="+", default=[0], help="tokens of spans that estimate unread keys")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    asked = parser.parse_args()
    base = load_base(asked.base)
    predictor = load_predictor(asked.run, base)
    ids = base.tokenizer.encode(asked.text.read_text())
    starts = np.linspace(0, len(ids) - asked.prompt_tokens, asked.prompts, dtype=int)
    prompts = [ids[s : s + asked.prompt_tokens] for s in starts]

    def continue_(selection: SelectionConfig | None) -> list[list[int]]:
        given = dict(max_new_tokens=asked.tokens, stop=[], sampling=SamplingConfig())
        return generate(base, prompts, predictor=selection and predictor, selection=selection, **given).tokens

    dense = continue_(None)
    settings = {}
    for tail, allocation in itertools.product(asked.tails, asked.allocations):
        selections = [SelectionConfig(budget=budget, tail=tail) for budget in asked.budgets]
        if allocation == "tolerance":  # found on the first of the text
            how = dict(policy=TokenButler(), prompt_tokens=asked.prompt_tokens)
            given = base.model, predictor, cut_windows(ids[:2048], context=2048), SelectionConfig(budget=1.0, tail=tail)
            selections = simulation.calibrate_tolerance(*given, asked.budgets, **how)
        named = f"{allocation}, tail {tail}" if tail else allocation
        settings |= {f"{b:g} {named}": s for b, s in zip(asked.budgets, selections, strict=True)}
    rows = [row("dense", dense, dense, base.tokenizer.ends)]
    print(rows[0], flush=True)
    for name, selection in settings.items():
        rows.append(row(name, continue_(selection), dense, base.tokenizer.ends))
        print(rows[-1], flush=True)
    report = {"rows": rows, "base": pathlib.Path(asked.base).name, **about("greedy")}
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
