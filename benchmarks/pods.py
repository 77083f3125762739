"""Steps of Llama-3.1, compiled for TPU pods by the TPU compiler on a machine without a TPU.

    python -m benchmarks.pods --json benchmarks/pods.json        # the whole table; needs jax[tpu], no TPU
    python -m benchmarks.pods --model llama-3.1-8b --topology v5e:16x16 --mesh data=256 --step train --length 4096

The steps are those of train.py, generate and eval.py, with the kernels that they choose on a TPU. Arguments are shapes
with shardings, so no arrays are made. The figures of each step are those of one chip:

- the memory that the compiler allots for arguments and temporaries
- collectives by kind, with the bytes that the chip sends (hlo.py says how they are counted)
- floating-point operations
- the times of arithmetic, memory and links at the chip's peak rates. A step takes at least the largest of the three,
  and their sum where nothing overlaps. No chip reaches its peak rates.

Operations and bytes of memory are counted by formula (`work_of`), because the compiler counts a loop's body once and
nothing inside a kernel.
"""

from __future__ import annotations

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # no metadata server is asked what chip this is
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no chip to share: another process may hold its lock

import argparse
import dataclasses
import importlib.metadata
import json
import math
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks import hlo
from benchmarks.pod_evaluations import PASSES, Sizes, lower_evaluation, operations_of
from benchmarks.pod_evaluations import markdown as evaluation_markdown
from benchmarks.pod_plans import CHIPS, MODELS, TABLE, PodPlan
from benchmarks.tpu_decode import SELECTION, lower_decode
from butler_jax.model import LOGICAL_AXES, BaseModel, parameter_count
from butler_jax.parallel import check_batch, module_shardings
from butler_jax.parallel.mesh import arrange, batch_sharding, parse_mesh
from butler_jax.predictors import make_predictor
from butler_jax.runs import versions
from butler_jax.storage import write_whole
from butler_jax.training import TrainConfig, start_state
from butler_jax.training.distillation import distil_step

MIB = 2**20
TOKEN_BYTES = 16  # of text, and of the tables of four budgets, which an evaluation looks up by length
LANES = 128  # what the flash attention kernel pads heads to


def mesh_of(plan: PodPlan) -> Mesh:
    """The plan's mesh over described chips. Raises ValueError where the topology has too few."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=plan.topology).devices
    sizes = parse_mesh(plan.mesh)
    needed = math.prod(sizes.values())
    if needed > len(devices):
        raise ValueError(f"mesh {plan.mesh} needs {needed} chips, {plan.topology} has {len(devices)}")
    return arrange(sizes, devices[:needed])


def lower_step(plan: PodPlan, mesh: Mesh) -> Any:
    """The plan's step, lowered for the mesh from shapes and shardings."""
    if plan.step == "decode":
        options = dict(batch=plan.batch_size, capacity=plan.length, predictor=plan.predictor_config)
        return lower_decode(mesh, base=plan.base, **options)
    check_batch(plan.batch_size, mesh)
    if plan.step in PASSES:
        sizes = Sizes(plan.batch_size, plan.length)
        return lower_evaluation(mesh, step=plan.step, base=plan.base, sizes=sizes, config=plan.predictor_config)
    settings = TrainConfig(
        predictor=plan.predictor_config,
        length=plan.length,
        batch_size=plan.batch_size,
        steps=1000,
        attention="splash",
    )
    step, optimiser = distil_step(settings)

    def described(shapes, axes):
        places = module_shardings(shapes, axes, mesh)
        return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, places)

    model = jax.eval_shape(lambda: BaseModel(plan.base, jax.random.key(0), jnp.bfloat16))
    state = jax.eval_shape(lambda: start_state(make_predictor(plan.base, settings.predictor), optimiser))
    row = jax.ShapeDtypeStruct((plan.batch_size, plan.length), jnp.int32, sharding=batch_sharding(mesh))
    batch = dict.fromkeys(("tokens", "segments", "positions"), row)
    with jax.set_mesh(mesh):
        return step.lower(described(state, state.module.logical_axes), described(model, LOGICAL_AXES), batch)


class Work(NamedTuple):
    """The work of one chip in one step: floating-point operations, and bytes read from and written to its memory."""

    flops: float
    memory: float


