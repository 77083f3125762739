"""A model of decode attention on TPUs that need not be there: `python -m benchmarks.tpu_model [--json FILE]`.

The TPU compiler writes its schedule: every instruction word ("bundle") of every kernel, in which an operation of each
unit starts. The model counts those that a call executes. It needs `pip install "jax[tpu]"`, and no TPU.

A kernel takes the longer of two times: of its bytes from HBM, and of its bundles, one a cycle. An operation beside the
kernels takes OPERATION. Dense attention takes its bytes. What the schedule does not show is left out: waiting for
memory inside a kernel, and the start of a program.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_llo_text=true --xla_jf_dump_to={tempfile.mkdtemp()}"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

import pallas_kernels as pk
from benchmarks import pod_plans, tpu_decode
from benchmarks.about import about
from pallas_kernels.bench.cases import SHAPES, Case
from pallas_kernels.tpu import attention, scores, selection

SCHEDULES = Path(os.environ["LIBTPU_INIT_ARGS"].rpartition("=")[2])
CLOCKS = {"v5e": 1.5e9, "v5p": 1.75e9, "v6e": 1.75e9}  # a second: the peak over the multiply-adds of the matrix units
CORES = {"v5e": 1, "v5p": 2, "v6e": 1}
OPERATION = 0.5e-6  # seconds; a guess
TRIALS = 8  # of the search for a threshold; counted on normal scores, 1/16 chosen
HEADS, GROUP, DIM, RANK = 8, 4, 128, 16  # Llama-3.1-8B's layer
UNITS = (16, 8, 4, 2)  # tokens of a page
KERNELS = ("importance_scores", "select_top_k", "attend_to_pages")


class BundleRun(NamedTuple):
    """Consecutive bundles at one depth of loops."""

    depth: int
    bundles: int


def runs_of(kernel: str) -> list[BundleRun]:
    """The runs of a kernel in its schedule, without those of one or two bundles, which only enter or leave others."""
    (path,) = (p for p in SCHEDULES.glob(f"*{kernel}*final_bundles.txt") if "schedule-analysis" not in p.name)
    found: list[list[int]] = []
    for line in path.read_text().splitlines():
        if not (match := re.match(r"\s*(?:0x[0-9a-f]+|0)\s*(LB|LH|PB|PF|CT|LE)?:?\s*((?:>\s*)*)[: ]*\{", line)):
            continue
        depth = match[2].count(">")
        if not found or found[-1][0] != depth or match[1] == "LB":
            found.append([depth, 0])
        found[-1][1] += 1
    return [BundleRun(*one) for one in found if one[1] > 2]


def compile_layer(chip: str, context: int, unit: int) -> tuple[dict[str, list[BundleRun]], int]:
    """The schedules of the kernels of a layer, and how many operations of a call are beside them."""
    for path in SCHEDULES.glob("*"):
        path.unlink()
    mesh = tpu_decode.chips(chip, "model=1")
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    cache = array(1, HEADS, context, DIM)
    operands = array(1, HEADS * GROUP, DIM), cache, cache, array(1, HEADS, GROUP, RANK)
    operands += array(1, HEADS, RANK, context), array(1, dtype=jnp.int32)

    def layer(q, k, v, q_imp, k_imp, lengths):
        rules = dict(sinks=4, recent=8, unit=unit, implementation="tpu")
        return pk.sparse_decode_attention(q, k, v, q_imp, k_imp, lengths, context // 16 // unit, **rules)

    with jax.set_mesh(mesh):
        text = jax.jit(layer).lower(*operands).compile().as_text()
    entry = re.findall(r"= \S+ ([\w-]+)\(", text[text.index("ENTRY") :])
    free = ("parameter", "constant", "bitcast", "get-tuple-element", "tuple")
    beside = sum(name not in free for name in entry) - len(KERNELS)
    return {kernel: runs_of(kernel) for kernel in KERNELS}, beside


def search_bundles(runs: list[BundleRun], units: int) -> float:
    """The bundles of the search of eight rows, of the schedule of the selection."""
    parts, slots = -(-units // selection.WIDE), max(1, units // 16 // selection.SLOTS)
    loops, once = [run.bundles for run in runs if run.depth == 2], sum(run.bundles for run in runs if run.depth == 1)
    counted = [i for i, run in enumerate(runs) if run.depth == 3]
    if not counted:  # one part: its loops are unrolled
        _, *trial, mark = loops
        return once + TRIALS * sum(trial) + units // selection.LANES * mark
    _, number, widen, before = loops[:4]
    after, mark, *find = [run.bundles for run in runs[counted[-1] :] if run.depth == 2]
    trial = before + after + parts * sum(runs[i].bundles for i in counted)
    # With more than one group of slots, each of the eight rows has a loop over them.
    return once + parts * (number + widen) + TRIALS * trial + units // selection.LANES * mark + slots * sum(find)


def tile_bundles(runs: list[BundleRun], unit: int) -> tuple[float, float, float]:
    """The bundles of a tile of the attention: around it, and to attend it where a row sees all or a part of it."""
    inner = [i for i, run in enumerate(runs) if run.depth == 3]
    pages, around = attention.TILE // unit, 0
    first, *_ = inner
    if pages > attention.UNROLLED:  # a loop starts the copies, those of a core's first tiles and those of the others
        _, first, starts, *_ = inner
        around = pages // attention.UNROLLED * runs[starts].bundles
    *parts, whole, masked = [run.bundles for run in runs[first:] if run.depth == 2]
    return around + sum(parts), whole, masked


def bundles_of(runs: dict[str, list[BundleRun]], context: int, batch: int, unit: int) -> dict[str, float]:
    """The bundles that each kernel of a call executes."""
    depth = lambda kernel, d: [run.bundles for run in runs[kernel] if run.depth == d]  # noqa: E731
    blocks = context // scores.BLOCK
    chunk = scores.SCORED // (HEADS * GROUP)
    score, *_, write = depth("importance_scores", 2)
    outside = sum(depth("importance_scores", 1))
    found = {"importance_scores": batch * (blocks * outside + context // chunk * (score + write))}

    units, together = context // unit, selection.LANES * unit
    found["select_top_k"] = (
        batch
        * HEADS
        / selection.SUBLANES
        * (context // together * depth("select_top_k", 2)[0] + search_bundles(runs["select_top_k"], units))
    )
    attend = runs["attend_to_pages"]
    around, whole, masked = tile_bundles(attend, unit)
    tiles = context // 16 // attention.TILE
    row = tiles * around + (tiles - 1) * whole + masked  # the newest page is seen in part
    found["attend_to_pages"] = batch * HEADS * (row + sum(depth("attend_to_pages", 1)))
    return found


def model_row(
    chip: str, context: int, batch: int, unit: int, runs: dict[str, list[BundleRun]], beside: int
) -> dict[str, Any]:
    """A row of the table: seconds of each kernel, of the call and of dense attention, and the share of the byte cap."""
    bandwidth = pod_plans.CHIPS[chip].memory
    case = Case(
        shape=SHAPES["llama8b"], context=context, batch=batch, tokens=context // 16, dtype=jnp.bfloat16, unit=unit
    )
    written = 4 * batch * HEADS * context  # scores
    read = case.dense_bytes / 16
    moved = dict(importance_scores=case.sparse_bytes(1) - read - written, select_top_k=written, attend_to_pages=read)
    kernels = {}
    for kernel, bundles in bundles_of(runs, context, batch, unit).items():
        cores = CORES[chip] if kernel == "attend_to_pages" or batch > 1 else 1  # cores divide sequences, or rows
        cycles, bytes_ = bundles / cores / CLOCKS[chip], moved[kernel] / bandwidth
        kernels[kernel] = dict(bundles=round(bundles), bundle_seconds=cycles, byte_seconds=bytes_)
    seconds = beside * OPERATION + sum(max(k["bundle_seconds"], k["byte_seconds"]) for k in kernels.values())
    dense = case.dense_bytes / bandwidth
    row = dict(
        chip=chip, context=context, batch=batch, unit=unit, dense_seconds=dense, operations=beside, kernels=kernels
    )
    return row | case.speeds(1, dense, seconds, seconds)


def main() -> None:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    rows = []
    print("MODELLED, nothing was run: Llama-3.1-8B's layer, bfloat16, 1/16 read in pages")
    for unit, chip, context in itertools.product(UNITS, CLOCKS, (16384, 32768, 131072)):
        schedule = compile_layer(chip, context, unit)
        for batch in (1, 16):
            row = model_row(chip, context, batch, unit, *schedule)
            rows.append(row)
            parts = ", ".join(
                f"{name} {1e6 * k['bundle_seconds']:.1f} ({1e6 * k['byte_seconds']:.1f} for bytes)"
                for name, k in row["kernels"].items()
            )
            print(
                f"{chip} {context:>7} tokens, pages of {unit:>2}, batch {batch:>2}: {1e6 * row['seconds']:8.1f} us, "
                f"dense {1e6 * row['dense_seconds']:8.1f} us, {row['speedup']:5.2f}x, {row['share_of_cap']:4.0%} of "
                f"the cap {row['cap']:.1f}; {row['operations']} operations; us: {parts}",
                flush=True,
            )
    shutil.rmtree(SCHEDULES, ignore_errors=True)
    if asked.json:
        report = about("tpu_model") | dict(
            clocks=CLOCKS, cores=CORES, operation_seconds=OPERATION, trials=TRIALS, rows=rows
        )
        asked.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
