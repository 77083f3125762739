"""Judge a base model and its predictor: every task under every policy and budget, cell by cell.

Several hosts take turns: each measures one of the next cells with the whole base on its first device, and the first one
keeps what they found. A cell is computed as one host alone would, so the report is the same.
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax

from butler_jax.evaluation.cells import Cell, Kept, Progress, Say, cell_of, key_of
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.contenders import Contender, contenders, described
from butler_jax.evaluation.programs import leave_room
from butler_jax.evaluation.report.report import Report, check_directory
from butler_jax.evaluation.tasks.registry import Task, make_tasks
from butler_jax.parallel import agree, gather
from butler_jax.predictors import Predictor
from butler_jax.runs import command, run_data, versions
from butler_jax.storage import to_dict


def evaluate(
    base: Any,
    predictor: Predictor | None = None,
    config: EvalConfig | None = None,
    *,
    data: str | None = None,
    keep: str | Path | None = None,
    say: Say | None = None,
) -> Report:
    """Run the tasks of a configuration on a base from load_base; config.policies are names, or policies themselves.

    predictor: needed by the policy tokenbutler; None reads it from config.run, and without a run the default policies
    do without tokenbutler. data: as config.data. keep: a directory where finished cells are kept as they come
    (cells.jsonl): the next evaluation there does not measure again what is the same, down to the policies' code and the
    package's version; None keeps and writes nothing. say: receives a line of progress after each cell. Of several
    processes, the first one keeps and says; the report is there in all. Raises ValueError for an unknown policy, one
    that was asked for and lacks its predictor, a context beyond the base's, an empty text, where `keep` is no
    directory, and where the processes would not measure the same.
    """
    config = config or EvalConfig()
    base.require_tokenizer()
    first = jax.process_index() == 0
    say = say if say and first else (lambda line: None)
    if keep is not None:
        check_directory(Path(keep))
    data = data or config.data or run_data(config.run)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        say(line)

    judged = contenders(base, predictor, config, data, note)
    tasks = make_tasks(base, config, data, note)
    kept, report = Kept(Path(keep) if keep is not None and first else None), Report()
    plan = [
        (task, one, part) for task in tasks for one in judged if task.takes(one) for part in _parts(task, one, config)
    ]
    learnt, known = {one.label: one.facts() for one in judged}, versions()
    keys = [
        key_of({
            "task": task.name, **task.facts, "base": base.fingerprint, "dtype": config.dtype, "of": learnt[one.label],
            "selections": {str(b): to_dict(s) for b, s in selections.items()}, "seed": config.seed,
            "version": known["butler-jax"],
        })
        for task, one, selections in plan
    ]  # fmt: skip
    if jax.process_count() > 1:
        agree({f"{t.name} under {one.label}, {[*s]}": key for (t, one, s), key in zip(plan, keys, strict=True)})
        there = gather({key: asdict(kept.cells[key]) for key in keys if key in kept.cells})[0]
        kept.cells = {key: cell_of(read) for key, read in there.items()}
    missing = [number for number, key in enumerate(keys) if key not in kept.cells]
    counts = {task.name: sum(plan[number][0] is task for number in missing) for task in tasks}
    progress = Progress(counts, len(plan), say, hosts=jax.process_count())
    for number, ((task, one, _), key) in enumerate(zip(plan, keys, strict=True)):
        if key not in kept.cells:
            turn = [n for n in missing if n >= number][: jax.process_count()]
            for n, cell in zip(turn, _judge([plan[n] for n in turn]), strict=True):
                about = {"task": plan[n][0].name, "policy": plan[n][1].label, "budgets": list(plan[n][2])}
                kept.add(keys[n], about, cell)
        cell = kept.cells[key]
        _enter(report, task, one, cell, config.seed)
        progress.add(task.name, one.label, cell, kept=number not in missing)
    report.about.update(
        base=base.name,
        fingerprint=base.fingerprint,
        predictors={one.label: one.about for one in judged if one.predictor is not None},
        policies=[described(p, data) for p in dict.fromkeys(one.policy for one in judged)],
        versions=known,
        device=f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        notes=notes,
        config={
            **to_dict(dataclasses.replace(config, policies=None)),
            "policies": [p.name for p in dict.fromkeys(one.policy for one in judged)],
        },
        command=command(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(sum(kept.cells[key].seconds for key in dict.fromkeys(keys)), 1),
        cells={"measured": len(missing), "kept": len(keys) - len(missing)},
    )
    return report


def _judge(turn: list[tuple[Task, Contender, dict]]) -> list[Cell]:
    """The cells of one turn: every process measures its own, and gets those of the others."""
    mine = None
    if jax.process_index() < len(turn):
        task, one, selections = turn[jax.process_index()]
        leave_room()
        began = time.perf_counter()
        cell = task.judge(one, selections)
        mine = Cell(cell.findings, cell.arrays, round(time.perf_counter() - began, 2))
    if jax.process_count() == 1:
        return [mine]
    return [cell_of(read) for read in gather(mine and asdict(mine))[: len(turn)]]


def _parts(task: Task, one: Contender, config: EvalConfig) -> list[dict]:
    """The selections of each cell."""
    selections = one.selections(config)
    return [selections] if task.at_once else [{budget: s} for budget, s in selections.items()]


def _enter(report: Report, task: Task, one: Contender, cell: Cell, seed: int) -> None:
    """A cell's findings as rows of the report, and its arrays."""
    for f in cell.findings:
        report.add(task.name, f.metric, one.label, f.budget, *f.estimate, task.unit, seed, f.attended, f.where)
    for name, values in cell.arrays.items():
        report.arrays.setdefault(name, {})[one.label] = values