def work_of(plan: PodPlan, held: float) -> Work:
    """The work of a step by formula, spread evenly over the chips. held: bytes of arguments on a chip.

    Training has the matrix products of the frozen layers once, and those of q_imp and k_imp once forward and once for
    their gradient. The cross entropy with attention calls attention three times forward (two products each) and twice
    backward (four each), over half the square and in heads of 128 lanes. That with errors calls it once, sums rows with
    six products and takes the gradient of k_imp with five. There are no logits. Operands and results are read or
    written once; weights twice, because they are gathered first.

    Decoding has two operations for every parameter and row, the scores of all cached tokens, and attention over the
    chosen ones. A chip reads all it holds except the keys and values that are not chosen; layer 0 reads all of them.
    """
    base, rows, length, sizes = plan.base, plan.batch_size, plan.length, parse_mesh(plan.mesh)
    chips = math.prod(sizes.values())
    E, hidden, L, H, K, D = base.width, base.hidden, base.layers, base.heads, base.kv_heads, base.head_dim
    R = TrainConfig().predictor.rank
    if plan.step == "decode":
        model = jax.eval_shape(lambda: BaseModel(base, jax.random.key(0)))
        share = (1 + (L - 1) * float(SELECTION.budget)) / L
        cache = 2 * L * rows * K * length * D * 2 / chips
        attention = 4 * rows * L * H * D * length * share
        scores = 2 * rows * (L - 1) * H * R * length
        flops = 2 * rows * (parameter_count(model) - base.vocab_size * E) + attention + scores
        return Work(flops / chips, held - cache * (1 - share))
    tokens = rows * length
    frozen = [(E, H * D), (E, K * D), (E, K * D), (H * D, E), (E, hidden), (E, hidden), (hidden, E)]
    learned = [(E, H * R), (D, K * R)]
    products = sum(a * b for a, b in frozen + 2 * learned)
    products_a_pair, calls = (3 * 2 + 2 * 4, 5) if plan.target == "attention" else (2 + 6 + 5, 3)
    attention = products_a_pair * tokens * length / 2 * H * LANES
    moved = sum(tokens * (a + b) + 2 * sizes["data"] * a * b for a, b in frozen + 2 * learned)
    moved += calls * tokens * 2 * (H + K) * LANES
    return Work(2 * L * (tokens * products + attention) / chips, 2 * L * moved / chips)


def whole_arguments(compiled: Any, length: int) -> list[str]:
    """The compiled program's arguments that every chip holds whole, above 1 MiB and above a token's data of text."""
    most = max(MIB, TOKEN_BYTES * (length + 1))
    leaves = dict(jax.tree_util.tree_leaves_with_path(compiled.in_avals))
    found = []
    for path, place in jax.tree_util.tree_leaves_with_path(compiled.input_shardings):
        size = leaves[path].size * leaves[path].dtype.itemsize
        if size > most and place.is_fully_replicated:
            found.append(f"{jax.tree_util.keystr(path)} {size / MIB:.1f} MiB")
    return found


def layer_bytes(plan: PodPlan) -> float:
    """Bytes of one frozen layer's weights in bfloat16: the part that a chip of the model axis reads."""
    layers = jax.eval_shape(lambda: BaseModel(plan.base, jax.random.key(0))).layers
    return 2 * parameter_count(layers) / plan.base.layers / parse_mesh(plan.mesh)["model"]


def compile_plan(plan: PodPlan) -> tuple[dict[str, Any], Any]:
    """The report of a step and the compiled step; (the report with the error, None) where the compiler refuses it."""
    mesh = mesh_of(plan)
    began = time.perf_counter()
    report = {"plan": dataclasses.asdict(plan), "chips": mesh.size}
    try:
        compiled = lower_step(plan, mesh).compile()
    except jax.errors.JaxRuntimeError as error:
        return {**report, "error": str(error).strip().splitlines()[0]}, None
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    kinds = hlo.by_kind(hlo.collectives(text, mesh.size))
    report |= {
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "output_bytes_besides": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "whole_arguments": whole_arguments(compiled, plan.length),
        "collectives": kinds,
        "compiler_flops": cost.get("flops"),
        "compiler_bytes_accessed": cost.get("bytes accessed"),
        "compile_seconds": time.perf_counter() - began,
    }
    if plan.step in PASSES:  # how often a chunk's scores are written is the compiler's choice: no times by formula
        flops = operations_of(plan.step, plan.base, Sizes(plan.batch_size, plan.length)) / mesh.size
        return {**report, "flops": flops}, compiled
    work, chip = work_of(plan, memory.argument_size_in_bytes), CHIPS[plan.chip]
    seconds = {
        "arithmetic": work.flops / chip.flops,
        "memory": work.memory / chip.memory,
        "links": sum(kind["bytes"] for kind in kinds.values()) / chip.links,
    }
    return {
        **report,
        "largest_stack_bytes": hlo.largest_stack(text, plan.base.layers),
        "layer_bytes": layer_bytes(plan),
        "flops": work.flops,
        "memory_bytes": work.memory,
        "seconds": seconds,
        "seconds_at_least": max(seconds.values()),
        "seconds_without_overlap": sum(seconds.values()),
    }, compiled


