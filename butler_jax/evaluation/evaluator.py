"""Evaluate a base model and its predictor: every task under every policy and budget, cell by cell.

A task sums over the sequences that it runs (`TextSums`, `Answers` or `Recall`). The quotient of two sums is an
`Estimate`: a mean with its standard error. An estimate with its task, metric, policy and budget is a `ReportRow`, and a
report is a list of these. The rows of one task, policy and budget are a `Cell`. A cell is measured at once, kept in
cells.jsonl and exchanged between hosts.

Several hosts take turns. Each measures one of the next cells with the whole base on its first device, and the first
host keeps the results. A cell is computed as a single host computes it, so the report is the same. With a mesh, all its
devices measure each cell together.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from butler_jax.evaluation.allocations import allocate_policies
from butler_jax.evaluation.cells import Cell, KeptCells, read_cell
from butler_jax.evaluation.config import EvalConfig
from butler_jax.evaluation.contenders import EvaluatedPolicy, collect_policies, describe_prepared
from butler_jax.evaluation.hashes import hash_facts
from butler_jax.evaluation.programs import drop_programs
from butler_jax.evaluation.progress import CellProgress, Say
from butler_jax.evaluation.report.report import Report, check_directory
from butler_jax.evaluation.tasks.base import Task
from butler_jax.evaluation.tasks.registry import make_tasks
from butler_jax.model import place_model, require_loaded
from butler_jax.parallel import EVALUATION_RULES, agree, check_batch, gather, make_mesh
from butler_jax.predictors import Predictor
from butler_jax.runs import command, run_data, versions
from butler_jax.selection import SelectionConfig
from butler_jax.storage import to_dict
from butler_jax.weights import Base


class PlannedCell(NamedTuple):
    """A cell to measure: a task, a policy and its selections by budget; key: the hash of all it depends on."""

    task: Task
    policy: EvaluatedPolicy
    selections: dict[float | int, SelectionConfig]
    key: str

    def __str__(self) -> str:
        return f"{self.task.name} under {self.policy.label}, {[*self.selections]}"

    def measure(self) -> Cell:
        """Measure the cell, and how long that takes."""
        drop_programs()
        began = time.perf_counter()
        cell = self.task.evaluate(self.policy, self.selections)
        return dataclasses.replace(cell, seconds=round(time.perf_counter() - began, 2))


def evaluate(
    base: Base,
    predictor: Predictor | None = None,
    config: EvalConfig | None = None,
    *,
    keep: str | Path | None = None,
    say: Say | None = None,
) -> Report:
    """Run the tasks of a configuration on a base model.

    Args:
        base: The model, with its tokenizer.
        predictor: Needed by the policy tokenbutler; None reads it from config.run. Without either, the default policies
            leave tokenbutler out.
        config: The configuration; config.policies are names, or policies themselves.
        keep: The directory of cells.jsonl, where finished cells are kept. A later evaluation measures a cell again only
            where something it depends on has changed, the policies' code and the package's version included. None
            writes nothing.
        say: Receives a line of progress after each cell.

    Returns:
        The report, in every process. Only the first process keeps cells and calls `say`.

    Raises:
        ValueError: A policy is unknown or lacks its predictor, the context is beyond the base's, a text is empty,
            `keep` is a file, the mesh does not fit the devices or the batch, or the processes would not measure the
            same.
    """
    config = config or EvalConfig()
    require_loaded(base, predictor)
    if not isinstance(config, EvalConfig):
        raise ValueError(f"config must be an EvalConfig, got a {type(config).__name__}")
    base.require_tokenizer()
    first = jax.process_index() == 0
    say = say if say and first else (lambda line: None)
    if keep is not None:
        check_directory(Path(keep).expanduser())
    data = config.data or run_data(config.run)
    notes: list[str] = []

    def note(line: str) -> None:
        if line not in notes:
            notes.append(line)
            say(line)

    with _on_mesh(config) as mesh:
        if mesh is not None:
            base = dataclasses.replace(base, model=place_model(base.model, mesh, EVALUATION_RULES))
        policies = collect_policies(base, predictor, config, data, note)
        policies = [policy.on(mesh) for policy in policies] if mesh is not None else policies
        tasks = make_tasks(base, config, data, note)
        policies = list(allocate_policies(policies, base, config, data, note, say))
        plan = plan_cells(base, tasks, policies, config)
        if not plan:
            note("nothing is measured: the tasks take none of the policies under these allocations and tails")
        kept = KeptCells(Path(keep) if keep is not None and first else None)
        if others := len(kept.cells.keys() - {cell.key for cell in plan}):
            say(f"{others} finished cells of other settings stay in {keep}; the report is of these settings alone")
        counts = _measure_missing(plan, kept, say, hosts=jax.process_count() if mesh is None else 1)
    report = Report(about={**_describe(base, policies, config, data), "notes": notes, "cells": counts})
    for planned in plan:
        cell = kept.cells[planned.key]
        for row in cell.rows:
            report.add(dataclasses.replace(row, policy=planned.policy.label))
        for name, values in cell.arrays.items():
            report.arrays.setdefault(name, {}).setdefault(planned.policy.label, []).extend(values)
    report.about["seconds"] = round(sum(kept.cells[key].seconds for key in {cell.key: None for cell in plan}), 1)
    return report


@contextmanager
def _on_mesh(config: EvalConfig) -> Iterator[jax.sharding.Mesh | None]:
    """Set the mesh of a configuration; None without one."""
    if not config.mesh:
        yield None
        return
    mesh = make_mesh(config.mesh)
    check_batch(config.batch_size, mesh, what="--batch-size")
    with jax.set_mesh(mesh):
        yield mesh


def plan_cells(
    base: Base, tasks: Sequence[Task], policies: Sequence[EvaluatedPolicy], config: EvalConfig
) -> list[PlannedCell]:
    """The cells of an evaluation in the order of tasks, policies and budgets."""
    shared = {"base": base.fingerprint, "dtype": str(base.dtype)}
    shared |= {"seed": config.seed, "version": versions()["butler-jax"]}
    facts = {policy.label: policy.facts() for policy in policies}
    plan = []
    for task, policy in itertools.product(tasks, policies):
        if not task.takes(policy):
            continue
        selections = policy.selections(config)
        for part in [selections] if task.at_once else [{budget: s} for budget, s in selections.items()]:
            chosen = {str(budget): to_dict(selection) for budget, selection in part.items()}
            depends = {**shared, "task": task.name, **task.facts, "policy": facts[policy.label], "selections": chosen}
            plan.append(PlannedCell(task, policy, part, hash_facts(depends)))
    return plan


def _measure_missing(plan: Sequence[PlannedCell], kept: KeptCells, say: Say, *, hosts: int) -> dict[str, int]:
    """Measure and keep the cells that are not kept, `hosts` of them at the same time, one on each.

    With one of several processes at a time, all of them measure it together.

    Returns how many cells were measured, and how many were kept.
    """
    if jax.process_count() > 1:
        _share_kept(kept, plan)
    missing = {cell.key: cell for cell in plan if cell.key not in kept.cells}
    counts = Counter(cell.task.name for cell in plan if cell.key in missing)
    for task in {id(cell.task): cell.task for cell in plan}.values():
        task.expect([(cell.policy, cell.selections) for cell in missing.values() if cell.task is task])
    progress = CellProgress({cell.task.name: counts[cell.task.name] for cell in plan}, len(plan), say, hosts=hosts)
    measured = set()
    for planned in plan:
        if planned.key not in kept.cells and jax.process_count() == 1:
            kept.refresh()  # another evaluation may have measured it meanwhile
        if planned.key not in kept.cells:
            turn = [cell for key, cell in missing.items() if key not in kept.cells][:hosts]
            progress.begin(planned.task.name, planned.policy.label)
            results = [planned.measure()] if hosts == 1 else _measure_turn(turn)
            for cell, found in zip(turn, results, strict=True):
                kept.add(cell.key, found)
                measured.add(cell.key)
        done = kept.cells[planned.key]
        progress.add(planned.task.name, planned.policy.label, done, kept=planned.key not in missing)
    return {"measured": len(measured), "kept": len(plan) - len(measured)}


def _describe(base: Base, policies: Sequence[EvaluatedPolicy], config: EvalConfig, data: str) -> dict[str, Any]:
    """What a report tells about its evaluation."""
    names = dict.fromkeys(one.policy for one in policies)
    return dict(
        base=base.name,
        fingerprint=base.fingerprint,
        predictors={one.label: one.about for one in policies if one.predictor is not None},
        policies=[describe_prepared(policy, data) for policy in names],
        versions=versions(),
        device=f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        config={**to_dict(dataclasses.replace(config, policies=None)), "policies": [policy.name for policy in names]},
        command=command(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _share_kept(kept: KeptCells, plan: Sequence[PlannedCell]) -> None:
    """Give all processes the cells that the first one has kept, and check that their plans are equal."""
    agree({str(cell): cell.key for cell in plan})
    there = gather({cell.key: asdict(kept.cells[cell.key]) for cell in plan if cell.key in kept.cells})[0]
    kept.cells = {key: read_cell(read) for key, read in there.items()}


def _measure_turn(turn: Sequence[PlannedCell]) -> list[Cell]:
    """The cells of one turn: every process measures its own, and receives those of the others."""
    number = jax.process_index()
    mine = turn[number].measure() if number < len(turn) else None
    return [read_cell(read) for read in gather(mine and asdict(mine))[: len(turn)]]
