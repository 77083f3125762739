"""Judge a base model and its predictor: every task under every policy and budget, cell by cell."""

from __future__ import annotations

import datetime
import time
from pathlib import Path
from typing import Any

import jax

from butler_jax.configs import EvalConfig, require, to_dict
from butler_jax.evaluation.cells import Cell, Kept, Progress, Say, key_of
from butler_jax.evaluation.contenders import Contender, contenders
from butler_jax.evaluation.report import Report, check_directory
from butler_jax.evaluation.tasks import Task, make_tasks
from butler_jax.json_objects import read_object
from butler_jax.policies.interface import describe
from butler_jax.predictors import Predictor
from butler_jax.provenance import command, versions
from butler_jax.typed import shown


def evaluate(
    base: Any,
    predictor: Predictor | None = None,
    config: EvalConfig | None = None,
    *,
    data: str | None = None,
    keep: str | Path | None = None,
    say: Say | None = None,
) -> Report:
    """Run the tasks of a configuration on a base from load_base.

    predictor: needed by the policy tokenbutler; None reads it from config.run, and without a run that policy is left
    out. data: as config.data. keep: a directory where finished cells are kept as they come (cells.jsonl): the next
    evaluation there does not measure again what is the same; None keeps and writes nothing. say: receives a line of
    progress after each cell. Raises ValueError for an unknown policy, a context beyond the base's, an empty text, and
    where `keep` is no directory.
    """
    config = config or EvalConfig()
    base.require_tokenizer()
    say = say or (lambda line: None)
    if keep is not None:
        check_directory(Path(keep))
    started = time.perf_counter()
    data = data or config.data or run_data(config.run)
    judged = contenders(base, predictor, config, data, say)
    tasks = make_tasks(base, config, data, say)
    kept, report = Kept(None if keep is None else Path(keep)), Report()
    plan = [
        (task, one, part) for task in tasks for one in judged if task.takes(one) for part in _parts(task, one, config)
    ]
    learnt = {one.label: one.facts() for one in judged}
    keys = [
        key_of({
            "task": task.name, **task.facts, "base": base.fingerprint, "dtype": config.dtype, "of": learnt[one.label],
            "selections": {str(b): to_dict(s) for b, s in selections.items()}, "seed": config.seed,
        })
        for task, one, selections in plan
    ]  # fmt: skip
    missing = [task.name for (task, *_), key in zip(plan, keys, strict=True) if key not in kept.cells]
    progress = Progress({task.name: missing.count(task.name) for task in tasks}, len(plan), say)
    for (task, one, selections), key in zip(plan, keys, strict=True):
        cell, found = kept.cells.get(key), key in kept.cells
        if cell is None:
            began = time.perf_counter()
            cell = task.judge(one, selections)
            cell = Cell(cell.findings, cell.arrays, round(time.perf_counter() - began, 2))
            kept.add(key, {"task": task.name, "policy": one.label, "budgets": list(selections)}, cell)
        _enter(report, task, one, cell, config.seed)
        progress.add(task.name, one.label, cell, kept=found)
    report.about.update(
        base=base.name,
        fingerprint=base.fingerprint,
        predictors={one.label: to_dict(one.predictor.config) for one in judged if one.predictor is not None},
        policies=[describe(p) for p in dict.fromkeys(one.policy for one in judged)],
        versions=versions(),
        device=f"{jax.default_backend()} {jax.devices()[0].device_kind}",
        config=to_dict(config),
        command=command(),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - started, 1),
    )
    return report


def run_config(run: Path) -> dict[str, Any]:
    """The configuration of a training run. Raises FileNotFoundError or ValueError where unusable."""
    path = Path(run) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{run} is no run directory: it has no config.json; give the directory of a run of train.py"
        )
    config = read_object(path)
    require(
        isinstance(config.get("base"), str),
        f"{path} names no base: {run} is no run that trained a predictor; give the directory of a run of train.py",
    )
    require(isinstance(config.get("data", ""), str), f"{path}: data must be a text, got {shown(config.get('data'))}")
    return config


def run_data(run: Path | None) -> str:
    """What a training run read; python_docs without one."""
    return "python_docs" if run is None else run_config(run).get("data", "python_docs")


def _parts(task: Task, one: Contender, config: EvalConfig) -> list[dict]:
    """The selections of each cell."""
    selections = one.selections(config)
    return [selections] if task.at_once else [{budget: s} for budget, s in selections.items()]


def _enter(report: Report, task: Task, one: Contender, cell: Cell, seed: int) -> None:
    """A cell's findings as rows of the report, and its arrays."""
    for f in cell.findings:
        report.add(task.name, f.metric, one.label, f.budget, *f.estimate, seed, f.attended, f.where)
    for name, values in cell.arrays.items():
        report.arrays.setdefault(name, {})[one.label] = values