def line_of(report: dict[str, Any]) -> str:
    """One entry of the table as text."""
    plan = PodPlan(**report["plan"])
    name = f"{plan.model} {plan.step} {plan.topology} {plan.mesh} T={plan.length} B={plan.batch_size}"
    if "error" in report:
        return f"{name}: {report['error']}"
    moved = ", ".join(
        f"{kind} {one['count']} x, {one['bytes'] / 1e9:.3g} GB" for kind, one in report["collectives"].items()
    )
    times = ""
    if "seconds" in report:
        parts = ", ".join(f"{part} {1e3 * s:.3g}" for part, s in report["seconds"].items())
        bounds = (1e3 * report[f"seconds_{bound}"] for bound in ("at_least", "without_overlap"))
        times = f", {report['memory_bytes'] / 1e9:.3g} GB of memory; ms at the peaks: {parts}; a step "
        times += " to ".join(f"{bound:.3g}" for bound in bounds) + " ms"
    whole = f"; WHOLE ON EVERY CHIP: {', '.join(report['whole_arguments'])}" if report["whole_arguments"] else ""
    kept, needed = (report[f"{name}_bytes"] / 2**30 for name in ("argument", "temporary"))
    return (
        f"{name}: arguments {kept:.2f} GiB, temporaries {needed:.2f} GiB; {moved or 'no collectives'}; "
        f"{report['flops'] / 1e12:.3g} TFLOP{times}{whole}"
    )


def markdown(report: dict[str, Any], step: str) -> list[str]:
    """The lines of the table of one kind of step in a written report, as docs/guides/scaling.md has them."""
    lines = [
        "| | slice, mesh | tokens x rows | GiB: arguments + temporaries | GB sent by a chip | collectives | TFLOP "
        "| ms: arithmetic, memory, links | a step, ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for found in report["steps"]:
        plan = PodPlan(**found["plan"])
        if plan.step != step:
            continue
        place = f"{plan.topology.replace(':', ' ')}, `{plan.mesh}`"
        cells = [plan.model.rpartition("-")[2].upper(), place, f"{plan.length:,} x {plan.batch_size}"]
        if "error" in found:
            cells += [f"does not fit: {found['error'].partition('HBM, ')[2] or found['error']}", *[""] * 5]
        else:
            sent = {kind: one["bytes"] / 1e9 for kind, one in found["collectives"].items()}
            cells.append(" + ".join(f"{found[f'{part}_bytes'] / 2**30:.2f}" for part in ("argument", "temporary")))
            cells.append(", ".join(f"{kind} {_short(size)}" for kind, size in sent.items() if size > 0.001))
            cells.append(f"{sum(one['count'] for one in found['collectives'].values()):,}")
            cells.append(_short(found["flops"] / 1e12))
            cells.append(", ".join(_short(1e3 * seconds) for seconds in found["seconds"].values()))
            bounds = (found[f"seconds_{bound}"] for bound in ("at_least", "without_overlap"))
            cells.append(" to ".join(_short(1e3 * seconds) for seconds in bounds))
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _short(value: float) -> str:
    """A number with three digits, or with all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def main() -> None:
    """Compile one plan or all of TABLE, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=list(MODELS), help="one step of this model instead of the whole table")
    for field in dataclasses.fields(PodPlan):
        if field.name != "model":
            kind = str if isinstance(field.default, str) else int
            parser.add_argument("--" + field.name.replace("_", "-"), type=kind, default=field.default)
    parser.add_argument("--json", type=pathlib.Path, help="write the figures here")
    parser.add_argument("--table", type=pathlib.Path, help="compile nothing: print the table of figures written before")
    arguments = parser.parse_args()
    if arguments.table:
        for kind in ("train", "decode"):
            print("\n".join(markdown(json.loads(arguments.table.read_text()), kind)), end="\n\n")
        print("\n".join(evaluation_markdown(json.loads(arguments.table.read_text()))))
        return
    jax.config.update("jax_enable_compilation_cache", False)  # it cannot hold programs for chips that are not here
    plans = TABLE
    if arguments.model:
        plans = [PodPlan(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(PodPlan)})]
    report = {
        "versions": {**versions(), "libtpu": importlib.metadata.version("libtpu")},
        "chips": {n: c._asdict() for n, c in CHIPS.items()},
        "steps": [],
    }
    known = []
    if arguments.json and arguments.json.exists():  # go on where an interrupted run of the same versions stopped
        written = json.loads(arguments.json.read_text())
        known = written["steps"] if written["versions"] == report["versions"] else []
    for plan in plans:
        done = [step for step in known if step["plan"] == dataclasses.asdict(plan)]
        report["steps"].append(done[0] if done else compile_plan(plan)[0])
        print(line_of(report["steps"][-1]), flush=True)
        jax.clear_caches()
        if arguments.json:
            write_whole(arguments.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
