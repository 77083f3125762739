"""The model of the kernels' time on four GPUs, and beside what was measured on one of them; no GPU is needed.

    python -m benchmarks.gpu_model --json benchmarks/gpu_model.json

The measured times include the host: a program of four layers is called and waited for, and its time is divided by four.
The model has no host. So a time measured is beside the modelled one and one offset, the median of what is left over in
all rows: one for torch's calls and one for programs of JAX.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pathlib
import statistics
from typing import Any

import jax.numpy as jnp

from benchmarks.about import about
from pallas_kernels.bench.assumptions import Assumptions
from pallas_kernels.bench.cases import SHAPES, Case
from pallas_kernels.bench.chips import CHIPS
from pallas_kernels.bench.prediction import predict_rows

MEASURED = pathlib.Path(__file__).parent / "h200"
FILES = ("sparse_decode.json", "sparse_decode_normalised.json")
CONTEXTS = tuple(2**n for n in range(12, 18))
BATCHES = (1, 16)
INTERVALS = (1, 8)
CALLS = (
    *(("normalised", 2, 1), ("normalised", 4, 1), ("normalised", 1, 1), ("maximum", 2, 1)),
    *(("normalised", 2, 4), ("maximum", 2, 4), ("normalised", 2, 16), ("maximum", 2, 16)),
)
"""Pooling, layers that choose together (the stride of the predictor), and tokens of a unit."""
PARTS = ("dense_seconds", "reuse_seconds", "predict_seconds")


def case_of(context: int, batch: int, pooling: str, together: int = 1, unit: int = 1) -> Case:
    """Llama-3.1-8B's layer, a sixteenth of the tokens read."""
    sizes = dict(context=context, batch=batch, tokens=context // 16, together=together, unit=unit)
    return Case(shape=SHAPES["llama8b"], dtype=jnp.dtype(jnp.bfloat16), pooling=pooling, **sizes)


def model_rows(chip: str, contexts=CONTEXTS, batches=BATCHES) -> list[dict[str, Any]]:
    """The rows of a chip: a layer of a decode step, with each of the calls; times in microseconds."""
    found = []
    for (pooling, together, unit), batch, context in itertools.product(CALLS, batches, contexts):
        for row in predict_rows(case_of(context, batch, pooling, together, unit), CHIPS[chip], INTERVALS):
            kernels = {name: round(1e6 * t, 1) for name, t in row["kernels"].items()}
            figures = dict(us=row["seconds"] * 1e6, dense_us=row["dense_seconds"] * 1e6, speedup=row["speedup"])
            figures |= dict(cap=row["cap"], share_of_cap=row["share_of_cap"])
            which = dict(chip=chip, pooling=pooling, together=together, unit=unit, batch=batch, context=context)
            which |= dict(interval=row["interval"])
            found.append(which | {k: round(v, 3) for k, v in figures.items()} | dict(kernels=kernels))
    return found


def compare(files=FILES) -> dict[str, Any]:
    """Rows of times measured on an H200 beside modelled ones, in microseconds, and the offsets of the host."""
    rows = []
    for name in files:
        report = json.loads((MEASURED / name).read_text())
        for row in (r for r in report["rows"] if r["interval"] == 1):
            (own,) = predict_rows(case_of(row["context"], row["batch"], report["pooling"]), CHIPS["h200"], (1,))
            found = dict(file=name, pooling=report["pooling"], batch=row["batch"], context=row["context"])
            for part in PARTS:
                found[part.removesuffix("_seconds")] = [round(1e6 * each[part], 1) for each in (row, own)]
            rows.append(found)
    offsets = {
        host: round(statistics.median(row[part][0] - row[part][1] for row in rows), 1)
        for host, part in (("torch_call_us", "dense"), ("jax_program_us_a_layer", "reuse"))
    }
    for row in rows:
        for part, host in (("dense", "torch_call_us"), ("reuse", "jax_program_us_a_layer")):
            row[f"{part}_model_over_measured"] = round((row[part][1] + offsets[host]) / row[part][0], 2)
        former = row["predict"][1] + offsets["jax_program_us_a_layer"]
        row["predict_model_over_measured_of_former_kernels"] = round(former / row["predict"][0], 2)
    return dict(offsets=offsets, compared=rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", nargs="+", choices=CHIPS, default=[*CHIPS])
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    asked = parser.parse_args()
    found = compare()
    print(f"H200, [measured, modelled] us a layer; the offsets of the host are {found['offsets']}")
    print(*found["compared"], sep="\n")
    rows = [row for chip in asked.chips for row in model_rows(chip)]
    print(*rows, sep="\n")
    if asked.json:
        note = "'compared' has times [measured, modelled]. The former kernels took 9 launches, 10 normalised."
        report = {**about("gpu_model"), "note": note, **found, "rows": rows, "assumptions": Assumptions().records()}
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
