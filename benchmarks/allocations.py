"""Perplexity after a prompt under each allocation, for predictors of one base and for both oracles, on several texts.

    python -m benchmarks.allocations --base BASE --runs RUN [RUN ...] --texts FILE [FILE ...] --json OUT.json

Every window has a prompt that is read densely. The rows after it read a mean share of their keys. The figures are per
cent over the dense perplexity, with the standard error of the paired difference over windows. Each window of a text
is read in one pass, so this suits an accelerator; `butler-jax eval` gives the same in parts, with further tasks.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from fractions import Fraction
from typing import Any

import numpy as np

from benchmarks.about import about
from butler_jax import SelectionConfig, load_base, load_predictor
from butler_jax.data import cut_windows
from butler_jax.policies import OracleResidual, TokenButler, make_policy
from butler_jax.simulation import calibrate_tolerance, simulate

ALLOCATIONS = ("per_head", "per_layer", "tolerance")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", required=True, help="as for butler-jax train")
    parser.add_argument("--runs", nargs="*", default=[], help="runs of butler-jax train; the oracles run in any case")
    parser.add_argument("--texts", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=4, help="windows of each text")
    parser.add_argument("--context", type=int, default=2048, help="tokens of a window")
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--budget", type=Fraction, default=Fraction(1, 16), help="mean share of the keys that is read")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    asked = parser.parse_args()
    base = load_base(asked.base)
    predictors: dict[str, Any] = {pathlib.Path(run).name: load_predictor(run, base) for run in asked.runs}
    rows: list[dict[str, Any]] = []
    for text in asked.texts:
        ids = base.tokenizer.encode(text.read_text())[: asked.windows * asked.context]
        (batch,) = cut_windows(ids, context=asked.context, batch_size=asked.windows)
        rows += measure(base, predictors, batch, text.stem, asked.prompt_tokens, float(asked.budget))
    if asked.json:
        asked.json.write_text(json.dumps({**about("allocations"), "rows": rows}, indent=1) + "\n")


def measure(base, predictors, batch, text: str, prompt: int, budget: float) -> list[dict[str, Any]]:
    """The rows of one text, printed as they are found."""
    counted = np.asarray(batch["segments"])[:, prompt:-1] > 0
    prompts = np.full(len(counted), prompt, np.int32)
    whole, selection = SelectionConfig(budget=1.0), SelectionConfig(budget=budget)

    def losses(found):
        return np.mean(np.asarray(found.nll, np.float64)[:, prompt:-1], axis=1, where=counted)

    dense = losses(simulate(base.model, batch, make_policy("dense"), whole))
    rows = [{"text": text, "policy": "dense", "perplexity": round(float(np.exp(dense.mean())), 3)}]
    print(rows[0], flush=True)
    contenders = [("oracle", make_policy("oracle"), None), ("oracle_residual", OracleResidual(), None)]
    for name, policy, predictor in contenders + [(name, TokenButler(), p) for name, p in predictors.items()]:
        for allocation in ALLOCATIONS if policy.for_predictor(predictor).one_unit else ALLOCATIONS[:1]:
            chosen = dataclasses.replace(selection, allocation=allocation)
            if allocation == "tolerance":
                how = dict(policy=policy, prompt_tokens=prompt)
                (chosen,) = calibrate_tolerance(base.model, predictor, [batch], whole, [budget], **how)
            found = simulate(base.model, batch, policy, chosen, predictor, prompts=prompts)
            more, read = losses(found) - dense, np.asarray(found.attended)[:, prompt:]
            rows.append(
                {
                    "text": text,
                    "policy": name,
                    "allocation": allocation,
                    "over_dense_percent": round(100 * float(np.expm1(more.mean())), 2),
                    "standard_error": round(100 * float(more.std(ddof=1)) / len(more) ** 0.5, 2),
                    "read": round(float(read.mean()), 4),
                    "most_read_by_a_row": round(float(read.max()), 3),
                }
            )
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    main()
