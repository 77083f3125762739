"""The dense model `butler` against lm-evaluation-harness's own `hf`, on the same weights and items in one process.

    python -m benchmarks.harness_agreement --base DIR --evals DIR --json benchmarks/quality/harness_agreement.json

It needs the extra `harness`, torch, transformers and accelerate. --evals: JSON lines of the local tasks (eval.py
--downstream).
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

import numpy as np

from benchmarks.about import about


def compare(
    base: pathlib.Path, evals: pathlib.Path, task: str, limit: int, max_length: int, *, chat: bool = False
) -> tuple[list[np.ndarray], list[list[float]]]:
    """Likelihoods [items, choices] in nats and accuracies of the items, of `butler` and of `hf`, in float32.

    chat: whether both put their contexts into the model's chat template.
    """
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM

    from butler_jax.evaluation import ButlerLM
    from butler_jax.evaluation.tasks.local_tasks import make_local_tasks

    settings = dict(max_length=max_length, batch_size=8)
    ours = ButlerLM.create_from_arg_obj(dict(base=str(base), dtype="float32", progress=False, **settings))
    theirs = HFLM(pretrained=str(base), device="cpu", dtype="float32", **settings)
    values, accuracies = [], []
    for model in (ours, theirs):
        tasks = make_local_tasks(evals, [task])
        found = evaluate(model, tasks, limit=limit, bootstrap_iters=0, apply_chat_template=chat)
        samples = found["samples"][f"{task}_local"]
        values.append(np.asarray([[answer[0][0] for answer in sample["resps"]] for sample in samples]))
        accuracies.append([sample["acc"] for sample in samples])
    return values, accuracies


def row(task: str, values: list[np.ndarray], accuracies: list[list[float]]) -> dict[str, Any]:
    """A task's accuracies and the differences of the likelihoods."""
    right = [float(np.mean(a)) for a in accuracies]
    same = sum(a == b for a, b in zip(*accuracies, strict=True))
    apart = float(np.abs(values[0] - values[1]).max())
    return {"task": task, "n": len(values[0]), "butler": right[0], "hf": right[1], "items_alike": same, "apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", type=pathlib.Path, required=True, help="a Hugging Face directory")
    parser.add_argument("--evals", type=pathlib.Path, required=True, help="a directory of JSON lines")
    parser.add_argument("--tasks", nargs="+", default=["lambada", "piqa"])
    parser.add_argument("--limit", type=int, default=200, help="items of a task")
    parser.add_argument("--max-length", type=int, default=1023, help="tokens that a prediction may look back on")
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    arguments = parser.parse_args()
    rows = []
    for task in arguments.tasks:
        found = compare(arguments.base, arguments.evals, task, arguments.limit, arguments.max_length)
        rows.append(row(task, *found))
        print(rows[-1], flush=True)
    report = {
        "rows": rows,
        "base": arguments.base.name,
        **about("harness_agreement", "lm_eval", "torch", "transformers"),
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
